"""On a GPU, nothing that the policy does in a step waits for the device.

vLLM checks its own ``execute_model`` where it runs on a GPU (``VLLM_GPU_SYNC_CHECK``).
Here all of a step that is the policy's runs on tensors that say they lie on a GPU and
refuse what would make the host wait: lengths, layers, selection, compaction, pruning,
queries of generated tokens, block tables. Kernels are launched with them and not run:
the host knows no value that they would have written.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.utils import torch_utils

# At once: vLLM's runner for CPUs puts one that copies nothing in its place.
from vllm.utils.torch_utils import async_tensor_h2d

from pyramid_vllm.policy import resolve_policy
from pyramid_vllm.worker import cache_group, prune
from pyramid_vllm.worker.cache_group import CacheGroup
from pyramid_vllm.worker.generated import GeneratedQueries
from pyramid_vllm.worker.layer import TieredLayer
from pyramid_vllm.worker.prune import RowPruner
from pyramid_vllm.worker.runners.v2 import V2Runner
from pyramid_vllm.worker.step import TierStep
from tests.device_road import RoadWorker
from tests.device_runner import MAX_REQS, MAX_TOKENS
from tests.device_tensors import DEVICE, Device, SyncError, launches_on_device
from tests.scheduling import Driver, make_config, make_request, scheduler_from

_SHORT: dict[str, Any] = {"recent": 16, "min_context": 16}
POLICIES: dict[str, dict[str, Any]] = {
    # Prunes rows, compacts after each chunk and compresses what is generated.
    "pyramidinfer": {
        "base": "pyramidinfer",
        "prefill_decay_ratio": 0.3,
        "prefill_recent_ratio": 0.0,
        "min_context_length": 8,
        "recent": 4,
        "exceed_length_to_compress": 8,
    },
    "pyramid": {"base": "pyramid", **_SHORT},
    "by depth": {"base": "pyramid-by-depth", "tiers": 3, **_SHORT},
    "h2o": {"base": "h2o"},
    "corm": {"base": "corm", **_SHORT},
    "knorm": {"base": "knorm"},
    "streaming": {"base": "streaming", **_SHORT},
}
#: Which kernels each launches, beside those that all of them launch.
ALWAYS = {"_lengths_kernel", "_select_kernel", "_compact_kernel"}
#: With a prefix cache, what is kept of a prompt is gathered into other pages.
CACHING = {"pyramid"}
SCORES = {"_normalizer_kernel", "_combine_kernel", "_score_kernel"}
LAUNCHED = {
    "pyramidinfer": SCORES
    | {"_index_kernel", "_move_kernel", "_store_kernel", "_missing_kernel"},
    "pyramid": SCORES | {"_pool_kernel"},
    "by depth": SCORES,
    "h2o": SCORES,
    "corm": SCORES,
    "knorm": {"_key_norm_kernel"},
    "streaming": set(),
}


class _Event:
    """In place of ``torch.cuda.Event``, without what waits."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        """On the stream."""

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 1.0


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """A process as on a GPU: pinned memory, events, one rank."""
    monkeypatch.setattr(torch_utils, "is_pin_memory_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(cache_group, "get_tensor_model_parallel_world_size", lambda: 1)
    group = SimpleNamespace(broadcast=lambda _: None)
    monkeypatch.setattr(prune, "get_tp_group", lambda: group)
    monkeypatch.setattr(prune, "get_forward_context", SimpleNamespace)
    return Device()


class Road:
    """An engine's scheduler, and a worker whose steps are watched."""

    def __init__(self, model: str, name: str, device: Device) -> None:
        policy = POLICIES[name]
        config = make_config(
            model,
            policy,
            max_num_seqs=MAX_REQS,
            max_num_batched_tokens=128,
            enable_prefix_caching=name in CACHING,
        )
        assert config.scheduler_config.max_num_batched_tokens <= MAX_TOKENS
        self._device, self.launched = device, set[str]()
        scheduler = scheduler_from(config, 128)
        with device:
            self.worker = RoadWorker(scheduler, config, resolve_policy(policy))
        self._driver = Driver(scheduler, depth=2, worker=self)

    def run(self, output: Any) -> None:
        """A step of the worker."""
        with launches_on_device() as launched, self._device, torch.inference_mode():
            self._device.watches = True
            assert self.worker.execute_model(output) is None
            self.worker.sample_tokens()
            self._device.watches = False
        self.launched |= launched

    def serve(self) -> None:
        """Requests that share pages, one after the other and at once."""
        driver = self._driver
        for name, length in (("first", 150), ("second", 150), ("third", 70)):
            request = make_request(name, length, 24, shared=64)
            driver.scheduler.add_request(request)
            driver.step()
        driver.run()


@pytest.mark.parametrize("name", POLICIES)
def test_a_step_never_waits(tiny_llama: str, device: Device, name: str) -> None:
    """From its plan to its block tables, with every kernel that the policy has."""
    road = Road(tiny_llama, name, device)
    road.serve()
    state = road.worker.tier_state
    assert state is not None
    assert road.launched == ALWAYS | LAUNCHED[name]
    assert state.counters.num_compactions >= 2
    assert state.counters.num_pages_freed > 0
    assert (state.counters.num_pruned_steps > 0) == (name == "pyramidinfer")


#: Where a read of the device is put, for the test to find it.
PLANTED: list[tuple[type, str]] = [
    (TierStep, "prepare"),
    (TierStep, "for_tier"),
    (TieredLayer, "after_attention"),
    (CacheGroup, "move"),
    (CacheGroup, "compress"),
    (GeneratedQueries, "write"),
    (RowPruner, "set_rows"),
    (RowPruner, "_enter"),
    (V2Runner, "truncate"),
]


@pytest.mark.parametrize(("owner", "method"), PLANTED)
def test_a_planted_read_is_found(
    tiny_llama: str,
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    method: str,
) -> None:
    """Each part of the road is watched."""
    original = getattr(owner, method)

    def planted(*args: Any, **kwargs: Any) -> Any:
        _tensor([1]).item()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, method, planted)
    road = Road(tiny_llama, "pyramidinfer", device)
    with pytest.raises(SyncError, match="item returns a device tensor's values"):
        road.serve()


def _tensor(values: list[int]) -> torch.Tensor:
    return async_tensor_h2d(values, device=DEVICE)


def _into_host(pins: bool, **kwargs: Any) -> None:
    torch.zeros(2, dtype=torch.int64, pin_memory=pins).copy_(_tensor([1, 2]), **kwargs)


WAITING: dict[str, Callable[[], Any]] = {
    "item": lambda: _tensor([1]).item(),
    "tolist": lambda: _tensor([1]).tolist(),
    "numpy": lambda: _tensor([1]).numpy(),
    "cpu": lambda: _tensor([1]).cpu(),
    "to": lambda: _tensor([1]).to("cpu"),
    "bool": lambda: bool(_tensor([1])),
    "if": lambda: 1 if _tensor([1]) > 0 else 0,
    "int": lambda: int(_tensor([1])),
    "float": lambda: float(_tensor([1])),
    "index": lambda: [0, 1][_tensor([1])],
    "range": lambda: range(_tensor([1])),  # type: ignore[call-overload]
    "max": lambda: int(_tensor([1, 2]).max()),
    "equal": lambda: torch.equal(_tensor([1]), _tensor([1])),
    "allclose": lambda: torch.allclose(_tensor([1]).float(), _tensor([1]).float()),
    "nonzero": lambda: _tensor([1]).nonzero(),
    "where": lambda: torch.where(_tensor([1]) > 0),
    "mask": lambda: _tensor([1, 2])[_tensor([1, 2]) > 1],
    "masked_select": lambda: _tensor([1]).masked_select(_tensor([1]) > 0),
    "unique": lambda: _tensor([1]).unique(),
    "repeat_interleave": lambda: _tensor([1, 2]).repeat_interleave(_tensor([1, 2])),
    "made there of values": lambda: torch.tensor([1], device=DEVICE),
    "copied from pageable memory": lambda: _tensor([1]).copy_(
        torch.ones(1, dtype=torch.int64), non_blocking=True
    ),
    "sent from pageable memory": lambda: torch.ones(1).to(DEVICE, non_blocking=True),
    "sent and waited for": lambda: torch.ones(1).pin_memory().to(DEVICE),
    "copied to pageable memory": lambda: _into_host(False, non_blocking=True),
    "copied and waited for": lambda: _into_host(True),
    "indexed by the host's tensor": lambda: _tensor([1, 2])[torch.tensor([1, 0])],
    "indexed by a list": lambda: _tensor([1, 2])[[1, 0]],
    "set to the host's tensor": lambda: _tensor([1, 2]).__setitem__(
        slice(None), torch.tensor([1, 0])
    ),
}


@pytest.mark.parametrize("name", WAITING)
def test_what_waits_is_refused(device: Device, name: str) -> None:
    with device:
        device.watches = True
        with pytest.raises(SyncError):
            WAITING[name]()


def test_what_does_not_wait_is_allowed(device: Device) -> None:
    with device:
        device.watches = True
        values, order = _tensor([3, 1, 2]), _tensor([2, 0, 1])
        made = torch.arange(3, device=DEVICE)
        made += values[order] + values.cumsum(0) * 2
        made[1:] = 0
        made[order[:2]] = values[:2]
        counts = _tensor([1, 2])
        counts.repeat_interleave(counts, output_size=3)
        torch.where(values > 1, values, 0).masked_fill_(values > 2, 1)
        host = torch.zeros(3, dtype=torch.int64, pin_memory=True)
        host.copy_(values, non_blocking=True)
        assert int(host[0]) == 3
        assert len(values) == values.shape[0] == 3
        assert [part.device for part in values] == [DEVICE] * 3
    assert values.tolist() == [3, 1, 2]
