"""Results on disk, so that a stopped evaluation goes on where it was."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pyramid_vllm.tools.quality.jobs import JobResult


def digest(content: Any) -> str:
    """A short name for what JSON can hold."""
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


class RunStore:
    """One JSON file a run.

    Args:
        folder: of the evaluation.
    """

    def __init__(self, folder: Path) -> None:
        self._runs = folder / "runs"
        self._rows = folder / "full-cache"

    def path(self, identity: Mapping[str, Any]) -> Path:
        """The run's file.

        Args:
            identity: all that the result depends on.
        """
        return self._runs / f"{digest(identity)}.json"

    def rows_dir(self, identity: Mapping[str, Any]) -> Path:
        """Where the full cache's distributions of a run of stock vLLM are."""
        return self._rows / digest(identity)

    def load(self, identity: Mapping[str, Any]) -> JobResult | None:
        """The run's result, if it is there and whole."""
        try:
            content = json.loads(self.path(identity).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            return None
        return JobResult.read(content["result"])

    def save(self, identity: Mapping[str, Any], result: JobResult) -> None:
        """Write the result; it appears whole or not at all."""
        path = self.path(identity)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"identity": dict(identity), "result": asdict(result)}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
        partial.replace(path)
