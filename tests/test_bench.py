"""``pyramid-vllm bench``: requests, checks and summaries; runs of a tiny model."""

import json
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from pyramid_vllm.model_shape import ModelShape
from pyramid_vllm.tools.bench import run as bench_run
from pyramid_vllm.tools.bench.figures import (
    batch_figures,
    check_activation,
    memory_binds,
    summarize,
)
from pyramid_vllm.tools.bench.measure import (
    MeasureTask,
    add_request,
    make_engine,
    run_batch,
    warm_up,
)
from pyramid_vllm.tools.bench.report import caching_label, format_ratio
from pyramid_vllm.tools.bench.requests import draw_prompts, make_requests, windows
from pyramid_vllm.tools.bench.run import Run
from pyramid_vllm.tools.bench.settings import BenchSettings, TokenRange
from pyramid_vllm.tools.bench.watch import Measured
from pyramid_vllm.tools.bench.workload import Point, Workload, memory_bytes
from pyramid_vllm.tools.cli import app
from pyramid_vllm.tools.store import Store, fingerprint
from tests.engines import random_prompts


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", *arguments], env={"COLUMNS": "140"})


class Letters:
    """A tokenizer of characters."""

    all_special_ids = (0, 1)

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [2 + ord(letter) % 50 for letter in text]


# Options.


def test_ranges_are_read() -> None:
    assert TokenRange.parse("--x", "512", 1) == TokenRange(512, 512)
    assert TokenRange.parse("--x", "512-2048", 1) == TokenRange(512, 2048)


@pytest.mark.parametrize("text", ["", "many", "9-3", "1", "-4", "1-2-3"])
def test_bad_ranges_are_named(text: str) -> None:
    with pytest.raises(ValueError, match="valid is a number or a range"):
        TokenRange.parse("--x", text, 2)


def test_memory_is_bytes_or_stock_sequences() -> None:
    assert memory_bytes("80MiB", 10, 100) == 80 * 2**20
    assert memory_bytes("4x", 10, 100) == (40 + 1) * 100
    assert memory_bytes("1.25x", 10, 100) == (13 + 1) * 100
    for text in ("x", "-1x", "0x", "infx", "nanx", "much"):
        with pytest.raises(ValueError, match=f"--kv-memory is '{text}'"):
            memory_bytes(text, 10, 100)


def test_stock_is_always_a_side_and_names_differ() -> None:
    policies = ["pyramid", '{"name": "pyramid", "retention": 0.3}', "none"]
    sides = bench_settings(kv_policy=policies).sides
    assert [side.name for side in sides] == ["none", "pyramid", "pyramid (2)"]
    assert sides[0].policy_json is None
    assert json.loads(sides[2].policy_json or "")["retention"] == 0.3
    assert len(bench_settings(kv_policy=["pyramid", "pyramid"]).sides) == 2
    with pytest.raises(ValueError, match="at least one policy"):
        bench_settings(kv_policy=["none"])
    with pytest.raises(ValueError, match="valid policies are"):
        bench_settings(kv_policy=["pyramyd"])


def test_engine_args_with_an_option_of_their_own_are_named() -> None:
    settings = bench_settings(engine_args='{"enforce_eager": false}')
    assert settings.engine_args == {"enforce_eager": False}
    for text, words in (
        ("[1]", "valid is a JSON object"),
        ("{", "Invalid JSON"),
        ('{"kv_cache_memory_bytes": 5}', "valid is --kv-memory"),
    ):
        with pytest.raises(ValueError, match=words):
            bench_settings(engine_args=text)


# Requests.


def test_the_same_seed_draws_the_same_requests() -> None:
    ranges = {"prompt_tokens": "5-9", "output_tokens": "2-4", "num_prompts": 500}
    settings = bench_settings(seed=7, **ranges)
    found = make_requests(settings, None, 64)
    assert found == make_requests(settings, None, 64)
    assert found != make_requests(bench_settings(seed=8, **ranges), None, 64)
    assert set(found.prompt_lengths) == {5, 6, 7, 8, 9}
    assert set(found.output_lengths) == {2, 3, 4}
    assert "500 of random token ids" in found.source


def test_windows_follow_each_other() -> None:
    assert windows(range(10), [3, 2, 4]) == [[0, 1, 2], [3, 4], [5, 6, 7, 8]]
    assert windows(range(10), [3, 7, 1]) == [[0, 1, 2], list(range(3, 10))]


def test_where_real_text_ends_random_tokens_begin() -> None:
    lengths = [300_000] * 3
    prompts, source = draw_prompts(Letters(), 70, lengths, 0)
    assert list(map(len, prompts)) == lengths
    assert "of real text" in source
    assert "of random token ids" in source
    assert max(prompts[0]) < 52 <= max(prompts[-1])  # letters end at 51
    assert min(prompts[-1]) == 2, "special tokens were drawn"


def bench_settings(**changes: Any) -> BenchSettings:
    settings: dict[str, Any] = {
        "model": "m",
        "num_prompts": 5,
        "prompt_tokens": "20-30",
        "output_tokens": "3-6",
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
    }
    return BenchSettings(**(settings | changes))


@pytest.mark.parametrize("tokenizer", [None, Letters()])
def test_prefixes_come_before_a_prompts_own_tokens_and_take_turns(
    tokenizer: Letters | None,
) -> None:
    settings = bench_settings(shared_prefix=40, num_prefixes=2)
    (prompts,) = make_requests(settings, tokenizer, 64).turns
    beginnings = [prompt[:40] for prompt in prompts]
    assert beginnings[0] == beginnings[2] == beginnings[4]
    assert beginnings[1] == beginnings[3] != beginnings[0]
    assert all(60 <= len(prompt) <= 70 for prompt in prompts)
    assert len({tuple(prompt[40:60]) for prompt in prompts}) == 5


def test_a_turn_is_as_long_as_all_that_its_conversation_has() -> None:
    settings = bench_settings(shared_prefix=40, turns=3)
    requests = make_requests(settings, None, 64)
    assert settings.num_requests == len(requests.output_lengths) == 15
    for index, first in enumerate(requests.turns[0]):
        parts = [len(turn[index]) for turn in requests.turns[1:]]
        assert all(20 <= part <= 30 for part in parts)
        outputs = requests.output_lengths[index::5]
        whole = len(first) + sum(parts) + sum(outputs)
        assert requests.lengths[index] == whole
        assert whole - outputs[-1] in requests.prompt_lengths
        assert len(first) in requests.prompt_lengths


# Figures.


def measure_task(**changes: Any) -> MeasureTask:
    settings: dict[str, Any] = {
        "model": "m",
        "turns": [[[1] * 10, [2] * 20]],
        "output_lengths": [3, 5],
        "engine_args": {},
    }
    return MeasureTask(**(settings | changes))


def test_latencies_of_a_batch_count_from_its_start() -> None:
    zeros: dict[str, Any] = dict.fromkeys((f.name for f in fields(Measured)), 0)
    times = {"first_token_s": [1.0, 2.0], "finish_s": [2.0, 4.0], "seconds": 4.0}
    measured = Measured(**zeros | times | {"num_preemptions": 3})
    figures = batch_figures(measure_task(), measured)
    assert figures["ttft_p50_s"] == 1.5
    assert figures["tpot_p50_s"] == 0.5  # (2 - 1) / 2 and (4 - 2) / 4
    assert figures["e2e_p99_s"] == pytest.approx(np.percentile([2, 4], 99))
    assert figures["requests_per_s"] == 0.5
    assert figures["output_tokens_per_s"] == 2.0
    assert figures["num_preemptions"] == 3


def test_a_policy_that_does_nothing_is_refused() -> None:
    idle = {"num_rows_scheduled": 9, "num_rows_computed": 9}
    idle |= {"num_compactions": 0, "num_kept_whole": 0}
    with pytest.raises(RuntimeError, match="policy 'p' keeps less"):
        check_activation("p", idle)
    check_activation("p", idle | {"num_compactions": 1})
    check_activation("p", idle | {"num_rows_computed": 8.5})
    check_activation("p", idle | {"num_kept_whole": 1})


# Summaries.


def test_ratios_are_taken_within_a_repeat() -> None:
    found = summarize(
        {
            "none": [{"t": 1.0, "z": 0}, {"t": 10.0, "z": 0}, {"t": 2.0, "z": 0}],
            "p": [{"t": 2.0, "z": 1}, {"t": 10.0, "z": 1}, {"t": 8.0, "z": 1}],
        }
    )
    ratio = found["p"]["t"]["ratio"]
    assert ratio["values"] == [2.0, 1.0, 4.0]
    assert (ratio["median"], ratio["min"], ratio["max"]) == (2.0, 1.0, 4.0)
    assert found["p"]["t"]["median"] == 8.0
    assert found["p"]["z"]["ratio"] is None
    assert format_ratio(ratio) == "2.00 (1.00-4.00)"


def test_memory_binds_where_stock_cannot_run_all_at_once() -> None:
    all_ran = {"max_num_running": 4, "num_preemptions": 0}
    assert not memory_binds(False, 4, [all_ran, all_ran])
    assert memory_binds(False, 4, [all_ran, all_ran | {"max_num_running": 3}])
    assert memory_binds(False, 4, [all_ran | {"num_preemptions": 1}])
    assert not memory_binds(True, 4, [all_ran | {"max_num_running": 3}])


def test_a_run_is_known_by_all_of_its_task(tmp_path: Path) -> None:
    point, side = Point("4x", 1), bench_settings().sides[0]

    def identity(repeat: int = 0, **changes: Any) -> dict[str, Any]:
        return Run(point, side, repeat, measure_task(**changes)).identity

    runs = [
        identity(),
        identity(1),
        identity(engine_args={"kv_policy": "{}"}),
        identity(turns=[[[1] * 10, [2] * 19 + [3]]]),
    ]
    assert fingerprint(identity()) == fingerprint(runs[0])
    assert len(set(map(fingerprint, runs))) == 4
    store, result = Store(tmp_path / "runs"), {"figures": {"t": 1.5}}
    assert store.load(runs[0]) is None
    store.save(runs[0], result)
    assert store.load(runs[0]) == result
    assert store.load(runs[1]) is None
    store.path(runs[0]).write_text("{", encoding="utf-8")
    assert store.load(runs[0]) is None, "half a file was taken for a run"


def test_a_finished_run_is_found_under_another_label(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: list[Any] = []

    def counted(task: Any, advance: Any) -> dict[str, Any]:
        tasks.append(task)
        return {"figures": {"seconds": 1.5}, "raw": {}}

    monkeypatch.setattr(bench_run, "run_task", counted)
    settings = bench_settings(out=tmp_path)
    shape = ModelShape(2, 1, 8, "float32", 64)
    requests = make_requests(settings, None, 64)
    workload = Workload(settings, requests, shape, {"block_size": 32})
    for label in ("4x", "80MiB"):
        run = Run(Point(label, 1), settings.sides[0], 0, measure_task())
        console = Console(quiet=True)
        (result,) = bench_run.execute(console, workload, [run])
        assert result["point"]["label"] == label
        assert result["figures"] == {"seconds": 1.5}
    assert len(tasks) == 1


def test_sides_that_differ_in_caching_are_named() -> None:
    assert caching_label({"none": True, "p": True}) == "prefix caching on"
    words = "prefix caching: stock vLLM on, p off"
    assert caching_label({"none": True, "p": False}) == words


# The command.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kv-policy", "pyramyd"], "valid policies are"),
        (["--prompt-tokens", "4-2"], "--prompt-tokens is '4-2'"),
        (["--output-tokens", "1"], "--output-tokens is '1'"),
        (["--kv-memory", "lots"], "--kv-memory is 'lots'"),
        (["--kv-memory", "0.5x"], "valid is that or more"),
        (["--kv-memory", "1KiB"], "valid is that or more"),
        (["--prompt-tokens", "4096"], "up to 4096"),
        (["--dtype", "int3"], "dtype is 'int3'"),
        (["--max-num-batched-tokens", "8"], "valid is --max-num-seqs"),
        (["--engine-args", '{"no_such": 1}'], "'no_such'"),
        (["--engine-args", '{"tensor_parallel_size": 2}'], "valid is 1"),
        (["--kv-policy", '{"tiers": 7}'], "valid is 1 to 6"),
        (["--shared-prefix", "-1"], "'--shared-prefix': Input should be greater"),
        (["--num-prefixes", "0"], "'--num-prefixes': Input should be greater"),
        (["--num-prefixes", "2"], "valid is up to 1, with --shared-prefix 0"),
        (
            ["--num-prefixes", "25", "--shared-prefix", "9"],
            "--num-prefixes is 25: valid is up to 24",
        ),
        (["--turns", "0"], "'--turns': Input should be greater"),
        (["--shared-prefix", "4000"], "the longest request has 4896 tokens"),
        (["--turns", "5"], "the longest request has 4480 tokens"),
        (
            [*("--shared-prefix", "9", "--turns", "2"), "--kv-memory", "1KiB"],
            "a request of 1801 tokens needs",
        ),
    ],
)
def test_the_command_names_what_is_wrong(
    tiny_llama: str, tmp_path: Path, arguments: list[str], words: str
) -> None:
    out = tmp_path / "out"
    result = run("--model", tiny_llama, "--out", str(out), *arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())
    assert not out.exists(), "something ran before the options were checked"


def check_medians(file: Path, point: dict[str, Any]) -> None:
    """The file of medians says the same as the folder of results."""
    (medians,) = json.loads(file.read_text())["points"]
    assert medians["kv_memory"] == "2x"
    assert medians["kv_bytes"] == point["kv_bytes"]
    assert (medians["shared_prefix"], medians["turns"]) == (0, 1)
    assert set(medians["sides"]) == {"none", "mine"}
    for name, side in medians["sides"].items():
        of_point = point["sides"][name]
        assert side["tokens_per_s"] == of_point["total_tokens_per_s"]["median"]
        for key in ("max_num_running", "num_rows_computed", "num_preemptions"):
            assert side[key] == of_point[key]["median"], key
        assert side["ratio"] == of_point["total_tokens_per_s"]["ratio"]["median"]
        assert side["prefix_caching"] is point["prefix_caching"][name]
    assert medians["sides"]["none"]["ratio"] == 1.0


# Engines, as the command makes them.

SIDES: dict[str, dict[str, Any]] = {
    "stock": {},
    "policy": {"kv_policy": '{"name": "p", "retention": 0.4, "min_context": 64}'},
    "off": {"enable_prefix_caching": False},
}


@pytest.fixture(scope="module", params=SIDES)
def side(
    request: pytest.FixtureRequest, tiny_llama: str
) -> Iterator[tuple[str, MeasureTask, Any]]:
    """A side's name, a task of prompts that share nothing, and the side's engine."""
    engine_args = {
        "dtype": "float32",
        "seed": 0,
        "kv_cache_memory_bytes": 16 * 2**20,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 512,
        "block_size": 32,
        "max_model_len": 430,  # room for further turns
        "enforce_eager": True,
        "skip_tokenizer_init": True,
    }
    task = measure_task(
        model=tiny_llama,
        turns=[random_prompts([200, 230])],
        output_lengths=[4, 4],
        engine_args=engine_args | SIDES[request.param],
    )
    engine = make_engine(task)
    yield request.param, task, engine
    engine.engine_core.shutdown()


@pytest.fixture(autouse=True)
def _empty_cache(request: pytest.FixtureRequest) -> None:
    if "side" in request.fixturenames:
        assert request.getfixturevalue("side")[2].reset_prefix_cache()


def measure_here(engine: Any, task: MeasureTask) -> Measured:
    return run_batch(engine, task, lambda done: None)


def test_prefix_caching_is_on_unless_switched_off(
    side: tuple[str, MeasureTask, Any],
) -> None:
    name, task, engine = side
    config = engine.vllm_config.cache_config
    assert config.enable_prefix_caching is (name != "off")
    assert measure_here(engine, task).prefix_caching is (name != "off")


def test_a_shared_prefix_is_not_computed_again(
    side: tuple[str, MeasureTask, Any],
) -> None:
    name, task, engine = side
    prefix, *own = random_prompts([128, 40, 50, 60], seed=5)
    turns = [[prefix + part for part in own]]
    task = replace(task, turns=turns, output_lengths=[4] * 3)
    found = measure_here(engine, task)
    total = sum(task.prompt_lengths)
    if name == "off":
        assert (found.num_prompt_tokens_computed, found.prefix_hit_rate) == (total, 0)
        return
    assert found.num_prompt_tokens_computed < total
    hits = total - found.num_prompt_tokens_computed
    assert found.prefix_hit_rate == pytest.approx(hits / total)
    if name == "stock":  # whose first request has the prefix when the others start
        assert hits == 2 * 128


def test_a_warm_up_leaves_nothing_in_the_cache(
    side: tuple[str, MeasureTask, Any],
) -> None:
    name, task, engine = side
    warm_up(engine, task)
    found = measure_here(engine, task)
    assert found.prefix_hit_rate == 0
    assert found.num_prompt_tokens_computed == sum(task.prompt_lengths)
    if name == "stock":  # there was something to leave
        assert measure_here(engine, task).prefix_hit_rate > 0.9


def test_a_warm_up_that_stays_in_the_cache_is_an_error(
    side: tuple[str, MeasureTask, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, task, engine = side
    with monkeypatch.context() as patch:
        patch.setattr(engine, "reset_prefix_cache", lambda: False)
        with pytest.raises(RuntimeError, match="could not be emptied"):
            warm_up(engine, task)


def test_a_turn_continues_the_answer_before_it(
    side: tuple[str, MeasureTask, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, task, engine = side
    sent: dict[str, list[int]] = {}

    def listening(engine: Any, name: str, prompt: list[int], num_tokens: int) -> None:
        sent[name] = prompt
        add_request(engine, name, prompt, num_tokens)

    monkeypatch.setattr("pyramid_vllm.tools.bench.measure.add_request", listening)
    later = [random_prompts([30, 40], seed=turn) for turn in (7, 8)]
    # The second conversation's first answer ends later than the first one's.
    turns = [*task.turns, *later]
    task = replace(task, turns=turns, output_lengths=[4, 9, 5, 3, 6, 7])
    found = measure_here(engine, task)
    assert [len(output) for output in found.outputs] == task.output_lengths
    assert [len(sent[str(number)]) for number in range(6)] == task.prompt_lengths
    for number in range(4):
        own = later[number // 2][number % 2]
        before = sent[str(number)] + found.outputs[number]
        assert sent[str(number + 2)] == before + own
    if name == "stock":
        # Whole pages of what the turn before it has computed: not its last token.
        ends = np.add(task.prompt_lengths, task.output_lengths)[:4].tolist()
        hits = sum((end - 1) // 32 * 32 for end in ends)
        total = sum(task.prompt_lengths)
        assert total - found.num_prompt_tokens_computed == hits
    # Later turns were sent later, and are timed from then on.
    assert found.finish_s[0] + found.finish_s[2] + found.finish_s[4] <= found.seconds
    assert all(0 < first < found.seconds for first in found.first_token_s)


@pytest.mark.timeout(300)
def test_a_sweep_shows_the_policy_and_is_resumed(
    tiny_llama: str, tmp_path: Path
) -> None:
    policy: dict[str, Any] = {
        "name": "mine",
        "retention": 0.4,
        "recent": 16,
        "min_context": 64,
    }
    policy["prune_from"] = 0
    arguments = (
        *("--model", tiny_llama, "--kv-policy", json.dumps(policy)),
        *("--num-prompts", "5", "--prompt-tokens", "180-220"),
        *("--output-tokens", "4-6", "--kv-memory", "2x", "--repeats", "2"),
        *("--max-num-seqs", "4", "--out", str(tmp_path)),
        *("--json", str(tmp_path / "made" / "medians.json")),
    )
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "results.json").read_text())
    (point,) = report["points"]
    assert point["memory_binds"]
    # Stock vLLM as it is; the policy prunes prompts, which goes with no prefix cache.
    assert point["prefix_caching"] == {"none": True, "mine": False}
    said = " ".join(result.stdout.split())
    assert "prefix caching: stock vLLM on, mine off" in said
    assert "prompts share no prefix" in said
    stock, side = point["sides"]["none"], point["sides"]["mine"]
    for repeat in range(2):
        for key in ("kv_bytes_per_request", "num_rows_computed"):
            assert side[key]["ratio"]["values"][repeat] < 0.75, key
        assert side["num_compactions"]["values"][repeat] == 5
        assert side["num_pages_freed"]["values"][repeat] > 0
        assert side["max_num_running"]["values"][repeat] > 2
    assert stock["max_num_running"]["values"] == [2, 2]
    assert stock["num_compactions"]["max"] == 0
    order = [(entry["repeat"], entry["side"]) for entry in report["runs"]]
    assert order == [(0, "none"), (0, "mine"), (1, "none"), (1, "mine")]
    raw = report["runs"][1]["raw"]
    assert all(180 <= length <= 220 for length in raw["prompt_lengths"])
    tokens = sum(raw["prompt_lengths"]) + sum(raw["output_lengths"])
    scheduled = report["runs"][0]["figures"]["num_rows_scheduled"]
    # The last token of an output is sampled, never computed.
    assert scheduled == tokens - 5
    check_medians(tmp_path / "made" / "medians.json", point)
    times = {file: file.stat().st_mtime_ns for file in tmp_path.glob("runs/*")}
    assert len(times) == 4
    again = run(*arguments)
    assert "4 of 4 runs are finished" in again.stdout
    assert times == {file: file.stat().st_mtime_ns for file in tmp_path.glob("runs/*")}
