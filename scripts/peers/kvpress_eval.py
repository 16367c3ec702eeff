"""Loss and greedy outputs of kvpress's presses, on prompts given as token ids.

Standalone: run by the environment that ``scripts/peers/setup`` makes, which has another
transformers than pyramid-vllm. A press evicts while the whole prompt is prefilled; what
follows is fed token by token, at the positions that it has in the uncompressed text.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import sys
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

from peer_task import PRESSES, Sample, Task, Window, read_task


class Runner:
    """A model under one press, or under none.

    Args:
        model: a causal language model of transformers.
        press: a kvpress press.
    """

    def __init__(self, model: Any, press: Any | None) -> None:
        self._model = model
        self._press = press
        eos = model.generation_config.eos_token_id
        self._eos = set(eos if isinstance(eos, list) else [eos])

    def _prefill(self, prompt: list[int]) -> tuple[Any, float, Any]:
        """The cache, mean tokens that its layers hold, and the last row of logits."""
        import torch
        from transformers import DynamicCache

        cache = DynamicCache()
        ids = torch.tensor([prompt])
        with self._press(self._model) if self._press else nullcontext():
            out = self._model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        held = [layer.keys.shape[2] for layer in cache.layers]
        if self._press is not None and not sum(held) < len(prompt) * len(held):
            raise RuntimeError(
                f"{type(self._press).__name__} holds all {len(prompt)} tokens of a "
                "prompt: there is nothing to compare"
            )
        return cache, sum(held) / len(held), out.logits[0, -1]

    def _step(self, cache: Any, token: int, position: int) -> Any:
        """Logits after one more token."""
        import torch

        # Without this, the position would be the compressed length.
        return self._model(
            input_ids=torch.tensor([[token]]),
            past_key_values=cache,
            position_ids=torch.tensor([[position]]),
        ).logits[0, -1]

    def score(self, window: Window) -> tuple[list[float], list[int], float]:
        """Nats of every target token, the most likely tokens, and mean tokens held."""
        cache, held, logits = self._prefill(window.prompt)
        nll, top1 = [], []
        for i, token in enumerate(window.target):
            if i > 0:
                position = len(window.prompt) + i - 1
                logits = self._step(cache, window.target[i - 1], position)
            nll.append(-float(logits.log_softmax(-1)[token]))
            top1.append(int(logits.argmax()))
        return nll, top1, held

    def answer(self, sample: Sample) -> tuple[list[int], float]:
        """Greedy tokens, with the one that ends them, and mean tokens held."""
        cache, held, logits = self._prefill(sample.prompt)
        tokens = [int(logits.argmax())]
        while len(tokens) < sample.max_tokens and tokens[-1] not in self._eos:
            position = len(sample.prompt) + len(tokens) - 1
            tokens.append(int(self._step(cache, tokens[-1], position).argmax()))
        return tokens, held


def evaluate(runner: Runner, task: Task, name: str) -> dict[str, Any]:
    """Run all windows and samples with one press."""
    total = len(task.windows) + len(task.samples)
    scored, answered = [], []
    for window in task.windows:
        scored.append(runner.score(window))
        print(f"{name}: {len(scored)} of {total}", file=sys.stderr)
    for sample in task.samples:
        answered.append(runner.answer(sample))
        print(f"{name}: {len(scored) + len(answered)} of {total}", file=sys.stderr)
    held_windows = [held for _, _, held in scored]
    held_samples = [held for _, held in answered]
    return {
        "nll": [nll for nll, _, _ in scored],
        "top1": [top1 for _, top1, _ in scored],
        "outputs": [tokens for tokens, _ in answered],
        "kept_tokens": sum(held_windows + held_samples) / max(1, total),
        "kept_tokens_windows": held_windows,
        "kept_tokens_samples": held_samples,
    }


def make_press(name: str, share: float) -> Any:
    """A press with kvpress's defaults, except for how much it keeps."""
    import kvpress

    return getattr(kvpress, PRESSES[name])(compression_ratio=1 - share)


def load_model(task: Task) -> Any:
    """The model in float32; all cores are its own unless OMP_NUM_THREADS says less."""
    import torch
    from transformers import AutoModelForCausalLM

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)
    torch.set_grad_enabled(False)
    return AutoModelForCausalLM.from_pretrained(
        task.model, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


def load_report(file: Path, digest: str, seed: int) -> dict[str, Any]:
    """The report of an earlier run with the same input, or a new report."""
    packages = ("kvpress", "transformers", "torch")
    versions = {package: version(package) for package in packages}
    if file.exists():
        report = json.loads(file.read_text(encoding="utf-8"))
        if (report["input_sha256"], report["versions"]) == (digest, versions):
            return report
    return {
        "input_sha256": digest,
        "argv": sys.argv,
        "seed": seed,
        "versions": versions,
        "full": None,
        "presses": {},
    }


def save(report: dict[str, Any], file: Path) -> None:
    """Write the whole report or nothing."""
    scratch = file.with_name(f"{file.name}.part")
    scratch.write_text(json.dumps(report) + "\n", encoding="utf-8")
    scratch.replace(file)


def run(task: Task, report: dict[str, Any], file: Path) -> None:
    """Add to the report what it lacks, and save it after each press."""
    import torch

    model = load_model(task)
    if report["full"] is None:
        report["full"] = evaluate(Runner(model, None), task, "full")
        save(report, file)
    for name, share in task.presses.items():
        if name in report["presses"]:
            continue
        torch.manual_seed(task.seed)
        press = make_press(name, share)
        result = evaluate(Runner(model, press), task, name)
        report["presses"][name] = result | {"settings": dataclasses.asdict(press)}
        save(report, file)


def main() -> None:
    """Read the input, write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("input", type=Path, help="JSON: what to run")
    parser.add_argument("output", type=Path, help="JSON; continued if begun")
    options = parser.parse_args()
    text = options.input.read_text(encoding="utf-8")
    try:
        task = read_task(text)
    except ValueError as error:
        parser.error(str(error))
    digest = hashlib.sha256(text.encode()).hexdigest()
    report = load_report(options.output, digest, task.seed)
    if report["full"] is not None and task.presses.keys() <= report["presses"].keys():
        print("nothing left to do", file=sys.stderr)
        return
    run(task, report, options.output)


if __name__ == "__main__":
    main()
