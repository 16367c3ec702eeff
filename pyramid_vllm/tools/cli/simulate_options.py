"""Types of the options of ``pyramid-vllm simulate``."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(help="A model's folder, a bundled shape's name or a hub name."),
]
Policies = Annotated[
    list[str] | None,
    typer.Option(
        help="A preset, a YAML file or inline JSON; repeat it to compare more. Stock "
        "vLLM is always there. Default: pyramid."
    ),
]
Overrides = Annotated[
    str | None, typer.Option(help="Settings that replace each policy's, as JSON.")
]
Gpu = Annotated[str, typer.Option(help="A shipped device, or a YAML file's path.")]
Efficiency = Annotated[
    str | None, typer.Option(help="Shares of the device's peaks, as JSON.")
]
TensorParallel = Annotated[int, typer.Option(min=1, help="Devices.")]
KVMemory = Annotated[
    str | None,
    typer.Option(
        help="KV memory of a device: bytes, or with KiB, MiB, GiB. Default: what the "
        "weights leave."
    ),
]
Dtype = Annotated[
    str | None, typer.Option(help="Of the KV cache too; default: the model's.")
]
MaxModelLen = Annotated[
    int | None, typer.Option(min=1, help="Longest request; default: the model's.")
]
DeviceDefault = Annotated[
    int | None, typer.Option(min=1, help="Default: vLLM's for the device.")
]
PrefixCaching = Annotated[bool, typer.Option(help="As in vLLM.")]
LoadName = Annotated[
    str,
    typer.Option(
        help="unshared, shared (one prefix), documents (several), chat (turns that "
        "grow), agent (tens of turns), reasoning (short in, long out)."
    ),
]
NumRequests = Annotated[
    int | None,
    typer.Option(
        min=1, help="Requests, or sessions of several turns; of a trace the first ones."
    ),
]
PromptTokens = Annotated[
    int | None, typer.Option(min=1, help="That each turn adds for itself.")
]
OutputTokens = Annotated[int | None, typer.Option(min=1, help="Of each answer.")]
SharedPrefix = Annotated[
    int | None, typer.Option(min=0, help="Tokens that sessions start with.")
]
NumPrefixes = Annotated[int | None, typer.Option(min=1, help="Different prefixes.")]
Turns = Annotated[int | None, typer.Option(min=1, help="Of a session.")]
ThinkTime = Annotated[
    float | None,
    typer.Option(min=0, help="Mean seconds from an answer to the next turn."),
]
Spread = Annotated[
    float | None, typer.Option(help="Lengths vary by this share of theirs.")
]
Rate = Annotated[
    float | None,
    typer.Option(help="Sessions a second, a Poisson process; default: all at once."),
]
Clients = Annotated[
    int | None, typer.Option(min=1, help="Sessions at once, in place of a rate.")
]
Trace = Annotated[
    Path | None, typer.Option(help="JSON lines in Mooncake's form, in place of --load.")
]
TraceSpeed = Annotated[
    float, typer.Option(help="Arrivals are this many times as fast.")
]
Cascade = Annotated[
    bool, typer.Option("--cascade", help="Pages that sequences share are read once.")
]
CpuTime = Annotated[
    bool,
    typer.Option(
        help="Whether the scheduler's own time counts. Without it, results are the "
        "same on every machine."
    ),
]
SloTtft = Annotated[
    str | None, typer.Option(help="Bound of the p99 time to first token, like 2s.")
]
SloTpot = Annotated[
    str | None,
    typer.Option(help="Bound of the p99 time per output token, like 50ms."),
]
Seed = Annotated[int, typer.Option(min=0)]
Calibrate = Annotated[
    Path | None,
    typer.Option(
        help="Fit the device's efficiencies to the runs in this folder of "
        "`pyramid-vllm bench`, print them and stop."
    ),
]
JsonFile = Annotated[
    Path | None, typer.Option("--json", help="Write the figures to this file.")
]
Plots = Annotated[Path | None, typer.Option(help="Draw a picture into this folder.")]
