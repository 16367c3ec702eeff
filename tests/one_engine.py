"""One engine at a time, with a tokenizer, and a watch over what its policy does."""

import string
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from vllm.v1.core.sched.interface import PauseState

from tests.engines import close, make_llm, scheduler_of, worker_of
from tests.scheduling import free_pages

Policy = dict[str, Any]
Tokens = list[list[int]]
Numbers = list[dict[int, float]]


def save_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer of ASCII characters and of pairs of letters."""
    letters = string.ascii_lowercase
    base = ["<unk>", "<s>", "</s>", "\u0120", *map(chr, range(33, 127))]
    pairs = [(a, b) for a in letters for b in letters][: vocab_size - len(base)]
    words = base + ["".join(pair) for pair in pairs]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=pairs, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    ).save_pretrained(folder)


class OneEngine:
    """The engine of the last settings. Only one is open, because closing one breaks any
    other."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._settings: dict[str, Any] | None = None
        self._llm: Any = None
        self.alone: dict[str, Tokens] = {}
        self.stock: list[Numbers] = []

    def get(self, **settings: Any) -> Any:
        """An idle engine; a new one, if the last one has others or was left busy."""
        if settings != self._settings or not self._is_idle():
            self.close()
            self._llm = make_llm(
                self._model,
                skip_tokenizer_init=False,
                structured_outputs_config={
                    "backend": "xgrammar",
                    "disable_any_whitespace": True,
                },
                async_scheduling=True,
                **({"max_num_batched_tokens": 4096} | settings),
            )
            self._settings = settings
        return self._llm

    def close(self) -> None:
        """Let the engine go."""
        if self._llm is not None:
            close(self._llm)
        self._llm = self._settings = None

    def _is_idle(self) -> bool:
        scheduler = scheduler_of(self._llm)
        unpaused = scheduler.pause_state == PauseState.UNPAUSED
        return unpaused and not self._llm.llm_engine.has_unfinished_requests()


def activity(llm: Any) -> tuple[int, int, int]:
    """Compactions of prompts and of generated tokens, and pruned steps, since start-
    up."""
    counters = scheduler_of(llm).kv_counters
    pruned_steps = worker_of(llm).tier_state.counters.num_pruned_steps
    return counters.num_compactions, counters.num_groups, pruned_steps


@contextmanager
def watched(llm: Any, policy: Policy) -> Iterator[Any]:
    """Check that the policy acts, and that everything is given back afterwards."""
    scheduler = scheduler_of(llm)
    before, pages = activity(llm), free_pages(scheduler)
    yield llm
    compacted, grouped, pruned = (
        now > then for now, then in zip(activity(llm), before, strict=True)
    )
    assert compacted, "nothing was compacted"
    assert grouped == ("exceed_length_to_compress" in policy)
    assert pruned == ("prune_from" in policy)
    scheduler.check_integrity()
    assert free_pages(scheduler) == pages
    assert len(worker_of(llm).tier_state.queries) == 0, "queries outlive their prompts"
