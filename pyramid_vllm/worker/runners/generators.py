"""Seeded requests whose sample is dropped, on CPU.

Cause: where a step ends before a request's known tokens do, vLLM's V1 runner drops the
sample and takes its random numbers back by the generator's offset, which CPU generators
do not have. Replays end steps where tokens were evicted, so seeded requests meet that.
Removal: once the runner samples for finished prefills alone.
"""

from typing import Any

import torch

#: What the runner subtracts; only the sign of the change is looked at.
_OFFSET = 4


class RewindableGenerator(torch.Generator):
    """A CPU generator that can take back what the current step has drawn."""

    _state: torch.Tensor

    @classmethod
    def like(cls, generator: torch.Generator) -> "RewindableGenerator":
        """The same random numbers."""
        other = cls()
        other.set_state(generator.get_state())
        return other

    def begin_step(self) -> None:
        """Remember the state before the step's sample."""
        self._state = self.get_state()

    def get_offset(self) -> int:
        """As CUDA's, for the runner to subtract from."""
        return _OFFSET

    def set_offset(self, offset: int) -> torch.Generator:
        """Take the step's sample back."""
        assert offset < _OFFSET, "only to rewind"
        self.set_state(self._state)
        return self


def make_rewindable(runner: Any) -> None:
    """Prepare the generators of a step's requests for a dropped sample.

    Args:
        runner: vLLM's V1 runner, between its forward pass and its sampling.
    """
    batch = runner.input_batch
    for index, generator in batch.generators.items():
        if not isinstance(generator, RewindableGenerator):
            generator = RewindableGenerator.like(generator)
            batch.generators[index] = generator
            runner.requests[batch.req_ids[index]].generator = generator
        generator.begin_step()
