"""Where a figure comes from: what every report of figures carries."""

import os
import platform
import sys
from datetime import UTC, datetime
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
