"""What an analysis is asked for."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationInfo
from pydantic.dataclasses import dataclass
from typer import Option

from pyramid_vllm.tools import option_types as options

#: Queries of a window, when what windows choose is compared.
WINDOW = 64


def _ratios(given: Any) -> Any:
    """Shares, ascending, at least two."""
    if not isinstance(given, str):
        return given
    try:
        values = tuple(sorted({float(value) for value in given.split(",")}))
    except ValueError:
        values = ()
    if len(values) < 2 or not (values[0] > 0 and values[-1] < 1):
        raise ValueError(
            f"ratios is '{given}': valid are at least two numbers between 0 and 1"
        )
    return values


def _distances(given: Any, info: ValidationInfo) -> Any:
    """Distances in tokens, ascending, that fit into the prompt."""
    if not isinstance(given, str):
        return given
    most = info.data["prompt_tokens"] - 2 * WINDOW
    try:
        values = tuple(sorted({int(value) for value in given.split(",")}))
    except ValueError:
        values = ()
    if not values or values[0] < 1 or values[-1] > most:
        raise ValueError(
            f"distances is '{given}': valid are whole numbers from 1 to {most}, "
            f"prompt_tokens less two windows of {WINDOW}"
        )
    return values


@dataclass(frozen=True, config=options.SETTINGS_CONFIG)
class AnalyzeSettings:
    """The options of the command."""

    model: options.Model
    kv_policy: Annotated[
        str, Option(help="How layers choose, and what a suggestion starts from.")
    ] = "pyramid"
    kv_policy_config: options.KVPolicyConfig = None
    text: Annotated[
        Path | None, Option(help="Long text; default: Python's own manual.")
    ] = None
    text_from: options.TextFrom = 0.0
    text_to: options.TextTo = 1.0
    prompt_tokens: Annotated[int, Option(min=128)] = 1024
    target_tokens: Annotated[
        int, Option(min=1, help="Tokens after a prompt whose loss is taken.")
    ] = 64
    windows: Annotated[
        int, Option(min=2, help="Every other one tests the suggestion.")
    ] = 6
    ratios: Annotated[
        tuple[float, ...],
        BeforeValidator(_ratios),
        Option(help="Shares of its context that one layer is cut to."),
    ] = options.as_text("0.1,0.2,0.3,0.5,0.7")
    distances: Annotated[
        tuple[int, ...],
        BeforeValidator(_distances),
        Option(help="Tokens between two windows that choose."),
    ] = options.as_text("64,128,256,512")
    needles: Annotated[
        int, Option(min=0, help="Further prompts that hide a number.")
    ] = 2
    retention: Annotated[
        float | None, Option(help="Of the suggestion; default: the policy's.")
    ] = None
    falling: Annotated[bool, Option(help="Suggest no more for a deeper layer.")] = False
    out: options.Out = Path("analyze-results")
