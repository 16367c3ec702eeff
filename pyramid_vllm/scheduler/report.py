"""Pages and concurrency of an engine under its policy, and the start-up log."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

from pyramid_vllm.policy import LengthRule
from pyramid_vllm.spec import TierAttentionSpec, group_page_bytes, max_chunk

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger(f"vllm.{__name__}")


class KVReport:
    """Pages, bytes and concurrent sequences, by the engine's KV cache groups."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        rule: LengthRule,
    ) -> None:
        self.rule = rule
        """The counts of the engine's policy."""
        self.max_model_len = vllm_config.model_config.max_model_len
        self._vllm_config = vllm_config
        self._groups = kv_cache_config.kv_cache_groups
        self._page_bytes = group_page_bytes(kv_cache_config)
        self._num_pages = kv_cache_config.num_blocks - 1  # one is the null block

    def num_request_pages(self, num_prompt_tokens: int, num_tokens: int) -> int:
        """Pages that a request holds with ``num_tokens`` computed tokens."""
        return self.num_pages(self.rule.held_lengths(num_prompt_tokens, num_tokens))

    def num_pages(self, lengths: tuple[int, ...]) -> int:
        """Pages for tiers of ``lengths`` tokens, and for layers without a tier."""
        return sum(self._group_pages(group, lengths) for group in self._groups)

    def _group_pages(self, group: KVCacheGroupSpec, lengths: tuple[int, ...]) -> int:
        spec = group.kv_cache_spec
        if isinstance(spec, TierAttentionSpec):
            return cdiv(lengths[spec.tier], spec.block_size)
        return cdiv(
            spec.max_memory_usage_bytes(self._vllm_config), spec.page_size_bytes
        )

    def max_output_tokens(self, rule: LengthRule, num_prompt_tokens: int) -> int | None:
        """Tokens that a request can generate if it has the whole pool.

        Args:
            rule: the request's counts.
            num_prompt_tokens: length of its prompt.

        Returns:
            None: the pool holds the request up to ``max_model_len``.
        """
        low, high = num_prompt_tokens, self.max_model_len

        def fits(num_tokens: int) -> bool:
            peak = rule.generation_peak(num_prompt_tokens, num_tokens)
            return self.holds(peak)

        if fits(high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        # The last token is sampled, never written to the cache.
        return low - num_prompt_tokens + 1

    def holds(self, lengths: tuple[int, ...]) -> bool:
        """Whether the whole pool can hold tiers of ``lengths`` tokens."""
        return self.num_pages(lengths) <= self._num_pages

    def max_unpruned_chunk(self, max_chunk: int) -> int:
        """Longest chunk, at most ``max_chunk``, with which a prompt of
        ``max_model_len`` fits into the pool without pruning."""
        longest = self.max_model_len

        def fits(chunk: int) -> bool:
            peak = self.rule.peak_lengths(longest, longest, chunk, pruned=False)
            return self.holds(peak)

        if fits(max_chunk):
            return max_chunk
        low, high = 1, max_chunk
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    def num_stock_sequences(self, num_tokens: npt.NDArray[np.int64]) -> int:
        """Number of the given sequences that fit into the pool in stock vLLM.

        Args:
            num_tokens: ``[num_sequences]``, computed tokens.
        """
        # The shortest first: the most that any order allows.
        num_bytes = np.cumsum(self._stock_bytes(np.sort(num_tokens)))
        return int(np.count_nonzero(num_bytes <= self._num_pages * self._page_bytes))

    def lines(self) -> list[str]:
        """The lines of the report, for a prompt of half ``max_model_len``."""
        rule, layout, config = self.rule, self.rule.layout, self.rule.config
        typical = max(1, self.max_model_len // 2)
        kept = rule.cache_lengths(typical)
        page_bytes = self._page_bytes
        pages = self.num_request_pages(typical, typical)
        stock_bytes = int(self._stock_bytes(np.array([typical]))[0])
        capacity = self._num_pages * page_bytes
        peak = (
            "at the prompt's end; until then a prompt holds all its tokens"
            if config.evict == "prompt_end"
            else "after every chunk of a prompt"
        )
        lines = [
            f"KV policy {config.name}: {self._retention()}, "
            f"{layout.num_tiers} tiers of {_run(layout.sizes)} layers by "
            f"{'depth' if layout.order is None else 'weight'}, "
            f"scorer {config.scorer} per {config.selection}, evicts {peak}",
            f"KV policy {config.name}: of a prompt of {typical} tokens the tiers keep "
            f"{_run(kept)} tokens a layer",
            f"KV policy {config.name}: {pages * page_bytes:,} KV bytes for such a "
            f"request against {stock_bytes:,} in stock vLLM; "
            f"{capacity / (pages * page_bytes):.1f} at once in {capacity:,} bytes "
            f"against {capacity / stock_bytes:.1f}",
        ]
        lines += self._method_lines(typical)
        if layout.num_padding_layers:
            share = layout.num_padding_layers / layout.num_layers
            lines.append(
                f"KV policy {config.name}: {layout.num_tiers} tiers do not divide "
                f"{layout.num_layers} layers: padding wastes {share:.1%} of the memory"
            )
        return lines

    def _retention(self) -> str:
        config = self.rule.config
        if config.fixes_decay:
            return f"prefill_decay_ratio {config.prefill_decay_ratio:g}"
        if config.capacity is not None:
            return f"capacity {config.capacity}"
        return f"retention {config.retention:g}"

    def _method_lines(self, typical: int) -> list[str]:
        """Lines on pruning and on compressed generation."""
        rule, lines = self.rule, []
        name, sizes = rule.config.name, rule.layout.sizes
        if rule.prunes:
            layer = sum(sizes[: rule.first_pruned_tier])
            chunk = min(typical, max_chunk(self._vllm_config))
            rows = sum(
                sum(map(int.__mul__, rule.num_rows(n, min(typical, n + chunk)), sizes))
                for n in range(0, typical, chunk)
            )
            lines.append(
                f"KV policy {name}: prunes prompts from layer {layer} on; of such a "
                f"prompt, in chunks of {chunk} tokens, "
                f"{rows / typical / sum(sizes):.1%} of the rows are computed"
            )
        if rule.config.generation:
            lines.append(
                f"KV policy {name}: of every {rule.config.exceed_length_to_compress} "
                "generated tokens that leave the recent window the tiers keep "
                f"{_run(rule.group_kept)}"
            )
        return lines

    def log(self) -> None:
        """Write the report to vLLM's log."""
        for line in self.lines():
            logger.info("%s", line)

    def _stock_bytes(self, num_tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Bytes of requests in stock vLLM: only tiered groups differ."""
        total = np.zeros_like(num_tokens)
        for group in self._groups:
            spec = group.kv_cache_spec
            if isinstance(spec, TierAttentionSpec):
                layers = len(group.layer_names)
                pages = -(num_tokens // -spec.block_size)
                total += pages * spec.page_size_bytes * layers
            else:
                total += self._group_pages(group, ()) * self._page_bytes
        return total


def _run(values: tuple[int, ...]) -> str:
    """``a-b`` if first and last differ, else ``a``."""
    low, high = values[0], values[-1]
    return f"{low}" if low == high else f"{low}-{high}"
