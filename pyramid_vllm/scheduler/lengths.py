"""Cached tokens of each running request in each tier."""

from collections.abc import Mapping
from typing import Any, Protocol

from pyramid_vllm.policy import LengthRule, Queries, RequestPolicies
from pyramid_vllm.policy.segments import Segments

Counts = tuple[int, ...]
#: Attribute of vLLM's ``Request``: its rule, fixed when it is first asked for.
_RULE = "kv_policy_rule"
#: Attribute of vLLM's ``Request``: first tokens of its prompt that stay whole, because
#: they came from the prefix cache when it was admitted. Set again only until then.
_SHARED = "kv_policy_shared"


class RequestLengths(Protocol):
    """The fields of vLLM's requests that we read."""

    request_id: str
    num_prompt_tokens: int
    num_computed_tokens: int
    num_preemptions: int
    sampling_params: Any


def needs_all_rows(request: RequestLengths) -> bool:
    """Whether a request's output depends on every row of its prompt."""
    sampling = request.sampling_params
    return sampling is not None and sampling.prompt_logprobs is not None


def can_share(rule: LengthRule) -> bool:
    """Whether a policy evicts once, after the whole prompt is computed: pages of a
    prefix cache are whole until then."""
    return not rule.prunes and rule.config.evict == "prompt_end"


class TierLengths:
    """The one record of evicted tokens; block managers and the plan read it.

    Args:
        policies: policies of the engine and of requests.
        max_chunk: most prompt tokens that one step computes.
        requests: the scheduler's requests.
    """

    def __init__(
        self,
        policies: RequestPolicies,
        max_chunk: int,
        requests: Mapping[str, RequestLengths],
    ) -> None:
        self._policies = policies
        self.max_chunk = max_chunk
        self.max_unpruned_chunk = max_chunk
        """``max_chunk`` of requests whose rows are not pruned; set by the scheduler."""
        self._requests = requests
        self._none = (0,) * policies.layout.num_tiers
        self._evicted: dict[str, Counts] = {}
        self._hit: dict[str, Counts] = {}
        """Evicted tokens of requests that were not admitted yet, in what they hit."""
        self.num_evicted = list(self._none)
        """By tier: evicted tokens of all requests that hold pages."""
        self.num_ever_evicted = list(self._none)
        """By tier: tokens evicted since start-up."""
        self.hits: dict[int, Any] = {}
        """By page, of all tiers: the hash that it had when it was hit last."""
        self._last_slots: tuple[tuple[str, int, int], Counts] | None = None
        self._last_peak: tuple[tuple[str, int, int], Counts] | None = None
        self._last_end: tuple[tuple[str, int], Counts | None] | None = None

    def __len__(self) -> int:
        """Number of requests that have evicted tokens."""
        return len(self._evicted)

    def rule_of(self, request: RequestLengths) -> LengthRule:
        """The counts of a request's own policy, else of the engine's."""
        rule: LengthRule | None = getattr(request, _RULE, None)
        if rule is None:
            sampling = request.sampling_params
            extra_args = None if sampling is None else sampling.extra_args
            rule = self._policies.rule_for(extra_args)
            setattr(request, _RULE, rule)
        return rule

    def evicted(self, req_id: str) -> Counts:
        """Computed tokens minus cache length, per tier."""
        return self._evicted.get(req_id) or self._hit.get(req_id, self._none)

    def rows(
        self, request: RequestLengths, num_before: int, num_after: int
    ) -> Counts | None:
        """Rows that each tier computes in a request's step; None: all of them."""
        rule = self.rule_of(request)
        if (
            not rule.prunes
            or num_before >= request.num_prompt_tokens
            or needs_all_rows(request)
        ):
            return None
        prompt = min(num_after, request.num_prompt_tokens)
        # A replay that evicts nothing may go on after the prompt's end.
        rows = tuple(
            count + num_after - prompt for count in rule.num_rows(num_before, prompt)
        )
        return rows if rows[-1] < num_after - num_before else None

    def slots(self, req_id: str, num_tokens: int, tier: int) -> int:
        """Tokens that a tier holds during the step that computes up to ``num_tokens``,
        before eviction."""
        request = self._requests[req_id]
        computed = request.num_computed_tokens
        if computed >= request.num_prompt_tokens or not self.rule_of(request).prunes:
            return num_tokens - self.evicted(req_id)[tier]
        key = (req_id, computed, num_tokens)
        # Every tier's manager asks several times.
        if self._last_slots is None or self._last_slots[0] != key:
            rows = self.rows(request, computed, num_tokens)
            scheduled = num_tokens - computed
            slots = tuple(
                computed - evicted + (scheduled if rows is None else rows[i])
                for i, evicted in enumerate(self.evicted(req_id))
            )
            self._last_slots = key, slots
        return self._last_slots[1][tier]

    def request(self, req_id: str) -> Any:
        """The scheduler's request with that id."""
        return self._requests[req_id]

    def peaks(self, request: RequestLengths, num_tokens: int) -> Counts:
        """Most tokens that each tier holds until ``num_tokens`` are computed."""
        key = (request.request_id, num_tokens, self.shared(request))
        # As in `slots`, every tier asks.
        if self._last_peak is None or self._last_peak[0] != key:
            pruned = not needs_all_rows(request)
            lengths = self.rule_of(request).peak_lengths(
                request.num_prompt_tokens,
                num_tokens,
                self.max_chunk if pruned else self.max_unpruned_chunk,
                pruned,
                self.shared(request),
            )
            self._last_peak = key, lengths
        return self._last_peak[1]

    def advance(self, request: RequestLengths) -> Counts | None:
        """Record what the rule evicts after a request's step.

        Args:
            request: its computed tokens include the step's.

        Returns:
            Cache lengths after the step; None: nothing is evicted.
        """
        computed = request.num_computed_tokens
        kept = self.rule_of(request).held_lengths(
            request.num_prompt_tokens, computed, self.shared(request)
        )
        evicted = tuple(computed - length for length in kept)
        before = self._evicted.get(request.request_id, self._none)
        self._last_slots = None
        if evicted == before:
            return None
        self._set_evicted(request.request_id, evicted)
        for tier, (new, old) in enumerate(zip(evicted, before, strict=True)):
            self.num_ever_evicted[tier] += new - old
        return kept

    def _set_evicted(self, req_id: str, evicted: Counts) -> None:
        before = self._evicted.get(req_id, self._none)
        self._evicted[req_id] = evicted
        for tier, (new, old) in enumerate(zip(evicted, before, strict=True)):
            self.num_evicted[tier] += new - old

    # Prefix caching.

    def shared(self, request: RequestLengths) -> int:
        """First tokens of a request's prompt that stay whole and shared."""
        num_shared: int = getattr(request, _SHARED, 0)
        return num_shared

    def note_hit(self, request: RequestLengths, num_tokens: int) -> None:
        """Take the tokens that a request gets from the prefix cache.

        A preempted request keeps the split of its first admission, whatever it hits
        then: its replay evicts what it evicted at first.
        """
        rule = self.rule_of(request)
        if rule.segments is not None:
            num_segments = rule.segments.num_compressed(num_tokens)
            self._hit[request.request_id] = rule.segments.num_evicted(num_segments)
            return
        if request.num_preemptions:
            return
        keeps = self._policies.server.hit_split == "keep" and can_share(rule)
        setattr(request, _SHARED, num_tokens if keeps else 0)

    def segments_of(self, req_id: str) -> Segments | None:
        """How a request's segments are compressed; None: they are not."""
        return self.rule_of(self._requests[req_id]).segments

    def due(self, req_id: str, num_tokens: int) -> tuple[int, Segments] | None:
        """The segment that is compressed in the step up to ``num_tokens``, and how."""
        request = self._requests[req_id]
        segments = self.rule_of(request).segments
        if segments is None:
            return None
        num_compressed = segments.num_compressed(num_tokens)
        if not num_compressed:
            return None
        segment = num_compressed - 1
        if self.evicted(req_id) == segments.num_evicted(num_compressed):
            return None
        return segment, segments

    def admit(self, req_id: str) -> bool:
        """Take what a request hit, now that it has the pages.

        Returns:
            Whether it hit compressed segments.
        """
        evicted = self._hit.pop(req_id, self._none)
        if any(evicted):
            self._set_evicted(req_id, evicted)
        return any(evicted)

    def note_sharers(self, request: RequestLengths, num_tokens: int) -> bool:
        """Take the first tokens of a prompt, computed by the request itself, whose
        pages others have got from the prefix cache: they stay whole, too.

        To evict them would free nothing, and cost pages of the request's own.

        Returns:
            Whether more tokens stay whole than before.
        """
        rule = self.rule_of(request)
        if (
            request.num_preemptions
            or num_tokens <= self.shared(request)
            or self._policies.server.hit_split != "keep"
            or not can_share(rule)
            or rule.config.scored_queries is Queries.ALL
        ):
            return False
        setattr(request, _SHARED, num_tokens)
        return True

    def kept_of_prompt(self, req_id: str, num_tokens: int) -> Counts | None:
        """Cache lengths after the step that ends a prompt, if the step evicts tokens
        from pages that other requests may read.

        Args:
            req_id: the request.
            num_tokens: computed tokens, with the step's.
        """
        request = self._requests[req_id]
        prompt = request.num_prompt_tokens
        if num_tokens < prompt or request.num_computed_tokens >= prompt:
            return None
        key = (req_id, self.shared(request))
        if self._last_end is None or self._last_end[0] != key:
            rule = self.rule_of(request)
            lengths = rule.kept_of_prompt(prompt, self.shared(request))
            evicts = can_share(rule) and min(lengths) < prompt
            self._last_end = key, lengths if evicts else None
        return self._last_end[1]

    def max_shared(self, request: RequestLengths) -> int | None:
        """Most tokens of a request whose pages may come from the prefix cache.

        The queries that score have to be computed, and so has every token after an
        eviction. Tokens that stay whole need neither.

        Returns:
            None: as many as in stock vLLM.
        """
        rule, prompt = self.rule_of(request), request.num_prompt_tokens
        if rule.config.segments:
            return None  # a look-up of segments knows
        if not can_share(rule) or needs_all_rows(request):
            return 0
        whole = self.shared(request)
        if min(rule.kept_of_prompt(prompt, whole)) == prompt:
            return prompt if rule.config.generation else None
        if rule.config.scored_queries is Queries.ALL:
            return whole
        # Two: vLLM pads a single last token with drafts of speculative decoding.
        return max(whole, prompt - max(2, rule.num_queries(prompt - whole)))

    def num_shareable(self, request: RequestLengths, num_tokens: int) -> int:
        """Number of a request's first ``num_tokens`` tokens that have stock vLLM's keys
        and values, in pages that are not written any more."""
        rule = self.rule_of(request)
        if rule.config.segments:
            return num_tokens
        if request.request_id in self._evicted:
            return 0
        if not can_share(rule):
            return 0
        # Groups of generated tokens are compressed in place.
        return (
            min(num_tokens, request.num_prompt_tokens)
            if rule.config.generation
            else num_tokens
        )

    def shares(self, request: RequestLengths) -> bool:
        """Whether a request past its prompt still offers pages to other requests."""
        rule = self.rule_of(request)
        return rule.config.segments or (
            request.request_id not in self._evicted
            and can_share(rule)
            and not rule.config.generation
        )

    def forget(self, req_id: str) -> None:
        """Drop a request that no longer holds pages."""
        self._hit.pop(req_id, None)
        for tier, count in enumerate(self._evicted.pop(req_id, ())):
            self.num_evicted[tier] -= count
        self._last_slots = self._last_peak = self._last_end = None
