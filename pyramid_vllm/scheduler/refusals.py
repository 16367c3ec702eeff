"""Refused requests: each ends with an error; other requests go on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

if TYPE_CHECKING:
    from vllm.v1.request import Request


class Refusals:
    """Outputs of refused requests, sent to their clients with the next step."""

    def __init__(self) -> None:
        self._outputs: list[tuple[int, EngineCoreOutput]] = []
        self._sessions: set[str] = set()
        """Ids of refused streaming sessions that their clients have not ended."""

    def __len__(self) -> int:
        """Number of outputs to send."""
        return len(self._outputs)

    def ends_session(self, request: Request) -> bool:
        """Whether a request only marks the end of a refused streaming session.

        vLLM's front end sends a last request of one token, with the session's id. It
        waits for no output of it. True is returned once for each session.
        """
        if request.resumable or request.request_id not in self._sessions:
            return False
        self._sessions.remove(request.request_id)
        return True

    def forget_sessions(self, request_ids: Iterable[str] | None) -> None:
        """Drop aborted sessions, because no end of them follows; None: all."""
        if request_ids is None:
            self._sessions.clear()
        else:
            self._sessions.difference_update(request_ids)

    def add(self, request: Request, is_session: bool) -> None:
        """Add the output of a request that the scheduler has ended.

        Args:
            request: the request.
            is_session: whether it is a part of a streaming session.
        """
        if is_session:
            self._sessions.add(request.request_id)
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
