"""The origin of figures, which every report of figures carries."""

import json
import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pyramid_vllm import __version__
from pyramid_vllm.compat import installed_vllm_version


def provenance(seed: int) -> dict[str, Any]:
    """Command, date, versions, seed and machine kind, as JSON can hold them."""
    return {
        "argv": sys.argv,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "pyramid_vllm": __version__,
            "vllm": installed_vllm_version(),
            "python": platform.python_version(),
        },
        "seed": seed,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def write_report(file: Path, content: Mapping[str, Any], seed: int) -> None:
    """Write figures and their provenance as JSON; the folder is made if missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**content, **provenance(seed)}, indent=2, default=str)
    file.write_text(text + "\n", encoding="utf-8")
