"""Continuations given from outside: the losses that a policy leaves on a text."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

#: Keys of ``SamplingParams.extra_args``.
FORCED_ARG = "forced_tokens"
OBSERVER_ARG = "observer"
#: Is shown the output's position and the model's own logits before a token is forced. A
#: row of an unfinished prompt is seen as position 0, and seen again later.
Observer = Callable[[int, torch.Tensor], None]


class ForcedTokens(AdapterLogitsProcessor):
    """Makes a request's next tokens those that it names, one by one.

    vLLM takes its raw log-probabilities before processors run, so those of the forced
    tokens are the model's.
    """

    observers: ClassVar[dict[str, Observer]] = {}
    """Observers by the name in a request; only engines in this process see them."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        args: dict[str, Any] = params.extra_args or {}
        if FORCED_ARG not in args:
            return None
        tokens: list[int] = args[FORCED_ARG]
        observer = self.observers.get(args.get(OBSERVER_ARG, ""))

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            position = len(output_ids)
            if position >= len(tokens):
                return logits
            if observer is not None:
                observer(position, logits)
            forced = torch.full_like(logits, float("-inf"))
            forced[tokens[position]] = 0.0
            return forced

        return force
