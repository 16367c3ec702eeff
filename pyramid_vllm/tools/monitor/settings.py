"""The options of ``pyramid-vllm top``."""

from dataclasses import dataclass

from pyramid_vllm.tools.options import argument, option


@dataclass(frozen=True)
class TopSettings:
    """Show what the KV policy of a running server does, until Ctrl-C."""

    url: str = argument(
        "A vLLM server, with or without /metrics.", default="http://127.0.0.1:8000"
    )
    interval: float = option(2.0, "Seconds between two readings.", min=0.1, max=3600)
    once: bool = option(False, "Print one picture, of one interval.", "--once")
    as_json: bool = option(False, "With --once: the figures as JSON.", "--json")

    def __post_init__(self) -> None:
        if self.as_json and not self.once:
            raise ValueError("'--json' is given: valid only with --once")
