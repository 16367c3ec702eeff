"""`scripts/ray/batch.py`: a job on Ray Data, with engines in Ray's own processes."""

import json
import re
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from engines import engine_kwargs, find_device
from rows import Answers, bundled_rows, read_rows

from tests.engines import texts_of_policy_and_stock
from tests.models import TINY_LLAMA, save_tiny_llama
from tests.one_engine import save_tokenizer
from tests.ray_cluster import RayCluster, ray_cluster
from tests.ray_processes import kill_with_children, pid_of, wait_for

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "ray"
POLICY = {"recent": 16, "min_context": 32}
ENGINE = {"max_model_len": 1024, "kv_cache_memory_bytes": 16 * 2**20}
MAX_TOKENS = 16
JOB_S = 240
#: How Ray names the process.
ENGINE_ACTOR = "ray::MapWorker(MapBatches(vLLMEngineStageUDF))"
TEXT = "the sea was calm and gulls sat on the rocks while a boat came in "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama with a tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    save_tokenizer(folder, TINY_LLAMA["vocab_size"])
    return save_tiny_llama(folder, TINY_LLAMA)


def make_rows(count: int) -> list[dict[str, Any]]:
    return [{"id": f"row-{i}", "prompt": f"{i} {TEXT * 7}"[:450]} for i in range(count)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def written(path: Path) -> dict[str, str]:
    """Answers by id; fails where an id is there twice."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = {row["id"]: row["answer"] for row in rows}
    assert len(found) == len(rows), "a row is there twice"
    return found


def one_node() -> AbstractContextManager[RayCluster]:
    environment = {"VLLM_LOGGING_LEVEL": "INFO"}
    return ray_cluster(num_nodes=1, num_cpus=2, num_gpus=0, env=environment)


def start_job(
    cluster: RayCluster, model: str, prompts: Path, output: Path, **engine: Any
) -> subprocess.Popen[bytes]:
    """A job whose log lies beside its output."""
    command = [sys.executable, str(SCRIPTS / "batch.py"), str(output)]
    command += ["--input", str(prompts), "--model", model, "--batch-size", "4"]
    command += ["--kv-policy-config", json.dumps(POLICY)]
    command += ["--engine-args", json.dumps(ENGINE | engine)]
    command += ["--max-tokens", str(MAX_TOKENS)]
    with output.with_suffix(".log").open("wb") as log:
        return cluster.popen(command, stdout=log, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[bytes], output: Path) -> tuple[int, str]:
    """Exit status and all that the job and its workers wrote."""
    try:
        process.wait(timeout=JOB_S)
    finally:
        process.kill()
    log = output.with_suffix(".log").read_text(encoding="utf-8", errors="replace")
    return process.returncode, log


def alone(
    model: str, rows: list[dict[str, Any]]
) -> tuple[dict[str, str], dict[str, str]]:
    """The same rows through an engine of this process: with its policy, and with
    stock."""
    ours, stock = texts_of_policy_and_stock(
        model,
        [row["prompt"] for row in rows],
        MAX_TOKENS,
        kv_policy="pyramid",
        kv_policy_config=POLICY,
        **ENGINE,
    )
    ids = [row["id"] for row in rows]
    return dict(zip(ids, ours, strict=True)), dict(zip(ids, stock, strict=True))


@pytest.mark.timeout(300)
def test_a_job_does_the_missing_rows_on_the_policy(model: str, tmp_path: Path) -> None:
    """Engines in Ray's workers evict, and choose what an engine of ours chooses."""
    rows, output = make_rows(20), tmp_path / "answers.jsonl"
    write(output, [{"id": row["id"], "answer": "earlier"} for row in rows[:4]])
    with output.open("a", encoding="utf-8") as torn:
        torn.write('{"id": "row-4", "answ')
    prompts = write(tmp_path / "prompts.jsonl", rows)
    with one_node() as cluster:
        status, log = finish(start_job(cluster, model, prompts, output), output)
    assert status == 0, log[-6000:]
    freed = re.findall(r"this worker frees its first (\d+) pages, in step (\d+)", log)
    assert len(freed) == 1, log[-6000:]
    counts = re.findall(
        r"EngineCore.*KV policy pyramid: (\d+) compactions, (\d+) pages", log
    )
    assert int(counts[-1][1]) >= int(freed[0][0]) > 0, "nothing was evicted"
    found = written(output)
    assert set(found) == {row["id"] for row in rows}
    assert [found.pop(f"row-{i}") for i in range(4)] == ["earlier"] * 4
    ours, stock = alone(model, rows[4:])
    assert found == ours
    assert found != stock, "the policy changes nothing here"


#: Two requests at a time, so that a job can be caught in the middle.
SLOWLY = {"max_num_seqs": 2}


def wait_for_rows(output: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until some rows are there and others are not."""
    wait_for(
        lambda: process.poll() is not None or len(output.read_bytes().splitlines()) > 3,
        JOB_S,
        "no rows",
    )
    assert process.poll() is None, "the job is over before it was disturbed"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_survives_a_killed_engine(model: str, tmp_path: Path) -> None:
    """Ray starts another one and gives it the lost rows, with no help."""
    rows, output = make_rows(48), tmp_path / "answers.jsonl"
    prompts = write(tmp_path / "prompts.jsonl", rows)
    with one_node() as cluster:
        job = start_job(cluster, model, prompts, output, **SLOWLY)
        output.touch()
        wait_for_rows(output, job)
        kill_with_children(pid_of(cluster, ENGINE_ACTOR))
        num_rows = len(output.read_bytes().splitlines())
        assert num_rows < len(rows), "no row was left to lose"
        status, log = finish(job, output)
    assert status == 0, log[-6000:]
    assert len(set(re.findall(r"EngineCore pid=(\d+)", log))) == 2
    assert written(output) == alone(model, rows)[0]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_job_goes_on_where_it_was(model: str, tmp_path: Path) -> None:
    """A row that cannot be answered fails alone, and is all that is missing."""
    rows, output = make_rows(48), tmp_path / "answers.jsonl"
    long = {"id": "long", "prompt": TEXT * 100}
    prompts = write(tmp_path / "prompts.jsonl", [*rows, long])
    with one_node() as cluster:
        job = start_job(cluster, model, prompts, output, **SLOWLY)
        output.touch()
        wait_for_rows(output, job)
        job.kill()
        job.wait(timeout=30)
        before = output.read_bytes().splitlines()
        assert len(before) < len(rows), "no row was left to do"
        status, log = finish(start_job(cluster, model, prompts, output), output)
    assert status == 1, log[-6000:]
    assert "row 'long': " in log
    assert "1 rows are missing" in log
    assert output.read_bytes().splitlines()[: len(before) - 1] == before[:-1]
    assert written(output) == alone(model, rows)[0]


def test_a_torn_row_is_cut_and_no_row_is_written_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "answers.jsonl", [{"id": 1, "answer": "a"}])
    with path.open("a", encoding="utf-8") as torn:
        torn.write('{"id": 2, "ans')
    with Answers(path) as answers:
        assert answers.ids == {1}
        assert answers.add({"id": 2, "answer": "b"})
        assert not answers.add({"id": 1, "answer": "again"})
        with pytest.raises(ValueError, match="another job"):
            Answers(path)
    assert written(path) == {1: "a", 2: "b"}


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        ([{"prompt": "a"}], "line 1 has no 'id'"),
        ([{"id": 1}], "line 1: valid is one of"),
        ([{"id": 1, "prompt": ""}], "prompt is ''"),
        ([{"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}], "line 2: id is 1"),
        ([{"id": 1, "prompt": "a"}, {"id": 2, "messages": [{}]}], "all have"),
        ([], "no rows"),
    ],
)
def test_bad_rows_are_refused(
    tmp_path: Path, rows: list[dict[str, Any]], error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        read_rows(write(tmp_path / "prompts.jsonl", rows))


def test_the_bundled_rows_are_valid(tmp_path: Path) -> None:
    rows = bundled_rows()
    assert read_rows(write(tmp_path / "prompts.jsonl", rows)) == rows


def test_bad_settings_are_refused() -> None:
    device = find_device("cpu")
    for arguments, error in (
        (("pyramd", None, None), "pyramd"),
        (("pyramid", '{"retention": 7}', None), "retention"),
        (("pyramid", None, '{"kv_policy": "none"}'), "--kv-policy"),
        (("pyramid", None, "[]"), "JSON object"),
    ):
        with pytest.raises(ValueError, match=error):
            engine_kwargs(device, *arguments)
    with pytest.raises(ValueError, match="valid are cpu, gpu"):
        find_device("tpu")
