"""Points of the sweep: memory, checked against the longest request."""

import math
from dataclasses import dataclass, fields
from typing import Any

from pyramid_vllm.model_shape import ModelShape
from pyramid_vllm.policy import LengthRule, MemoryModel, num_pages, tier_layout
from pyramid_vllm.tools.bench.requests import Requests, make_requests
from pyramid_vllm.tools.bench.settings import BenchSettings
from pyramid_vllm.tools.sides import Side
from pyramid_vllm.tools.sizes import BYTES, format_bytes, quantity

_BLOCK_SIZE = 32


def memory_bytes(text: str, sequence_pages: int, page_bytes: int) -> int:
    """Bytes of ``80MiB``, or of ``4x``: stock sequences of the longest request.

    Args:
        text: a value of ``--kv-memory``.
        sequence_pages: pages of the longest request in stock vLLM.
        page_bytes: bytes of such a page.

    Raises:
        ValueError: the text is neither.
    """
    if num_bytes := int(quantity(text, BYTES)):
        return num_bytes
    num_sequences = quantity(text, {"x": 1.0})
    if not num_sequences:
        raise ValueError(
            f"--kv-memory is '{text}': valid are bytes, a number with KiB, MiB or GiB, "
            "or stock sequences of the longest request like 4x"
        )
    pages = math.ceil(num_sequences * sequence_pages) + 1  # the null page
    return pages * page_bytes


@dataclass(frozen=True)
class Point:
    """Memory at which all sides are compared."""

    label: str
    """The value of ``--kv-memory``."""
    kv_bytes: int


@dataclass(frozen=True)
class Workload:
    """All that the sides share."""

    settings: BenchSettings
    requests: Requests
    shape: ModelShape
    engine_args: dict[str, Any]
    """Settings of ``LLM``, but for memory and policy."""

    @property
    def block_size(self) -> int:
        """Tokens of a page."""
        return int(self.engine_args["block_size"])

    @property
    def page_bytes(self) -> int:
        """Bytes of stock vLLM's pages with the same tokens, all layers."""
        return self.block_size * self.shape.token_bytes * self.shape.num_layers

    def stock_fits(self, kv_bytes: int, num_at_once: int) -> bool:
        """Whether that many of the longest requests fit in stock vLLM at once."""
        pages = sorted(num_pages(self.requests.lengths, self.block_size))
        return sum(pages[-num_at_once:]) < kv_bytes // self.page_bytes

    def rule(self, side: Side) -> LengthRule | None:
        """The side's counts; None: stock vLLM."""
        if side.policy is None:
            return None
        return LengthRule(side.policy, tier_layout(side.policy, self.shape.num_layers))

    def points(self) -> list[Point]:
        """The points of the sweep, by memory.

        Raises:
            ValueError: memory cannot hold a prompt as long as the longest request,
                which is the bound that the engine has.
        """
        (sequence,) = num_pages((max(self.requests.lengths),), self.block_size)
        labels = {
            memory_bytes(label, sequence, self.page_bytes): label
            for label in self.settings.kv_memory
        }
        points = [Point(label, num_bytes) for num_bytes, label in labels.items()]
        for point in points:
            for side in self.settings.sides:
                self._check_fits(side, point)
        return sorted(points, key=lambda point: point.kv_bytes)

    def _check_fits(self, side: Side, point: Point) -> None:
        longest, rule = max(self.requests.lengths), self.rule(side)
        (pages,), page_bytes = num_pages((longest,), self.block_size), self.page_bytes
        if rule is not None:
            layer_bytes = self.block_size * self.shape.token_bytes
            memory = MemoryModel(rule, self.block_size, layer_bytes)
            chunk = self.settings.max_num_batched_tokens
            pages = memory.pages(rule.peak_lengths(longest, longest, chunk))
            page_bytes = memory.page_bytes
        needed = (pages + 1) * page_bytes  # the null page
        if point.kv_bytes < needed:
            raise ValueError(
                f"--kv-memory is {point.label}, {format_bytes(point.kv_bytes)}: a "
                f"request of {longest} tokens needs {format_bytes(needed)} with policy "
                f"'{side.name}'; valid is that or more"
            )


def make_workload(settings: BenchSettings) -> Workload:
    """Draw the requests and check that they fit.

    Raises:
        ValueError: an option is not valid; names it, its value and what is.
        OSError: the model's configuration cannot be read.
    """
    from transformers import AutoConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    unknown = settings.engine_args.keys() - {field.name for field in fields(EngineArgs)}
    for key in sorted(unknown):
        raise ValueError(f"--engine-args has '{key}': valid are vLLM's settings")
    is_cpu = bool(current_platform.is_cpu())
    dtype = settings.dtype or ("float32" if is_cpu else "auto")
    config = AutoConfig.from_pretrained(settings.model)
    shape = ModelShape.of(config, _cache_dtype(config, dtype))
    tokenizer = _tokenizer(str(settings.model))
    requests = make_requests(settings, tokenizer, config.get_text_config().vocab_size)
    longest = max(requests.lengths)
    if longest > shape.max_position:
        raise ValueError(
            f"the longest request has {longest} tokens: valid for this model is up to "
            f"{shape.max_position}"
        )
    engine_args = {
        "dtype": dtype,
        "seed": settings.seed,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "block_size": _BLOCK_SIZE,
        "max_model_len": longest,
        "enforce_eager": is_cpu,
        "skip_tokenizer_init": tokenizer is None,
        **settings.engine_args,
    }
    return Workload(settings, requests, shape, engine_args)


def _tokenizer(model: str) -> Any:
    """None where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError):
        return None


def _cache_dtype(config: Any, dtype: str) -> str | None:
    if dtype != "auto":
        return dtype
    # With auto, vLLM runs float32 models in bfloat16.
    name = str(config.get_text_config().dtype or "").removeprefix("torch.")
    return "bfloat16" if name in ("", "float32") else name
