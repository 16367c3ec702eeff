"""The checkout that a script runs from."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def commit() -> str | None:
    """The commit, with ``-dirty`` where files are changed; None: no git checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40"]
    command += ["--dirty", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
