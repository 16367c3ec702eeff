"""What the attention kernels of GPUs compute, in torch.

A stand-in takes a kernel's arguments and reads only what the kernel reads: the blocks
that hold a request's tokens, through the strides of the views it is given.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CALLS: Counter[str] = Counter()
FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Form:
    """How queries look at keys.

    Attributes:
        window: Keys seen before and after a query; below 0 without a limit.
        softcap: Bound of the scores, 0 for none.
        sinks: A score a head that takes its share of the weights, ``[num_heads]``.
    """

    scale: float
    causal: bool
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sinks: Tensor | None = None


def attend(query: Tensor, key: Tensor, value: Tensor, form: Form) -> Tensor:
    """Attention of one request, its queries being the last of its tokens.

    Args:
        query: ``[num_queries, num_heads, head_size]``.
        key: ``[num_keys, num_kv_heads, head_size]``.
        value: As ``key``.
    """
    num_kv_heads = key.shape[1]
    queries = query.transpose(0, 1).unflatten(0, (num_kv_heads, -1)).flatten(1, 2)
    scores = queries @ key.permute(1, 2, 0) * form.scale
    if form.softcap > 0:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    scores = scores.view(query.shape[1], query.shape[0], key.shape[0])
    hidden = ~_seen(query.shape[0], key.shape[0], form)
    scores.masked_fill_(hidden, -torch.inf)
    if form.sinks is not None:
        sinks = form.sinks.float()[:, None, None].expand(-1, query.shape[0], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[0]]
    # A query that sees nothing gives zeros.
    weights = weights.masked_fill(hidden.all(dim=-1, keepdim=True), 0.0)
    groups = query.shape[1] // num_kv_heads
    weights = weights.view(num_kv_heads, groups * query.shape[0], key.shape[0])
    output = weights @ value.transpose(0, 1)
    return output.view(query.shape[1], query.shape[0], -1).transpose(0, 1)


def _seen(num_queries: int, num_keys: int, form: Form) -> Tensor:
    """Whether a query sees a key, ``[num_queries, num_keys]``."""
    keys = torch.arange(num_keys)
    queries = torch.arange(num_keys - num_queries, num_keys)[:, None]
    left, right = form.window
    right = 0 if form.causal else right
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool)
    if right >= 0:
        seen &= keys <= queries + right
    if left >= 0:
        seen &= keys >= queries - left
    return seen


def read(cache: Tensor, block_ids: Tensor, num_tokens: int, scale: Any) -> Tensor:
    """A request's tokens in ``[blocks, block_size, heads, head_size]``, as floats.

    Only caches of 8 bits are scaled, as in the kernels.
    """
    tokens = cache[block_ids.long()].flatten(0, 1)[:num_tokens]
    return tokens.float() * scale if cache.dtype == FP8 else tokens.float()


def write(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """Put tokens into their slots; those with a negative slot into none."""
    CALLS["write"] += 1
    assert slot_mapping.dtype == torch.int64
    used = slot_mapping >= 0
    slots = slot_mapping[used]
    blocks, offsets = slots // key_cache.shape[1], slots % key_cache.shape[1]
    sides = (key, key_cache, k_scale), (value, value_cache, v_scale)
    for tokens, cache, scale in sides:
        # The slots say how many tokens there are: the rows may be padded.
        rows = tokens[used.nonzero()[:, 0]]
        if kv_cache_dtype.startswith("fp8"):
            limit = torch.finfo(FP8).max
            rows = (rows.float() / scale).clamp(-limit, limit).to(FP8)
            rows, cache = rows.view(torch.uint8), cache.view(torch.uint8)
        cache[blocks, offsets] = rows


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    seqused_k: Tensor,
    max_seqlen_k: int,
    block_table: Tensor,
    form: Form,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
) -> None:
    """Attention of a batch; caches are ``[blocks, block_size, heads, head_size]``."""
    for name, array in {
        "cu_seqlens_q": cu_seqlens_q,
        "seqused_k": seqused_k,
        "block_table": block_table,
    }.items():
        assert array.dtype == torch.int32, name
        assert array.stride(-1) == 1, name
    lengths = seqused_k.tolist()
    starts = cu_seqlens_q.tolist()
    assert len(lengths) == len(starts) - 1 <= len(block_table)
    for index, length in enumerate(lengths):
        rows = slice(starts[index], starts[index + 1])
        if rows.stop == rows.start:  # padding
            continue
        assert rows.stop - rows.start <= max_seqlen_q, "max_seqlen_q is no bound"
        assert length <= max_seqlen_k, "max_seqlen_k is no bound"
        blocks = block_table[index, : -(-length // k.shape[1])]
        key = read(k, blocks, length, _per_head(k_descale, index))
        value = read(v, blocks, length, _per_head(v_descale, index))
        query = q[rows].float()
        if q_descale is not None and q.dtype == FP8:
            scale = q_descale.expand(len(lengths), k.shape[2])[index]
            query *= scale.repeat_interleave(q.shape[1] // k.shape[2])[:, None]
        result = attend(query, key, value, form)
        out[rows].copy_(result.view_as(out[rows]))


def _per_head(descale: Tensor | None, index: int) -> Any:
    """A request's scales, ``[num_kv_heads, 1]``."""
    return 1.0 if descale is None else descale[index].float()[:, None]


def _refuse(arguments: dict[str, Any]) -> None:
    """Refuse what a stand-in does not compute."""
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        raise NotImplementedError(f"the stand-in does not compute {', '.join(given)}")


def _is_causal(causal: Any) -> bool:
    if not isinstance(causal, bool):
        raise NotImplementedError("the stand-in takes causal as a bool")
    return causal


def unified_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    sinks: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    output_scale: Tensor | None = None,
    qq_bias: Tensor | None = None,
    mm_prefix_range: Tensor | None = None,
    rswa_prefix_lens: Tensor | None = None,
    k_scale_cache: Tensor | None = None,
    chunk_lookback: int = -1,
    **rest: Any,
) -> None:
    """In place of the kernel of ``TRITON_ATTN``."""
    CALLS["unified_attention"] += 1
    _refuse(
        {
            "alibi_slopes": alibi_slopes,
            "output_scale": output_scale,
            "qq_bias": qq_bias,
            "mm_prefix_range": mm_prefix_range,
            "rswa_prefix_lens": rswa_prefix_lens,
            "k_scale_cache": k_scale_cache,
            "chunk_lookback": None if chunk_lookback < 0 else chunk_lookback,
        }
    )
    form = Form(softmax_scale, _is_causal(causal), window_size, softcap, sinks)
    paged_attention(q, k, v, out, form=form, **_paged(rest))


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    out: Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: list[int] | None = None,
    softcap: float = 0.0,
    s_aux: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    dynamic_causal: Tensor | None = None,
    mask_mod: Any = None,
    cu_seqlens_k: Tensor | None = None,
    return_softmax_lse: bool = False,
    **rest: Any,
) -> Tensor:
    """In place of the kernel of ``FLASH_ATTN``, over a paged cache."""
    CALLS["flash_attn_varlen_func"] += 1
    _refuse(
        {
            "alibi_slopes": alibi_slopes,
            "dynamic_causal": dynamic_causal,
            "mask_mod": mask_mod,
            "cu_seqlens_k": cu_seqlens_k,
            "return_softmax_lse": return_softmax_lse or None,
        }
    )
    window = (-1, -1) if window_size is None else (window_size[0], window_size[1])
    form = Form(softmax_scale, _is_causal(causal), window, softcap, s_aux)
    paged_attention(q, k, v, out, form=form, **_paged(rest))
    return out


def _paged(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that say where the tokens are; the others only tune a kernel."""
    names = (
        "cu_seqlens_q",
        "max_seqlen_q",
        "seqused_k",
        "max_seqlen_k",
        "block_table",
        "q_descale",
        "k_descale",
        "v_descale",
    )
    return {name: arguments[name] for name in names}
