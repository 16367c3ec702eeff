"""n-gram drafts: only confirmed tokens are evicted, and drafts change no token.

Each case is a process of its own: vLLM cannot start an engine in one that has loaded
the code for n-gram drafts.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engines import close, generate, make_llm, random_prompts, scheduler_of
from tests.models import TINY_LLAMA, save_tiny_llama

POLICY: dict[str, Any] = {"retention": 0.4, "recent": 24, "min_context": 40, "tiers": 3}
#: So few words that what was said before is often said again.
VOCABULARY = 16
COMMON = random_prompts([600], VOCABULARY, seed=1)[0]
PROMPTS = [
    COMMON[:shared] + random_prompts([new], VOCABULARY, seed=10 + i)[0]
    for i, (shared, new) in enumerate([(600, 50), (300, 20), (600, 1), (100, 3)])
]
# A last token alone gets drafts beside it.
PROMPTS += [[5], [3, 4], COMMON[:64], COMMON[:65]]
NUM_TOKENS = 60

SCRIPT = """
import json, sys
from tests.engines import generate, make_llm, scheduler_of

if __name__ == "__main__":
    model, prompts, num_tokens, settings = json.load(sys.stdin)
    llm = make_llm(model, **settings)
    scheduler, counts = scheduler_of(llm), [0, 0]
    make_stats = scheduler.make_spec_decoding_stats

    def count(stats, num_draft_tokens, num_accepted_tokens, **other):
        counts[0] += num_draft_tokens
        counts[1] += num_accepted_tokens
        return make_stats(stats, num_draft_tokens, num_accepted_tokens, **other)

    scheduler.make_spec_decoding_stats = count
    tokens = []
    for _ in range(2):
        outputs = generate(llm, prompts, num_tokens, logprobs=None)
        tokens.append([output.tokens for output in outputs])
        scheduler.check_integrity()
    compactions = scheduler.kv_counters.num_compactions
    print("@", json.dumps([tokens, *counts, compactions]), flush=True)
"""


@pytest.fixture(scope="module")
def few_words(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_llama(
        tmp_path_factory.mktemp("few-words"), TINY_LLAMA | {"vocab_size": VOCABULARY}
    )


def with_drafts(model: str, script: Path, **settings: Any) -> Any:
    """Both runs' tokens, drafts, accepted ones, and compactions."""
    script.write_text(SCRIPT)
    settings["speculative_config"] = {
        "method": "ngram",
        "num_speculative_tokens": 3,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    paths = [os.environ.get("PYTHONPATH"), str(Path(__file__).resolve().parents[1])]
    result = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps([model, PROMPTS, NUM_TOKENS, settings]),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("@")]
    assert lines, result.stderr[-3000:]
    return json.loads(lines[0][1:])


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("change", "caching"),
    [({"hit_split": "ignore"}, True), ({"prune_from": 0, "recent": 8}, False)],
    ids=["cached", "pruned"],
)
def test_drafts_change_no_token(
    few_words: str, tmp_path: Path, change: dict[str, Any], caching: bool
) -> None:
    settings = {
        "kv_policy": "pyramid-by-depth",
        "kv_policy_config": POLICY | change,
        "enable_prefix_caching": caching,
        "max_model_len": 800,
    }
    llm = make_llm(few_words, **settings)
    expected = [g.tokens for g in generate(llm, PROMPTS, NUM_TOKENS, logprobs=None)]
    assert scheduler_of(llm).kv_counters.num_compactions >= 4
    close(llm)
    runs, num_drafts, num_accepted, num_compactions = with_drafts(
        few_words, tmp_path / "drafts.py", **settings
    )
    assert runs == [expected, expected]
    assert num_drafts > num_accepted > 20
    assert num_compactions >= 8
