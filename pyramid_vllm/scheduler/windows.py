"""Plans one step of one request: which queries score, and what is evicted."""

import bisect

from pyramid_vllm.plan import GeneratedWindow, PromptWindow
from pyramid_vllm.policy import LengthRule, Queries
from pyramid_vllm.scheduler.lengths import RequestLengths, TierLengths


def prompt_window(
    lengths: TierLengths, request: RequestLengths, num_before: int, drops: bool
) -> PromptWindow | None:
    """Plan one prefill step's eviction and record it in ``lengths``.

    Args:
        lengths: advanced to the step's end.
        request: its computed tokens include the step's.
        num_before: tokens computed before the step.
        drops: whether the worker may hold queries that are of no use any more.

    Returns:
        None: the step neither scores, prunes nor evicts.
    """
    rule = lengths.rule_of(request)
    if rule.config.segments:
        return None  # of a segment everything is done after the forward pass
    computed, num_prompt = request.num_computed_tokens, request.num_prompt_tokens
    num_rows = lengths.rows(request, num_before, computed)
    num_kept = lengths.advance(request)
    num_shared = lengths.shared(request)
    retain, num_queries = _queries(rule, num_prompt, num_shared, num_before, computed)
    if num_kept is None and num_rows is None and not retain and not drops:
        return None
    return PromptWindow(
        req_id=request.request_id,
        policy=rule.config.name,
        num_tokens=computed,
        num_queries=num_queries,
        retain=retain,
        num_kept=num_kept,
        num_recent=rule.num_recent(max(0, computed - num_shared)),
        num_shared=num_shared,
        num_rows=num_rows,
    )


def _queries(
    rule: LengthRule, num_prompt: int, num_shared: int, num_before: int, computed: int
) -> tuple[bool, int]:
    """Whether a later chunk needs this chunk's queries, and how many queries score."""
    config = rule.config
    kept = rule.kept_of_prompt(num_prompt, num_shared)
    if not config.needs_queries or min(kept) == num_prompt:
        return False, 0
    if config.scored_queries is Queries.ALL:
        return computed < num_prompt, computed - num_before
    if computed == num_prompt:
        return False, rule.num_queries(computed - num_shared)
    if config.evict == "chunk" or rule.prunes:
        return True, rule.num_queries(computed)
    window_start = num_prompt - rule.num_queries(num_prompt - num_shared)
    return computed > window_start, max(0, computed - window_start)


def generated_window(
    lengths: TierLengths, request: RequestLengths, num_before: int
) -> GeneratedWindow | None:
    """Plan one decode step's compression: arguments as in ``prompt_window``.

    Returns:
        None: no group of generated tokens has left the recent window.
    """
    rule = lengths.rule_of(request)
    computed, num_prompt = request.num_computed_tokens, request.num_prompt_tokens
    num_groups = rule.num_groups(num_prompt, computed - num_prompt)
    if num_groups == rule.num_groups(num_prompt, num_before - num_prompt):
        return None
    num_kept = lengths.advance(request)
    size = rule.config.exceed_length_to_compress
    if num_kept is None or size is None:  # every tier keeps whole groups
        return None
    return GeneratedWindow(
        req_id=request.request_id,
        policy=rule.config.name,
        num_tokens=computed,
        num_queries=rule.num_group_queries(computed),
        starts=rule.group_starts(num_prompt, num_groups, lengths.shared(request)),
        size=size,
        num_chosen=rule.group_kept,
        num_kept=num_kept,
    )


def segment_window(
    lengths: TierLengths,
    request: RequestLengths,
    segment: int,
    pages: tuple[tuple[int, ...] | None, ...],
    is_found: bool,
    is_ordered: bool,
) -> GeneratedWindow:
    """Plan a segment's compression and record it in ``lengths``.

    Args:
        lengths: advanced to the step's end.
        request: its computed tokens include the step's.
        segment: which of its segments.
        pages: see ``GeneratedWindow``.
        is_found: see ``GeneratedWindow``.
        is_ordered: see ``GeneratedWindow``.
    """
    rule, computed = lengths.rule_of(request), request.num_computed_tokens
    segments = rule.segments
    assert segments is not None
    assert computed == segments.end(segment), f"{computed} tokens: a segment is late"
    num_kept = lengths.advance(request)
    assert num_kept is not None
    return GeneratedWindow(
        req_id=request.request_id,
        policy=rule.config.name,
        num_tokens=computed,
        num_queries=rule.config.gen_queries if rule.config.needs_queries else 0,
        starts=tuple(segment * kept for kept in segments.kept),
        size=segments.size,
        num_chosen=segments.kept,
        num_kept=num_kept,
        num_first=0 if segment else rule.config.sinks,
        pages=pages,
        is_found=is_found,
        is_ordered=is_ordered,
    )


def to_next_group(
    rule: LengthRule, request: RequestLengths, num_computed: int, num_new: int
) -> int:
    """Number of tokens, at most ``num_new``, until a group of generated tokens leaves
    the recent window."""
    prompt = request.num_prompt_tokens
    generated = num_computed - prompt
    now = rule.num_groups(prompt, generated)
    return 1 + bisect.bisect_right(
        range(1, num_new), now, key=lambda n: rule.num_groups(prompt, generated + n)
    )
