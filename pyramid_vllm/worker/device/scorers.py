"""Which scorers have kernels."""

from collections.abc import Iterable

from pyramid_vllm.kernels.score_triton import ACCUMULATED, ATTENTION, VOTES
from pyramid_vllm.policy import KVPolicyError, PolicyConfig

#: Those that read queries, by what ``score`` calls them.
KINDS = {"attention": ATTENTION, "accumulated": ACCUMULATED, "votes": VOTES}
KEY_NORM = "key_norm"
RECENCY = "recency"
KERNELS = frozenset({*KINDS, KEY_NORM, RECENCY})


def check_scorers(policies: Iterable[PolicyConfig]) -> None:
    """Refuse scorers that no kernel computes.

    Raises:
        KVPolicyError: names the scorer.
    """
    for policy in policies:
        if policy.scorer not in KERNELS:
            raise KVPolicyError(
                f"kv_policy does not support scorer='{policy.scorer}' on this device: "
                f"kernels compute {', '.join(sorted(KERNELS))}; others run on the CPU "
                "back end"
            )
