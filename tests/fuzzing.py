"""A worker without a model: pages hold numbers that say which token lies there.

It runs steps as the V1 runner does, with the package's own code for the rows of block
tables, and checks at every read that a request finds its own tokens and no other's.
"""

import random
import zlib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from pyramid_vllm.plan import GeneratedWindow, PromptWindow, StepPlan, plan_of
from pyramid_vllm.policy import LengthRule
from pyramid_vllm.scheduler import PyramidScheduler
from pyramid_vllm.scheduler.segments import namespace
from pyramid_vllm.worker.runners.v1 import V1Runner

Tokens = npt.NDArray[np.int64]
_MAX_REQS = 64


class _Table:
    """A block table of one KV cache group, with vLLM's names."""

    def __init__(self, block_size: int, max_blocks: int) -> None:
        self.block_size = block_size
        rows = np.zeros((_MAX_REQS, max_blocks), dtype=np.int32)
        self.block_table = SimpleNamespace(np=rows)
        self.num_blocks_per_row = np.zeros(_MAX_REQS, dtype=np.int32)

    def append(self, row: int, block_ids: list[int]) -> None:
        start = self.num_blocks_per_row[row]
        self.block_table.np[row, start : start + len(block_ids)] = block_ids
        self.num_blocks_per_row[row] += len(block_ids)

    def pages(self, row: int) -> npt.NDArray[np.int32]:
        return self.block_table.np[row, : self.num_blocks_per_row[row]]


class _Request:
    """What the worker knows of a request."""

    def __init__(self, num_groups: int, tokens: list[int]) -> None:
        self.tokens = tokens
        self.held: list[Tokens] = [np.empty(0, dtype=np.int64)] * num_groups
        """What each cache group must find in its pages."""
        self.evicted: list[int] = []
        """By tier; empty: none yet."""
        self.block_ids: list[list[int]] = []
        self.is_segmented = False
        """Whether what it holds follows from its tokens alone."""


class PageWorker:
    """Runs scheduler outputs in order.

    Args:
        scheduler: whose pools and tiers it mirrors.
        rng: chooses which tokens stay.
    """

    def __init__(self, scheduler: PyramidScheduler, rng: random.Random) -> None:
        config = scheduler.kv_cache_config
        self._rng = np.random.default_rng(rng.getrandbits(32))
        self._managers = scheduler.tier_managers
        self._tier_of_group = {
            manager.kv_cache_group_id: manager.kv_cache_spec.tier
            for manager in self._managers
        }
        block_size = self._managers[0].block_size
        max_blocks = -(-scheduler.max_model_len // block_size) + 1
        self._memory = np.zeros((config.num_blocks, block_size), dtype=np.int64)
        self.input_batch = SimpleNamespace(
            req_id_to_index={},
            block_table=[_Table(block_size, max_blocks) for _ in self._tier_of_group],
        )
        self.requests: dict[str, _Request] = {}
        self._free_rows = list(range(_MAX_REQS))
        self.num_shared_reads = self.num_segment_hits = 0
        self._rule_of = scheduler.tier_lengths.rule_of
        self._rules: dict[str, LengthRule] = {}

    def note(self, requests: Mapping[str, Any]) -> None:
        """Learn the rules of all requests, some of which leave before their step."""
        for req_id, request in requests.items():
            self._rules[req_id] = self._rule_of(request)

    def run(self, output: Any) -> None:
        """One step: rows, keys of the step's tokens, compaction."""
        plan: StepPlan = plan_of(output)
        self._begin(plan)
        starts = self._update_rows(output, plan)
        for req_id, num_evicted in plan.begun.items():
            segments = self._rules[req_id].segments
            assert segments is not None
            num_segments = segments.num_compressed(starts[req_id])
            assert num_evicted == segments.num_evicted(num_segments)
            self.requests[req_id].evicted = list(num_evicted)
            self.requests[req_id].is_segmented = True
            self.num_segment_hits += num_segments
        self._prepare(output, plan, starts)
        for group_id, tier in self._tier_of_group.items():
            self._run_group(output, plan, starts, group_id, tier)
        for group in plan.generated:
            for group_id, tier in self._tier_of_group.items():
                self._compress(group, group_id, tier)
        for req_id, num_tokens, num_kept in plan.compactions:
            self.requests[req_id].evicted = [num_tokens - kept for kept in num_kept]
        self._truncate(plan)

    def _begin(self, plan: StepPlan) -> None:
        """Before the requests that left are forgotten."""

    def _prepare(self, output: Any, plan: StepPlan, starts: dict[str, int]) -> None:
        """Hook for subclasses, between the rows of a step and its writes."""

    def _truncate(self, plan: StepPlan) -> None:
        """Cut rows with the package's own code, and take them as what requests own."""
        V1Runner(self).truncate(self._tier_of_group, plan)
        for req_id, row in self.input_batch.req_id_to_index.items():
            for group_id, ids in enumerate(self.requests[req_id].block_ids):
                table = self.input_batch.block_table[group_id]
                assert table.pages(row).tolist() == ids

    def _update_rows(self, output: Any, plan: StepPlan) -> dict[str, int]:
        """Take the step's requests and pages in; computed tokens of each before it."""
        for req_id in plan.released:
            self._forget(req_id)
        for new in output.scheduled_new_reqs:
            self._add(new.req_id, list(new.prompt_token_ids), new.block_ids)
        cached = output.scheduled_cached_reqs
        for i, req_id in enumerate(cached.req_ids):
            if req_id in cached.resumed_req_ids:
                tokens = cached.all_token_ids[req_id]
                self._add(req_id, list(tokens), cached.new_block_ids[i])
            elif cached.new_block_ids[i] is not None:
                self._append(req_id, cached.new_block_ids[i])
        starts = {
            new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs
        }
        return starts | dict(
            zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        )

    def _add(self, req_id: str, tokens: list[int], block_ids: Any) -> None:
        self._forget(req_id)
        self.requests[req_id] = _Request(len(self._tier_of_group), tokens)
        self.input_batch.req_id_to_index[req_id] = self._free_rows.pop()
        self.requests[req_id].block_ids = [[] for _ in block_ids]
        self._append(req_id, block_ids)

    def _append(self, req_id: str, block_ids: Any) -> None:
        row = self.input_batch.req_id_to_index[req_id]
        for group_id, ids in enumerate(block_ids):
            self.input_batch.block_table[group_id].append(row, ids)
            self.requests[req_id].block_ids[group_id].extend(ids)

    def _forget(self, req_id: str) -> None:
        self.requests.pop(req_id, None)
        row = self.input_batch.req_id_to_index.pop(req_id, None)
        if row is not None:
            for table in self.input_batch.block_table:
                table.num_blocks_per_row[row] = 0
            self._free_rows.append(row)

    def _names(self, req_id: str, group_id: int, start: int, end: int) -> Tokens:
        """Numbers of tokens; they are equal where stock vLLM's keys and values are
        equal."""
        request = self.requests[req_id]
        request.tokens += [7] * (end - len(request.tokens))  # what tests sample
        if request.evicted and not request.is_segmented:  # of nobody else's context
            prefix = zlib.crc32(f"{req_id} {self._rng.random()}".encode())
            return prefix * 4096 + np.arange(start, end) + 1
        known = np.array(request.tokens[:end], dtype=np.int64)
        policy = zlib.crc32(namespace(self._rules[req_id]).encode())
        mixed = np.cumsum(known * 1000003 + np.arange(end) * 7919 + 17 + group_id)
        mixed += policy
        return mixed[start:] * 31 + 1

    def _run_group(
        self,
        output: Any,
        plan: StepPlan,
        starts: dict[str, int],
        group_id: int,
        tier: int,
    ) -> None:
        windows = {window.req_id: window for window in plan.windows}
        for req_id, num_new in output.num_scheduled_tokens.items():
            start, request = starts[req_id], self.requests[req_id]
            if not len(request.held[group_id]) and start:  # pages of the prefix cache
                names = self._names(req_id, group_id, 0, start)
                request.held[group_id] = self._left_of(req_id, names, tier)
                self.num_shared_reads += 1
            num_held = len(request.held[group_id])
            num_evicted = request.evicted[tier] if request.evicted else 0
            assert num_held == start - num_evicted, (req_id, group_id, "count")
            names = self._names(req_id, group_id, start, start + num_new)
            window = windows.get(req_id)
            if window is not None and window.num_rows is not None:
                rows = self._rng.choice(num_new, window.num_rows[tier], replace=False)
                names = names[np.sort(rows)]
            request.held[group_id] = np.concatenate((request.held[group_id], names))
            self._write(req_id, group_id, num_held, names)
        for req_id in output.num_scheduled_tokens:  # attention: all writes are done
            held = self.requests[req_id].held[group_id]
            found = self._read(req_id, group_id, len(held))
            assert np.array_equal(found, held), (req_id, group_id, "another's tokens")
        for window in plan.windows:
            self._compact(window, group_id, tier)

    def _left_of(self, req_id: str, names: Tokens, tier: int) -> Tokens:
        """What is left of a request's first tokens once its segments are compressed."""
        segments = self._rules[req_id].segments
        if segments is None:
            return names
        end = segments.num_compressed(len(names)) * segments.size
        left = [
            _best(names[first : first + segments.size], segments.kept[tier])
            for first in range(0, end, segments.size)
        ]
        return np.concatenate((*left, names[end:]))

    def _slots(self, req_id: str, group_id: int, start: int, end: int) -> Any:
        places, pages = np.arange(start, end), self._pages(req_id, group_id)
        block_size = self._memory.shape[1]
        assert end <= len(pages) * block_size, (req_id, "no page for a token")
        return pages[places // block_size], places % block_size

    def _pages(self, req_id: str, group_id: int) -> npt.NDArray[np.int32]:
        row = self.input_batch.req_id_to_index[req_id]
        return self.input_batch.block_table[group_id].pages(row)

    def _read(self, req_id: str, group_id: int, end: int) -> Tokens:
        return self._memory[self._slots(req_id, group_id, 0, end)]

    def _write(self, req_id: str, group_id: int, start: int, names: Tokens) -> None:
        slots = self._slots(req_id, group_id, start, start + len(names))
        self._memory[slots] = names

    def _compact(self, window: PromptWindow, group_id: int, tier: int) -> None:
        if window.num_kept is None:
            return
        request = self.requests[window.req_id]
        held, num_kept = request.held[group_id], window.num_kept[tier]
        if num_kept == len(held):
            return
        shared = window.num_shared
        own = self._rng.choice(len(held) - shared, num_kept - shared, replace=False)
        indices = shared + np.sort(own)
        request.held[group_id] = np.concatenate((held[:shared], held[indices]))
        block_size = self._memory.shape[1]
        table = self._pages(window.req_id, group_id)
        pages = None if window.pages is None else window.pages[group_id]
        if pages is not None:
            assert shared % block_size == 0
            pages = np.concatenate((table[: shared // block_size], pages))
        to = table if pages is None else pages
        if not window.is_ordered:
            tokens = self._memory[table[indices // block_size], indices % block_size]
            places = np.arange(shared, shared + len(indices))
            self._memory[to[places // block_size], places % block_size] = tokens
            return
        # One token after the other, as the kernel moves them: what is written must not
        # be read later.
        for place, index in enumerate(indices.tolist(), shared):
            token = self._memory[table[index // block_size], index % block_size]
            self._memory[to[place // block_size], place % block_size] = token

    def _compress(self, group: GeneratedWindow, group_id: int, tier: int) -> None:
        request = self.requests[group.req_id]
        held, start = request.held[group_id], group.starts[tier]
        if group.pages is not None:
            self._compress_segment(group, group_id, tier)
            return
        chosen = self._rng.choice(group.size, group.num_chosen[tier], replace=False)
        request.held[group_id] = np.concatenate(
            (
                held[:start],
                held[start : start + group.size][np.sort(chosen)],
                held[start + group.size :],
            )
        )
        assert len(request.held[group_id]) == group.num_kept[tier]
        self._write(group.req_id, group_id, start, request.held[group_id][start:])

    def _compress_segment(
        self, window: GeneratedWindow, group_id: int, tier: int
    ) -> None:
        """What stays of a segment follows from its tokens; found pages hold it."""
        request, start = self.requests[window.req_id], window.starts[tier]
        request.is_segmented = True
        held = request.held[group_id]
        names = held[start : start + window.size]
        best = _best(names, window.num_chosen[tier])
        request.held[group_id] = np.concatenate(
            (held[:start], best, held[start + window.size :])
        )
        assert len(request.held[group_id]) == window.num_kept[tier]
        assert window.pages is not None
        pages = window.pages[group_id]
        if window.is_found or pages is None:
            return
        block_size, table = self._memory.shape[1], self._pages(window.req_id, group_id)
        indices = start + np.flatnonzero(np.isin(names, best))
        sources = table[indices // block_size], indices % block_size
        if not window.is_ordered:
            tokens = self._memory[sources]
            for place, token in enumerate(tokens):
                self._memory[pages[place // block_size], place % block_size] = token
            return
        for place, source in enumerate(zip(*sources, strict=True)):
            page = pages[place // block_size]
            self._memory[page, place % block_size] = self._memory[source]


def _best(names: Tokens, count: int) -> Tokens:
    """A choice of ``count`` tokens that depends on the tokens alone, in order."""
    chosen = np.argsort(names * 2654435761 % 1000003, kind="stable")[:count]
    best: Tokens = names[np.sort(chosen)]
    return best
