"""What the command's options mean; nothing here loads a model."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyramid_vllm.policy import NONE, PolicyConfig, resolve_policy
from pyramid_vllm.tools.json_settings import json_object
from pyramid_vllm.tools.sizes import parse_bytes

WORKLOADS = ("offline", "online")
DTYPES = ("auto", "float32", "float16", "bfloat16")
#: Settings of ``LLM`` that have an option of their own here.
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
class TokenRange:
    """Lengths between two bounds, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, option: str, text: str, least: int) -> "TokenRange":
        """Read ``512`` or ``512-2048``.

        Raises:
            ValueError: it is neither, or has lengths below ``least``.
        """
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


@dataclass(frozen=True)
class KVMemory:
    """A point of the sweep, in bytes or in stock sequences of the longest request."""

    label: str
    num_bytes: int = 0
    num_sequences: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "KVMemory":
        """Read ``80MiB`` or ``4x``.

        Raises:
            ValueError: it is neither.
        """
        label = text.strip()
        try:
            if not label.lower().endswith("x"):
                return cls(label, num_bytes=parse_bytes(label))
            sequences = float(label[:-1])
        except ValueError:
            sequences = 0.0
        if not 0 < sequences < math.inf:
            raise ValueError(
                f"--kv-memory is '{text}': valid are bytes, a number with KiB, MiB or "
                "GiB, or stock sequences of the longest request like 4x"
            )
        return cls(label, num_sequences=sequences)

    def resolve(self, sequence_pages: int, page_bytes: int) -> int:
        """Bytes, given the pages of the longest request in stock vLLM."""
        if self.num_bytes:
            return self.num_bytes
        pages = math.ceil(self.num_sequences * sequence_pages) + 1  # the null page
        return pages * page_bytes


@dataclass(frozen=True)
class Side:
    """One of the engines that are compared."""

    name: str
    policy: PolicyConfig | None

    @property
    def policy_json(self) -> str | None:
        """As engines take it."""
        return None if self.policy is None else json.dumps(self.policy.model_dump())


def parse_sides(policies: Sequence[str]) -> tuple[Side, ...]:
    """Stock vLLM and the policies, each under a name of its own.

    Raises:
        KVPolicyError: a policy is not valid.
        ValueError: there is none, or one is given twice.
    """
    sides = [Side(NONE, None)]
    for text in policies:
        policy = resolve_policy(text)
        if policy is None:
            continue
        if any(side.policy == policy for side in sides):
            raise ValueError(f"--kv-policy {text} is given twice: valid is once each")
        alike = sum(
            side.policy is not None and side.policy.name == policy.name
            for side in sides
        )
        name = f"{policy.name} ({alike + 1})" if alike else policy.name
        sides.append(Side(name, policy))
    if len(sides) == 1:
        raise ValueError(
            f"--kv-policy is only '{NONE}': valid is at least one policy to compare"
        )
    return tuple(sides)


def parse_engine_args(text: str | None) -> dict[str, Any]:
    """Further settings of ``LLM``.

    Raises:
        ValueError: not a JSON object, or one of them has an option of its own.
    """
    found = json_object("--engine-args", text)
    for key in found:
        if key in OWN_OPTIONS:
            raise ValueError(f"--engine-args has '{key}': valid is {OWN_OPTIONS[key]}")
    return found


@dataclass(frozen=True)
class BenchSettings:
    """The options of the command."""

    model: str
    sides: tuple[Side, ...]
    workload: str
    num_prompts: int
    prompt_tokens: TokenRange
    output_tokens: TokenRange
    text: Path | None
    kv_memory: tuple[KVMemory, ...]
    repeats: int
    seed: int
    max_num_seqs: int
    max_num_batched_tokens: int
    dtype: str | None
    """None: float32 on CPU, else the model's."""
    engine_args: dict[str, Any]
    request_rates: tuple[float, ...]
    out: Path
    shared_prefix: int = 0
    """Tokens that prompts begin with, before their own."""
    num_prefixes: int = 1
    """How many beginnings there are; prompts take turns."""
    turns: int = 1
    """Of each conversation; each prompt starts one."""
    json_file: Path | None = None

    @property
    def num_requests(self) -> int:
        """Of one run."""
        return self.num_prompts * self.turns

    @property
    def sharing(self) -> str:
        """What requests share, in words."""
        words = "prompts share no prefix"
        if self.shared_prefix:
            words = f"prompts share a prefix of {self.shared_prefix} tokens"
        if self.num_prefixes > 1:
            words = (
                f"prompts begin with one of {self.num_prefixes} prefixes of "
                f"{self.shared_prefix} tokens"
            )
        return words if self.turns == 1 else f"{words}, {self.turns} turns each"

    def check(self) -> None:
        """Check what can be checked without the model.

        Raises:
            ValueError: names the option, its value and what is valid.
        """
        _check_one_of("--workload", self.workload, WORKLOADS)
        if self.dtype is not None:
            _check_one_of("--dtype", self.dtype, DTYPES)
        online = self.workload == "online"
        if self.request_rates and not online:
            raise ValueError("--request-rate needs --workload online: it is 'offline'")
        for rate in self.request_rates:
            if not rate > 0:
                raise ValueError(f"--request-rate is {rate:g}: valid is above 0")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"--max-num-batched-tokens is {self.max_num_batched_tokens}: valid is "
                f"--max-num-seqs, {self.max_num_seqs}, or more"
            )
        self._check_sharing(online)
        workers = self.engine_args.get("tensor_parallel_size", 1)
        if workers != 1 and not online:
            raise ValueError(
                f"tensor_parallel_size is {workers}: --workload offline watches one "
                "worker; valid is 1, or --workload online"
            )

    def _check_sharing(self, online: bool) -> None:
        for option, value, least in (
            ("--shared-prefix", self.shared_prefix, 0),
            ("--num-prefixes", self.num_prefixes, 1),
            ("--turns", self.turns, 1),
        ):
            if value < least:
                raise ValueError(f"{option} is {value}: valid is {least} or more")
        if self.num_prefixes > 1 and not self.shared_prefix:
            raise ValueError(
                f"--num-prefixes is {self.num_prefixes}, --shared-prefix 0: valid is "
                "1, or --shared-prefix above 0"
            )
        if self.num_prefixes > self.num_prompts:
            raise ValueError(
                f"--num-prefixes is {self.num_prefixes}: valid is up to --num-prompts, "
                f"{self.num_prompts}"
            )
        if online and self.turns > 1:
            raise ValueError(
                f"--turns is {self.turns}: vLLM's client sends single requests; valid "
                "is 1, or --workload offline"
            )
        if online and self.num_prefixes > 1 and self.text is None:
            raise ValueError(
                f"--num-prefixes is {self.num_prefixes}: vLLM's client draws one "
                "prefix; valid is 1, or --text, or --workload offline"
            )

    def describe(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            **vars(self),
            "sides": {side.name: side.policy_json for side in self.sides},
            "prompt_tokens": vars(self.prompt_tokens),
            "output_tokens": vars(self.output_tokens),
            "kv_memory": [memory.label for memory in self.kv_memory],
            "text": None if self.text is None else str(self.text),
            "out": str(self.out),
            "json_file": None if self.json_file is None else str(self.json_file),
        }


def _check_one_of(option: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"{option} is '{value}': valid is one of {', '.join(valid)}")
