"""Compressed segments in vLLM's prefix cache: their names, look-up and pages."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    make_block_hash_with_group_id,
    resolve_block_hashes,
)

from pyramid_vllm.policy import NONE, LengthRule

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

    from pyramid_vllm.scheduler.block_manager import TierBlockManager
    from pyramid_vllm.scheduler.lengths import TierLengths

Pages = list["KVCacheBlock"]


@lru_cache(maxsize=4096)
def namespace(rule: LengthRule) -> str:
    """What tells the pages of one policy's sequences from those of others; empty for
    policies that leave a sequence's first pages as stock vLLM computes them."""
    if rule.segments is None:
        return ""
    settings = rule.config.model_dump_json(exclude={"name", "growth_reserve"})
    shares = f"{settings} {rule.segments} {rule.layout.tier_of_layer}"
    return hashlib.sha256(shares.encode()).hexdigest()


def separate(request: Request, own: str, of_engine: str) -> None:
    """Keep a request's pages from those of requests with other segments.

    Args:
        request: it arrives.
        own: the namespace of its policy.
        of_engine: that of the engine's policy, whose pages have stock's hashes.
    """
    if own == of_engine:
        return
    request.cache_salt = f"{request.cache_salt or ''} kv_policy {own or NONE}"
    request.block_hashes.clear()
    request.update_block_hashes()


class Hit(NamedTuple):
    """What a request finds in the prefix cache."""

    pages: tuple[Sequence[KVCacheBlock], ...]
    """Of each KV cache group."""
    num_tokens: int


class SegmentCache:
    """Finds and names compressed segments.

    The pages of segment ``k`` carry a hash of all tokens that were read to choose what
    is kept, of the policy, and of their place in the segment. vLLM's pool keeps them
    like any other page, one KV cache group a tier.

    Args:
        coordinator: of all KV cache groups.
        managers: of the tiers, one for each of their groups.
        lengths: of the requests.
    """

    def __init__(
        self,
        coordinator: KVCacheCoordinator,
        managers: Sequence[TierBlockManager],
        lengths: TierLengths,
    ) -> None:
        self._coordinator, self._managers = coordinator, managers
        self._pool = coordinator.block_pool
        self._lengths = lengths
        self._page = managers[0].block_size

    def hashes(self, request: Request) -> Sequence[BlockHash]:
        """Of a request's pages, as stock vLLM hashes them."""
        return resolve_block_hashes(
            request.block_hashes, self._pool.hash_block_size, self._page
        )

    def _name(self, request: Request, rule: LengthRule, segment: int) -> bytes | None:
        """What a segment's hashes begin with; None: the tokens are not there yet."""
        segments, hashes = rule.segments, self.hashes(request)
        assert segments is not None
        last = (segment + 1) * segments.size
        if rule.config.needs_queries:
            last = segments.end(segment)
        place = last // self._page - 1
        if place >= len(hashes):
            return None
        tag = namespace(rule).encode()
        return hashlib.sha256(hashes[place] + tag).digest()

    @staticmethod
    def _hash(name: bytes, place: int) -> BlockHash:
        return BlockHash(name + place.to_bytes(2, "big"))

    def find_segment(self, request: Request, segment: int) -> list[Pages] | None:
        """What the tiers keep of a segment, by manager; None: some of it is not in the
        cache."""
        rule = self._lengths.rule_of(request)
        name, found = self._name(request, rule, segment), []
        segments, hashes = rule.segments, self.hashes(request)
        assert segments is not None
        first = segment * segments.size // self._page
        whole = hashes[first : first + segments.size // self._page]
        if name is None:
            return None
        for manager in self._managers:
            kept = segments.kept[manager.kv_cache_spec.tier]
            keys = whole
            if kept < segments.size:
                keys = [self._hash(name, i) for i in range(kept // self._page)]
            pages = self._cached(keys, manager.kv_cache_group_id)
            if len(pages) < len(keys):
                return None
            found.append(pages)
        return found

    def _cached(self, keys: Sequence[BlockHash], group: int) -> Pages:
        """Pages of a KV cache group, up to the first that is not in the cache."""
        pages: Pages = []
        for key in keys:
            found = self._pool.get_cached_block(key, [group])
            if found is None:
                break
            pages += found
        return pages

    def offer(
        self,
        request: Request,
        segment: int,
        group: int,
        pages: Iterable[KVCacheBlock],
    ) -> None:
        """Let later requests find a KV cache group's pages of a segment."""
        rule = self._lengths.rule_of(request)
        name = self._name(request, rule, segment)
        if name is None:
            return
        for place, page in enumerate(pages):
            key = make_block_hash_with_group_id(self._hash(name, place), group)
            self._pool._insert_block_hash(key, page, num_tokens=self._page)

    def find(self, request: Request, most: int) -> Hit:
        """The longest prefix of at most ``most`` tokens that the cache holds as a
        request would have left it: compressed segments, then whole pages."""
        rule = self._lengths.rule_of(request)
        segments = rule.segments
        assert segments is not None
        compressed: list[list[Pages]] = []
        while segments.end(len(compressed)) <= most:
            pages = self.find_segment(request, len(compressed))
            if pages is None:
                break
            compressed.append(pages)
        # The more segments, the longer the prefix.
        for num_segments in range(len(compressed), -1, -1):
            hit = self._hit(request, rule, compressed[:num_segments], most)
            if hit is not None:
                return hit
        return Hit(tuple(() for _ in self._coordinator.single_type_managers), 0)

    def is_being_computed(self, request: Request, running: Iterable[Request]) -> bool:
        """Whether a request would compute a segment that another is computing.

        Args:
            request: it waits.
            running: requests in the middle of their prompt.
        """
        rule = self._lengths.rule_of(request)
        segments = rule.segments
        if segments is None or not self._pool.enable_caching:
            return False
        if request.skip_reading_prefix_cache:
            return False
        own = self.hashes(request)
        for other in running:
            end = segments.next_end(other.num_computed_tokens)
            place = end // self._page - 1
            if end > other.num_tokens or place >= len(own):
                continue
            theirs = self.hashes(other)
            if (
                place < len(theirs)
                and own[place] == theirs[place]
                and self._lengths.rule_of(other) is rule
            ):
                return True
        return False

    def _hit(
        self,
        request: Request,
        rule: LengthRule,
        compressed: Sequence[list[Pages]],
        most: int,
    ) -> Hit | None:
        """The longest prefix with these compressed segments; None: there is none."""
        segments, hashes = rule.segments, self.hashes(request)
        assert segments is not None
        start = len(compressed) * segments.size
        most = min(most, segments.end(len(compressed)) - 1)
        keys = hashes[start // self._page : most // self._page]
        whole = []
        for manager in self._managers:
            whole.append(self._cached(keys, manager.kv_cache_group_id))
            keys = keys[: len(whole[-1])]
        num_tokens = start + len(keys) * self._page
        if rule.config.needs_queries:
            # The queries of the tokens after a segment have to be computed.
            num_tokens = min(num_tokens, start + segments.size)
        num_tokens -= num_tokens % self._coordinator.scheduler_block_size
        others = self._others(request, num_tokens)
        num_tokens = min([num_tokens, *(length for _, length in others.values())])
        if segments.num_compressed(num_tokens) != len(compressed):
            return None
        num_whole = (num_tokens - start) // self._page
        pages = {group: found for group, (found, _) in others.items()}
        for place, (manager, own) in enumerate(zip(self._managers, whole, strict=True)):
            kept = [page for of_all in compressed for page in of_all[place]]
            pages[manager.kv_cache_group_id] = kept + own[:num_whole]
        return Hit(tuple(pages[group] for group in sorted(pages)), num_tokens)

    def _others(
        self, request: Request, num_tokens: int
    ) -> dict[int, tuple[Sequence[KVCacheBlock], int]]:
        """By KV cache group that is of no tier: what it has of the longest prefix that
        all of them have, and that prefix's length."""
        tiered = {manager.kv_cache_group_id for manager in self._managers}
        managers = [
            manager
            for manager in self._coordinator.single_type_managers
            if manager.kv_cache_group_id not in tiered
        ]
        found: dict[int, tuple[Sequence[KVCacheBlock], int]] = {}
        lengths = [num_tokens]
        while len(found) < len(managers) or len(set(lengths)) > 1:
            num_tokens, lengths = min(lengths), []
            for manager in managers:
                group = manager.kv_cache_group_id
                pages, length = type(manager).find_longest_cache_hit(
                    block_hashes=resolve_block_hashes(
                        request.block_hashes,
                        self._pool.hash_block_size,
                        manager.block_size,
                    ),
                    max_length=num_tokens,
                    kv_cache_group_ids=[group],
                    block_pool=self._pool,
                    kv_cache_spec=manager.kv_cache_spec,
                    drop_eagle_block=False,
                    alignment_tokens=self._coordinator.scheduler_block_size,
                )
                found[group] = pages[0], length
                lengths.append(length)
        return found
