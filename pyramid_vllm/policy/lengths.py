"""Cache lengths: how many tokens each tier keeps, as a function of length alone."""

from dataclasses import dataclass
from functools import cached_property

from pyramid_vllm.policy.budgets import Budget, make_budget
from pyramid_vllm.policy.budgets.base import UNIT, as_units
from pyramid_vllm.policy.budgets.pyramidinfer import decay
from pyramid_vllm.policy.config import PolicyConfig
from pyramid_vllm.policy.segments import Segments, kept_of_segment
from pyramid_vllm.policy.tiers import TierLayout

Counts = tuple[int, ...]
#: Times ``min_context`` that a request computes itself, behind shared tokens, before it
#: evicts any. Every query that scores reads the whole prompt, and what has evicted is
#: not cached: a few tokens do not repay that.
_LEAST_OWN = 2


@dataclass(frozen=True)
class LengthRule:
    """Rows that each tier computes and tokens that it holds, from lengths alone.

    The budget decides how much of the prompt is kept. Generated tokens follow; a
    policy may compress them in groups.
    """

    config: PolicyConfig
    layout: TierLayout

    @cached_property
    def budget(self) -> Budget:
        """The policy's budget."""
        return make_budget(self.config, self.layout)

    @cached_property
    def segments(self) -> Segments | None:
        """How sequences are compressed segment by segment; None: they are not, or every
        tier keeps whole segments."""
        config = self.config
        if not config.segments:
            return None
        many = 10**6  # so long that no floor counts
        shares = [count * UNIT // many for count in self.budget.cache_lengths(many)]
        kept = kept_of_segment(config.segment, config.page, shares)
        if min(kept) == config.segment:
            return None
        # Whole pages, because their hash names what was read to choose.
        recent = -(-config.recent // config.page) * config.page
        return Segments(config.segment, recent, kept)

    @property
    def compresses_output(self) -> bool:
        """Whether generated tokens may be evicted."""
        return self.config.generation or self.segments is not None

    def num_recent(self, num_tokens: int) -> int:
        """Length of the recent window of ``num_tokens`` tokens."""
        return self.budget.num_recent(num_tokens)

    def num_queries(self, num_tokens: int) -> int:
        """Number of newest prompt tokens, of ``num_tokens``, whose queries score."""
        if not self.config.needs_queries:
            return 0
        recent = self.num_recent(num_tokens)
        most = as_units(self.config.query_ratio) * num_tokens // UNIT
        queries = min(self.config.queries or recent, max(recent, most))
        if self.config.prune_from is not None or self.config.evict == "chunk":
            # The rows or keys of older tokens may be gone.
            queries = min(queries, recent)
        return min(num_tokens, queries)

    def cache_lengths(self, num_tokens: int) -> Counts:
        """Tokens that each tier keeps of a prompt of ``num_tokens`` tokens."""
        if not self.config.segments:
            return self.budget.cache_lengths(num_tokens)
        if self.segments is None:
            return (num_tokens,) * self.layout.num_tiers
        return self.segments.held(num_tokens)

    def kept_of_prompt(self, num_tokens: int, num_shared: int) -> Counts:
        """Tokens that each tier keeps of a prompt whose first ``num_shared`` tokens
        stay whole: the budget is that of the others, unless these are few."""
        num_own = max(0, num_tokens - num_shared)
        if num_shared and num_own < _LEAST_OWN * self.config.min_context:
            return (num_tokens,) * self.layout.num_tiers
        own = self.cache_lengths(num_own)
        return tuple(num_shared + count for count in own) if num_shared else own

    def held_lengths(
        self, num_prompt_tokens: int, num_computed_tokens: int, num_shared: int = 0
    ) -> Counts:
        """Tokens that each tier holds after the step that computed the last of
        ``num_computed_tokens``.

        Args:
            num_prompt_tokens: length of the prompt.
            num_computed_tokens: prompt and generated tokens.
            num_shared: first tokens of the prompt that stay whole.
        """
        if self.config.segments:
            return self.cache_lengths(num_computed_tokens)
        prompt = min(num_computed_tokens, num_prompt_tokens)
        if prompt < num_prompt_tokens and self.config.evict == "prompt_end":
            first = self.first_pruned_tier
            kept = (prompt,) * first + self.cache_lengths(prompt)[first:]
        else:
            kept = self.kept_of_prompt(prompt, num_shared)
        num_generated = num_computed_tokens - prompt
        if not num_generated:
            return kept
        num_groups = self.num_groups(num_prompt_tokens, num_generated)
        return tuple(
            length + num_generated - num_groups * evicted
            for length, evicted in zip(kept, self._group_evicted, strict=True)
        )

    # Pruned prefill.

    @cached_property
    def first_pruned_tier(self) -> int:
        """First tier with pruned input; the number of tiers if there is none."""
        num_tiers = self.layout.num_tiers
        if self.config.prune_from is None:
            return num_tiers
        # The input of the first layer cannot be pruned: nothing has been scored yet.
        first_layers = [sum(self.layout.sizes[:tier]) for tier in range(num_tiers)]
        return next(
            (
                tier
                for tier in range(1, num_tiers)
                if first_layers[tier] >= self.config.prune_from
            ),
            num_tiers,
        )

    @property
    def prunes(self) -> bool:
        """Whether any tier's input is pruned."""
        return self.first_pruned_tier < self.layout.num_tiers

    def num_rows(self, num_before: int, num_after: int) -> Counts:
        """Rows that each tier computes of a chunk of a prompt.

        A pruned tier computes as many rows as its count grows by, and at least the
        chunk's part of the recent window. Compaction then removes the surplus.

        Args:
            num_before: prompt tokens computed before the chunk.
            num_after: prompt tokens computed with the chunk.
        """
        chunk, first = num_after - num_before, self.first_pruned_tier
        recent = min(chunk, self.num_recent(num_after))
        before, after = self.cache_lengths(num_before), self.cache_lengths(num_after)
        rows: list[int] = []
        most = recent
        # From the last tier back: rows that a tier drops are gone for all later tiers.
        for tier in range(self.layout.num_tiers - 1, first - 1, -1):
            most = max(most, after[tier] - before[tier])
            rows.append(most)
        return (chunk,) * first + tuple(reversed(rows))

    # Compressed generation.

    @cached_property
    def group_kept(self) -> Counts:
        """Tokens that each tier keeps of a group of generated tokens.

        PyramidInfer's released code: ``gen_compress_ratio`` of the group times a
        decay from 1 to ``gen_decay_ratio`` over layers, at least one token.
        """
        config, num_layers = self.config, self.layout.num_layers
        group = config.exceed_length_to_compress
        if group is None:
            return (0,) * self.layout.num_tiers
        kept = group * config.gen_compress_ratio
        strategy, ratio = config.gen_decay_strategy, config.gen_decay_ratio
        return self.budget.by_tier(
            [
                max(1, int(kept * decay(strategy, ratio, layer, num_layers) + 1e-9))
                for layer in range(num_layers)
            ]
        )

    @cached_property
    def _group_evicted(self) -> Counts:
        group = self.config.exceed_length_to_compress
        if group is None:
            return (0,) * self.layout.num_tiers
        return tuple(group - kept for kept in self.group_kept)

    def num_groups(self, num_prompt_tokens: int, num_generated: int) -> int:
        """Groups of generated tokens that have left the recent window.

        The window spans all tokens so far, prompt and output.
        """
        group = self.config.exceed_length_to_compress
        if group is None:
            return 0
        recent = self.num_recent(num_prompt_tokens + num_generated)
        return max(0, num_generated - recent) // group

    def group_starts(
        self, num_prompt_tokens: int, num_groups: int, num_shared: int = 0
    ) -> Counts:
        """First cached token of the last of ``num_groups`` groups, per tier."""
        prompt = self.kept_of_prompt(num_prompt_tokens, num_shared)
        return tuple(
            length + (num_groups - 1) * kept
            for length, kept in zip(prompt, self.group_kept, strict=True)
        )

    def num_group_queries(self, num_tokens: int) -> int:
        """Number of newest tokens, of ``num_tokens``, whose queries score a group."""
        if not self.config.needs_queries:
            return 0
        return min(self.config.gen_queries, self.num_recent(num_tokens))

    # Memory.

    def peak_lengths(
        self,
        num_prompt_tokens: int,
        num_tokens: int,
        max_chunk: int,
        pruned: bool = True,
        num_shared: int = 0,
    ) -> Counts:
        """Most tokens that each tier holds until ``num_tokens`` are computed.

        Args:
            num_prompt_tokens: length of the prompt.
            num_tokens: prompt and generated tokens at the end.
            max_chunk: most prompt tokens that one step computes.
            pruned: whether the policy's pruning applies to the request.
            num_shared: first tokens of the prompt that stay whole.
        """
        if self.config.segments:
            return self.generation_peak(num_prompt_tokens, num_tokens)
        prompt = min(num_tokens, num_prompt_tokens)
        first = self.first_pruned_tier if pruned else self.layout.num_tiers
        # Counts grow by at most one a token, so the last chunk is the worst.
        chunk = min(prompt, max_chunk)
        by_chunk = self._with_rows(prompt, chunk)
        recent = min(chunk, self.num_recent(prompt))
        # Both tiers' counts are rounded, so their growth may differ by one.
        by_rows = tuple(length + 1 for length in self._with_rows(prompt, recent))
        if self.config.evict == "prompt_end":
            whole = self.first_pruned_tier
            by_chunk = (prompt,) * whole + by_chunk[whole:]
        prefill = by_chunk[:first] + by_rows[first:]
        end = self.generation_peak(num_prompt_tokens, num_tokens, num_shared)
        return tuple(map(max, prefill, end))

    def _with_rows(self, prompt: int, num_rows: int) -> Counts:
        return tuple(
            length + num_rows for length in self.cache_lengths(prompt - num_rows)
        )

    def generation_peak(
        self, num_prompt_tokens: int, num_tokens: int, num_shared: int = 0
    ) -> Counts:
        """Most tokens that each tier holds during or after any step from the prompt's
        end to ``num_tokens`` computed tokens; arguments as of ``held_lengths``."""
        if self.segments is not None:
            return self.segments.peak(num_tokens)
        held = self.held_lengths(num_prompt_tokens, num_tokens, num_shared)
        if not self.num_groups(num_prompt_tokens, num_tokens - num_prompt_tokens):
            return held
        return tuple(map(int.__add__, held, self._group_evicted))
