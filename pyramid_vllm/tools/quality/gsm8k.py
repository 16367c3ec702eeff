"""Grade-school mathematics (GSM8K, arXiv 2110.14168), with worked examples."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyramid_vllm.tools.chat import chat_ids, has_template

#: Solved problems in front of each question: they are what a policy may evict.
NUM_EXAMPLES = 4
_MARK = "####"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Problem:
    """One prompt and its right answer."""

    prompt_ids: list[int]
    answer: str


def read_problems(path: Path, tokenizer: Any, num_problems: int) -> list[Problem]:
    """Problems of a file; its first ones are the examples and are not asked.

    Args:
        path: JSON lines with ``question`` and ``answer``, the result after ``####``.
        tokenizer: a Hugging Face tokenizer; its chat template is used if it has one.
        num_problems: how many.

    Raises:
        ValueError: the file is not like that, or too short.
        OSError: it cannot be read.
    """
    rows = [_row(path, line) for line in path.read_text("utf-8").splitlines() if line]
    if len(rows) < NUM_EXAMPLES + num_problems:
        raise ValueError(
            f"{path} has {len(rows)} problems: valid for gsm8k_problems is up to "
            f"{len(rows) - NUM_EXAMPLES}, beside {NUM_EXAMPLES} examples"
        )
    solved = rows[:NUM_EXAMPLES]
    return [
        Problem(_prompt(tokenizer, solved, question), _plain(answer.split(_MARK)[-1]))
        for question, answer in rows[NUM_EXAMPLES : NUM_EXAMPLES + num_problems]
    ]


def is_right(problem: Problem, text: str) -> bool:
    """Whether the last number of an output is the answer."""
    numbers = _NUMBER.findall(text)
    return bool(numbers) and _plain(numbers[-1]) == problem.answer


def _plain(number: str) -> str:
    found = number.strip().replace(",", "")
    # 18.00 is 18.
    return found.rstrip("0").rstrip(".") if "." in found else found


def _row(path: Path, line: str) -> tuple[str, str]:
    """Question and answer."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON lines: {error}") from None
    if not isinstance(row, dict) or _MARK not in row.get("answer", ""):
        raise ValueError(
            f"{path}: valid lines have a 'question', and an 'answer' with '{_MARK}'"
        )
    return row["question"], row["answer"]


def _prompt(tokenizer: Any, solved: list[tuple[str, str]], question: str) -> list[int]:
    if has_template(tokenizer):
        turns = [turn for example in solved for turn in example]
        return chat_ids(tokenizer, *turns, question)
    examples = [f"Question: {q}\nAnswer: {a}\n\n" for q, a in solved]
    ids: list[int] = tokenizer.encode(
        f"{''.join(examples)}Question: {question}\nAnswer:"
    )
    return ids
