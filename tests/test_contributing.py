"""docs/contributing.md: its scorer in one file decides which tokens an engine keeps."""

import re
from pathlib import Path

import pytest
import torch

from tests.engines import close, held_kv, make_llm, random_prompts, scheduler_of
from tests.models import TINY_LLAMA

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs/contributing.md").read_text(encoding="utf-8")
(PROMPT,) = random_prompts([300], seed=3)


@pytest.fixture
def scorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The document's file, saved as it says; what to call its scorer."""
    (source,) = re.findall(r"```python\n([^`]*@scorer.*?)```", TEXT, flags=re.S)
    (name,) = set(re.findall(r'"scorer": "(.+?)"', TEXT))
    (tmp_path / f"{name.split(':')[0]}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def expected(key: torch.Tensor, num_kept: int) -> list[list[int]]:
    """Positions that each KV head keeps: KeyDiff written down a second time.

    Args:
        key: ``[num_tokens, num_kv_heads, head_size]``.
        num_kept: how many stay; the newest always does.
    """
    kept = []
    for head in key.double().unbind(1):
        mean = sum(row / row.norm() for row in head) / len(head)
        cosines = [float(row @ mean / (row.norm() * mean.norm())) for row in head[:-1]]
        order = sorted(range(len(cosines)), key=cosines.__getitem__)
        kept.append(sorted([*order[: num_kept - 1], len(head) - 1]))
    return kept


def test_the_scorer_of_the_document_decides(tiny_llama: str, scorer: str) -> None:
    """In every layer and head; the whole keys are those of a request without policy."""
    from vllm import SamplingParams

    policy = {"base": "knorm", "name": "mine", "scorer": scorer, "tiers": 2}
    llm = make_llm(tiny_llama, kv_policy=policy)
    try:
        for name in ("mine", "none"):
            sampling = SamplingParams(
                max_tokens=4, detokenize=False, extra_args={"kv_policy": name}
            )
            prompt = {"prompt_token_ids": PROMPT}
            llm.llm_engine.add_request(name, prompt, sampling)
        llm.llm_engine.step()
        scheduler = scheduler_of(llm)
        mine, whole = scheduler.requests
        num_kept = scheduler.kv_rule.cache_lengths(len(PROMPT))[0]
        assert num_kept == len(PROMPT) // 2
        for layer in range(TINY_LLAMA["num_hidden_layers"]):
            full, (key, value) = held_kv(llm, whole, layer), held_kv(llm, mine, layer)
            assert len(full[0]) == len(PROMPT)
            for head, kept in enumerate(expected(full[0], num_kept)):
                torch.testing.assert_close(key[:, head], full[0][kept, head])
                torch.testing.assert_close(value[:, head], full[1][kept, head])
    finally:
        close(llm)
