"""The options of ``pyramid-vllm bench``; nothing here loads a model."""

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from pyramid_vllm.policy import NONE
from pyramid_vllm.tools.bench.ranges import KVMemory, TokenRange
from pyramid_vllm.tools.json_settings import json_object
from pyramid_vllm.tools.options import MODEL, POLICIES, option
from pyramid_vllm.tools.sides import Side, parse_sides

WORKLOADS = ("offline", "online")
DTYPES = ("auto", "float32", "float16", "bfloat16")
#: Settings of ``LLM`` that have their own option here.
OWN_OPTIONS = {
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
class BenchSettings:
    """Compare stock vLLM with KV policies: same requests, same KV bytes."""

    model: str | None = option(None, MODEL)
    kv_policy: list[str] | None = option(None, POLICIES)
    workload: str = option(
        "offline", "offline: one batch; online: a server under load."
    )
    num_prompts: int = option(24, min=1)
    prompt_tokens: str = option(
        "768",
        "Length of prompts, or of each turn's own part of them: 512, or a range like "
        "512-2048. A shared prefix comes on top.",
    )
    output_tokens: str = option("128", "Length of outputs, likewise; at least 2.")
    text: Path | None = option(
        None, "Prompts are consecutive windows of this file's tokens."
    )
    kv_memory: list[str] | None = option(
        None,
        "KV memory: bytes like 80MiB, or stock sequences of the longest request like "
        "4x; repeat it for a sweep. Default: 4x.",
    )
    repeats: int = option(3, "Runs of each side.", min=1)
    seed: int = option(0, min=0)
    max_num_seqs: int = option(128, min=1)
    max_num_batched_tokens: int = option(2048, min=1)
    dtype: str | None = option(None, "Default: float32 on CPU, else auto.")
    engine_args: str | None = option(
        None,
        "Further settings of vLLM's engine, as JSON. Prefix caching is on, as it is in "
        "vLLM; '{\"enable_prefix_caching\": false}' switches it off. Unless it says "
        "so, CPU engines run eagerly.",
    )
    request_rate: list[float] | None = option(
        None,
        "Requests a second of the online workload, as a Poisson process; repeat it for "
        "more points. Default: all at once.",
    )
    shared_prefix: int = option(
        0, "Tokens of a prefix that prompts share, before their own ones."
    )
    num_prefixes: int = option(
        1, "How many shared prefixes there are; prompts take turns."
    )
    turns: int = option(
        1,
        "Turns of each conversation: a prompt is the one before it, the answer to "
        "that, and an own part. Above 1, --workload is offline.",
    )
    json_file: Path | None = option(
        None, "Write the medians of every point to this file.", "--json"
    )
    out: Path = option(
        Path("bench-results"),
        "Folder of results; runs finished in it are not repeated.",
    )

    @cached_property
    def sides(self) -> list[Side]:
        """Stock vLLM, then the policies."""
        policies = self.kv_policy or ["pyramid"]
        sides = parse_sides(policies)
        if len(sides) == 1:
            raise ValueError(
                f"--kv-policy is only '{NONE}': valid is at least one policy to compare"
            )
        if len(sides) <= sum(text != NONE for text in policies):
            raise ValueError(
                f"--kv-policy {' '.join(policies)} has one policy given twice: valid "
                "is once each"
            )
        return sides

    @cached_property
    def prompt_range(self) -> TokenRange:
        """Lengths of prompts."""
        return TokenRange.parse("--prompt-tokens", self.prompt_tokens, 1)

    @cached_property
    def output_range(self) -> TokenRange:
        """Lengths of outputs."""
        return TokenRange.parse("--output-tokens", self.output_tokens, 2)

    @cached_property
    def memories(self) -> list[KVMemory]:
        """Points of the sweep over memory."""
        return [KVMemory.parse(text) for text in self.kv_memory or ["4x"]]

    @cached_property
    def engine(self) -> dict[str, Any]:
        """Further settings of ``LLM``."""
        found = json_object("--engine-args", self.engine_args)
        for key in found:
            if key in OWN_OPTIONS:
                valid = OWN_OPTIONS[key]
                raise ValueError(f"--engine-args has '{key}': valid is {valid}")
        return found

    @property
    def is_online(self) -> bool:
        """Whether a server is put under load."""
        return self.workload == "online"

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

    def check(self) -> None:
        """Check what can be checked without the model.

        Raises:
            ValueError: names the option, its value and what is valid.
        """
        _ = self.sides, self.prompt_range, self.output_range, self.memories
        for name, value, valid in (
            ("--workload", self.workload, WORKLOADS),
            ("--dtype", self.dtype or "auto", DTYPES),
        ):
            if value not in valid:
                names = ", ".join(valid)
                raise ValueError(f"{name} is '{value}': valid is one of {names}")
        if self.request_rate and not self.is_online:
            raise ValueError("--request-rate needs --workload online: it is 'offline'")
        for rate in self.request_rate or ():
            if not rate > 0:
                raise ValueError(f"--request-rate is {rate:g}: valid is above 0")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"--max-num-batched-tokens is {self.max_num_batched_tokens}: valid is "
                f"--max-num-seqs, {self.max_num_seqs}, or more"
            )
        workers = self.engine.get("tensor_parallel_size", 1)
        if workers != 1 and not self.is_online:
            raise ValueError(
                f"tensor_parallel_size is {workers}: --workload offline watches one "
                "worker; valid is 1, or --workload online"
            )
        self._check_sharing()

    def _check_sharing(self) -> None:
        for name, value, least in (
            ("--shared-prefix", self.shared_prefix, 0),
            ("--num-prefixes", self.num_prefixes, 1),
            ("--turns", self.turns, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}: valid is {least} or more")
        several = f"--num-prefixes is {self.num_prefixes}"
        if self.num_prefixes > 1 and not self.shared_prefix:
            raise ValueError(
                f"{several}, --shared-prefix 0: valid is 1, or --shared-prefix above 0"
            )
        if self.num_prefixes > self.num_prompts:
            raise ValueError(
                f"{several}: valid is up to --num-prompts, {self.num_prompts}"
            )
        if self.is_online and self.turns > 1:
            raise ValueError(
                f"--turns is {self.turns}: vLLM's client sends single requests; valid "
                "is 1, or --workload offline"
            )

    def describe(self) -> dict[str, Any]:
        """The options as reports carry them."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        del found["kv_policy"], found["request_rate"]
        return found | {
            "sides": {side.name: side.policy_json for side in self.sides},
            "prompt_tokens": vars(self.prompt_range),
            "output_tokens": vars(self.output_range),
            "kv_memory": [memory.label for memory in self.memories],
            "engine_args": self.engine,
            "request_rates": self.request_rate or [],
        }
