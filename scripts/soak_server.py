"""What both sides' servers of the soak test share."""

from collections.abc import Iterator
from dataclasses import dataclass

from soak_load import MAX_MODEL_LEN, LoadRequest, draw_requests

MODEL_NAME = "model"
BLOCK_SIZE = 32
MAX_NUM_SEQS = 64
#: Shorter than most prompts, so that these come in chunks.
MAX_CHUNK = 256


@dataclass(frozen=True)
class Settings:
    """What both sides share."""

    model: str
    minutes: float
    rate_factor: float
    abort_share: float
    stock_sequences: int
    seed: int
    vocab_size: int
    kv_bytes: int

    def arguments(self) -> list[str]:
        """Options of `vllm serve`."""
        options = {
            "served-model-name": MODEL_NAME,
            "dtype": "float32",
            "block-size": BLOCK_SIZE,
            "max-model-len": MAX_MODEL_LEN,
            "max-num-seqs": MAX_NUM_SEQS,
            "max-num-batched-tokens": MAX_CHUNK,
            "kv-cache-memory-bytes": self.kv_bytes,
            "seed": self.seed,
        }
        pairs = (("--" + name, str(value)) for name, value in options.items())
        return ["--enforce-eager", *(word for pair in pairs for word in pair)]

    def requests(self, seed: int, rate: float, seconds: float) -> Iterator[LoadRequest]:
        """Requests of this load."""
        return draw_requests(seed, rate, seconds, self.vocab_size, self.abort_share)
