"""docs/contributing.md: its scorer in one file decides which tokens an engine keeps."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import BACKEND
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
    """Positions that each KV head keeps: KeyDiff, written a second time.

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


@pytest.mark.skipif(BACKEND is not None, reason="no kernel computes it")
def test_the_scorer_of_the_document_decides(tiny_llama: str, scorer: str) -> None:
    """The scorer decides in every layer and head. The whole keys are those of a request
    without a policy."""
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


TRACED = """\
import os
from pathlib import Path
from pyramid_vllm.policy import Queries, scorer
from {module} import {function} as inner

@scorer(Queries.NONE)
def traced(inputs, config):
    with Path("called").open("a") as file:
        print(os.getpid(), file=file)
    return inner(inputs, config)
"""

ENGINE = """\
import os
from vllm import SamplingParams
from tests.engines import make_llm

if __name__ == "__main__":
    policy = {"base": "knorm", "name": "mine", "scorer": "traced:traced"}
    llm = make_llm(
        os.environ["MODEL"], kv_policy=policy, distributed_executor_backend="mp"
    )
    prompt = {"prompt_token_ids": list(range(300))}
    sampling = SamplingParams(max_tokens=2, ignore_eos=True, detokenize=False)
    llm.generate([prompt], sampling)
    print("mine", os.getpid())
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_engine_core_and_workers_find_it(
    tiny_llama: str, tmp_path: Path, scorer: str
) -> None:
    """Processes of their own find the scorer by the module search path alone."""
    module, _, function = scorer.partition(":")
    source = TRACED.format(module=module, function=function)
    (tmp_path / "traced.py").write_text(source)
    (tmp_path / "engine.py").write_text(ENGINE)
    result = subprocess.run(
        [sys.executable, "engine.py"],
        cwd=tmp_path,
        env=os.environ
        | {
            "MODEL": tiny_llama,
            "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    mine = re.search(r"^mine (\d+)$", result.stdout, flags=re.M)
    assert mine is not None
    called = (tmp_path / "called").read_text().split()
    assert len(called) == TINY_LLAMA["num_hidden_layers"]
    assert mine.group(1) not in called
