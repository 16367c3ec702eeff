"""Which positions a worker's layers hold of each request, followed step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch

from pyramid_vllm.kernels.spans import Spans
from pyramid_vllm.policy import KVPolicyError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from pyramid_vllm.attention.layout import KVViews
    from pyramid_vllm.plan import StepPlan
    from pyramid_vllm.worker.rows import BatchRows
    from pyramid_vllm.worker.step import TierStep


class RecordedLayer(Protocol):
    """What the record reads of a layer."""

    index: int
    tier: int
    cache: KVViews


class KeptRecord:
    """Original positions of the tokens in the cache, by request, layer and KV head.

    Followed from the indices that the layers choose by; those are of what a layer
    holds, so that each choice is applied to what the one before has left. A request
    that ran before the record began is left out once it has evicted tokens, until it
    starts afresh; one that finished stays.

    Args:
        layers: the worker's, first to last.
    """

    def __init__(self, layers: Sequence[RecordedLayer]) -> None:
        self._layers = layers
        self._place = {layer.index: place for place, layer in enumerate(layers)}
        self._held: dict[str, list[torch.Tensor]] = {}
        """By layer: ``[num_kv_heads, num_held]``, int64, in the order of the cache."""
        self._ended: set[str] = set()
        """Finished or preempted: an id that is seen again restarts its record."""
        self._evicted: dict[tuple[str, int], torch.Tensor] = {}
        self._pruned: dict[tuple[str, int], torch.Tensor] = {}

    def evict(self, req_id: str, layer: int, kept: torch.Tensor) -> None:
        """Note what a layer keeps of all that it holds in this step.

        Args:
            req_id: the request.
            layer: the layer's index.
            kept: ``[1 or num_kv_heads, num_kept]``, int64, ascending.
        """
        self._evicted[req_id, layer] = kept

    def prune(self, tier: int, step: TierStep, kept: torch.Tensor) -> None:
        """Note which rows of a tier the next one computes.

        Args:
            tier: the tier that chose.
            step: the current step.
            kept: ``[num_scores]``, int32: of each window the chunk's rows that stay.
        """
        for batch in step.batches:
            spans = dict(zip(Spans._fields, batch.on_host[2, tier], strict=True))
            for column, window in enumerate(batch.windows):
                count, start = spans["num_kept"][column], spans["offset"][column]
                if count < spans["num_held"][column]:
                    rows = kept[start : start + count].long().cpu()
                    self._pruned[window.req_id, tier + 1] = rows

    def end_forward(self, plan: StepPlan, rows: BatchRows) -> None:
        """Append the step's tokens, then take away those that were evicted.

        Raises:
            RuntimeError: a layer holds another number of tokens than its lengths say.
        """
        self._ended |= plan.released
        for row, req_id in enumerate(rows.req_ids):
            self._follow(req_id, row, rows)
        self._evicted.clear()
        self._pruned.clear()

    def _follow(self, req_id: str, row: int, rows: BatchRows) -> None:
        evicted = rows.num_evicted[:, row].tolist()
        # The first tier computes every row.
        end = int(rows.seq_lens[0, row]) + evicted[0]
        start = end - int(rows.num_rows[0, row])
        if req_id in self._ended:
            self._ended.discard(req_id)
            self._held.pop(req_id, None)
        if req_id not in self._held:
            if any(evicted):
                return
            self._held[req_id] = [
                torch.arange(start).expand(layer.cache.key.shape[1], -1)
                for layer in self._layers
            ]
        chunks = [torch.arange(start, end)]
        for tier in range(1, len(evicted)):
            kept = self._pruned.get((req_id, tier))
            chunks.append(chunks[-1] if kept is None else chunks[-1][kept])
        lengths = rows.seq_lens[:, row].tolist()
        held = self._held[req_id]
        for i, layer in enumerate(self._layers):
            length, chunk = lengths[layer.tier], chunks[layer.tier]
            after = torch.cat((held[i], chunk.expand(len(held[i]), -1)), dim=1)
            if after.shape[1] != length:
                raise RuntimeError(
                    f"KV policy: layer {layer.index} holds {length} tokens of "
                    f"{req_id}, the record has {after.shape[1]}"
                )
            kept = self._evicted.get((req_id, layer.index))
            held[i] = after if kept is None else after.gather(1, _by_head(kept, after))

    def compress(self, req_id: str, layer: int, kept: torch.Tensor) -> None:
        """Take away what a layer evicts after the forward pass: arguments as of
        ``evict``."""
        held = self._held.get(req_id)
        if held is not None:
            place = self._place[layer]
            held[place] = held[place].gather(1, _by_head(kept, held[place]))

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for ``collective_rpc``.

        Returns:
            ``block_size``, ``tiers``: of each layer, and ``held``: by request, layer
            and KV head the positions in the cache, in its order.
        """
        return {
            "block_size": self._layers[0].cache.key.shape[2],
            "tiers": [layer.tier for layer in self._layers],
            "held": {
                req_id: [positions.tolist() for positions in held]
                for req_id, held in self._held.items()
            },
        }


def _by_head(kept: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
    return kept.expand(len(held), -1)


def check_recordable(layers: Sequence[Any], vllm_config: VllmConfig) -> None:
    """Refuse what the record does not follow.

    Raises:
        KVPolicyError: names it.
    """
    if not layers:
        raise KVPolicyError("kv_policy has no record: no layer of the model is tiered")
    num_ranks = vllm_config.parallel_config.tensor_parallel_size
    if num_ranks > 1:
        raise KVPolicyError(
            "kv_policy does not record what is kept with "
            f"tensor_parallel_size={num_ranks}: valid is 1"
        )
    if vllm_config.speculative_config is not None:
        raise KVPolicyError(
            "kv_policy does not record what is kept with speculative_config: valid is "
            "none"
        )
