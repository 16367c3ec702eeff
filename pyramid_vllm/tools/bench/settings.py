"""The options of ``pyramid-vllm bench``; nothing here loads a model."""

from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

from pydantic.dataclasses import dataclass as settings_class

from pyramid_vllm.policy import NONE
from pyramid_vllm.tools import options
from pyramid_vllm.tools.options import option, parsed
from pyramid_vllm.tools.sides import Side, parse_sides

#: Settings of ``LLM`` that have their own option here.
_OWN_OPTIONS = {
    "model": "--model",
    "kv_policy": "--kv-policy",
    "kv_policy_config": "--kv-policy",
    "kv_cache_memory_bytes": "--kv-memory",
    "dtype": "--dtype",
    "seed": "--seed",
    "max_num_seqs": "--max-num-seqs",
    "max_num_batched_tokens": "--max-num-batched-tokens",
}


@dataclass(frozen=True)
class TokenRange:
    """Lengths between two bounds, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, option: str, text: str, least: int) -> "TokenRange":
        """Read ``512`` or ``512-2048``; ``ValueError`` if it is neither, or below
        ``least``."""
        low, _, high = text.partition("-")
        try:
            found = cls(int(low), int(high or low))
        except ValueError:
            found = cls(0, 0)
        if not least <= found.low <= found.high:
            raise ValueError(
                f"{option} is '{text}': valid is a number or a range like 512-2048, "
                f"from {least} on"
            )
        return found


_prompts = parsed(partial(TokenRange.parse, "--prompt-tokens", least=1))
_outputs = parsed(partial(TokenRange.parse, "--output-tokens", least=2))


@settings_class(frozen=True, config=options.SETTINGS_CONFIG)
class BenchSettings:
    """Compare stock vLLM with KV policies: same requests, same KV bytes."""

    model: str | None = option(None, options.MODEL)
    kv_policy: options.Texts = option(("pyramid",), options.POLICIES)
    num_prompts: int = option(24, min=1)
    prompt_tokens: Annotated[TokenRange, _prompts] = option(
        "768",
        "Length of prompts, or of each turn's own part of them: 512, or a range like "
        "512-2048. A shared prefix comes on top.",
    )
    output_tokens: Annotated[TokenRange, _outputs] = option(
        "128", "Length of outputs, likewise; at least 2."
    )
    kv_memory: options.Texts = option(
        ("4x",),
        "KV memory: bytes like 80MiB, or stock sequences of the longest request like "
        "4x; repeat it for a sweep.",
    )
    repeats: int = option(3, "Runs of each side.", min=1)
    seed: int = option(0, min=0)
    max_num_seqs: int = option(128, min=1)
    max_num_batched_tokens: int = option(2048, min=1)
    dtype: str | None = option(None, "Default: float32 on CPU, else auto.")
    engine_args: options.EngineArgs = option(
        None,
        "Further settings of vLLM's engine, as JSON. Prefix caching is on, as it is in "
        "vLLM; '{\"enable_prefix_caching\": false}' switches it off. Unless it says "
        "so, CPU engines run eagerly.",
    )
    shared_prefix: int = option(
        0, "Tokens of a prefix that prompts share, before their own ones.", min=0
    )
    num_prefixes: int = option(
        1, "How many shared prefixes there are; prompts take turns.", min=1
    )
    turns: int = option(
        1,
        "Turns of each conversation: a prompt is the one before it, the answer to "
        "that, and an own part.",
        min=1,
    )
    json_file: Path | None = option(
        None, "Write the medians of every point to this file.", "--json"
    )
    out: Path = option(
        Path("bench-results"),
        "Folder of results; runs finished in it are not repeated.",
    )

    def __post_init__(self) -> None:
        if len(self.sides) == 1:
            raise ValueError(
                f"--kv-policy is only '{NONE}': valid is at least one policy to compare"
            )
        for key in self.engine_args:
            if key in _OWN_OPTIONS:
                valid = _OWN_OPTIONS[key]
                raise ValueError(f"--engine-args has '{key}': valid is {valid}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"--max-num-batched-tokens is {self.max_num_batched_tokens}: valid is "
                f"--max-num-seqs, {self.max_num_seqs}, or more"
            )
        workers = self.engine_args.get("tensor_parallel_size", 1)
        if workers != 1:
            raise ValueError(
                f"tensor_parallel_size is {workers}: valid is 1, since one worker is "
                "watched"
            )
        most = self.num_prompts if self.shared_prefix else 1
        if self.num_prefixes > most:
            raise ValueError(
                f"--num-prefixes is {self.num_prefixes}: valid is up to {most}, with "
                f"--shared-prefix {self.shared_prefix} and --num-prompts "
                f"{self.num_prompts}"
            )

    @cached_property
    def sides(self) -> list[Side]:
        """Stock vLLM, then the policies."""
        return parse_sides(self.kv_policy)

    @property
    def num_requests(self) -> int:
        """Requests of one run."""
        return self.num_prompts * self.turns

    @property
    def sharing(self) -> str:
        """What requests share, in words."""
        words = "prompts share no prefix"
        if self.num_prefixes > 1:
            words = (
                f"prompts begin with one of {self.num_prefixes} prefixes of "
                f"{self.shared_prefix} tokens"
            )
        elif self.shared_prefix:
            words = f"prompts share a prefix of {self.shared_prefix} tokens"
        return words if self.turns == 1 else f"{words}, {self.turns} turns each"

    def describe(self) -> dict[str, Any]:
        """The options as reports carry them."""
        found = asdict(self)
        del found["kv_policy"]
        return found | {"sides": {side.name: side.policy_json for side in self.sides}}
