"""Refused requests: each ends with an error; other requests go on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

if TYPE_CHECKING:
    from vllm.v1.request import Request


class Refusals:
    """Outputs of refused requests, sent to their clients with the next step."""

    def __init__(self) -> None:
        self._outputs: list[tuple[int, EngineCoreOutput]] = []

    def __len__(self) -> int:
        """Number of outputs to send."""
        return len(self._outputs)

    def add(self, request: Request) -> None:
        """Add the output of a request that the scheduler has ended."""
        output = EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=[],
            finish_reason=request.get_finished_reason(),
            events=request.take_events(),
            trace_headers=request.trace_headers,
        )
        self._outputs.append((request.client_index, output))

    def tell(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Move the outputs to those of a step, by client."""
        for client, output in self._outputs:
            outputs.setdefault(client, EngineCoreOutputs()).outputs.append(output)
        self._outputs.clear()
