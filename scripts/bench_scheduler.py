"""Milliseconds of the scheduler for one step: preset ``pyramid`` against stock vLLM.

A step's time is that of ``schedule()`` plus ``update_from_output()``, with the
asynchronous scheduler two steps deep, as vLLM runs on GPUs. It is the thread's CPU
time: work of other processes does not count. Both sides live in one process and take
turns round by round; the first of each pair of rounds alternates. A round's figure is
the mean over its steps, a row's is the median over rounds. There is no GPU and there
are no weights: the worker's results are made here.

Both loads keep the number of scheduled sequences the same in every step:

* ``decode``: all prompts are computed before the first measured step.
* ``prefill``: one in eight of the sequences is a new one, whose whole prompt is
  computed in the step. A sequence lives for eight steps, so as many end as arrive.
  Queueing a request is not timed. It is harder on a scheduler than most real loads,
  because answers have eight tokens.

The memory is a fifth more than stock vLLM needs, so that nothing waits for pages. In
load ``prefill`` the prefix cache soon fills it: new pages are evicted from the cache.
"""

import gc
import os
import statistics
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

# Before vLLM is imported: its log lines would break the progress bar.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from pyramid_vllm.policy import PolicyConfig, resolve_policy
from pyramid_vllm.tools.figures import right_table
from pyramid_vllm.tools.options import or_fail
from pyramid_vllm.tools.provenance import write_report
from pyramid_vllm.tools.simulate.engine import EngineSettings, SimulatedEngine, sampled
from pyramid_vllm.tools.simulate.model import load_model

MODEL = load_model("Llama-3-8B", None, 1)
POLICY = "pyramid"
RUNNING = (64, 256, 512, 1024)
TIERS = (1, 6, 32)
Load = StrEnum("Load", {"DECODE": "decode", "PREFILL": "prefill"})
Caching = StrEnum("Caching", {"ON": "on", "OFF": "off"})
ROUNDS = 5
BLOCK_SIZE = 16
#: In load ``prefill`` one sequence in this many computes its prompt.
PROMPT_SHARE = 8
#: In each step one in ``BLOCK_SIZE`` of the sequences needs a new page.
STEPS_PER_ROUND = 4
PROMPT_TOKENS = 384
PIPELINE_DEPTH = 2
#: Memory, as a multiple of what stock vLLM needs at most.
MEMORY_MARGIN = 1.2
SEED = 0


@dataclass(frozen=True)
class Case:
    """A row of the matrix."""

    running: int
    """Sequences that each step schedules."""
    tiers: int
    caching: bool
    load: str

    @property
    def num_new(self) -> int:
        """Requests that arrive before a step, until all are there or for ever."""
        return self.running // PROMPT_SHARE

    def engine_settings(self, num_outputs: int) -> EngineSettings:
        """An engine in which neither the memory nor a bound on a step ever binds.

        Args:
            num_outputs: tokens that a request generates.
        """
        longest = PROMPT_TOKENS + BLOCK_SIZE + num_outputs
        num_pages = -(-longest // BLOCK_SIZE)
        page_bytes = BLOCK_SIZE * int(MODEL.token_bytes) * MODEL.num_layers
        # A request that ended keeps its place until its last step's output is taken.
        max_num_seqs = self.running + PIPELINE_DEPTH * self.num_new
        return EngineSettings(
            model=MODEL,
            kv_bytes=int(MEMORY_MARGIN * max_num_seqs * num_pages * page_bytes),
            max_model_len=longest,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=self.num_new * longest + self.running,
            block_size=BLOCK_SIZE,
            prefix_caching=self.caching,
        )


class Side:
    """A scheduler under a load, without a worker.

    Args:
        case: of the matrix.
        policy: the side's; None: stock vLLM.
        num_rounds: how many rounds will be measured.
    """

    def __init__(
        self, case: Case, policy: PolicyConfig | None, num_rounds: int
    ) -> None:
        self._case = case
        num_steps = PROMPT_SHARE + num_rounds * STEPS_PER_ROUND
        # In load `decode` no request ends before the last step.
        self._num_outputs = PROMPT_SHARE if case.load == "prefill" else num_steps + 1
        self._engine = SimulatedEngine(case.engine_settings(self._num_outputs), policy)
        self.scheduler: Any = self._engine.scheduler
        self._flying: deque[tuple[Any, Any]] = deque()
        self._num_requests = 0
        for _ in range(PROMPT_SHARE):
            self._admit()
            self._step()

    def round(self) -> float:
        """Mean milliseconds of a step."""
        seconds = 0.0
        expected = self._case.num_new if self._case.load == "prefill" else 0
        for _ in range(STEPS_PER_ROUND):
            if expected:
                self._admit()
            taken, output = self._step()
            seconds += taken
            assert len(output.num_scheduled_tokens) == self._case.running
            assert len(output.scheduled_new_reqs) == expected
        return 1000 * seconds / STEPS_PER_ROUND

    def _admit(self) -> None:
        """Queue a step's new requests; their prompts share no page."""
        for _ in range(self._case.num_new):
            index = self._num_requests
            # Lengths differ, so that not all sequences need a new page at once.
            length = PROMPT_TOKENS + index % BLOCK_SIZE
            prompt = [index % 100_000, index // 100_000, *range(2, length)]
            request = self._engine.request(str(index), prompt, self._num_outputs, 0.0)
            self.scheduler.add_request(request)
            self._num_requests += 1

    def _step(self) -> tuple[float, Any]:
        """Schedule a step, then take the output of the one before.

        Returns:
            CPU seconds of both, and what was scheduled.
        """
        start = time.thread_time()
        output = self.scheduler.schedule()
        seconds = time.thread_time() - start
        assert not output.preempted_req_ids, "the memory binds"
        self._flying.append((output, sampled(self.scheduler, output)))
        if len(self._flying) == PIPELINE_DEPTH:
            oldest = self._flying.popleft()
            start = time.thread_time()
            self.scheduler.update_from_output(*oldest)
            seconds += time.thread_time() - start
        return seconds, output


def check_sides(stock: Side, ours: Side, case: Case) -> None:
    """Check that the sides are what the row says: vLLM's own, and a busy policy."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    assert type(stock.scheduler) is AsyncScheduler
    assert ours.scheduler.kv_rule.layout.num_tiers == case.tiers
    assert ours.scheduler.kv_counters.num_compactions >= case.running
    assert ours.scheduler.kv_counters.num_pages_freed > 0


def time_rounds(sides: dict[str, Side], num_rounds: int) -> dict[str, list[float]]:
    """Milliseconds a step of each side, round by round.

    The garbage collector runs between rounds only, and over what is new since the
    sides were made: vLLM, too, freezes what it starts with.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for number in range(num_rounds):
            for name in sorted(sides, reverse=number % 2 == 0):
                times[name].append(sides[name].round())
                gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    return times


def measure(case: Case, num_rounds: int) -> dict[str, Any]:
    """A row: the medians of both sides and their ratio.

    Args:
        case: of the matrix.
        num_rounds: of each side that count; one more comes first, to warm up.
    """
    policy = resolve_policy(POLICY, {"tiers": case.tiers})
    sides = {
        "stock": Side(case, None, num_rounds + 1),
        "ours": Side(case, policy, num_rounds + 1),
    }
    times = time_rounds(sides, num_rounds + 1)
    check_sides(sides["stock"], sides["ours"], case)
    stock, ours = (statistics.median(times[name][1:]) for name in sides)
    return asdict(case) | {"stock_ms": stock, "ours_ms": ours, "ratio": ours / stock}


def table(rows: list[dict[str, Any]], num_rounds: int) -> Table:
    """Rows as people read them."""
    columns = ("load", "prefix caching", "running", "tiers")
    made = right_table(
        (*columns, "stock ms", "ours ms", "ratio"),
        "schedule() + update_from_output(), ms a step: median of "
        f"{num_rounds} rounds of {STEPS_PER_ROUND} steps",
    )
    for row in rows:
        made.add_row(
            row["load"],
            "on" if row["caching"] else "off",
            f"{row['running']:,}",
            str(row["tiers"]),
            *(f"{row[key]:.2f}" for key in ("stock_ms", "ours_ms", "ratio")),
            end_section=row["tiers"] == rows[-1]["tiers"],
        )
    return made


def check_options(running: Sequence[int], tiers: Sequence[int], rounds: int) -> None:
    """Raises: ValueError: a value is not valid; names the option and what is valid."""
    for num in running:
        if num < 1 or num % PROMPT_SHARE:
            valid = f"positive multiples of {PROMPT_SHARE}"
            raise ValueError(f"--running is '{num}': valid are {valid}")
    for num in tiers:
        if not 1 <= num <= MODEL.num_layers:
            raise ValueError(f"--tiers is '{num}': valid is 1 to {MODEL.num_layers}")
    if rounds < 1:
        raise ValueError(f"--rounds is '{rounds}': valid is 1 or more")


def listed(what: str, values: Sequence[Any]) -> Any:
    """An option that can be given several times."""
    default = ", ".join(map(str, values))
    return typer.Option(help=f"{what}; repeatable. All of {default} if not given.")


def main(
    running: Annotated[list[int] | None, listed("Sequences", RUNNING)] = None,
    tiers: Annotated[list[int] | None, listed("Numbers of tiers", TIERS)] = None,
    caching: Annotated[
        list[Caching] | None, listed("Prefix caching", list(Caching))
    ] = None,
    load: Annotated[list[Load] | None, listed("Load", list(Load))] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of each side.")] = ROUNDS,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print the scheduler's milliseconds a step, ours and stock vLLM's."""
    or_fail(lambda: check_options(running or (), tiers or (), rounds))
    chosen = (load or Load, caching or Caching, running or RUNNING, tiers or TIERS)
    cases = [
        Case(num_running, num_tiers, cached == "on", kind)
        for kind, cached, num_running, num_tiers in product(*chosen)
    ]
    rows = [
        measure(case, rounds) for case in track(cases, console=Console(stderr=True))
    ]
    # At least as wide as the table, also where there is no terminal.
    console = Console()
    console.print(table(rows, rounds), width=max(80, console.width))
    if json_file is not None:
        write_report(json_file, {"rows": rows, "rounds": rounds}, SEED)


if __name__ == "__main__":
    typer.run(main)
