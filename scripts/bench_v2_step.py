"""Host milliseconds of a decode step of vLLM's V2 runner: a policy against stock vLLM.

On a GPU the host prepares a step while the device still computes the one before; where
it takes longer than that, the device waits. This is the time of the worker's
``execute_model``: requests and pages, inputs, block tables, slots, attention metadata,
and all that a policy adds. The forward pass is left out, because on GPUs it is the
replay of a graph; sampling is left out, because it is the same on both sides.

There is no GPU. The runner and the builders of ``TRITON_ATTN`` run on the CPU, as in
``tests/gpu_on_cpu.py``, and launches of kernels do nothing, for vLLM's as for ours.
Copies to the device are copies within the CPU's memory, and pin nothing. A GPU's
launches and copies cost more than that on both sides.

Both sides live in one process and take turns round by round. A step's time is the
thread's CPU time; a round's figure is the mean over its steps, a row's is the median
over rounds. All sequences generate. Their prompts were compacted before, every tier to
another length, so that no two tiers share metadata; in the measured steps nothing is
evicted, and one in ``BLOCK_SIZE`` of the sequences needs a new page.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any

# Before torch and vLLM are imported.
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer
from bench_scheduler import listed, time_rounds
from rich.console import Console
from rich.progress import track
from rich.table import Table

from pyramid_vllm.tools.options import or_fail
from pyramid_vllm.tools.provenance import write_report
from tests import gpu_on_cpu
from tests.engines import MIB, close, make_llm, random_prompts, scheduler_of, worker_of
from tests.models import TINY_LLAMA, save_tiny_llama

RUNNING = (256,)
TIERS = (1, 6)
NUM_LAYERS = TINY_LLAMA["num_hidden_layers"]
ROUNDS = 20
STEPS_PER_ROUND = 16
BLOCK_SIZE = 32
#: Every tier keeps another part of such a prompt.
PROMPT_TOKENS = 96
POLICY = {"base": "pyramid-by-depth", "recent": 8, "min_context": 16, "retention": 0.4}
SEED = 0


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    running: int
    """Sequences that each step schedules."""
    tiers: int


def nothing(*_: Any, **__: Any) -> None:
    """In place of a launch."""


def use_backend(is_ours: bool) -> None:
    """Let the next engine have the stock backend, or ours; its start writes a cache."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from pyramid_vllm.attention import registry

    name = "triton.PyramidTritonBackend"
    registry.WRAPPED = {AttentionBackendEnum.CPU_ATTN: name}
    path = f"pyramid_vllm.attention.{name}" if is_ours else None
    gpu_on_cpu.use_backend("TRITON_ATTN", path)


class Side:
    """An engine whose sequences all generate.

    Args:
        model: folder.
        case: of the table.
        is_ours: whether it has a policy.
        num_rounds: how many rounds will be measured.
    """

    def __init__(self, model: str, case: Case, is_ours: bool, num_rounds: int) -> None:
        import torch
        from vllm.v1.attention.backends import triton_attn

        self._case, num_steps = case, num_rounds * STEPS_PER_ROUND
        longest = PROMPT_TOKENS + BLOCK_SIZE + num_steps + 2
        use_backend(is_ours)
        policy = {"kv_policy": POLICY | {"tiers": case.tiers}} if is_ours else {}
        token_bytes = 2 * NUM_LAYERS * 4
        token_bytes *= TINY_LLAMA["num_key_value_heads"] * TINY_LLAMA["head_dim"]
        self.llm = make_llm(
            model,
            block_size=BLOCK_SIZE,
            max_model_len=longest,
            max_num_seqs=case.running,
            # All prompts in one step: they generate equally much.
            max_num_batched_tokens=case.running * (PROMPT_TOKENS + BLOCK_SIZE),
            kv_cache_memory_bytes=2 * case.running * longest * token_bytes + MIB,
            **policy,
        )
        self.scheduler, self.worker = scheduler_of(self.llm), worker_of(self.llm)
        triton_attn.unified_attention = nothing
        triton_attn.triton_reshape_and_cache_flash = nothing
        self._queue(num_steps + 2)
        while any(r.num_computed_tokens < r.num_prompt_tokens for r in self._requests):
            self._step()
        hidden = torch.zeros(case.running, TINY_LLAMA["hidden_size"])
        # As a replay: no Python of the model runs.
        self.worker.model_runner.get_model().forward = lambda **_: hidden

    @property
    def _requests(self) -> list[Any]:
        return list(self.scheduler.requests.values())

    def _queue(self, num_outputs: int) -> None:
        """Lengths differ, so that not all sequences need a new page at once."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0.0, max_tokens=num_outputs, ignore_eos=True, detokenize=False
        )
        lengths = [PROMPT_TOKENS + i % BLOCK_SIZE for i in range(self._case.running)]
        for index, prompt in enumerate(random_prompts(lengths, seed=SEED)):
            self.llm.llm_engine.add_request(
                str(index), {"prompt_token_ids": prompt}, sampling
            )

    def _step(self) -> tuple[float, Any]:
        """CPU seconds of the worker, and what it ran."""
        from pyramid_vllm.tools.simulate.engine import sampled

        output = self.scheduler.schedule()
        start = time.thread_time()
        result = self.worker.execute_model(output)
        seconds = time.thread_time() - start
        assert result is None, "the runner waits to sample"
        # Instead of sampling, which reads what no kernel has written.
        self.worker.model_runner.execute_model_state = None
        self.scheduler.update_from_output(output, sampled(self.scheduler, output))
        return seconds, output

    def round(self) -> float:
        """Mean milliseconds of a step."""
        seconds = 0.0
        for _ in range(STEPS_PER_ROUND):
            taken, output = self._step()
            seconds += taken
            tokens = output.num_scheduled_tokens.values()
            assert list(tokens) == [1] * self._case.running, "not all generate"
        return 1000 * seconds / STEPS_PER_ROUND


def check_sides(stock: Side, ours: Side, case: Case) -> None:
    """Check that the sides are what the row says."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    for side in (stock, ours):
        assert isinstance(side.worker.model_runner, GPUModelRunner)
    assert not hasattr(stock.worker, "tier_state")
    state = ours.worker.tier_state
    assert state.step.num_tiers == case.tiers
    # Each prompt once, and nothing since.
    assert state.counters.num_compactions == case.running
    evicted = {ours.scheduler.tier_lengths.evicted(r) for r in ours.scheduler.requests}
    assert all(len(set(counts)) == case.tiers for counts in evicted)


def measure(model: str, case: Case, num_rounds: int) -> dict[str, Any]:
    """A row: the medians of both sides and their ratio.

    Args:
        model: folder.
        case: of the table.
        num_rounds: of each side that count; one more comes first, to warm up.
    """
    sides = {
        name: Side(model, case, name == "ours", num_rounds + 1)
        for name in ("stock", "ours")
    }
    times = time_rounds(sides, num_rounds + 1)
    check_sides(sides["stock"], sides["ours"], case)
    for side in sides.values():
        close(side.llm)
    stock, ours = (statistics.median(times[name][1:]) for name in sides)
    return asdict(case) | {"stock_ms": stock, "ours_ms": ours, "ratio": ours / stock}


def table(rows: list[dict[str, Any]], num_rounds: int) -> Table:
    """Rows as people read them."""
    made = Table(
        title="execute_model() without forward and sampling, host ms: median of "
        f"{num_rounds} rounds of {STEPS_PER_ROUND} steps"
    )
    for column in ("running", "tiers", "stock ms", "ours ms", "ratio"):
        made.add_column(column, justify="right")
    for row in rows:
        figures = (f"{row[key]:.3f}" for key in ("stock_ms", "ours_ms", "ratio"))
        made.add_row(f"{row['running']:,}", str(row["tiers"]), *figures)
    return made


def check_options(running: Sequence[int], tiers: Sequence[int], rounds: int) -> None:
    """Raises: ValueError: a value is not valid; names the option and what is valid."""
    for num in running:
        if num < 1:
            raise ValueError(f"--running is '{num}': valid is 1 or more")
    for num in tiers:
        if not 1 <= num <= NUM_LAYERS:
            raise ValueError(f"--tiers is '{num}': valid is 1 to {NUM_LAYERS}")
    if rounds < 1:
        raise ValueError(f"--rounds is '{rounds}': valid is 1 or more")


def main(
    running: Annotated[list[int] | None, listed("Sequences", RUNNING)] = None,
    tiers: Annotated[list[int] | None, listed("Numbers of tiers", TIERS)] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of each side.")] = ROUNDS,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print the host's milliseconds of a decode step, ours and stock vLLM's."""
    or_fail(lambda: check_options(running or (), tiers or (), rounds))
    gpu_on_cpu.prepare()
    from triton.runtime.interpreter import InterpretedFunction

    InterpretedFunction.run = nothing
    cases = [Case(*values) for values in product(running or RUNNING, tiers or TIERS)]
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny_llama(Path(folder), TINY_LLAMA)
        rows = [
            measure(model, case, rounds)
            for case in track(cases, console=Console(stderr=True))
        ]
    # At least as wide as the table, also where there is no terminal.
    console = Console()
    console.print(table(rows, rounds), width=max(80, console.width))
    if json_file is not None:
        write_report(json_file, {"rows": rows, "rounds": rounds}, SEED)


if __name__ == "__main__":
    typer.run(main)
