"""How long a step lasts: a roofline of what it reads and computes.

The roofline model is Williams, Waterman and Patterson's (CACM 52(4), 2009): a kernel
takes the longer of its time for bytes and its time for FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pyramid_vllm.plan import GeneratedWindow, PromptWindow, StepPlan
from pyramid_vllm.policy import PolicyConfig, Queries
from pyramid_vllm.tools.simulate.device import Device
from pyramid_vllm.tools.simulate.model import ModelWork

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
#: A selection writes scores and reads them this often, four bytes each.
_SELECT_PASSES = 4
_SCORE_BYTES = 4


@dataclass
class StepWork:
    """The work of one device in one step, in FLOPs and bytes."""

    weight_bytes: float = 0.0
    linear_flops: float = 0.0
    prompt_flops: float = 0.0
    """Attention of sequences that compute more than one row."""
    prompt_bytes: float = 0.0
    """Keys and values that they read, and all that are written."""
    decode_flops: float = 0.0
    decode_bytes: float = 0.0
    score_flops: float = 0.0
    score_bytes: float = 0.0
    move_bytes: float = 0.0
    """Bytes of selection and compaction."""
    num_compactions: float = 0.0
    """Sequences times layers that compact."""
    link_bytes: float = 0.0
    num_all_reduces: float = 0.0
    num_sequences: float = 0.0


def step_seconds(work: StepWork, model: ModelWork, device: Device) -> Any:
    """Seconds of a step, or ``[num_steps]`` where the fields of the work are that.

    Args:
        work: of one step, or of several.
        model: for the dtype of its matrices, which the device has a peak for.
        device: its peaks and efficiencies.
    """
    larger = np.maximum
    share = device.efficiency
    peak = device.tflops[model.dtype] * 1e12
    bandwidth = device.bandwidth_gb_s * 1e9
    reads, moves = bandwidth * share.bandwidth, bandwidth * share.move_bandwidth
    attends, scores = peak * share.attention_flops, peak * share.score_flops
    return (
        share.step_ms * 1e-3
        + work.num_sequences * share.sequence_us * 1e-6
        + larger(work.weight_bytes / reads, work.linear_flops / (peak * share.flops))
        + larger(work.prompt_bytes / reads, work.prompt_flops / attends)
        + larger(work.decode_bytes / reads, work.decode_flops / attends)
        + larger(work.score_bytes / moves, work.score_flops / scores)
        + work.move_bytes / moves
        + work.num_compactions * share.compaction_us * 1e-6
        + work.link_bytes / (device.link_gb_s * 1e9 * share.link)
        + work.num_all_reduces * share.all_reduce_us * 1e-6
    )


class WorkModel:
    """Turns a scheduled step into the work of one device.

    Args:
        model: the sizes.
        tier_sizes: layers of each tier; of stock vLLM one tier of all full-attention
            layers.
        configs: by name, the policies that requests have; how each scores.
    """

    def __init__(
        self,
        model: ModelWork,
        tier_sizes: tuple[int, ...],
        configs: dict[str, PolicyConfig],
    ) -> None:
        self._model, self._configs = model, configs
        self._sizes = np.array(tier_sizes, dtype=np.float64)
        self._evicted: dict[str, Floats] = {}
        """Evicted tokens of each request, by tier."""
        self._windows = [window for window in model.windows if window is not None]
        devices = model.tensor_parallel
        self._heads = model.num_heads / devices
        # A query and a key, then a weight and a value: a multiply and an add each.
        self._pair_flops = 4.0 * model.head_size * self._heads

    def step(
        self,
        before: Ints,
        rows: Ints,
        plan: StepPlan | None,
        saved_tokens: float = 0.0,
        req_ids: Sequence[str] = (),
    ) -> StepWork:
        """The work of a step.

        Args:
            before: ``[num_requests]``, computed tokens of each scheduled request.
            rows: ``[num_requests]``, tokens that the step computes.
            plan: the policy's; None: stock vLLM.
            saved_tokens: tokens times full-attention layers whose keys and values
                are read once for several sequences.
            req_ids: ids of the scheduled requests; needed with a plan.
        """
        work = StepWork(num_sequences=float(len(rows)))
        num_tiers = len(self._sizes)
        held = np.repeat(before[:, None].astype(np.float64), num_tiers, axis=1)
        tier_rows = np.repeat(rows[:, None].astype(np.float64), num_tiers, axis=1)
        if plan is not None:
            for req_id in plan.released:
                self._evicted.pop(req_id, None)
            for req_id, num_evicted in plan.begun.items():
                self._evicted[req_id] = np.array(num_evicted, np.float64)
            index = {req_id: i for i, req_id in enumerate(req_ids)}
            for req_id in self._evicted.keys() & index.keys():
                held[index[req_id]] -= self._evicted[req_id]
            for window in plan.windows:
                at = index[window.req_id]
                if window.num_rows is not None:
                    tier_rows[at] = window.num_rows
                self._add_window(work, window, held[at] + tier_rows[at])
            for group in plan.generated:
                self._add_group(work, group)
            for req_id, num_tokens, num_kept in plan.compactions:
                self._evicted[req_id] = num_tokens - np.array(num_kept, np.float64)
        self._add_linear(work, tier_rows, len(rows))
        self._add_attention(work, held, tier_rows, before, rows)
        work.decode_bytes -= saved_tokens * self._model.token_bytes
        self._add_links(work, float(rows.sum()))
        return work

    def _add_linear(
        self, work: StepWork, tier_rows: Floats, num_sequences: int
    ) -> None:
        model, devices = self._model, self._model.tensor_parallel
        of_tier = tier_rows.sum(axis=0)
        # Layers with a sliding window compute every row, as the first tier does.
        layer_rows = float(of_tier @ self._sizes) + of_tier[0] * len(self._windows)
        logits = 2.0 * model.head_params * num_sequences
        work.linear_flops = (layer_rows * model.layer_flops + logits) / devices
        layers = model.num_layers * model.layer_bytes(float(of_tier[0]))
        head = model.head_params * model.dtype_bytes
        work.weight_bytes = (layers + head) / devices

    def _add_attention(
        self, work: StepWork, held: Floats, tier_rows: Floats, before: Ints, rows: Ints
    ) -> None:
        token_bytes = self._model.token_bytes
        pairs = (tier_rows * held + tier_rows * (tier_rows + 1) / 2) @ self._sizes
        read = (held + tier_rows) @ self._sizes
        written = float((tier_rows @ self._sizes).sum())
        for window in self._windows:
            seen = np.minimum(before, window)
            pairs += rows * np.minimum(seen + (rows + 1) / 2, window)
            read += np.minimum(before + rows, window + rows)
            written += float(rows.sum())
        is_decode = rows == 1
        work.decode_flops = float(pairs[is_decode].sum()) * self._pair_flops
        work.decode_bytes = float(read[is_decode].sum()) * token_bytes
        work.prompt_flops = float(pairs[~is_decode].sum()) * self._pair_flops
        work.prompt_bytes = (float(read[~is_decode].sum()) + written) * token_bytes

    def _add_links(self, work: StepWork, num_rows: float) -> None:
        """Two all-reduces a layer; a ring sends 2 (N - 1) / N of the bytes."""
        model, devices = self._model, self._model.tensor_parallel
        if devices == 1:
            return
        work.num_all_reduces = 2.0 * model.num_layers
        of_one = num_rows * model.hidden_size * model.dtype_bytes
        work.link_bytes = work.num_all_reduces * of_one * 2 * (devices - 1) / devices

    def _add_window(self, work: StepWork, window: PromptWindow, held: Floats) -> None:
        """Scores, selection and compaction of a prompt's step."""
        config = self._configs[window.policy]
        queries = config.scored_queries
        if queries is Queries.ALL:
            self._add_scores(work, window.num_queries, float(held @ self._sizes))
        if window.num_kept is None:
            return
        kept = np.array(window.num_kept, dtype=np.float64)
        evicts = kept < held
        layers = self._sizes * evicts
        candidates = float(held @ layers)
        if queries is Queries.WINDOW:
            self._add_scores(work, window.num_queries, candidates)
        elif queries is Queries.NONE and not config.scoring.is_same_for_all_heads:
            work.score_bytes += candidates * self._model.token_bytes / 2
        heads = self._model.num_kv_heads_per_device
        work.move_bytes += _SELECT_PASSES * _SCORE_BYTES * heads * candidates
        work.move_bytes += 2 * float(kept @ layers) * self._model.token_bytes
        work.num_compactions += float(layers.sum())

    def _add_group(self, work: StepWork, group: GeneratedWindow) -> None:
        """Scores and compaction of a group of generated tokens, behind which newer ones
        move up, or of a segment, behind which they stay."""
        if group.is_found:
            return
        chosen = np.array(group.num_chosen)
        layers = self._sizes * (chosen < group.size)
        num_layers = float(layers.sum())
        self._add_scores(work, group.num_queries, group.size * num_layers)
        if group.pages is None:
            chosen = np.array(group.num_kept) - np.array(group.starts)
        moved = float(chosen @ layers)
        work.move_bytes += 2 * moved * self._model.token_bytes
        work.num_compactions += num_layers

    def _add_scores(self, work: StepWork, num_queries: int, num_keys: float) -> None:
        """Add the work of scoring ``num_keys`` keys of all layers by each query."""
        work.score_flops += self._pair_flops / 2 * num_queries * num_keys
        work.score_bytes += num_keys * self._model.token_bytes / 2
