"""What tests read in documents."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def read(path: str) -> str:
    """A document, by its path in the repository."""
    return (ROOT / path).read_text(encoding="utf-8")


def rows(text: str, header: str) -> dict[str, list[str]]:
    """A table's rows by their first cell, found by its header."""
    table = text[text.index(header) :].split("\n\n")[0]
    cells = [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in table.splitlines()[2:]
    ]
    return {first.strip("`"): rest for first, *rest in cells}


def code_words(text: str) -> list[str]:
    """Everything that is set as code within a line."""
    blocks = re.compile(r"^```.*?^```", flags=re.M | re.S)
    return re.findall(r"`([^`\n]+)`", blocks.sub("", text))


def functions(path: str) -> set[str]:
    """Functions of a file, those of its classes by ``Class.name``, and its classes."""
    names = set()
    for node in ast.parse(read(path)).body:
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
            names |= {
                f"{node.name}.{part.name}"
                for part in node.body
                if isinstance(part, ast.FunctionDef)
            }
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
    return names
