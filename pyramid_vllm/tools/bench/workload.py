"""Points of the sweep: memory, checked against the longest request."""

from dataclasses import dataclass, fields, replace
from typing import Any

from pyramid_vllm.model_shape import ModelShape
from pyramid_vllm.policy import LengthRule, MemoryModel, num_pages, tier_layout
from pyramid_vllm.tools.bench.requests import Requests, make_requests
from pyramid_vllm.tools.bench.settings import BenchSettings
from pyramid_vllm.tools.sides import Side, should_evict
from pyramid_vllm.tools.sizes import format_bytes

DEFAULT_BLOCK_SIZE = 32


@dataclass(frozen=True)
class Point:
    """Memory and rate at which all sides are compared."""

    label: str
    kv_bytes: int
    request_rate: float | None
    """Requests a second; None: all at once."""
    kv_memory: str = ""
    """The value of ``--kv-memory``."""


@dataclass(frozen=True)
class Workload:
    """All that the sides share."""

    requests: Requests
    shape: ModelShape
    dtype: str
    is_cpu: bool
    has_tokenizer: bool
    block_size: int
    points: tuple[Point, ...] = ()

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest request."""
        return max(self.requests.lengths)

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

    def should_evict(self, side: Side) -> bool:
        """Whether the policy keeps less than all of any prompt."""
        return should_evict(self.rule(side), self.requests.prompt_lengths)

    def check_fits(self, side: Side, chunk: int, kv_bytes: int, label: str) -> None:
        """Refuse memory that cannot hold a prompt as long as the longest request,
        which is the bound that the engine has."""
        longest, rule = self.max_model_len, self.rule(side)
        (pages,), page_bytes = num_pages((longest,), self.block_size), self.page_bytes
        if rule is not None:
            layer_bytes = self.block_size * self.shape.token_bytes
            memory = MemoryModel(rule, self.block_size, layer_bytes)
            pages = memory.pages(rule.peak_lengths(longest, longest, chunk))
            page_bytes = memory.page_bytes
        needed = (pages + 1) * page_bytes  # the null page
        if kv_bytes < needed:
            raise ValueError(
                f"--kv-memory is {label}, {format_bytes(kv_bytes)}: a request of "
                f"{longest} tokens needs {format_bytes(needed)} with policy "
                f"'{side.name}'; valid is that or more"
            )


def engine_args(
    settings: BenchSettings, workload: Workload, point: Point, side: Side
) -> dict[str, Any]:
    """Settings of a side's engine."""
    return {
        "dtype": workload.dtype,
        "seed": settings.seed,
        "kv_cache_memory_bytes": point.kv_bytes,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "block_size": workload.block_size,
        "max_model_len": workload.max_model_len,
        "enforce_eager": workload.is_cpu,
        **settings.engine,
        "kv_policy": side.policy_json,
    }


def make_workload(settings: BenchSettings) -> Workload:
    """Draw the requests and check that they fit.

    Raises:
        ValueError: an option is not valid; names it, its value and what is.
        OSError: the model's configuration or the text cannot be read.
    """
    from transformers import AutoConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    settings.check()
    unknown = settings.engine.keys() - {field.name for field in fields(EngineArgs)}
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
    if settings.is_online and tokenizer is None:
        raise ValueError("--workload online needs a tokenizer in the model's folder")
    workload = Workload(
        requests=requests,
        shape=shape,
        dtype=dtype,
        is_cpu=is_cpu,
        has_tokenizer=tokenizer is not None,
        block_size=int(settings.engine.get("block_size") or DEFAULT_BLOCK_SIZE),
    )
    return replace(workload, points=_points(settings, workload))


def _points(settings: BenchSettings, workload: Workload) -> tuple[Point, ...]:
    (sequence,) = num_pages((workload.max_model_len,), workload.block_size)
    points: dict[tuple[float, int], Point] = {}
    for memory in settings.memories:
        kv_bytes = memory.resolve(sequence, workload.page_bytes)
        for side in settings.sides:
            chunk = settings.max_num_batched_tokens
            workload.check_fits(side, chunk, kv_bytes, memory.label)
        for rate in settings.request_rate or (None,):
            at_rate = "" if rate is None else f", {rate:g} requests/s"
            label = f"{memory.label}{at_rate}"
            if ((rate or 0.0), kv_bytes) in points:
                labels = ", ".join(memory.label for memory in settings.memories)
                raise ValueError(f"points are given twice; --kv-memory is {labels}")
            point = Point(label, kv_bytes, rate, memory.label)
            points[(rate or 0.0), kv_bytes] = point
    return tuple(points[key] for key in sorted(points))


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
