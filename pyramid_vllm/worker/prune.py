"""Pruned prefill: deeper layers compute only the rows that they keep."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from vllm.distributed import get_tp_group
from vllm.forward_context import get_forward_context

from pyramid_vllm.policy import KVPolicyError
from pyramid_vllm.worker.step import TierStep

_LOOP = ("positions", "hidden_states", "residual")
#: What a stack of layers may be called with: nothing else has a row for each token.
#: ``t_cond`` is Mistral's, one for all of them.
_STACK = {*_LOOP, "input_ids", "intermediate_tensors", "inputs_embeds", "t_cond"}


def decoder_layers(model: nn.Module, attention: list[str]) -> list[nn.Module]:
    """The decoder layers around the attention layers of a model.

    Args:
        model: vLLM's model.
        attention: names of its attention layers, as ``model.layers.0.self_attn.attn``.

    Raises:
        KVPolicyError: the model does not call its layers as
            ``layer(positions, hidden_states, residual)``, or adds to their rows.
    """
    layers = []
    for name in attention:
        match = re.match(r"(.*?)\.\w+\.\d+(?=\.)", name)
        try:
            layer = model.get_submodule(match.group() if match else "")
        except AttributeError:
            layer = model
        names = tuple(inspect.signature(layer.forward).parameters)[: len(_LOOP)]
        if names != _LOOP or layer is model:
            raise KVPolicyError(
                f"kv_policy does not support prune_from with {type(model).__name__}: "
                f"{type(layer).__name__} is called with ({', '.join(names)}), "
                f"valid are models that call layer({', '.join(_LOOP)})"
            )
        assert match is not None
        _check_stack(model, model.get_submodule(match.group(1)))
        layers.append(layer)
    return layers


def _check_stack(model: nn.Module, stack: nn.Module) -> None:
    parameters = inspect.signature(stack.forward).parameters.values()
    others = [
        parameter.name
        for parameter in parameters
        if parameter.name not in _STACK and parameter.kind != parameter.VAR_KEYWORD
    ]
    if others:
        # For instance Qwen3-VL's features of images, which the first layers add.
        raise KVPolicyError(
            f"kv_policy does not support prune_from with {type(model).__name__}: "
            f"its layers take {', '.join(others)} by row; valid is prune_from none"
        )


class RowPruner:
    """Narrows the rows between tiers, and scatters the model's output back.

    In steps that prune nothing it touches nothing: its hooks exist only during a step
    that does, and compiled code never sees them.

    Args:
        model: vLLM's model.
        layers: its decoder layers, first to last.
        tier_of_layer: tier of each.
    """

    def __init__(
        self, model: nn.Module, layers: list[nn.Module], tier_of_layer: tuple[int, ...]
    ) -> None:
        self._model = model
        self._layers = list(zip(layers, tier_of_layer, strict=True))
        self._step: TierStep | None = None
        """The step that prunes."""
        self._kept: dict[int, torch.Tensor] = {}
        """By tier: its rows, as indices of the tier's before."""
        self._rows_of_batch: torch.Tensor | None = None
        """The current tier's rows, as indices of the batch's."""
        self._positions: torch.Tensor | None = None
        self._tier = 0
        self._num_rows = 0

    def set_rows(self, tier: int, kept: torch.Tensor) -> None:
        """Set the rows that the tier after ``tier`` computes.

        Args:
            tier: the tier that has just run.
            kept: ``[num_scores]``, int32: of each window the chunk's rows that stay.
        """
        step = self._step
        assert step is not None
        assert step.starts is not None
        assert step.window_of is not None
        assert step.row_offsets is not None
        num_rows = step.rows.total_rows[tier + 1]
        index = torch.empty(num_rows, dtype=torch.int32, device=kept.device)
        step.kernels.row_indices(
            step.starts[tier],
            step.starts[tier + 1],
            step.window_of[tier],
            kept,
            step.row_offsets[tier],
            index,
        )
        # Ranks add their rows up. Sums over ranks need not be the same on each of them
        # to the last bit, and one rank with other rows would spoil those of all.
        get_tp_group().broadcast(index)
        self._kept[tier + 1] = index

    @contextmanager
    def pruning(self, step: TierStep) -> Iterator[None]:
        """Install the hooks for one step."""
        self._step, self._tier, self._kept = step, 0, {}
        self._rows_of_batch = self._positions = None
        with ExitStack() as hooks:
            handle = self._model.register_forward_pre_hook(_run_uncompiled)
            hooks.callback(handle.remove)
            hooks.callback(self._model.register_forward_hook(self._scatter).remove)
            for layer, tier in self._layers:
                if tier:
                    handle = layer.register_forward_pre_hook(
                        self._hook(tier), with_kwargs=True
                    )
                    hooks.callback(handle.remove)
            yield

    def _hook(self, tier: int) -> Any:
        def narrow(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            values = dict(zip(_LOOP, args, strict=False)) | kwargs
            if tier != self._tier:
                self._enter(tier, values)
            elif self._positions is not None:
                values["positions"] = self._positions
            return (), values

        return narrow

    def _enter(self, tier: int, values: dict[str, Any]) -> None:
        """Go to the next tier's rows."""
        assert self._step is not None
        kernels = self._step.kernels
        self._tier, kept = tier, self._kept[tier]
        if self._rows_of_batch is None:
            self._num_rows = len(values["hidden_states"])
        if len(kept) == len(values["hidden_states"]):
            if self._positions is not None:
                values["positions"] = self._positions
            return
        positions = values["positions"] if self._positions is None else self._positions
        values["positions"] = self._positions = positions.index_select(-1, kept)
        values["hidden_states"] = kernels.gather_rows(values["hidden_states"], kept)
        if values["residual"] is not None:
            values["residual"] = kernels.gather_rows(values["residual"], kept)
        before = self._rows_of_batch
        self._rows_of_batch = kept if before is None else before[kept]

    def _scatter(
        self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor
    ) -> torch.Tensor:
        """The last tier's rows in their places; dropped ones are zero."""
        rows = self._rows_of_batch
        if rows is None:
            raise RuntimeError("KV policy: a step that should prune dropped no row")
        assert self._step is not None
        return self._step.kernels.scatter_rows(output, rows, self._num_rows)


def _run_uncompiled(module: nn.Module, args: Any) -> None:
    # Compiled code has no place for the hooks; the rows of a step that prunes differ
    # from layer to layer.
    get_forward_context().skip_compiled = True
