"""The rows of a batch job: prompts as JSON lines in, answers as JSON lines out."""

import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Self

Row = dict[str, Any]
_KINDS = ("messages", "prompt")
#: Number and length of the bundled rows, which have about 750 tokens each.
_NUM_BUNDLED, _BUNDLED_CHARACTERS = 16, 3000


def bundled_rows() -> list[Row]:
    """Chat prompts over pages of the text that every Python carries."""
    pages = [name for name in sorted(topics) if len(topics[name]) > _BUNDLED_CHARACTERS]
    question = "Explain the page below to a colleague, in a few sentences.\n\n"
    rows = []
    for name in pages[:_NUM_BUNDLED]:
        text = question + topics[name][:_BUNDLED_CHARACTERS]
        rows.append({"id": name, "messages": [{"role": "user", "content": text}]})
    return rows


def read_rows(path: Path) -> list[Row]:
    """All rows of a file of JSON lines, checked.

    Raises:
        ValueError: a row lacks an id or a prompt, or has another's id.
    """
    rows: dict[Any, Row] = {}
    for value, where in _lines(path):
        row = _checked(value, where)
        if row["id"] in rows:
            raise ValueError(f"{where}: id is {row['id']!r}: valid is one of its own")
        rows[row["id"]] = row
    kinds = {kind_of(row) for row in rows.values()}
    if len(kinds) != 1:
        raise ValueError(
            f"{path} has {' and '.join(sorted(kinds)) or 'no rows'}: valid are rows "
            "that all have 'messages', or all 'prompt'"
        )
    return list(rows.values())


def kind_of(row: Row) -> str:
    """Which of the two a row has: chat ``messages`` or a ``prompt``."""
    return next(kind for kind in _KINDS if kind in row)


def _lines(path: Path) -> Iterator[tuple[Any, str]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                yield json.loads(line), where
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON: {error}") from None


def _checked(row: Any, where: str) -> Row:
    if not isinstance(row, dict) or not isinstance(row.get("id"), str | int):
        raise ValueError(f"{where} has no 'id': valid is an object with a text or int")
    if sum(kind in row for kind in _KINDS) != 1:
        raise ValueError(f"{where}: valid is one of 'messages' and 'prompt'")
    kind = kind_of(row)
    if not row[kind] or not isinstance(row[kind], list if kind == "messages" else str):
        raise ValueError(f"{where}: {kind} is {row[kind]!r}: valid is one not empty")
    return {"id": row["id"], kind: row[kind]}


class Answers:
    """A file of JSON lines that grows by whole rows, each id once.

    Args:
        path: the file; what an earlier job wrote into it is kept.

    Raises:
        ValueError: another job is writing to it, or it holds something else.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ValueError(f"{path}: another job is writing to it") from None
        self._cut_torn_line()
        self.ids: set[Any] = {row["id"] for row, _ in _lines(path)}
        """Ids of the rows in the file."""

    def _cut_torn_line(self) -> None:
        """A job that was killed may have written half of its last row."""
        self._file.seek(0)
        self._file.truncate(self._file.read().rfind(b"\n") + 1)

    def add(self, row: Row) -> bool:
        """Write a row, unless one with its id is there.

        Returns:
            Whether it was written.
        """
        if row["id"] in self.ids:
            return False
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        self.ids.add(row["id"])
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
