"""``pyramid-vllm analyze``: how much of its context each layer of a model needs."""

from pathlib import Path
from typing import Annotated

import typer

from pyramid_vllm.cli.failing import or_fail

RATIOS = "0.1,0.2,0.3,0.5,0.7"
DISTANCES = "64,128,256,512"


def analyze(
    model: Annotated[
        str | None, typer.Option(help="A model's folder; default: the bundled one.")
    ] = None,
    kv_policy: Annotated[
        str, typer.Option(help="How layers choose, and what a suggestion starts from.")
    ] = "pyramid",
    kv_policy_config: Annotated[
        str | None, typer.Option(help="Settings that replace the policy's, as JSON.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Long text; default: Python's own manual.")
    ] = None,
    text_from: Annotated[float, typer.Option(help="First share of it used.")] = 0.0,
    text_to: Annotated[float, typer.Option(help="Last share of it used.")] = 1.0,
    prompt_tokens: Annotated[int, typer.Option(min=128)] = 1024,
    target_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens behind a prompt whose loss is taken.")
    ] = 64,
    windows: Annotated[
        int, typer.Option(min=2, help="Every other one tests the suggestion.")
    ] = 6,
    ratios: Annotated[
        str, typer.Option(help="Shares of its context that one layer is cut to.")
    ] = RATIOS,
    distances: Annotated[
        str, typer.Option(help="Tokens between two windows that choose.")
    ] = DISTANCES,
    needles: Annotated[
        int, typer.Option(min=0, help="Prompts that hide a number, besides.")
    ] = 2,
    retention: Annotated[
        float | None, typer.Option(help="Of the suggestion; default: the policy's.")
    ] = None,
    falling: Annotated[
        bool, typer.Option(help="Suggest no more for a deeper layer.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder of what is written.")] = Path(
        "analyze-results"
    ),
) -> None:
    """Measure what each layer needs of its context, and suggest a policy file."""
    from pyramid_vllm.analysis.settings import (
        AnalyzeSettings,
        parse_distances,
        parse_ratios,
    )
    from pyramid_vllm.cli.model import make_model

    settings = or_fail(
        lambda: AnalyzeSettings(
            model=model or str(make_model()),
            kv_policy=kv_policy,
            kv_policy_config=kv_policy_config,
            text=text,
            text_from=text_from,
            text_to=text_to,
            prompt_tokens=prompt_tokens,
            target_tokens=target_tokens,
            windows=windows,
            needles=needles,
            ratios=parse_ratios(ratios),
            distances=parse_distances(distances, prompt_tokens),
            retention=retention,
            falling=falling,
            out=out,
        )
    )
    from pyramid_vllm.analysis.run import run_analysis

    or_fail(lambda: run_analysis(settings))
