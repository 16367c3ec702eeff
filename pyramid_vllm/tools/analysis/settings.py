"""The options of ``pyramid-vllm analyze``."""

from pathlib import Path
from typing import Annotated

from pydantic.dataclasses import dataclass

from pyramid_vllm.tools import options
from pyramid_vllm.tools.options import option


def _ratios(given: str) -> tuple[float, ...]:
    """Shares, ascending, at least two."""
    try:
        values = tuple(sorted({float(value) for value in given.split(",")}))
    except ValueError:
        values = ()
    if len(values) < 2 or not (values[0] > 0 and values[-1] < 1):
        raise ValueError(
            f"ratios is '{given}': valid are at least two numbers between 0 and 1"
        )
    return values


@dataclass(frozen=True, config=options.SETTINGS_CONFIG)
class AnalyzeSettings:
    """Measure what each layer needs of its context, and suggest a policy file."""

    model: str | None = option(None, options.MODEL_NAME)
    kv_policy: str = option(
        "pyramid", "How layers choose, and what a suggestion starts from."
    )
    kv_policy_config: str | None = option(None, options.POLICY_OVERRIDES)
    text: Path | None = option(None, "Long text; default: Python's own manual.")
    text_from: float = option(0.0, options.TEXT_FROM)
    text_to: float = option(1.0, options.TEXT_TO)
    prompt_tokens: int = option(1024, min=128)
    target_tokens: int = option(64, "Tokens after a prompt whose loss is taken.", min=1)
    windows: int = option(6, "Every other one tests the suggestion.", min=2)
    ratios: Annotated[tuple[float, ...], options.parsed(_ratios)] = option(
        "0.1,0.2,0.3,0.5,0.7", "Shares of its context that one layer is cut to."
    )
    needles: int = option(2, "Further prompts that hide a number.", min=0)
    retention: float | None = option(None, "Of the suggestion; default: the policy's.")
    falling: bool = option(False, "Suggest no more for a deeper layer.")
    out: Path = option(Path("analyze-results"), "Folder of what is written.")
