"""Cache lengths in pages, bytes and concurrent sequences."""

from collections.abc import Iterable
from dataclasses import dataclass

from pyramid_vllm.policy.lengths import LengthRule


def num_pages(lengths: Iterable[int], block_size: int) -> tuple[int, ...]:
    """Pages that hold the given numbers of tokens."""
    return tuple(-(-length // block_size) for length in lengths)


@dataclass(frozen=True)
class MemoryModel:
    """Memory of one request under a policy and in stock vLLM.

    Args:
        rule: the policy's counts.
        block_size: tokens of a page.
        layer_page_bytes: bytes of one layer's page, keys and values.
    """

    rule: LengthRule
    block_size: int
    layer_page_bytes: int

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of one KV cache group."""
        return self.layer_page_bytes * self.rule.layout.group_size

    def pages(self, lengths: Iterable[int]) -> int:
        """Pages of all tiers that hold the given numbers of tokens."""
        groups = self.rule.layout.groups_per_tier
        return sum(map(int.__mul__, num_pages(lengths, self.block_size), groups))

    def request_bytes(self, num_prompt_tokens: int, num_output_tokens: int) -> int:
        """Bytes that a request holds after its last token."""
        lengths = self.rule.held_lengths(
            num_prompt_tokens, num_prompt_tokens + num_output_tokens
        )
        return self.pages(lengths) * self.page_bytes

    def stock_request_bytes(self, num_tokens: int) -> int:
        """Bytes that stock vLLM holds for a request of ``num_tokens`` tokens."""
        (pages,) = num_pages((num_tokens,), self.block_size)
        return pages * self.layer_page_bytes * self.rule.layout.num_layers

    def concurrency(self, kv_bytes: int, num_prompt: int, num_output: int) -> float:
        """Requests of full length that fit into ``kv_bytes`` at once."""
        usable = kv_bytes // self.page_bytes - 1  # vLLM keeps one null block
        return usable * self.page_bytes / self.request_bytes(num_prompt, num_output)

    def stock_concurrency(self, kv_bytes: int, num_tokens: int) -> float:
        """The same in stock vLLM."""
        page = self.layer_page_bytes * self.rule.layout.num_layers
        usable = kv_bytes // page - 1
        return usable * page / self.stock_request_bytes(num_tokens)
