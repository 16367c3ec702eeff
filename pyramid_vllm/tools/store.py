"""Finished runs on disk, so that a stopped command continues where it was."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def fingerprint(content: Any) -> str:
    """A short name for what JSON can hold; other content has another one."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


class Store:
    """A folder with one JSON file for each finished run.

    A run is found by its identity: all that its result depends on, as JSON can hold
    it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, identity: Any) -> Path:
        """The run's file."""
        return self._folder / f"{fingerprint(identity)}.json"

    def load(self, identity: Any) -> dict[str, Any] | None:
        """The saved content of the run; None: the run is not finished."""
        try:
            content = json.loads(self.path(identity).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return None
        return dict(content)

    def save(self, identity: Any, content: Mapping[str, Any]) -> None:
        """Write a run's file, which appears whole or not at all."""
        path = self.path(identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)
