"""Exact figures of four small simulated loads; run it to write them anew."""

import json
from pathlib import Path
from typing import Any

from pyramid_vllm.policy import resolve_policy
from pyramid_vllm.tools.figures import Figures
from pyramid_vllm.tools.simulate.device import load_device
from pyramid_vllm.tools.simulate.engine import EngineSettings, SimulatedEngine
from pyramid_vllm.tools.simulate.figures import run_figures
from pyramid_vllm.tools.simulate.loads import Load, Session, Turn, named_load
from pyramid_vllm.tools.simulate.model import load_model
from pyramid_vllm.tools.simulate.run import Simulation

FILE = Path(__file__).with_name("simulated.json")


def slice_of_a_trace() -> Load:
    """Requests with the lengths and shared prefixes of a conversation's trace: some
    go on from another, and all start with the same block."""
    rows = []
    for index in range(40):
        # The blocks of the request eight before, then some of its own.
        blocks = [0, *(100 * (index % 8) + k for k in range(1, 3 + index // 8))]
        own = tuple((1_000_000 + 10 * index + k, 512) for k in range(index % 5))
        pieces = (*((block, 512) for block in blocks), *own, (index + 5_000, 77))
        turn = Turn(pieces, 40 + 37 * (index % 7))
        rows.append(Session((turn,), arrival=0.04 * index))
    return Load("trace", tuple(rows))


def loads() -> dict[str, Load]:
    """The four loads."""
    lengths = {"num_requests": 40, "prompt_tokens": 256, "output_tokens": 96}
    return {
        "unshared": named_load("unshared", lengths | {"prompt_tokens": 1024}),
        "shared": named_load("shared", lengths | {"shared_prefix": 1024}),
        "documents": named_load(
            "documents", lengths | {"shared_prefix": 1024, "num_prefixes": 4}
        ),
        "trace": slice_of_a_trace(),
    }


def rounded(figures: Figures) -> dict[str, Any]:
    """Figures without the times of this machine, to nine significant digits: what is
    the same wherever the same versions run."""
    return {
        key: value if isinstance(value, int) else float(f"{value:.9g}")
        for key, value in figures.items()
        if key not in ("cpu_ms_per_step", "wall_s")
    }


def figures() -> dict[str, Any]:
    """Figures by load and policy."""
    model = load_model("Llama-3-8B", None, 1)
    settings = EngineSettings(
        model=model,
        kv_bytes=512 * 32 * int(model.token_bytes) * model.num_layers,
        max_model_len=8192,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        block_size=32,
    )
    device = load_device("h100")
    engines = {
        side: SimulatedEngine(settings, resolve_policy(side))
        for side in ("none", "pyramid")
    }
    return {
        name: {
            side: rounded(
                run_figures(Simulation(side, engine, device, load, False).run())
            )
            for side, engine in engines.items()
        }
        for name, load in loads().items()
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(figures(), indent=2) + "\n", encoding="utf-8")
