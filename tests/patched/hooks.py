"""One test for each of ``patches/``, by its name, of a vLLM that has them.

``tests/test_patches.py`` runs this file in a process that imports a patched copy, where
every test passes, and in one that imports the installed vLLM, where every test fails.
"""

import pickle
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.model_executor.layers.attention import attention
from vllm.v1 import kv_cache_spec_registry
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.worker import gpu_model_runner as v1
from vllm.v1.worker.gpu import attn_utils, block_table, model_states
from vllm.v1.worker.gpu import model_runner as v2

SHAPE: dict[str, Any] = {
    "block_size": 16,
    "num_kv_heads": 2,
    "head_size": 8,
    "dtype": torch.float32,
}


@dataclass(frozen=True, kw_only=True)
class KeyedSpec(FullAttentionSpec):
    """A spec with a field of its own."""

    key: int

    @property
    def group_key(self) -> int:
        return self.key


def test_registry_built_ins_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin registers before anybody has registered what is built in."""
    monkeypatch.setattr(kv_cache_spec_registry, "_REGISTRY_KVCACHESPEC_LIST", {})
    monkeypatch.setattr(KVCacheSpecRegistry, "_has_builtins", False, raising=False)
    KVCacheSpecRegistry.register(KeyedSpec, manager_class=FullAttentionManager)
    spec = FullAttentionSpec(**SHAPE)
    assert KVCacheSpecRegistry.get_manager_class(spec) is FullAttentionManager


def test_merge_keeps_subclass_fields() -> None:
    one, two = KeyedSpec(key=1, **SHAPE), KeyedSpec(key=2, **SHAPE)
    windowed = KeyedSpec(key=1, sliding_window=32, **SHAPE)
    assert KeyedSpec.merge([one, one]) == one
    assert KeyedSpec.merge([one, windowed]) == windowed
    with pytest.raises(AssertionError, match="same attention spec"):
        KeyedSpec.merge([one, two])


def test_explicit_group_key() -> None:
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(KeyedSpec, manager_class=FullAttentionManager)
    one, two = KeyedSpec(key=1, **SHAPE), KeyedSpec(key=2, **SHAPE)
    assert one.is_uniform_with_collection({"a": one, "b": one})
    assert not one.is_uniform_with_collection({"a": one, "b": two})


class NamedBackend(AttentionBackend):
    """Gives each layer a spec of its own."""

    @classmethod
    def customize_layer_spec(cls, spec: Any, layer_name: str, _config: Any) -> Any:
        return KeyedSpec(key=int(layer_name), **SHAPE)

    @staticmethod
    def get_supported_kernel_block_sizes(_spec: Any = None) -> list[int]:
        return [16]


def test_spec_by_layer_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both runners ask with the layer's name."""
    layer = SimpleNamespace(
        get_kv_cache_spec=lambda _: FullAttentionSpec(**SHAPE),
        get_attn_backend=lambda: NamedBackend,
    )
    layers = {"0": layer, "1": layer}
    config = MagicMock()
    config.attention_config.hisparse_config = None
    for module in (attn_utils, v1):
        monkeypatch.setattr(module, "get_layers_from_vllm_config", lambda *_: layers)
    runner = SimpleNamespace(vllm_config=config)
    for specs in (
        attn_utils.get_kv_cache_spec(config),
        v1.GPUModelRunner.get_kv_cache_spec(runner),
    ):
        assert {name: spec.key for name, spec in specs.items()} == {"0": 0, "1": 1}


def test_manager_truncate() -> None:
    """The pool has the blocks, workers get the news once, and nothing is cached any
    more."""
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
    # Gathered into a block that it got for that.
    others = pool.get_new_blocks(1)
    assert manager.truncate("a", 16, others) == 2
    assert manager.take_truncations() == {"a": [others[0].block_id]}
    manager.truncate("a", 16)
    manager.free("a")
    assert manager.take_truncations() == {}
    assert pool.get_num_free_blocks() == 8


def test_scheduler_output_truncations(tiny_llama: str) -> None:
    """The next step has them, and both runners cut their rows."""
    from tests.scheduling import make_request, make_stock_scheduler

    scheduler = make_stock_scheduler(tiny_llama, 16)
    scheduler.add_request(make_request("a", 100, 4))
    assert scheduler.schedule().kv_cache_truncations is None
    (manager,) = scheduler.kv_cache_manager.coordinator.single_type_managers
    manager.truncate("a", 40)
    output = scheduler.schedule()
    assert output.kv_cache_truncations == {"a": {0: 2}}
    output.kv_cache_truncations |= {"finished": {0: 1}}

    ids, table = [7, 8, 9, 10], MagicMock()
    batch = SimpleNamespace(req_id_to_index={"a": 3}, block_table=table)
    request = SimpleNamespace(block_ids=(ids,))
    first = SimpleNamespace(requests={"a": request}, input_batch=batch)
    v1.GPUModelRunner._truncate_block_tables(first, output)
    assert ids == [7, 8]
    table.add_row.assert_called_once_with(([7, 8],), 3)

    tables = block_table.BlockTables.__new__(block_table.BlockTables)
    tables.num_blocks = SimpleNamespace(np=np.full((2, 4), 4))
    rows = torch.full((4, 4), 5, dtype=torch.int32)
    tables.block_tables = [SimpleNamespace(gpu=rows)] * 2
    states = SimpleNamespace(req_id_to_index={"a": 3})
    second = SimpleNamespace(req_states=states, block_tables=tables)
    output.kv_cache_truncations["a"][1] = [9]
    v2.GPUModelRunner.truncate_block_tables(second, output)
    assert tables.num_blocks.np[:, 3].tolist() == [2, 1]
    assert rows[3].tolist() == [9, 5, 5, 5]


def test_scheduler_output_plugin_metadata() -> None:
    """What a scheduler puts there reaches a worker in another process."""
    output, other = SchedulerOutput.make_empty(), SchedulerOutput.make_empty()
    output.plugin_metadata["ours"] = {"kept": [1, 2]}
    assert pickle.loads(pickle.dumps(output)).plugin_metadata == output.plugin_metadata
    assert other.plugin_metadata == {}


class OneLess:
    """Metadata in which the second KV cache group has one token less."""

    def customize_common_attn_metadata(self, group_id: int, common: Any) -> Any:
        common = copy(common)
        common.seq_lens = common.seq_lens - group_id
        return common

    def get_extra_common_attn_kwargs(self, *_: Any) -> dict[str, Any]:
        return {}

    get_extra_attn_kwargs = get_extra_common_attn_kwargs


def attention_group(name: str) -> Any:
    """An attention group whose metadata is the lengths that its builder gets."""
    builder = SimpleNamespace(supports_update_block_table=False)
    return SimpleNamespace(
        layer_names=[name],
        kv_cache_spec=FullAttentionSpec(**SHAPE),
        get_metadata_builder=lambda _: builder,
        build_metadata=lambda common, _: common.seq_lens.tolist(),
    )


def test_metadata_by_group() -> None:
    """Builders of both runners get the lengths of their own KV cache group."""
    groups = [[attention_group("first")], [attention_group("second")]]
    starts, lengths = torch.tensor([0, 1, 2]), torch.tensor([5, 9])
    config, tables = MagicMock(), [torch.zeros(2, 4)] * 2
    spec = FullAttentionSpec(**SHAPE)
    config.kv_cache_groups = [SimpleNamespace(kv_cache_spec=spec)] * 2
    expected = {"first": [5, 9], "second": [4, 8]}
    slots = torch.zeros(2, 2)
    sizes = (2, 2, starts, starts, 1, lengths, 9)
    assert expected == attn_utils.build_attn_metadata(
        groups, *sizes, tables, slots, config, model_specific_attn_metadata=OneLess()
    )
    runner = MagicMock(
        attn_groups=groups,
        kv_cache_config=config,
        seq_lens=lengths,
        optimistic_seq_lens_cpu=lengths,
        query_start_loc=SimpleNamespace(gpu=starts, cpu=starts),
        is_mm_prefix_lm=False,
        dcp_world_size=1,
        speculative_config=None,
        model_specific_attn_metadata=OneLess(),
    )
    runner.input_batch.num_computed_tokens_cpu_tensor = lengths - 1
    runner.input_batch.num_prompt_tokens_cpu_tensor = lengths - 2
    runner.input_batch.block_table = [
        SimpleNamespace(get_device_tensor=lambda _, table=table: table)
        for table in tables
    ]
    runner.model_config.rswa_window = None
    runner.cache_config.use_replayssm = False
    runner._get_encoder_seq_lens.return_value = (None, None)
    build = v1.GPUModelRunner._build_attention_metadata
    metadata, _ = build(runner, 2, 2, 1, slot_mappings=slots)
    assert metadata == expected


def test_model_state_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resolver gets vLLM's choice and replaces it; registered twice, it runs once."""

    class State:
        def __init__(self, *_: Any) -> None: ...

    def resolver(_config: Any, _model: Any, cls: type) -> type:
        return type(f"Our{cls.__name__}", (cls,), {})

    monkeypatch.setattr(model_states, "_RESOLVERS", [])
    config, model = MagicMock(), SimpleNamespace(get_model_state_cls=lambda: State)
    config.model_config.enable_prompt_embeds = False
    arguments = (config, model, None, torch.device("cpu"))
    assert type(model_states.init_model_state(*arguments)) is State
    for _ in range(2):
        model_states.register_model_state_resolver(resolver)
    found = type(model_states.init_model_state(*arguments))
    assert (found.__name__, found.__base__) == ("OurState", State)


def test_requires_eager_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """ATTENTION excludes full graphs and MODEL excludes all graphs, on both runners."""
    from vllm.v1.core.sched.output import EagerScope

    asked: list[Any] = []

    def dispatch(_manager: Any, *sizes: Any, **how: Any) -> Any:
        asked.append((sizes[2], how["max_query_len"], how["need_eager"]))
        return SimpleNamespace(num_tokens=0), None

    monkeypatch.setattr(v2, "dispatch_cg_and_sync_dp", dispatch)
    runner = MagicMock(is_encoder_decoder=False, lora_config=None, pcp_manager=None)
    runner.gather_batch_req_state.return_value = (None, 1)
    for scope in EagerScope:
        output = SchedulerOutput.make_empty()
        output.num_scheduled_tokens, output.total_num_scheduled_tokens = {"a": 1}, 1
        output.requires_eager = scope
        v2.GPUModelRunner.execute_model(runner, output)
    assert asked == [(1, 1, False), (None, None, False), (None, None, True)]

    first = MagicMock()
    first.model_config.is_encoder_decoder = False
    first.vllm_config.parallel_config.data_parallel_size = 1
    first.vllm_config.observability_config.cudagraph_metrics = False
    first.cudagraph_dispatcher.dispatch.return_value = (CUDAGraphMode.NONE, MagicMock())
    v1.GPUModelRunner._determine_batch_execution_and_padding(
        first, 1, 1, np.ones(1), 1, False, force_eager_attention=True
    )
    how = first.cudagraph_dispatcher.dispatch.call_args.kwargs
    assert how["invalid_modes"] == {CUDAGraphMode.FULL}


def test_post_attention_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets the layer, its queries and the metadata, once attention has run."""
    order: list[Any] = []

    def note(name: str) -> Callable[..., None]:
        return lambda *what, **_: order.append((name, what))

    layer = SimpleNamespace(impl=SimpleNamespace(forward=note("attention")))
    layer.post_attention_hook = note("hook")
    context = ("metadata", layer, None, None)
    monkeypatch.setattr(attention, "get_attention_context", lambda _: context)
    query = torch.ones(1)
    attention.unified_attention_with_output(query, query, query, query, "layer")
    assert [name for name, _ in order] == ["attention", "hook"]
    assert order[1][1] == (layer, query, "metadata")
    layer.post_attention_hook = None
    attention.unified_attention_with_output(query, query, query, query, "layer")
    assert len(order) == 3
