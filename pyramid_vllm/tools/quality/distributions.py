"""Next-token distributions: the full cache's on disk, a policy's against them."""

from pathlib import Path

import numpy as np
import torch


class FullRows:
    """Writes a window's log-probabilities to an ``.npy`` file, as float16.

    Args:
        path: the file; it appears once all is written.
        num_tokens: rows, one for each forced token.
    """

    def __init__(self, path: Path, num_tokens: int) -> None:
        self._path, self._partial = path, path.with_suffix(".partial")
        self._rows: np.memmap | None = None
        self._top_tokens = [-1] * num_tokens

    def see(self, position: int, logits: torch.Tensor) -> None:
        if self._rows is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._rows = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
                self._partial,
                mode="w+",
                dtype=np.float16,
                shape=(len(self._top_tokens), logits.shape[-1]),
            )
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        self._top_tokens[position] = int(logprobs.argmax())
        self._rows[position] = logprobs.clamp_min(-6e4).half().cpu().numpy()

    def result(self) -> dict[str, list[float]]:
        """Put the file in its place; the most likely token at each position."""
        assert self._rows is not None
        self._rows.flush()
        self._partial.rename(self._path)
        return {"top_tokens": list(self._top_tokens)}


class PolicyRows:
    """Compares a policy's distributions with the full cache's, row by row.

    Args:
        path: written by ``FullRows``; half precision blurs a mean by < 1e-3 nats.
        num_tokens: rows, one for each forced token.
    """

    def __init__(self, path: Path, num_tokens: int) -> None:
        self._full = np.load(path, mmap_mode="r")
        self._divergences = [float("nan")] * num_tokens
        self._top_tokens = [-1] * num_tokens

    def see(self, position: int, logits: torch.Tensor) -> None:
        ours = torch.log_softmax(logits.float(), dim=-1)
        stored = torch.from_numpy(self._full[position].astype(np.float32))
        # After rounding the sum is not exactly 1.
        full = torch.log_softmax(stored.to(ours.device), dim=-1)
        self._divergences[position] = float((full.exp() * (full - ours)).sum())
        self._top_tokens[position] = int(ours.argmax())

    def result(self) -> dict[str, list[float]]:
        """KL(full || policy) in nats, and the most likely token, at each position."""
        return {"divergences": self._divergences, "top_tokens": list(self._top_tokens)}
