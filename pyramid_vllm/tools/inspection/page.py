"""The page: one HTML file that needs nothing else."""

import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from typing import Any

_FOLDER = files("pyramid_vllm.tools.inspection")


def page(report: Mapping[str, Any]) -> str:
    """The page of a report.

    Args:
        report: the JSON.
    """
    parts = {
        "TITLE": escape(f"{report['policy']['name']} on {report['model']}"),
        "STYLE": _read("page.css"),
        "SCRIPT": _read("page.js"),
        "DATA": _embedded(report),
    }
    # In one pass: what is put in is not looked at again.
    pieces = _read("page.html").split("@@")
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _embedded(report: Mapping[str, Any]) -> str:
    """JSON that no HTML parser finds a tag in."""
    text = json.dumps(report, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
