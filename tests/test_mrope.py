"""Models whose positions have three channels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
from pathlib import Path

if __name__ == "__main__":
    from tests.engines import (
        close, generate, make_llm, random_prompts, scheduler_of, worker_of
    )
    from tests.test_families import save_qwen_vl

    model = save_qwen_vl(Path(sys.argv[1]))
    prompts = random_prompts([300, 40, 517, 129], vocab_size=480, seed=5)
    settings = {"limit_mm_per_prompt": {"image": 0, "video": 0}}
    policy = {"retention": 0.4, "recent": 8, "min_context": 40, "tiers": 2}

    def tokens(llm, prompts):
        return [output.tokens for output in generate(llm, prompts, 24)]

    llm = make_llm(model, **settings)
    result = {"mrope": worker_of(llm).model_runner.uses_mrope}
    result["stock"] = tokens(llm, prompts)
    close(llm)
    for name, change in {
        "all": {"retention": 1.0}, "evicted": {}, "pruned": {"prune_from": 0}
    }.items():
        llm = make_llm(
            model, kv_policy="pyramid-by-depth",
            kv_policy_config=policy | change, **settings
        )
        result[name] = tokens(llm, prompts)
        result[name + " alone"] = [tokens(llm, [prompt])[0] for prompt in prompts]
        result[name + " compactions"] = scheduler_of(llm).kv_counters.num_compactions
        pruned = worker_of(llm).tier_state.counters.num_pruned_steps
        close(llm)
    print("@", json.dumps(result | {"pruned steps": pruned}), flush=True)
"""


#: vLLM looks at a model's class in another process, which needs the stand-in too.
SITE = """
from tests.stubs import stand_in_for_torchvision

stand_in_for_torchvision()
"""


@pytest.mark.timeout(300)
def test_text_under_mrope(tmp_path: Path) -> None:
    """Stock's tokens where all is kept; else those of each prompt alone."""
    script = tmp_path / "mrope.py"
    script.write_text(SCRIPT)
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    root = Path(__file__).resolve().parents[1]
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {
            "PYTHONPATH": f"{site}{os.pathsep}{root}",
            # Else what was once seen of the class would be read instead.
            "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
        },
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("@")]
    assert lines, result.stderr[-3000:]
    found = json.loads(lines[0][1:])
    assert found["mrope"]
    assert found["all"] == found["stock"]
    for name in ("evicted", "pruned"):
        assert found[name] == found[f"{name} alone"]
        assert found[name] != found["stock"]
        assert found[f"{name} compactions"] > 0
    assert found["pruned steps"] > 0
