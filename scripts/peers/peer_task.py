"""What a peer is asked to run: token ids in, so that no tokenizer can differ."""

import dataclasses
import json
from pathlib import Path
from typing import Any

#: kvpress's classes by the names that the input knows them by.
PRESSES = {
    "snapkv": "SnapKVPress",
    "pyramidkv": "PyramidKVPress",
    "streaming_llm": "StreamingLLMPress",
    "expected_attention": "ExpectedAttentionPress",
    "tova": "TOVAPress",
    "knorm": "KnormPress",
    "random": "RandomPress",
}
#: Scoring windows of kvpress's defaults have 64 tokens; a prompt has to be longer.
MIN_PROMPT = 65


@dataclasses.dataclass(frozen=True)
class Window:
    """Text to score: loss of ``target`` behind ``prompt``."""

    prompt: list[int]
    target: list[int]


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt to answer greedily."""

    prompt: list[int]
    max_tokens: int


@dataclasses.dataclass(frozen=True)
class Task:
    """The input, valid."""

    model: str
    presses: dict[str, float]
    windows: list[Window]
    samples: list[Sample]
    seed: int


def invalid(key: str, value: Any, valid: str) -> ValueError:
    """An error that names all three."""
    shown = repr(value)
    shown = shown if len(shown) < 60 else f"{shown[:57]}..."
    return ValueError(f"{key} is {shown}: valid is {valid}")


def is_int(value: Any) -> bool:
    """JSON's true and false are not numbers."""
    return isinstance(value, int) and not isinstance(value, bool)


def take(owner: Any, name: str, keys: tuple[str, ...]) -> list[Any]:
    """Values of exactly these keys."""
    if not isinstance(owner, dict):
        raise invalid(name, owner, f"an object with {', '.join(keys)}")
    for key in sorted(owner.keys() ^ set(keys)):
        state = "has a key" if key in owner else "lacks the key"
        raise ValueError(f"{name} {state} {key!r}: valid are just {', '.join(keys)}")
    return [owner[key] for key in keys]


def check_ids(key: str, ids: Any, least: int) -> None:
    """Token ids, at least so many."""
    if not isinstance(ids, list) or not all(is_int(i) and i >= 0 for i in ids):
        raise invalid(key, ids, "a list of token ids")
    if len(ids) < least:
        raise invalid(f"length of {key}", len(ids), f"{least} tokens or more")


def check_presses(presses: Any) -> None:
    """Known names, and shares that evict something."""
    if not isinstance(presses, dict):
        raise invalid("presses", presses, "an object of shares kept, by press")
    for name, share in presses.items():
        if name not in PRESSES:
            raise invalid("a key of presses", name, f"one of {', '.join(PRESSES)}")
        if not isinstance(share, float) or not 0 < share < 1:
            raise invalid(f"presses.{name}", share, "a share between 0 and 1")


def read_windows(items: Any) -> list[Window]:
    """The input's ``windows``."""
    if not isinstance(items, list):
        raise invalid("windows", items, "a list")
    windows = []
    for i, item in enumerate(items):
        window = Window(*take(item, f"windows[{i}]", ("prompt", "target")))
        check_ids(f"windows[{i}].prompt", window.prompt, MIN_PROMPT)
        check_ids(f"windows[{i}].target", window.target, 1)
        windows.append(window)
    return windows


def read_samples(items: Any) -> list[Sample]:
    """The input's ``samples``."""
    if not isinstance(items, list):
        raise invalid("samples", items, "a list")
    samples = []
    for i, item in enumerate(items):
        sample = Sample(*take(item, f"samples[{i}]", ("prompt", "max_tokens")))
        check_ids(f"samples[{i}].prompt", sample.prompt, MIN_PROMPT)
        if not is_int(sample.max_tokens) or sample.max_tokens < 1:
            raise invalid(f"samples[{i}].max_tokens", sample.max_tokens, "1 or more")
        samples.append(sample)
    return samples


def read_task(text: str) -> Task:
    """Validate the input.

    Raises:
        ValueError: it is not valid; the message names key, value and valid values.
    """
    keys = ("model", "presses", "windows", "samples", "seed")
    model, presses, windows, samples, seed = take(json.loads(text), "input", keys)
    if not isinstance(model, str) or not Path(model, "config.json").is_file():
        raise invalid("model", model, "the folder of a model")
    check_presses(presses)
    if not is_int(seed):
        raise invalid("seed", seed, "an integer")
    return Task(model, presses, read_windows(windows), read_samples(samples), seed)
