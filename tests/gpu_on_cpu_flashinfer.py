"""A ``flashinfer`` of two wrappers, which compute in torch what they have planned.

A run reads nothing but what ``plan()`` was given, and the pages: a wrong plan gives
wrong attention, as it does on a GPU. The plan copies what the library takes from the
CPU, but not the pages' numbers, which it takes from the GPU.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.gpu_on_cpu_kernels import CALLS, Form, attend, read


class PagedWrapper:
    """What both wrappers share: a plan, and attention over pages."""

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        *,
        use_cuda_graph: bool = False,
        **_: Any,
    ) -> None:
        if kv_layout not in ("NHD", "HND"):
            raise ValueError(f"kv_layout is {kv_layout!r}; valid: NHD, HND")
        self._kv_layout = kv_layout
        self._int_workspace_buffer = SimpleNamespace()  # where it keeps its plan
        self.is_cuda_graph_enabled = use_cuda_graph

    def reset_workspace_buffer(
        self, float_workspace_buffer: Tensor, int_workspace_buffer: Any
    ) -> None:
        self._int_workspace_buffer = int_workspace_buffer

    def _keep(
        self,
        qo_indptr: Tensor,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        page_size: int,
        num_qo_heads: int,
        num_kv_heads: int,
        causal: bool,
        sm_scale: float,
        window_left: int,
        logits_soft_cap: float | None,
        seq_lens: Tensor | None,
    ) -> None:
        for name, array in (("qo_indptr", qo_indptr), ("indptr", indptr)):
            assert array.device.type == "cpu", name
            assert array.dtype == torch.int32, name
        lengths = get_seq_lens(indptr, last_page_len, page_size)
        assert seq_lens is None or torch.equal(seq_lens, lengths)
        assert len(qo_indptr) == len(indptr) == len(last_page_len) + 1
        plan = self._int_workspace_buffer
        plan.starts, plan.pages = qo_indptr.tolist(), indptr.tolist()
        plan.lengths, self._indices = lengths.tolist(), indices
        self._num_heads = num_qo_heads, num_kv_heads
        self._page_size, self._causal = page_size, causal
        self._sm_scale, self._window_left = sm_scale, window_left
        self._logits_soft_cap = logits_soft_cap or 0.0

    def run(
        self,
        q: Tensor,
        paged_kv_cache: tuple[Tensor, Tensor],
        *,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: Tensor,
        kv_cache_sf: None = None,
        sinks: Tensor | None = None,
        return_lse: bool = False,
    ) -> Tensor:
        CALLS[f"{type(self).__name__}.run"] += 1
        assert kv_cache_sf is None
        assert not return_lse
        caches = paged_kv_cache
        if self._kv_layout == "HND":
            caches = tuple(cache.transpose(1, 2) for cache in caches)
        num_qo_heads, num_kv_heads = self._num_heads
        shape = self._page_size, num_kv_heads
        assert all(cache.shape[1:3] == shape for cache in caches), "not the layout"
        plan = self._int_workspace_buffer
        assert q.shape[:2] == out.shape[:2] == (plan.starts[-1], num_qo_heads)
        window = self._window_left, -1
        form = Form(self._sm_scale, self._causal, window, self._logits_soft_cap, sinks)
        for index, length in enumerate(plan.lengths):
            rows = slice(plan.starts[index], plan.starts[index + 1])
            pages = self._indices[plan.pages[index] : plan.pages[index + 1]]
            key, value = (
                read(cache, pages, length, scale)
                for cache, scale in zip(caches, (k_scale, v_scale), strict=True)
            )
            query = q[rows].float() * (1.0 if q_scale is None else q_scale)
            out[rows].copy_(attend(query, key, value, form))
        return out


class BatchPrefillWithPagedKVCacheWrapper(PagedWrapper):
    """Requests of any number of queries."""

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        sm_scale: float,
        window_left: int,
        logits_soft_cap: float | None,
        seq_lens: Tensor | None = None,
        **_: Any,
    ) -> None:
        CALLS["prefill_plan"] += 1
        self._keep(
            qo_indptr,
            paged_kv_indptr,
            paged_kv_indices,
            paged_kv_last_page_len,
            page_size,
            num_qo_heads,
            num_kv_heads,
            causal,
            sm_scale,
            window_left,
            logits_soft_cap,
            seq_lens,
        )


class BatchDecodeWithPagedKVCacheWrapper(PagedWrapper):
    """Requests of one query each."""

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        sm_scale: float,
        window_left: int,
        logits_soft_cap: float | None,
        seq_lens: Tensor | None = None,
        **_: Any,
    ) -> None:
        CALLS["decode_plan"] += 1
        self._keep(
            torch.arange(len(indptr), dtype=torch.int32),
            indptr,
            indices,
            last_page_len,
            page_size,
            num_qo_heads,
            num_kv_heads,
            False,
            sm_scale,
            window_left,
            logits_soft_cap,
            seq_lens,
        )


def get_seq_lens(indptr: Tensor, last_page_len: Tensor, page_size: int) -> Tensor:
    """Lengths of requests from their pages."""
    full = (indptr[1:] - indptr[:-1] - 1).clamp(min=0) * page_size
    return (full + last_page_len).to(torch.int32)


def fast_decode_plan(
    wrapper: BatchDecodeWithPagedKVCacheWrapper, **arguments: Any
) -> None:
    """What a wrapper of a CUDA graph plans from its second time on."""
    wrapper.plan(**arguments)


def install() -> None:
    """Let ``import flashinfer`` find the wrappers."""
    if "flashinfer" in sys.modules:
        return

    def missing(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("the stand-in has only the paged wrappers")

    class Missing:
        __init__ = missing

    contents: dict[str, dict[str, Any]] = {
        "flashinfer": {
            "BatchPrefillWithPagedKVCacheWrapper": BatchPrefillWithPagedKVCacheWrapper,
            "BatchDecodeWithPagedKVCacheWrapper": BatchDecodeWithPagedKVCacheWrapper,
            "BatchAttentionWithAttentionSinkWrapper": type("Sinks", (Missing,), {}),
            "BatchPrefillWithRaggedKVCacheWrapper": type("Ragged", (Missing,), {}),
            "get_seq_lens": get_seq_lens,
            "nvfp4_quantize_append_paged_kv_cache_with_slot_mapping": missing,
        },
        "flashinfer.decode": {
            "fast_decode_plan": fast_decode_plan,
            "trtllm_batch_decode_with_kv_cache": missing,
        },
        "flashinfer.prefill": {"trtllm_batch_context_with_kv_cache": missing},
        "flashinfer.utils": {"FP4Tensor": Missing},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=name == "flashinfer")
        module.__dict__.update(values)
        sys.modules[name] = module
