"""Tensors that stand for a GPU's, on a CPU, and what would make the host wait for it.

A ``DeviceTensor`` says that it lies on ``cuda``; its memory is the host's. Within
``Device`` every call of torch is looked at. Once it watches, what returns a device
tensor's values to the host, needs the size of a result from the device, or copies
between host and device other than asynchronously, raises. Outside of ``Device`` it is
an ordinary tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)
_aten = torch.ops.aten
_T = torch.Tensor


class SyncError(RuntimeError):
    """The host would wait for the device."""


class DeviceTensor(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda _: DEVICE)
    is_cuda = property(lambda _: True)
    is_cpu = property(lambda _: False)


#: Methods that return values of a tensor, or a copy of it, to the host.
_READS = {
    getattr(_T, name)
    for name in (
        "item", "tolist", "numpy", "cpu", "__array__", "__bool__", "__int__",
        "__float__", "__complex__", "__index__", "__contains__", "__format__",
        "__repr__", "__dlpack__",
    )
}  # fmt: skip
#: Operators whose result, or its size, the host has to read.
_READING_OPS = {
    _aten._local_scalar_dense.default, _aten.nonzero.default, _aten.equal.default,
    _aten.masked_select.default, _aten.is_nonzero.default, _aten._unique2.default,
    _aten.unique_dim.default, _aten.unique_consecutive.default, _aten.bincount.default,
    _aten.allclose.default,
}  # fmt: skip
_INDEXED = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
_EMPTY = {torch.empty, torch.empty_like, _T.new_empty}
#: They send a host's list or array at once.
_SENDS = {torch.tensor, torch.as_tensor, torch.asarray, _T.new_tensor}


class _Operators(TorchDispatchMode):
    """Looks at the operators that a call on device tensors is made of."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._refuse = device.refuse

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _READING_OPS:
            self._refuse(f"{func} returns values, or their number, to the host")
        if func is _aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
            self._refuse("repeat_interleave without output_size reads its sum")
        if func in _INDEXED:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self._refuse("boolean indexing counts what it finds")
        return func(*args, **kwargs)


class Device(TorchFunctionMode):
    """While it is entered, torch has the device ``DEVICE``."""

    def __init__(self) -> None:
        super().__init__()
        self.watches = False
        """Whether what would wait raises: what starts an engine may wait."""
        self._pinned: dict[int, torch.Tensor] = {}
        """By address: kept, so that the address is not another tensor's."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        special = _SPECIAL.get(func)
        if special is not None:
            return special(self, func, *args, **kwargs)
        has_device = any(
            isinstance(part, DeviceTensor) for part in _parts(args, kwargs)
        )
        makes = "device" in kwargs and _is_device(kwargs["device"])
        if not (has_device or makes):
            return self._on_host(func, args, kwargs)
        _check(self, func, args, kwargs)
        if makes:
            kwargs["device"] = "cpu"
        with _Operators(self):
            result = func(*plain(args), **plain(kwargs))
        if func in _EMPTY:
            result.zero_()  # no kernel writes it, and it may hold indices
        return result if func in _READS else on_device(result)

    def refuse(self, why: str) -> None:
        """Raises: SyncError: the host is not to wait now."""
        if self.watches:
            raise SyncError(why)

    def _on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        pins = kwargs.pop("pin_memory", False)
        result = func(*args, **kwargs)
        return self.pin(result) if pins else result

    def pin(self, host: torch.Tensor) -> torch.Tensor:
        """Take a host tensor for pinned."""
        self._pinned[host.untyped_storage().data_ptr()] = host
        return host

    def is_pinned(self, host: torch.Tensor) -> bool:
        """Whether a host tensor lies in pinned memory."""
        return host.untyped_storage().data_ptr() in self._pinned

    def check_copy(self, host: torch.Tensor, non_blocking: bool) -> None:
        """Refuse a copy from or to a host tensor that blocks."""
        if not non_blocking:
            self.refuse("a copy between host and device without non_blocking")
        if host.numel() and not (self.is_pinned(host) and host.is_contiguous()):
            self.refuse("a copy between the device and memory that is not pinned")


def plain(values: Any) -> Any:
    """The same with ordinary tensors in place of device tensors."""
    return tree_map(
        lambda v: v.as_subclass(_T) if isinstance(v, DeviceTensor) else v, values
    )


def on_device(values: Any) -> Any:
    """The same with device tensors in place of ordinary ones."""
    return tree_map(
        lambda v: v.as_subclass(DeviceTensor) if isinstance(v, _T) else v, values
    )


def _parts(*values: Any) -> list[Any]:
    return tree_leaves(values)


def _is_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _check(mode: Device, func: Any, args: Any, kwargs: Any) -> None:
    """Refuse what a call on device tensors must not do."""
    name = getattr(func, "__name__", str(func))
    if func in _READS:
        mode.refuse(f"{name} returns a device tensor's values to the host")
    if func in _SENDS:
        mode.refuse(f"{name} sends values to the device and waits")
    for part in _parts(args, kwargs):
        is_host = isinstance(part, _T) and not isinstance(part, DeviceTensor)
        if (is_host and part.dim()) or isinstance(part, np.ndarray):
            mode.refuse(f"{name} of a device tensor is given one of the host")
    if func in (_T.__getitem__, _T.__setitem__):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        if any(isinstance(part, list) for part in index):
            mode.refuse(f"{name} of a device tensor sends a list and waits")


def _to(mode: Device, func: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
    """``Tensor.to``: of a device tensor to the host, or the other way around."""
    target, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    is_on_device = isinstance(tensor, DeviceTensor)
    if target is None or _is_device(target) == is_on_device:
        moved = plain(tensor).to(dtype or tensor.dtype)
        return on_device(moved) if is_on_device else moved
    if is_on_device:
        # Memory that torch allocates for it is pinned.
        if not non_blocking:
            mode.refuse("to() the host without non_blocking")
        return mode.pin(plain(tensor).to(dtype or tensor.dtype, copy=True))
    mode.check_copy(tensor, non_blocking)
    return on_device(tensor.to(dtype or tensor.dtype, copy=True))


def _copy(
    mode: Device, func: Any, out: Any, source: Any, non_blocking: bool = False
) -> Any:
    """``Tensor.copy_``: the copy happens now, as kernels do."""
    hosts = [t for t in (out, source) if not isinstance(t, DeviceTensor)]
    if len(hosts) == 1:
        mode.check_copy(hosts[0], non_blocking)
    plain(out).copy_(plain(source))
    return out


def _iterate(mode: Device, func: Any, tensor: Any) -> Iterator[Any]:
    parts = plain(tensor).unbind(0)
    return iter(on_device(parts) if isinstance(tensor, DeviceTensor) else parts)


def _pin(mode: Device, func: Any, tensor: Any, *_: Any) -> Any:
    if isinstance(tensor, DeviceTensor):
        mode.refuse("pin_memory of a device tensor")
    return mode.pin(tensor.clone())


def _is_pinned(mode: Device, func: Any, tensor: Any, *_: Any) -> bool:
    return not isinstance(tensor, DeviceTensor) and mode.is_pinned(tensor)


_SPECIAL: dict[Any, Any] = {
    _T.to: _to,
    _T.copy_: _copy,
    _T.__iter__: _iterate,
    _T.pin_memory: _pin,
    _T.is_pinned: _is_pinned,
}


@contextmanager
def launches_on_device() -> Iterator[set[str]]:
    """Let launches of kernels take device tensors alone, and do nothing.

    Yields:
        Names of the kernels that have been launched.
    """
    from triton.runtime.interpreter import InterpretedFunction

    launched = set()

    def run(function: Any, *args: Any, **kwargs: Any) -> None:
        for part in _parts(args, kwargs):
            if isinstance(part, _T) and not isinstance(part, DeviceTensor):
                raise AssertionError(f"{function.__name__} was given a host's tensor")
        launched.add(function.__name__)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "run", run)
        yield launched
