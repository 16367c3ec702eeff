"""What can be asked of every worker with a KV policy, by ``collective_rpc``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyramid_vllm.worker.record import KeptRecord, check_recordable

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from pyramid_vllm.worker.state import WorkerState


class RemoteCalls:
    """Mixed into workers; answers are plain values."""

    vllm_config: VllmConfig
    tier_layers: list[Any]
    tier_state: WorkerState | None

    def kv_policy_stats(self) -> dict[str, Any]:
        """What this worker has done of its plans.

        Returns:
            Counts since start-up, of ``WorkerCounters``; empty before the cache is
            allocated, or in a model without one.
        """
        return {} if self.tier_state is None else self.tier_state.counters.as_dict()

    def record_kv_policy(self, on: bool = True) -> None:
        """Follow which tokens layers hold of requests.

        Args:
            on: whether from now on, or no more.

        Raises:
            KVPolicyError: this worker's set-up is not one that a record follows.
        """
        check_recordable(self.tier_layers, self.vllm_config)
        assert self.tier_state is not None
        self.tier_state.record = KeptRecord(self.tier_layers) if on else None

    def kv_policy_record(self) -> dict[str, Any]:
        """What ``record_kv_policy`` has followed, of ``KeptRecord``; else empty."""
        record = None if self.tier_state is None else self.tier_state.record
        return {} if record is None else record.as_dict()
