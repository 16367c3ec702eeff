"""What a chunked prefill carries from chunk to chunk: queries, or their scores."""

from collections.abc import Iterable

import torch


class _ByRequest:
    """Tensors of requests in the middle of their prompt, by layer."""

    def __init__(self) -> None:
        self._held: dict[str, dict[int, torch.Tensor]] = {}

    def __len__(self) -> int:
        """Requests that have tensors here."""
        return len(self._held)

    def _get(self, req_id: str, layer: int) -> torch.Tensor | None:
        return self._held.get(req_id, {}).get(layer)

    def retain(self, req_id: str, layer: int, tensor: torch.Tensor) -> None:
        """Keep a tensor for a later chunk."""
        self._held.setdefault(req_id, {})[layer] = tensor

    def release(self, req_ids: Iterable[str]) -> None:
        """Drop what requests need no longer."""
        for req_id in req_ids:
            self._held.pop(req_id, None)


class QueryWindows(_ByRequest):
    """Newest queries of requests in the middle of their prompt, by layer.

    Selection must not depend on how the prompt was cut into chunks: queries of the
    recent window that fell into an earlier chunk stay here until the prompt's end.
    """

    def newest(
        self, req_id: str, layer: int, chunk: torch.Tensor, num_queries: int
    ) -> torch.Tensor:
        """The last ``num_queries`` queries of a prompt whose chunk has just run.

        Args:
            req_id: the request.
            layer: index of the layer.
            chunk: ``[chunk_tokens, num_heads, head_size]``, the queries of the chunk.
            num_queries: length of the window.

        Returns:
            ``[num_queries, num_heads, head_size]``

        Raises:
            RuntimeError: queries of an earlier chunk are missing.
        """
        missing = num_queries - len(chunk)
        if missing <= 0:
            return chunk[len(chunk) - num_queries :]
        held = self._get(req_id, layer)
        if held is None or len(held) < missing:
            raise RuntimeError(
                f"KV policy: {missing} queries of request {req_id} are missing in "
                f"layer {layer}"
            )
        return torch.cat((held[len(held) - missing :], chunk))

    def retain(self, req_id: str, layer: int, tensor: torch.Tensor) -> None:
        """Keep a window for a later chunk."""
        # A copy: the runner writes the next step's queries over these.
        super().retain(req_id, layer, tensor.clone())


class AccumulatedScores(_ByRequest):
    """Scores of requests in the middle of their prompt that add up over its queries."""

    def add(self, req_id: str, layer: int, chunk: torch.Tensor) -> torch.Tensor:
        """The scores of a chunk's queries and all earlier ones.

        Args:
            req_id: the request.
            layer: index of the layer.
            chunk: ``[num_kv_heads, num_tokens]``, float32.

        Returns:
            The same shape.
        """
        held = self._get(req_id, layer)
        if held is None:
            return chunk
        total = chunk.clone()
        total[:, : held.shape[1]] += held
        return total
