"""vLLM's hooks of ``patches/``, each by itself, and engines that use nothing else.

They run on a patched vLLM alone: ``scripts/check-patches`` does that.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec

from pyramid_vllm.native import SWITCH, uses_native_hooks
from pyramid_vllm.plan import PLAN_ATTRIBUTE, plan_of
from tests.engines import (
    close,
    generate,
    make_llm,
    random_prompts,
    scheduler_of,
    worker_of,
)

pytestmark = pytest.mark.skipif(
    not uses_native_hooks(),
    reason=f"{SWITCH} is not set: scripts/check-patches sets it",
)

SHAPE: dict[str, Any] = {
    "block_size": 16,
    "num_kv_heads": 2,
    "head_size": 8,
    "dtype": torch.float32,
}
POLICY = {
    "base": "pyramid",
    "tiers": 3,
    "recent": 24,
    "min_context": 40,
    "retention": 0.4,
    "prune_from": 2,
}


@dataclass(frozen=True, kw_only=True)
class KeyedSpec(FullAttentionSpec):
    """A spec with a field of its own."""

    key: int

    @property
    def group_key(self) -> int:
        return self.key


def test_a_plugin_may_register_first() -> None:
    """In a process in which nobody has registered what is built in."""
    code = """
from tests.test_native_hooks import KeyedSpec, SHAPE
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
KVCacheSpecRegistry.register(KeyedSpec, manager_class=FullAttentionManager)
print(KVCacheSpecRegistry.get_manager_class(FullAttentionSpec(**SHAPE)).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
        check=True,
    )
    assert done.stdout.split()[-1] == "FullAttentionManager"


def test_merged_specs_keep_the_fields_of_subclasses() -> None:
    one, two = KeyedSpec(key=1, **SHAPE), KeyedSpec(key=2, **SHAPE)
    windowed = KeyedSpec(key=1, sliding_window=32, **SHAPE)
    assert KeyedSpec.merge([one, one]) == one
    assert KeyedSpec.merge([one, windowed]) == windowed
    with pytest.raises(AssertionError, match="same attention spec"):
        KeyedSpec.merge([one, two])


def test_layers_of_different_keys_are_not_uniform() -> None:
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    KVCacheSpecRegistry.register(KeyedSpec, manager_class=FullAttentionManager)
    one, two = KeyedSpec(key=1, **SHAPE), KeyedSpec(key=2, **SHAPE)
    assert one.is_uniform_with_collection({"a": one, "b": one})
    assert not one.is_uniform_with_collection({"a": one, "b": two})


def test_a_manager_gives_up_a_part_of_a_request() -> None:
    """The pool has the blocks, workers are told once, nothing is cached any more."""
    pool = BlockPool(num_gpu_blocks=9, enable_caching=True, hash_block_size=16)
    spec = FullAttentionSpec(**SHAPE)
    manager = FullAttentionManager(spec, pool, True, 0, scheduler_block_size=16)
    blocks = manager.allocate_new_blocks("a", 80, 80)
    assert (len(blocks), pool.get_num_free_blocks()) == (5, 3)
    assert manager.truncate("a", 20) == 3
    assert manager.req_to_blocks["a"] == blocks[:2]
    assert pool.get_num_free_blocks() == 6
    assert manager.take_truncations() == {"a": 2}
    assert manager.take_truncations() == {}
    manager.cache_blocks(SimpleNamespace(request_id="a"), 32, replay_boundaries=())
    assert not any(block.block_hash for block in blocks)
    # Gathered into blocks that it got beside them.
    others = pool.get_new_blocks(1)
    assert manager.truncate("a", 16, others) == 2
    assert manager.take_truncations() == {"a": [others[0].block_id]}
    manager.truncate("a", 16)
    manager.free("a")
    assert manager.take_truncations() == {}
    assert pool.get_num_free_blocks() == 8


def test_a_step_has_what_the_scheduler_tells() -> None:
    output = SchedulerOutput.make_empty()
    assert (output.plugin_metadata, output.kv_cache_truncations) == ({}, None)
    assert output.requires_eager == 0


@pytest.fixture(scope="module")
def llm(tiny_llama: str) -> Iterator[Any]:
    """An engine that evicts and prunes."""
    llm = make_llm(tiny_llama, kv_policy=POLICY)
    yield llm
    close(llm)


def test_no_override_is_in_place(llm: Any) -> None:
    """Backends, builders, specs, metadata and dispatch are vLLM's own."""
    worker, runner = worker_of(llm), worker_of(llm).model_runner
    layers = worker.compilation_config.static_forward_context.values()
    for layer in layers:
        assert type(layer.impl).__module__.startswith("vllm.")
        assert layer.post_attention_hook is not None
    for groups in runner.attn_groups:
        for group in groups:
            assert type(group.get_metadata_builder()).__module__.startswith("vllm.")
    replaced = {
        name for name in vars(runner) if callable(getattr(type(runner), name, 0))
    }
    assert replaced == {"execute_model"}  # the guard


def test_the_hooks_do_the_work(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans travel among the metadata; rows are cut by what the step behind says."""
    scheduler, outputs = scheduler_of(llm), []
    schedule = scheduler.schedule

    def watch(*args: Any) -> Any:
        outputs.append(schedule(*args))
        return outputs[-1]

    monkeypatch.setattr(scheduler, "schedule", watch)
    generate(llm, random_prompts([200, 300]), 4)
    plans = [plan_of(output) for output in outputs]
    assert all(plan is not None for plan in plans)
    assert not any(hasattr(output, PLAN_ATTRIBUTE) for output in outputs)
    pruning = [i for i, plan in enumerate(plans) if plan and plan.prunes]
    assert pruning
    for i, output in enumerate(outputs):
        assert (output.requires_eager == 2) == (i in pruning)
    cut = [i for i, plan in enumerate(plans) if plan and plan.cache_lengths]
    told = [i for i, output in enumerate(outputs) if output.kv_cache_truncations]
    assert told == [i + 1 for i in cut]
    worker = worker_of(llm)
    assert worker.tier_state.counters.num_pages_freed > 0
