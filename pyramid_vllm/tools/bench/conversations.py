"""Conversations: requests whose prompts continue the answers before them."""

from collections.abc import Callable, Sequence
from itertools import accumulate

Prompt = list[int]
#: Sends one request: its number, its prompt and the length of its output.
Send = Callable[[int, Prompt, int], None]


def turn_lengths(
    turns: Sequence[Sequence[int]], output_lengths: Sequence[int]
) -> list[int]:
    """Length of every request's prompt, turn by turn.

    Args:
        turns: of each turn, the tokens that each conversation adds to its history.
        output_lengths: of every request, turn by turn.
    """
    num = len(turns[0])
    outputs = [output_lengths[start : start + num] for start in _starts(turns)]
    histories: list[list[int]] = []
    for index in range(num):
        # Each turn adds the answer before it, and a part of its own.
        added = [turns[0][index]]
        for answers, turn in zip(outputs, turns[1:], strict=False):
            added.append(answers[index] + turn[index])
        histories.append(list(accumulate(added)))
    return [history[turn] for turn in range(len(turns)) for history in histories]


def _starts(turns: Sequence[Sequence[int]]) -> range:
    return range(0, len(turns) * len(turns[0]), len(turns[0]))


class Conversations:
    """Sends a conversation's next request when the answer before it is complete.

    Requests are numbered turn by turn: conversation ``i`` of ``n`` has the requests
    ``i``, ``n + i``, ``2 * n + i`` and so on.

    Args:
        turns: of each turn, the tokens that each conversation adds to its history.
        output_lengths: of every request.
        send: queues a request.
    """

    def __init__(
        self,
        turns: Sequence[Sequence[Prompt]],
        output_lengths: Sequence[int],
        send: Send,
    ) -> None:
        self._turns = turns
        self._output_lengths = output_lengths
        self._send = send
        self._num = len(turns[0])
        self._histories: list[Prompt] = [[] for _ in range(self._num)]

    def start(self) -> None:
        """Send the first turns."""
        for number in range(self._num):
            self._send_turn(number)

    def follow(self, number: int, output: Sequence[int]) -> int | None:
        """Send what follows an answer; the number of that request, if there is one."""
        self._histories[number % self._num] += output
        following = number + self._num
        if following >= len(self._output_lengths):
            return None
        self._send_turn(following)
        return following

    def _send_turn(self, number: int) -> None:
        turn, index = divmod(number, self._num)
        self._histories[index] += self._turns[turn][index]
        prompt = list(self._histories[index])
        self._send(number, prompt, self._output_lengths[number])
