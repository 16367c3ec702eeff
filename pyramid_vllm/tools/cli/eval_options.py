"""The options of ``pyramid-vllm eval``."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str | None, typer.Option(help="Folder or hub name; default: the bundled one.")
]
Policies = Annotated[
    list[str] | None,
    typer.Option(help="A preset, a YAML file or inline JSON; default: pyramid."),
]
Retentions = Annotated[
    list[float] | None,
    typer.Option(help="Asked of each policy in turn; default: its own."),
]
Text = Annotated[
    Path | None, typer.Option(help="A text file: losses, agreement, haystack.")
]
TextFrom = Annotated[float, typer.Option(help="Share of the file where it begins.")]
TextTo = Annotated[float, typer.Option(help="Share of the file where it ends.")]
PromptTokens = Annotated[int, typer.Option(min=1, help="Of each window of the text.")]
TargetTokens = Annotated[int, typer.Option(min=1, help="Tokens behind each prompt.")]
Windows = Annotated[int, typer.Option(min=1, help="Windows of the text.")]
AgreementTokens = Annotated[
    int, typer.Option(min=0, help="Greedy tokens behind each prompt; 0: none.")
]
Retrieval = Annotated[
    list[str] | None,
    typer.Option(help="A retrieval task, 'all' or 'none'; default: all."),
]
RetrievalTokens = Annotated[
    list[int] | None, typer.Option(help="Lengths of prompts; default: 1024.")
]
Depths = Annotated[int, typer.Option(min=1, help="Places of a needle, evenly spread.")]
Samples = Annotated[int, typer.Option(min=1, help="For each task, length and depth.")]
Gsm8k = Annotated[Path | None, typer.Option(help="GSM8K's problems, as JSON lines.")]
Gsm8kProblems = Annotated[int, typer.Option(min=1, help="Problems that are asked.")]
Seed = Annotated[int, typer.Option(help="Of samples, engines and intervals.")]
KVMemory = Annotated[str, typer.Option(help="Bytes, or with KiB, MiB, GiB.")]
MaxNumBatchedTokens = Annotated[
    int, typer.Option(min=0, help="Of vLLM; 0: each prompt is one chunk.")
]
Dtype = Annotated[str, typer.Option(help="The model's.")]
EngineArgs = Annotated[
    str | None, typer.Option(help="More arguments of vLLM's LLM, as JSON.")
]
Out = Annotated[Path, typer.Option(help="Results; runs that are there are kept.")]
