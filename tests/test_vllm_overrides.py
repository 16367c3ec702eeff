"""Every vLLM name that we override still is what it was when we read it.

A failing line means: read the new source, mend the override, then write the new digest.
"""

import hashlib
import importlib
import inspect

import pytest
import vllm

#: Overridden name -> start of the SHA-256 of its source, by vLLM version.
DIGESTS = {
    "0.32.0": {
        "vllm.engine.arg_utils:EngineArgs.add_cli_args": "0b7444570415",
        "vllm.engine.arg_utils:EngineArgs.from_cli_args": "51a013f61829",
        "vllm.engine.arg_utils:EngineArgs.create_engine_config": "b9b94288f46d",
        "vllm.engine.arg_utils:AsyncEngineArgs": "17135bafcc6c",
        "vllm.v1.core.sched.async_scheduler:AsyncScheduler": "157edcf67cd3",
        "vllm.v1.core.sched.scheduler:Scheduler.schedule": "da4f2cf2fc39",
        "vllm.v1.core.sched.scheduler:Scheduler.add_request": "fa2b51cd04a9",
        "vllm.v1.core.sched.scheduler:Scheduler._reserve_prefill_lookahead": "c214e49d7610",
        "vllm.v1.core.sched.scheduler:Scheduler._preempt_request": "4113f5de8a84",
        "vllm.v1.core.sched.scheduler:Scheduler._update_after_schedule": "2b527eb8070d",
        "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.get_num_blocks_to_allocate": "f50d7c5b5451",
        "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.allocate_new_blocks": "b8edfbf2e166",
        "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.pop_blocks_for_free": "bc0da22a739b",
        "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.free": "8293f02e5c2b",
        "vllm.v1.core.single_type_kv_cache_manager:register_all_kvcache_specs": "0c0dbba790f8",
        "vllm.v1.core.sched.scheduler:Scheduler._get_local_prefix_cache_hit": "3495ddb7de46",
        "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": "85b29db96051",
        "vllm.v1.core.sched.scheduler:Scheduler.has_requests": "6529a9d59f78",
        "vllm.v1.core.sched.scheduler:Scheduler.finish_requests": "b7a4ef7b8aa5",
        "vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager.cache_blocks": "981125e4caaf",
        "vllm.v1.core.single_type_kv_cache_manager:SingleTypeKVCacheManager.cache_blocks": "973ea9fec074",
        "vllm.v1.core.kv_cache_manager:KVCacheManager.allocate_slots": "8c60d937fd9e",
        "vllm.v1.core.kv_cache_manager:KVCacheManager.get_computed_blocks": "77f434d88d57",
        "vllm.v1.core.kv_cache_coordinator:HybridKVCacheCoordinator.find_longest_cache_hit": "0d109ac725cf",
        "vllm.v1.core.block_pool:BlockPool.cache_full_blocks": "5fbbcc0cf6eb",
        "vllm.v1.core.block_pool:BlockPool.evict_blocks": "0aa2e3002a37",
        "vllm.v1.core.block_pool:BlockPool.get_new_blocks": "ab54592edae4",
        "vllm.v1.core.block_pool:BlockPool.free_blocks": "f12f94bc787c",
        "vllm.v1.engine.input_processor:InputProcessor.process_inputs": "e22b5f772979",
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._bookkeeping_sync": "13c3e81003a7",
        "vllm.v1.core.kv_cache_utils:get_kv_cache_groups": "8dda9428a81d",
        "vllm.v1.core.kv_cache_utils:_get_kv_cache_groups_uniform_page_size": "79a07fdd7261",
        "vllm.v1.kv_cache_interface:FullAttentionSpec": "f96924ee635d",
        "vllm.v1.kv_cache_interface:KVCacheSpec.is_uniform_with_collection": "a1462ca435a9",
        "vllm.v1.attention.selector:_cached_get_attn_backend": "61943e24c20e",
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend": "77bf222fdf19",
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder": "7594b0d1e049",
        "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl": "fa7deca5db28",
        "vllm.v1.worker.cpu_worker:CPUWorker": "df55680e0131",
        "vllm.v1.worker.gpu_worker:Worker.execute_model": "782126ba48e7",
        "vllm.v1.worker.gpu_worker:Worker.get_kv_cache_spec": "9a301e556c2f",
        "vllm.v1.worker.gpu_worker:Worker.initialize_from_config": "71b1fbd04807",
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._update_states": "326599f31b27",
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._build_attention_metadata": "6015ffa2b3ec",
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_slot_mappings": "a7830268c258",
        "vllm.v1.worker.block_table:BlockTable": "22208a742d8c",
    }
}
VERSION = vllm.__version__.split("+")[0]


def source_digest(path: str) -> str:
    module_name, _, qualified = path.partition(":")
    target = importlib.import_module(module_name)
    for part in qualified.split("."):
        target = inspect.getattr_static(target, part)
    if isinstance(target, classmethod | staticmethod):
        target = target.__func__
    source = inspect.getsource(inspect.unwrap(target))
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def test_this_version_was_read() -> None:
    assert VERSION in DIGESTS


@pytest.mark.parametrize("path", DIGESTS.get(VERSION, {}))
def test_overridden_source_is_unchanged(path: str) -> None:
    assert source_digest(path) == DIGESTS[VERSION][path]
