"""``pyramid-vllm analyze``: how much of its context each layer of a model needs."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from pyramid_vllm.tools.cli.failing import or_fail

RATIOS = "0.1,0.2,0.3,0.5,0.7"
DISTANCES = "64,128,256,512"


ModelOption = Annotated[
    str | None, typer.Option(help="A model's folder; default: the bundled one.")
]
KvPolicyOption = Annotated[
    str, typer.Option(help="How layers choose, and what a suggestion starts from.")
]
KvPolicyConfigOption = Annotated[
    str | None, typer.Option(help="Settings that replace the policy's, as JSON.")
]
TextOption = Annotated[
    Path | None, typer.Option(help="Long text; default: Python's own manual.")
]
TextFromOption = Annotated[float, typer.Option(help="First share of it used.")]
TextToOption = Annotated[float, typer.Option(help="Last share of it used.")]
PromptTokensOption = Annotated[int, typer.Option(min=128)]
TargetTokensOption = Annotated[
    int, typer.Option(min=1, help="Tokens behind a prompt whose loss is taken.")
]
WindowsOption = Annotated[
    int, typer.Option(min=2, help="Every other one tests the suggestion.")
]
RatiosOption = Annotated[
    str, typer.Option(help="Shares of its context that one layer is cut to.")
]
DistancesOption = Annotated[
    str, typer.Option(help="Tokens between two windows that choose.")
]
NeedlesOption = Annotated[
    int, typer.Option(min=0, help="Prompts that hide a number, besides.")
]
RetentionOption = Annotated[
    float | None, typer.Option(help="Of the suggestion; default: the policy's.")
]
FallingOption = Annotated[
    bool, typer.Option(help="Suggest no more for a deeper layer.")
]
OutOption = Annotated[Path, typer.Option(help="Folder of what is written.")]


def analyze(
    model: ModelOption = None,
    kv_policy: KvPolicyOption = "pyramid",
    kv_policy_config: KvPolicyConfigOption = None,
    text: TextOption = None,
    text_from: TextFromOption = 0.0,
    text_to: TextToOption = 1.0,
    prompt_tokens: PromptTokensOption = 1024,
    target_tokens: TargetTokensOption = 64,
    windows: WindowsOption = 6,
    ratios: RatiosOption = RATIOS,
    distances: DistancesOption = DISTANCES,
    needles: NeedlesOption = 2,
    retention: RetentionOption = None,
    falling: FallingOption = False,
    out: OutOption = Path("analyze-results"),
) -> None:
    """Measure what each layer needs of its context, and suggest a policy file."""
    given = dict(locals())
    or_fail(lambda: _run(**given))


def _run(model: str | None, ratios: str, distances: str, **others: Any) -> None:
    from pyramid_vllm.tools.analysis import settings as parts
    from pyramid_vllm.tools.analysis.run import run_analysis
    from pyramid_vllm.tools.cli.model import make_model

    settings = parts.AnalyzeSettings(
        model=model or "",
        ratios=parts.parse_ratios(ratios),
        distances=parts.parse_distances(distances, others["prompt_tokens"]),
        **others,
    )
    # Made only once the options are in order.
    run_analysis(settings if model else replace(settings, model=str(make_model())))
