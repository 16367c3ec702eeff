"""How much of prompts an engine works on at once: what bounds its buffers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

#: Tokens that are scored without being computed, because they lie in pages of the
#: prefix cache but may be evicted: of these for each token that a step can compute.
_SHARED = 8


@dataclass(frozen=True)
class PromptLimits:
    """The scheduler keeps them, and workers size their buffers by them.

    They count only prompts that evict tokens.
    """

    max_cut: int
    """Most prompts that are computed in part after a step. vLLM's own scheduler begins
    no prompt before every running one has got its chunk, so that without limits of our
    own there are as many as full chunks fit into a step; but encoder inputs and
    replays may end chunks early."""
    max_admitted: int
    """Most tokens that may be evicted, of all prompts that one step begins; a longer
    prompt begins alone."""
    max_at_once: int
    """Most prompts whose queries a worker holds in a step: those cut before it and
    those cut by it."""
    max_scores: int
    """Most tokens of all prompts that one step scores, in each layer."""

    @classmethod
    def of(cls, vllm_config: VllmConfig) -> PromptLimits:
        """Of an engine's settings."""
        scheduler = vllm_config.scheduler_config
        longest = int(vllm_config.model_config.max_model_len)
        budget = scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
        # Without a threshold a prompt that is cut takes all that is left of a step.
        chunk = scheduler.long_prefill_token_threshold or budget
        max_cut = min(scheduler.max_num_seqs, max(1, -(-budget // chunk)))
        shares = vllm_config.cache_config.enable_prefix_caching
        max_admitted = budget * (_SHARED if shares else 1)
        return cls(
            max_cut=max_cut,
            max_admitted=max_admitted,
            max_at_once=min(scheduler.max_num_seqs, 2 * max_cut),
            max_scores=max_cut * longest + max(longest, max_admitted),
        )
