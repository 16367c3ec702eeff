"""``pyramid-vllm inspect``: which tokens of a prompt each tier keeps."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from pyramid_vllm.tools.cli.failing import or_fail

if TYPE_CHECKING:
    from pyramid_vllm.tools.inspection.settings import InspectSettings

ModelArgument = Annotated[
    str | None, typer.Argument(help="Folder or hub name; default: the bundled one.")
]
PromptOption = Annotated[str | None, typer.Option(help="The prompt.")]
PromptFileOption = Annotated[
    Path | None, typer.Option(help="A text file that holds the prompt.")
]
ChatOption = Annotated[
    bool, typer.Option("--chat", help="Put it into the model's chat template.")
]
KvPolicyOption = Annotated[
    str, typer.Option(help="A preset, a YAML file or inline JSON.")
]
KvPolicyConfigOption = Annotated[
    str | None, typer.Option(help="Settings that replace the policy's, as JSON.")
]
MaxTokensOption = Annotated[
    int, typer.Option(min=1, help="Most tokens that are generated.")
]
EngineArgsOption = Annotated[
    str | None, typer.Option(help="More arguments of vLLM's LLM, as JSON.")
]
OutOption = Annotated[
    Path | None, typer.Option(help="Folder; default: inspect-results.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the JSON; write files only with --out.")
]


def inspect(
    model: ModelArgument = None,
    prompt: PromptOption = None,
    prompt_file: PromptFileOption = None,
    chat: ChatOption = False,
    kv_policy: KvPolicyOption = "pyramid",
    kv_policy_config: KvPolicyConfigOption = None,
    max_tokens: MaxTokensOption = 32,
    engine_args: EngineArgsOption = None,
    out: OutOption = None,
    json_only: JsonOption = False,
) -> None:
    """Run one prompt and show which of its tokens each tier kept."""
    from pyramid_vllm.tools.cli.model import make_model
    from pyramid_vllm.tools.inspection.settings import InspectSettings, read_prompt
    from pyramid_vllm.tools.json_settings import json_object

    settings = or_fail(
        lambda: InspectSettings(
            prompt=read_prompt(prompt, prompt_file),
            engine_args=json_object("--engine-args", engine_args),
            model=model or str(make_model()),
            kv_policy=kv_policy,
            kv_policy_config=kv_policy_config,
            chat=chat,
            max_tokens=max_tokens,
        )
    )
    folder = out if json_only else out or Path("inspect-results")
    or_fail(lambda: _run(settings, folder, json_only))


def _run(settings: "InspectSettings", out: Path | None, json_only: bool) -> None:
    from pyramid_vllm.tools.inspection.run import (
        inspect_prompt,
        print_table,
        report,
        write_report,
    )
    from pyramid_vllm.tools.plotting import check_matplotlib

    if out is not None:
        check_matplotlib()  # before the model runs, not after it
    found = inspect_prompt(settings)
    if out is not None:
        write_report(found, out)
    if json_only:
        typer.echo(json.dumps(report(found), ensure_ascii=False))
        return
    console = Console()
    print_table(found, console)
    console.print(f"results are in {out}")
