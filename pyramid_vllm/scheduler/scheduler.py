"""vLLM's scheduler with a KV policy: it plans evictions and frees their pages."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import RequestStatus

from pyramid_vllm.checks import check_engine, check_kv_cache_config
from pyramid_vllm.limits import PromptLimits
from pyramid_vllm.metrics.config import reaches_plugins
from pyramid_vllm.plan import GeneratedWindow, StepPlan, attach_plan
from pyramid_vllm.policy import KVPolicyError, LengthRule, RequestPolicies
from pyramid_vllm.scheduler.admission import GrowthReserve
from pyramid_vllm.scheduler.block_manager import (
    TierBlockManager,
    register_spec,
)
from pyramid_vllm.scheduler.chunks import ChunkEnds
from pyramid_vllm.scheduler.in_flight import PromptsInFlight
from pyramid_vllm.scheduler.integrity import check_pool
from pyramid_vllm.scheduler.kv_manager import TierKVCacheManager
from pyramid_vllm.scheduler.lengths import TierLengths, needs_all_rows
from pyramid_vllm.scheduler.page_plans import PagePlans
from pyramid_vllm.scheduler.refusals import Refusals
from pyramid_vllm.scheduler.report import KVReport
from pyramid_vllm.scheduler.segments import namespace, separate
from pyramid_vllm.scheduler.statistics import Statistics
from pyramid_vllm.scheduler.windows import (
    generated_window,
    prompt_window,
)
from pyramid_vllm.spec import (
    max_chunk,
    model_weights,
    request_policies,
    required_policy,
)
from pyramid_vllm.stats import TIMES_ATTRIBUTE, PolicyCounters

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.engine import EngineCoreOutputs
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.metrics.stats import SchedulerStats
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

logger = init_logger(f"vllm.{__name__}")

_LOG_INTERVAL_S = 30.0


class PyramidScheduler(AsyncScheduler):
    """Adds a KV policy's counts and pages to vLLM's scheduling.

    All decisions are functions of lengths: no step waits for a worker.
    """

    def __init__(
        self,
        vllm_config: VllmConfig,
        kv_cache_config: KVCacheConfig,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        check_engine(vllm_config)
        num_layers = check_kv_cache_config(kv_cache_config)
        register_spec(vllm_config)
        super().__init__(vllm_config, kv_cache_config, *args, **kwargs)
        policies = request_policies(
            required_policy(vllm_config), num_layers, model_weights(vllm_config)
        )
        self.kv_rule = policies.rule
        self.tier_lengths = TierLengths(policies, max_chunk(vllm_config), self.requests)
        self.tier_managers = [
            manager
            for manager in self.kv_cache_manager.coordinator.single_type_managers
            if isinstance(manager, TierBlockManager)
        ]
        in_flight = PromptsInFlight(PromptLimits.of(vllm_config), self.tier_lengths)
        self._pages = TierKVCacheManager.adopt(
            self.kv_cache_manager, self.tier_managers, self.tier_lengths, in_flight
        )
        self._page_plans = PagePlans(self._pages, self.tier_managers)
        self._reserve = self._make_reserve(policies)
        self.tier_managers[0].reserve = self._reserve.num_pages
        self._last_log = -_LOG_INTERVAL_S
        self._chunk_ends = ChunkEnds(self.tier_lengths)
        # Ids in the order of admission: dicts, because sets have none.
        self._in_prompt: dict[str, None] = {}
        self._compressing: dict[str, None] = {}
        """Requests past their prompt whose generated tokens are compressed."""
        self._refusals = Refusals()
        self.kv_report = KVReport(vllm_config, kv_cache_config, self.kv_rule)
        self.tier_lengths.max_unpruned_chunk = self.kv_report.max_unpruned_chunk(
            self.tier_lengths.max_chunk
        )
        self._statistics = Statistics(self.tier_lengths, self.kv_report)
        reaches = reaches_plugins(vllm_config.additional_config)
        self._tells_stats = self.log_stats and reaches
        if self.log_stats and not reaches:
            logger.warning(
                "KV policy: no metrics: the front end is vLLM's Rust one, or the "
                "configuration was not made by vLLM's EngineArgs, or changed afterwards"
            )
        self.kv_report.log()

    @property
    def kv_counters(self) -> PolicyCounters:
        """Counters since start-up."""
        return self._statistics.counters

    def _make_reserve(self, policies: RequestPolicies) -> GrowthReserve:
        growth = policies.server.growth_reserve
        return GrowthReserve(
            None if growth == "all" else growth,
            self.max_model_len,
            self.tier_lengths.max_chunk,
            self.tier_lengths,
            self.tier_managers,
        )

    def add_request(self, request: Request) -> None:
        """Queue a request, with its output capped at what the whole pool can hold.

        A request that cannot be served ends with finish reason "error"; others go on.
        """
        if self._refusals.ends_session(request):
            return
        try:
            rule = self._check_request(request)
        except KVPolicyError as error:
            self._refuse(request, error)
            return
        limit = self.kv_report.max_output_tokens(rule, request.num_prompt_tokens)
        if limit is not None and request.max_tokens > limit:
            self.kv_counters.num_capped_outputs += 1
            logger.warning_once(
                "KV policy: the KV cache cannot hold every output up to max_model_len; "
                "longer ones end with finish reason 'length', the first one %d tokens "
                "after a prompt of %d",
                limit,
                request.num_prompt_tokens,
            )
            request.max_tokens = limit
        self._statistics.count_request(rule, request)
        if self._pages.enable_caching:
            separate(request, namespace(rule), namespace(self.kv_rule))
        if rule.prunes and needs_all_rows(request):
            logger.info_once(
                "KV policy: requests for prompt_logprobs are served unpruned, because "
                "they need every row of the prompt"
            )
        super().add_request(request)

    def _check_request(self, request: Request) -> LengthRule:
        """The counts of a request that can be served.

        Raises:
            KVPolicyError: gives the reason why it cannot.
        """
        if request.resumable:
            raise KVPolicyError(
                "streamed prompts are not supported: eviction needs the prompt's end"
            )
        rule = self.tier_lengths.rule_of(request)
        peak = self.tier_lengths.peaks(request, request.num_prompt_tokens)
        if not self.kv_report.holds(peak):
            raise KVPolicyError(
                f"kv_policy '{rule.config.name}': a prompt of "
                f"{request.num_prompt_tokens} tokens needs "
                f"{self.kv_report.num_pages(peak)} pages, more than the whole KV cache"
            )
        return rule

    def _refuse(self, request: Request, error: KVPolicyError) -> None:
        """End a request before it is scheduled."""
        self.kv_counters.num_refused_requests += 1
        logger.error("KV policy: request %s is refused: %s", request.request_id, error)
        is_session = request.resumable
        # The request's policy must not be resolved again.
        request.sampling_params, request.resumable = None, False
        super().add_request(request)
        self.finish_requests(request.request_id, RequestStatus.FINISHED_ERROR)
        self._refusals.add(request, is_session)

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        """End requests; of an aborted session that was refused, expect no end."""
        if isinstance(request_ids, str):
            request_ids = (request_ids,)
        elif request_ids is not None:
            request_ids = tuple(request_ids)  # it is read twice
        self._refusals.forget_sessions(request_ids)
        return super().finish_requests(request_ids, finished_status)

    def has_requests(self) -> bool:
        """Whether a step has work, including refusals to report."""
        return bool(self._refusals) or super().has_requests()

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Take a step's tokens; report refused requests to their clients."""
        if self._tells_stats:
            times = getattr(model_runner_output, TIMES_ATTRIBUTE, ())
            self._statistics.take_times(times)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._refusals.tell(outputs)
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's statistics, with the policy's in the field of a KV connector."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None and self._tells_stats:
            stats.kv_connector_stats = self._statistics.payload(self.running)
        return stats

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule one step and attach its plan."""
        self._reserve.begin(self.running)
        self._pages.begin_step()
        output = super().schedule(*args, **kwargs)
        released = frozenset(output.finished_req_ids).union(
            output.preempted_req_ids or ()
        )
        self._follow(output, released)
        plan = self._plan(output, released)
        attach_plan(output, plan)
        self._free_evicted(plan)
        self._count(plan)
        return output

    def _follow(self, output: SchedulerOutput, released: frozenset[str]) -> None:
        """Note which requests a step starts and ends: others that generate need no
        plan, unless their policy compresses what they generate."""
        for req_id in released:
            self._in_prompt.pop(req_id, None)
            self._compressing.pop(req_id, None)
        for new in output.scheduled_new_reqs:
            self._in_prompt[new.req_id] = None
        for req_id in output.scheduled_cached_reqs.resumed_req_ids:
            self._in_prompt[req_id] = None

    def _plan(self, output: SchedulerOutput, released: frozenset[str]) -> StepPlan:
        """Plan a step, and record what it evicts."""
        scheduled = output.num_scheduled_tokens
        windows, num_prompt_tokens = [], 0
        generated = [*self._plan_segments(scheduled), *self._plan_groups(scheduled)]
        for req_id in self._scheduled(self._in_prompt, scheduled):
            request = self.requests[req_id]
            before = request.num_computed_tokens - scheduled[req_id]
            if before < request.num_prompt_tokens:
                # A replay may go on past the prompt's end.
                computed = min(request.num_computed_tokens, request.num_prompt_tokens)
                num_prompt_tokens += computed - before
                self._chunk_ends.note(request)
                drops = self._keeps_shared(request) and bool(before)
                window = prompt_window(self.tier_lengths, request, before, drops)
                if window is not None:
                    windows.append(self._page_plans.gathered(request, window))
            if request.num_computed_tokens >= request.num_prompt_tokens:
                self._end_prompt(request)
        return StepPlan(
            num_reqs=len(scheduled),
            num_prompt_tokens=num_prompt_tokens,
            windows=tuple(windows),
            generated=tuple(generated),
            released=released,
            begun=self._pages.begun.copy(),
        )

    def _plan_segments(self, scheduled: Mapping[str, int]) -> Iterator[GeneratedWindow]:
        """Plan the compression of segments; count those that requests begin with."""
        for req_id in self._pages.begun:
            segments = self.tier_lengths.segments_of(req_id)
            assert segments is not None
            before = self.requests[req_id].num_computed_tokens - scheduled[req_id]
            self._statistics.count_segment_hits(segments.num_compressed(before))
        for req_id, segment in self._pages.due.items():
            window = self._page_plans.segment(self.requests[req_id], segment)
            self._statistics.count_segment(window.is_found)
            yield window

    def _plan_groups(self, scheduled: Mapping[str, int]) -> Iterator[GeneratedWindow]:
        """Plan the compression of groups of generated tokens."""
        for req_id in self._scheduled(self._compressing, scheduled):
            request = self.requests[req_id]
            before = request.num_computed_tokens - scheduled[req_id]
            window = generated_window(self.tier_lengths, request, before)
            if window is not None:
                yield window

    def _keeps_shared(self, request: Request) -> bool:
        """Whether more of a prompt that ends now stays whole, for others read it."""
        end = request.num_prompt_tokens + request.max_tokens
        return self._page_plans.keep_shared(
            request, self.waiting, lambda whole: self._holds(request, end, whole)
        )

    def _end_prompt(self, request: Request) -> None:
        req_id, lengths = request.request_id, self.tier_lengths
        rule, prompt = lengths.rule_of(request), request.num_prompt_tokens
        del self._in_prompt[req_id]
        if rule.config.generation:
            self._compressing[req_id] = None
        if (
            lengths.shared(request)
            and not any(lengths.evicted(req_id))
            and min(rule.cache_lengths(prompt)) < prompt
        ):
            self._statistics.count_whole()

    @staticmethod
    def _scheduled(req_ids: Iterable[str], scheduled: Mapping[str, int]) -> list[str]:
        return [req_id for req_id in req_ids if req_id in scheduled]

    def _get_local_prefix_cache_hit(
        self, request: Request, *args: Any, **kwargs: Any
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        """Limit a prefix hit, so that the prompt can still be evicted."""
        hit = super()._get_local_prefix_cache_hit(request, *args, **kwargs)
        lengths = self.tier_lengths
        lengths.note_hit(request, hit[1])
        most = lengths.max_shared(request)
        end = request.num_prompt_tokens + request.max_tokens
        whole = lengths.shared(request)
        if whole and not self._holds(request, end, whole):
            # The pool cannot hold the output beside a prefix that stays whole.
            lengths.note_hit(request, 0)
            most = lengths.max_shared(request)
        if most is None or hit[1] <= most:
            return hit
        manager = self.kv_cache_manager
        blocks, num_tokens, num_uncached = manager.coordinator.find_longest_cache_hit(
            request.block_hashes, most
        )
        boundary = num_tokens + num_uncached if num_uncached else 0
        return manager.create_kv_cache_blocks(blocks), num_tokens, boundary, False

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Also let a request wait while another computes the same segment: it then gets
        the segment compressed, as stock vLLM's gets the pages of a step before it."""
        ready: bool = super()._handle_blocked_waiting_request(request)
        if not ready or request.num_computed_tokens:
            return ready
        if not self._pages.segments.is_being_computed(
            request,
            (r for r in self.running if r.num_computed_tokens < r.num_prompt_tokens),
        ):
            return True
        self._statistics.count_wait()
        return False

    def _holds(self, request: Request, num_tokens: int, num_shared: int) -> bool:
        """Whether the whole pool can hold a request up to ``num_tokens``, if its first
        ``num_shared`` stay whole."""
        peak = self.tier_lengths.rule_of(request).generation_peak(
            request.num_prompt_tokens,
            min(num_tokens, self.max_model_len),
            num_shared,
        )
        return self.kv_report.holds(peak)

    def check_integrity(self) -> None:
        """Check that free and held pages add up and no count outlives its pages."""
        coordinator = self.kv_cache_manager.coordinator
        check_pool(coordinator.block_pool, coordinator.single_type_managers)
        for manager in self.tier_managers:
            manager.check_settled()
            for req_id, blocks in manager.req_to_blocks.items():
                held = self._num_held(req_id, manager)
                assert len(blocks) * manager.block_size >= held, (
                    f"request {req_id} has {len(blocks)} pages for {held} tokens"
                )
        holders = {req for m in self.tier_managers for req in m.req_to_blocks}
        assert len(self.tier_lengths) <= len(holders), "counts outlive their pages"

    def _num_held(self, req_id: str, manager: TierBlockManager) -> int:
        computed = self.requests[req_id].num_computed_tokens
        tier = manager.kv_cache_spec.tier
        return computed - self.tier_lengths.evicted(req_id)[tier]

    def _reserve_prefill_lookahead(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        """Also end chunks at points of eviction: see ``ChunkEnds.limit``."""
        if num_new_tokens == 1 and self.num_prefill_lookahead <= 1:
            return 1  # the usual case: nothing is shorter
        num_new_tokens = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        return self._chunk_ends.limit(request, num_computed_tokens, num_new_tokens)

    def _free_evicted(self, plan: StepPlan) -> None:
        """Return the pages of evicted tokens to the pool, for later steps."""
        for req_id, _, num_kept in plan.compactions:
            num_freed = self._pages.truncate(req_id, num_kept)
            self._statistics.count_freed(num_freed)

    def _count(self, plan: StepPlan) -> None:
        self._statistics.count_step(plan, len(self.running))
        if not plan.windows:
            return
        counters = self.kv_counters
        now = time.monotonic()
        if now - self._last_log >= _LOG_INTERVAL_S:
            self._last_log = now
            logger.info(
                "KV policy %s: %d compactions, %d pages freed, %d sequences running "
                "(most so far %d)",
                self.kv_rule.config.name,
                counters.num_compactions,
                counters.num_pages_freed,
                len(self.running),
                counters.max_num_running,
            )
