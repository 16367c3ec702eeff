"""A scheduler without an engine; tests act as the worker."""

import zlib
from collections import deque
from typing import Any

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import (
    get_kv_cache_config_from_groups,
    get_kv_cache_groups,
    get_request_block_hasher,
    init_none_hash,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

import pyramid_vllm  # noqa: F401
from pyramid_vllm.plan import StepPlan, plan_of
from pyramid_vllm.scheduler import PyramidScheduler
from pyramid_vllm.scheduler.block_manager import register_spec
from pyramid_vllm.spec import TierAttentionSpec, length_rule, required_policy
from pyramid_vllm.tools.simulate.engine import EngineSettings, SimulatedEngine, sampled
from pyramid_vllm.tools.simulate.model import load_model

BLOCK_SIZE = 32


def make_config(model: str, policy: dict[str, Any], **settings: Any) -> Any:
    """vLLM's configuration of a small engine with a policy."""
    async_scheduling = settings.pop("async_scheduling", False)
    defaults = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "block_size": BLOCK_SIZE,
        "max_model_len": 512,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 256,
        "enable_prefix_caching": False,
    }
    arguments = EngineArgs(model=model, kv_policy=policy, **(defaults | settings))
    config = arguments.create_engine_config()
    config.scheduler_config.async_scheduling = async_scheduling
    config.cache_config.kv_cache_layout = "LBNHC"
    return config


def scheduler_from(config: Any, num_blocks: int) -> PyramidScheduler:
    """A scheduler over a pool of ``num_blocks`` pages, the null page included."""
    plain = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=2, head_size=32, dtype=torch.float32
    )
    num_layers = config.model_config.hf_text_config.num_hidden_layers
    layout = length_rule(required_policy(config), num_layers).layout
    specs: dict[str, KVCacheSpec] = {
        f"model.layers.{layer}.self_attn.attn": TierAttentionSpec.of(
            plain, tier, num_layers
        )
        for layer, tier in enumerate(layout.tier_of_layer)
    }
    register_spec(config)
    # vLLM makes several KV cache groups of a tier that has more layers than others.
    groups = get_kv_cache_groups(config, specs)
    page_bytes = plain.page_size_bytes * layout.group_size
    kv_config = get_kv_cache_config_from_groups(config, groups, num_blocks * page_bytes)
    config.cache_config.num_gpu_blocks = kv_config.num_blocks
    return PyramidScheduler(
        config, kv_config, StructuredOutputManager(config), block_size=BLOCK_SIZE
    )


def make_stock_scheduler(model: str, num_blocks: int, **settings: Any) -> Any:
    """vLLM's own scheduler over ``num_blocks`` pages of all layers."""
    work = load_model(model, "float32", 1)
    page_bytes = BLOCK_SIZE * int(work.token_bytes) * work.num_layers
    sizes = {
        "max_model_len": 256,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 256,
    }
    engine = EngineSettings(
        model=work,
        kv_bytes=num_blocks * page_bytes,
        block_size=BLOCK_SIZE,
        prefix_caching=False,
        **(sizes | settings),
    )
    return SimulatedEngine(engine, None).scheduler


def make_scheduler(
    model: str, num_blocks: int, policy: dict[str, Any], **settings: Any
) -> PyramidScheduler:
    """A scheduler with a configuration of its own."""
    return scheduler_from(make_config(model, policy, **settings), num_blocks)


init_none_hash(sha256)
_BLOCK_HASHER = get_request_block_hasher(BLOCK_SIZE, sha256)


def make_request(
    name: str, prompt: int, output: int, priority: int = 0, **settings: Any
) -> Request:
    """A greedy request.

    Args:
        name: its id.
        prompt: tokens of the prompt.
        output: tokens to generate.
        priority: lower ones come first.
        settings: ``shared``, tokens that the prompt has in common with all others,
            by default all; further sampling parameters.
    """
    shared = settings.pop("shared", prompt)
    seed = zlib.crc32(name.encode())
    tokens = [(i if i < shared else i * seed + 1) % 500 for i in range(prompt)]
    sampling = SamplingParams(
        temperature=0.0, max_tokens=output, ignore_eos=True, **settings
    )
    return Request(
        request_id=name,
        prompt_token_ids=tokens,
        sampling_params=sampling,
        pooling_params=None,
        priority=priority,
        block_hasher=_BLOCK_HASHER,
    )


class Driver:
    """Schedules steps, and returns each one's output ``depth - 1`` steps later."""

    def __init__(
        self, scheduler: PyramidScheduler, depth: int = 1, worker: Any = None
    ) -> None:
        self.scheduler = scheduler
        self.worker = worker
        self._depth = depth
        self._flying: deque[Any] = deque()
        self.plans: list[StepPlan] = []
        self.evicted: list[dict[str, tuple[int, ...]]] = []
        """After each step's schedule: evicted tokens of requests, by tier."""
        self.finished: dict[str, str] = {}
        """The reason for each request's end that its client gets."""

    @property
    def num_flying(self) -> int:
        """Steps whose output is not yet returned."""
        return len(self._flying)

    def step(self) -> StepPlan:
        """One step: schedule, check the pool, return the oldest output if due."""
        output = self.scheduler.schedule()
        plan: StepPlan = plan_of(output)
        if hasattr(self.worker, "note"):
            self.worker.note(self.scheduler.requests)
        self.plans.append(plan)
        lengths = self.scheduler.tier_lengths
        holders = list(self.scheduler.requests)
        counts = {req_id: lengths.evicted(req_id) for req_id in holders}
        self.evicted.append({r: count for r, count in counts.items() if any(count)})
        self.scheduler.check_integrity()
        self._flying.append((output, sampled(self.scheduler, output)))
        if len(self._flying) >= self._depth:
            self.land()
        return plan

    def land(self) -> None:
        """Return the oldest step's output."""
        output, result = self._flying.popleft()
        if self.worker is not None:
            self.worker.run(output)
        outputs = self.scheduler.update_from_output(output, result)
        for of_client in outputs.values():
            for news in of_client.outputs:
                if news.finish_reason is not None:
                    self.finished[news.request_id] = str(news.finish_reason)
        self.scheduler.check_integrity()

    def run(self, limit: int = 5000) -> None:
        """Step until nothing is left."""
        while self.scheduler.has_requests():
            assert len(self.plans) < limit, "the schedule does not end"
            self.step()
        while self._flying:
            self.land()


def serve(scheduler: Any, *requests: Any) -> Driver:
    """Serve requests that arrive together."""
    for request in requests:
        scheduler.add_request(request)
    driver = Driver(scheduler)
    driver.run()
    return driver


def held_pages(scheduler: PyramidScheduler, req_id: str) -> dict[int, int]:
    """Pages of a request, by tier."""
    return {
        manager.kv_cache_spec.tier: len(manager.req_to_blocks.get(req_id, ()))
        for manager in scheduler.tier_managers
    }


def free_pages(scheduler: PyramidScheduler) -> int:
    """Free pages of the pool."""
    pages: int = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    return pages
