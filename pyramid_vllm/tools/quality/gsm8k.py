"""Grade-school mathematics (GSM8K, arXiv 2110.14168), with worked examples."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        path: JSON lines with ``question`` and ``answer``, the result behind ``####``.
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
    examples = rows[:NUM_EXAMPLES]
    asked = rows[NUM_EXAMPLES : NUM_EXAMPLES + num_problems]
    return [
        Problem(
            _prompt(tokenizer, examples, row["question"]),
            _plain(row["answer"].split(_MARK)[-1]),
        )
        for row in asked
    ]


def is_right(problem: Problem, text: str) -> bool:
    """Whether the last number of an output is the answer."""
    numbers = _NUMBER.findall(text)
    return bool(numbers) and _plain(numbers[-1]) == problem.answer


def _plain(number: str) -> str:
    found = number.strip().replace(",", "")
    # 18.00 is 18.
    return found.rstrip("0").rstrip(".") if "." in found else found


def _row(path: Path, line: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON lines: {error}") from None
    if not isinstance(row, dict) or _MARK not in row.get("answer", ""):
        raise ValueError(
            f"{path}: valid lines have a 'question', and an 'answer' with '{_MARK}'"
        )
    return row


def _encode(tokenizer: Any, text: str, special: bool) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=special)
    return ids


def _prompt(tokenizer: Any, examples: list[dict[str, str]], question: str) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        solved = [f"Question: {e['question']}\nAnswer: {e['answer']}" for e in examples]
        text = "\n\n".join([*solved, f"Question: {question}\nAnswer:"])
        return _encode(tokenizer, text, special=True)
    messages = []
    for example in examples:
        messages.append({"role": "user", "content": example["question"]})
        messages.append({"role": "assistant", "content": example["answer"]})
    messages.append({"role": "user", "content": question})
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    return _encode(tokenizer, text, special=False)
