"""``scripts/gpu-check`` on a machine without a GPU, and its parts."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_check import bandwidth, bench, engine, pieces
from gpu_check.pieces import FAILED, MET, MISSED, OK, Options
from gpu_check.timing import Timed
from gpu_check.workload import PrefillLayer, Sizes, Step

from pyramid_vllm.kernels import pooled, select_tokens, window_scores

ROOT = Path(__file__).resolve().parents[1]
KERNELS = {
    "score",
    "score_key_diffs",
    "score_key_norms",
    "pool_scores",
    "select",
    "compact_pages",
    "tier_lengths",
    "row_indices",
    "gather_rows",
    "scatter_rows",
    "store_queries",
    "count_missing",
}


def gpu_check(
    folder: Path, *options: str, root: Path = ROOT, path: Path | None = None
) -> tuple[int, dict[str, Any], str]:
    """Exit status, JSON and output of the command."""
    file = folder / "report.json"
    environment = os.environ | {"PYTHON": sys.executable}
    environment.pop("TRITON_INTERPRET", None)
    environment["PYTHONPATH"] = str(path or "")
    done = subprocess.run(
        [str(root / "scripts" / "gpu-check"), *options, "--json", str(file)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert file.exists(), done.stderr
    return done.returncode, json.loads(file.read_text()), done.stdout


def checks(report: dict[str, Any], piece: str) -> dict[str, Any]:
    """A piece's checks by name."""
    return {check["name"]: check for check in report["pieces"][piece]["checks"]}


pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="what is tested is a machine without a GPU"
)


def test_without_a_gpu(tmp_path: Path) -> None:
    """Kernels run interpreted, and what cannot run reports why."""
    status, report, output = gpu_check(tmp_path, "--quick")
    assert status == 0
    assert not report["failed"]
    kernels = checks(report, "kernels")
    assert kernels.keys() == {*KERNELS, "kernels run", "steady state"}
    for name in KERNELS:
        figures = kernels[name]["figures"]
        assert kernels[name]["status"] == OK
        assert figures["max_error"] < 1e-5
        assert figures["num_failed"] == 0
        assert len(figures["variants"]) > 0
        assert all(variant["num_values"] for variant in figures["variants"])
    why = {skip["what"]: skip["why"] for skip in report["skipped"]}
    for piece in ("bandwidth", "engine", "bench"):
        assert report["pieces"][piece]["status"] == "skipped"
        assert why[piece] == "no NVIDIA GPU that torch can use"
        assert f"skipped: {piece}: {why[piece]}" in output
    assert "kernels, steady state" in why
    found = checks(report, "environment")
    assert found["torch"]["figures"]["version"] == torch.__version__
    assert found["gpu"]["status"] == "skipped"


BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Blocker())
"""


def test_kernels_need_torch_and_triton_alone(tmp_path: Path) -> None:
    names = {"pydantic", "vllm", "pytest", "rich", "typer", "transformers", "yaml"}
    blocker = BLOCKER.format(names=names)
    (tmp_path / "sitecustomize.py").write_text(blocker, encoding="utf-8")
    options = ("--only", "environment,kernels", "--kernels", "select,tier_lengths")
    status, report, _ = gpu_check(tmp_path, *options, "--quick", path=tmp_path)
    assert status == 0
    environment = checks(report, "environment")
    assert environment["kernels"]["figures"]["with_package"] is False
    kernels = checks(report, "kernels")
    assert kernels["select"]["status"] == kernels["tier_lengths"]["status"] == OK
    assert {"what": "bench", "why": "not in --only"} in report["skipped"]


OFF_BY_ONE = """
_right = select
def select(scores, out, *args, **kwargs):
    _right(scores, out, *args, **kwargs)
    out[out > 4] -= 1
"""
RAISES = """
def pool_scores(*args, **kwargs):
    raise RuntimeError("no kernel for this GPU")
"""


def test_broken_kernels_fail_the_check(tmp_path: Path) -> None:
    """One kernel is wrong and one raises; the others still run."""
    for part in ("scripts/gpu_check", "pyramid_vllm", "tests/parity"):
        shutil.copytree(ROOT / part, tmp_path / part)
    for file in ("scripts/gpu-check", "tests/__init__.py"):
        shutil.copy(ROOT / file, tmp_path / file)
    package = tmp_path / "pyramid_vllm"
    (package / "__init__.py").write_text("import no_such_package\n")
    for name, code in (("select_triton", OFF_BY_ONE), ("score_triton", RAISES)):
        with (package / "kernels" / f"{name}.py").open("a") as file:
            file.write(code)
    kernels = "select,pool_scores,row_indices"
    options = ("--only", "kernels", "--quick", "--kernels", kernels)
    status, report, _ = gpu_check(tmp_path, *options, root=tmp_path)
    assert status == 1
    assert report["failed"]
    assert report["pieces"]["kernels"]["status"] == FAILED
    found = checks(report, "kernels")
    assert found["select"]["status"] == FAILED
    assert found["select"]["figures"]["max_error"] == 1
    assert found["pool_scores"]["status"] == FAILED
    assert "no kernel for this GPU" in found["pool_scores"]["detail"]
    (first, *_) = found["pool_scores"]["figures"]["variants"]
    assert first["traceback"].startswith("Traceback")
    assert found["row_indices"]["status"] == OK


DIES = """
import os
from gpu_check.pieces import OK, Check
def run(options):
    yield Check("first", OK)
    print("last words")
    os._exit(3)
"""


def test_a_piece_that_ends_its_process_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the piece had found before is kept."""
    package = tmp_path / "gpu_check"
    package.mkdir()
    path = [str(package), str(ROOT / "scripts" / "gpu_check")]
    (package / "__init__.py").write_text(f"__path__ = {path}\n")
    (package / "dies.py").write_text(DIES)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    piece = pieces.run_piece("dies", Options(), 60, {})
    assert piece.status == FAILED
    assert [check.name for check in piece.checks] == ["first"]
    assert "exit status 3" in piece.why
    assert "last words" in piece.traceback


TINY = Sizes(
    num_requests=2,
    num_tokens=60,
    num_queries=16,
    num_layers=4,
    num_tiers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=32,
    dtype=torch.float32,
    recent=8,
    hidden=64,
    intermediate=96,
)


def test_the_step_that_is_timed_is_the_policys() -> None:
    """For each request, layer and head, the step keeps the right tokens and moves them
    to the front."""
    step = Step(TINY, "cpu", seed=0)
    layers, requests = range(TINY.num_layers), range(TINY.num_requests)
    before = {
        (layer, i): [step.pages.tokens(layer, i, of) for of in ("keys", "values")]
        for layer in layers
        for i in requests
    }
    step.prefill()
    for (layer, i), tokens in before.items():
        query = step.query[0, i * TINY.num_queries :][: TINY.num_queries]
        scores = window_scores(query, tokens[0], TINY.head_size**-0.5, 1.0)
        scores = pooled(scores, TINY.recent, "max", TINY.pool_kernel)
        begin = step.pages.offsets[i]
        kept = step.kept[layer, :, begin : begin + TINY.num_kept].long()
        expected = select_tokens(scores, TINY.num_kept, TINY.sinks, TINY.recent)
        assert torch.equal(kept, expected)
        for of, part in zip(("keys", "values"), tokens, strict=True):
            found = step.pages.tokens(layer, i, of)[: TINY.num_kept]
            index = kept.T[..., None].expand_as(found)
            assert torch.equal(found, part.gather(0, index))


def test_bytes_and_operations_are_those_of_the_step() -> None:
    """They are counted in tensors of the sizes that kernels read, write and
    multiply."""
    step = Step(TINY, "cpu", seed=0)
    keys = step.pages.tokens(0, 0)
    assert TINY.key_bytes(3) == 3 * TINY.num_requests * keys.nbytes
    moved = keys[TINY.sinks : TINY.num_kept]
    assert TINY.moved_bytes(1) == TINY.num_requests * 2 * 2 * moved.nbytes
    products = TINY.num_requests * 2 * TINY.num_queries * len(keys)
    assert TINY.score_flop(1) == products * 2 * TINY.num_heads * TINY.head_size
    fewer = step.with_queries(4)
    assert fewer.query.shape[1] == 4 * TINY.num_requests
    assert fewer.spans.num_queries.tolist() == [4, 4]
    assert step.spans.num_queries.tolist() == [16, 16]


def test_what_bounds_scoring() -> None:
    peaks = {"copy_bytes_per_s": 3e12, "matmul_flop_per_s": 6e14}
    bound, seconds = bandwidth.regime(Sizes(num_queries=8), 32, peaks)
    assert (bound, seconds) == ("memory", 32 * 8192 * 8 * 128 * 2 / 3e12)
    bound, seconds = bandwidth.regime(Sizes(num_queries=256), 32, peaks)
    assert bound == "arithmetic"
    assert seconds == 4 * 32 * 256 * 8192 * 32 * 128 / 6e14


class Clock:
    """Runs what is to be timed; the GPU's share of it takes one millisecond."""

    def time(self, run: Callable[[], object]) -> Timed:
        run()
        return Timed(launched=5.0, replayed=1.0)


def test_bandwidths_are_shares_of_a_copys() -> None:
    """The time on the GPU decides whether a goal is met."""
    step, clock = Step(TINY, "cpu", seed=0), Clock()
    for part, num_bytes, goal in (
        (bandwidth._compact, TINY.moved_bytes(2), 0.6),
        (bandwidth._score, TINY.key_bytes(4), 0.5),
    ):
        for share, status in ((goal + 0.01, MET), (goal - 0.01, MISSED)):
            copied = num_bytes * 1e3 / share
            peaks = {"copy_bytes_per_s": copied, "matmul_flop_per_s": 1e15}
            more = (2,) if part is bandwidth._compact else ()
            check = part("x", step, *more, clock, peaks)
            assert check.status == status
            assert check.figures["share_of_copy"] == pytest.approx(share)


def test_the_prefills_stand_in_runs() -> None:
    layer = PrefillLayer(TINY, "cpu")
    assert layer.run().shape == (TINY.num_tokens, 64)
    assert layer.run().isfinite().all()


def side(tokens: list[int], logprobs: list[float], **more: Any) -> dict[str, Any]:
    return {"tokens": [tokens], "logprobs": [logprobs], "counters": None} | more


def test_engines_are_compared_until_tokens_differ() -> None:
    ours = side([1, 2, 3], [-1.0, -2.0, -3.0])
    close = side([1, 2, 9], [-1.0, -2.0, -3.001])
    assert engine.alike("x", ours, close, 0.01).status == OK
    assert engine.alike("x", ours, close, 0.0001).status == FAILED
    # After the first difference they have read other tokens.
    later = side([1, 9, 3], [-1.0, -2.0, -7.0])
    assert engine.alike("x", ours, later, 0.01).status == OK
    sooner = side([1, 9, 3], [-1.0, -2.5, -3.0])
    assert engine.alike("x", ours, sooner, 0.01).status == FAILED


def test_retention_one_has_to_be_stock_with_the_policy_on() -> None:
    stock, on = side([1, 2], [0, 0]), {"num_evicted_tokens": 0}
    assert engine.identical("x", side([1, 2], [], counters=on), stock).status == OK
    other = side([1, 3], [], counters=on)
    assert engine.identical("x", other, stock).status == FAILED
    assert engine.identical("x", stock, stock).status == FAILED
    evicts = side([1, 2], [], counters={"num_evicted_tokens": 1})
    assert engine.identical("x", evicts, stock).status == FAILED


def test_a_policy_that_does_nothing_fails() -> None:
    names = ("num_compactions", "num_pages_freed", "num_evicted_tokens")
    ran = {"attention": "PyramidTritonImpl", "graphs": "FULL"}
    stock = side([1], [-1.0])
    good = side([1], [-1.1], counters=dict.fromkeys(names, 2), engine=ran)
    assert engine.acted("x", good, stock).status == OK
    for change in (
        {"counters": dict.fromkeys(names, 2) | {"num_pages_freed": 0}},
        {"logprobs": stock["logprobs"]},
        {"engine": ran | {"graphs": "NONE"}},
        {"engine": ran | {"attention": "TritonAttentionImpl"}},
    ):
        assert engine.acted("x", good | change, stock).status == FAILED


def test_the_oracle_decides() -> None:
    good = {"decided": True, "max_gap": 1e-5, "max_error": 1e-4}
    undecided = good | {"decided": False, "max_error": 1.0}
    assert engine.beside_oracle("x", [good, undecided]).status == OK
    assert engine.beside_oracle("x", [undecided]).status == FAILED
    assert engine.beside_oracle("x", [good | {"max_gap": 0.1}]).status == FAILED


def test_engines_on_the_cpu(tmp_path: Path) -> None:
    """The engines that run on a GPU run here with the V2 runner, and with graphs as far
    as a CPU has them."""
    status, report, _ = gpu_check(tmp_path, "--only", "engine", "--on-cpu")
    found = checks(report, "engine")
    assert status == 0, report["pieces"]["engine"]
    for name in (
        "retention 1 is stock",
        "graphs: the policy acts",
        "graphs: the oracle",
        "graphs are eager",
    ):
        assert found[f"TRITON_ATTN, {name}"]["status"] == OK
    graphs = found["TRITON_ATTN, graphs"]["figures"]
    assert graphs["graphs"] == "FULL_DECODE_ONLY"
    assert found["TRITON_ATTN, eager"]["figures"]["graphs"] == "NONE"


@pytest.mark.parametrize("shape", [bench.LARGE, bench.SMALL, bench.TINY])
def test_the_benchmark_takes_our_options(tmp_path: Path, shape: bench.Shape) -> None:
    """Of its two amounts of memory, one binds and one does not."""
    from pyramid_vllm.tools.bench.workload import make_workload

    shape.write_config(tmp_path)
    settings = bench.settings(shape, tmp_path, Options())
    assert settings.engine_args == {"load_format": "dummy"}
    workload = make_workload(settings)
    points = workload.points()
    fits = [
        workload.stock_fits(point.kv_bytes, settings.num_prompts) for point in points
    ]
    assert fits == [False, True]
    most = max(point.kv_bytes for point in points)
    assert most < 0.6 * max(shape.least_gib, 1) * 2**30
