"""Finished runs, so that a command that was cut off goes on where it stopped."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyramid_vllm import __version__
from pyramid_vllm.compat import installed_vllm_version
from pyramid_vllm.tools.bench.figures import Figures

#: Of ``RunResult.raw``: whether the side's engine had its prefix cache on.
PREFIX_CACHING = "prefix_caching"


@dataclass(frozen=True)
class RunResult:
    """What one run of one side gave."""

    figures: Figures
    raw: dict[str, Any]
    """Per request, where there is such a thing."""


def run_key(task: Any, repeat: int) -> str:
    """Name of a run: another task, repeat or version has another."""
    whole = {
        "kind": type(task).__name__,
        "task": asdict(task),
        "repeat": repeat,
        "vllm": installed_vllm_version(),
        "pyramid_vllm": __version__,
    }
    text = json.dumps(whole, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


class RunStore:
    """A folder with a file for every finished run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _file(self, key: str) -> Path:
        return self._folder / f"{key}.json"

    def has(self, key: str) -> bool:
        """Whether the run is finished."""
        return self._file(key).is_file()

    def load(self, key: str) -> RunResult:
        """A finished run."""
        found = json.loads(self._file(key).read_text(encoding="utf-8"))
        return RunResult(found["figures"], found["raw"])

    def save(self, key: str, labels: dict[str, Any], result: RunResult) -> None:
        """Keep a run; the labels are for people who open the file."""
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(labels | asdict(result), indent=2) + "\n"
        # A file that is there is whole.
        part = self._file(key).with_suffix(".part")
        part.write_text(text, encoding="utf-8")
        part.replace(self._file(key))
