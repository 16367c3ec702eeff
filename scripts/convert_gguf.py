"""Turn a GGUF that transformers reads into a float32 folder that vLLM loads."""

from pathlib import Path
from typing import Annotated

import typer

from pyramid_vllm.tools.cli.model import convert_gguf


def main(
    gguf: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    folder: Annotated[Path, typer.Argument(help="Must not exist yet.")],
) -> None:
    """Convert GGUF into FOLDER, dequantized, with its tokenizer."""
    if folder.exists():
        raise typer.BadParameter(
            f"folder is {folder}: valid is a path that does not exist yet"
        )
    convert_gguf(gguf, folder)
    typer.echo(folder)


if __name__ == "__main__":
    typer.run(main)
