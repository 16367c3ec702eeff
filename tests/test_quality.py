"""Samples, windows and statistics of the quality evaluation, without an engine."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from tokenizers.trainers import WordLevelTrainer
from transformers import PreTrainedTokenizerFast

from pyramid_vllm.tools.quality.puzzles import PUZZLES
from pyramid_vllm.tools.quality.retrieval import (
    TASKS,
    Sample,
    make_samples,
    score,
    split_sentences,
)
from pyramid_vllm.tools.quality.statistics import mean_interval, ratio_interval
from pyramid_vllm.tools.quality.tasks import match_length
from pyramid_vllm.tools.quality.texts import read_part, windows
from pyramid_vllm.tools.quality.words import PLAIN_WORDS, sentences

TEMPLATE = (
    "{% for m in messages %}<role> {{ m.content }} <end>{% endfor %}"
    "{% if add_generation_prompt %} <role>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A tokenizer of words and single digits, with a chat template."""
    lines = [next(hay) for hay in [sentences(Random(0))] for _ in range(300)]
    for make in PUZZLES.values():
        puzzle = make(Random(0))
        lines += [puzzle.intro, puzzle.question, puzzle.answer_start, *puzzle.needles]
    lines += [" ".join(PLAIN_WORDS), "0 1 2 3 4 5 6 7 8 9", " ".join("ABCDEFGHIJKLM")]
    model = Tokenizer(WordLevel(unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    special = ["<unk>", "<s>", "<role>", "<end>"]
    model.train_from_iterator(lines, WordLevelTrainer(special_tokens=special))
    model.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", bos_token="<s>"
    )
    made.chat_template = TEMPLATE
    return made


def place(sample: Sample, tokenizer: Any, text: str) -> float:
    """Where a text first lies in a prompt, as a share of it."""
    wanted = tokenizer.encode(text, add_special_tokens=False)
    ids = sample.prompt_ids
    found = [i for i in range(len(ids)) if ids[i : i + len(wanted)] == wanted]
    assert found, f"{text} is not in the prompt"
    return found[0] / len(ids)


@pytest.mark.parametrize("task", TASKS)
def test_samples_are_a_function_of_their_seed(task: str, tokenizer: Any) -> None:
    made = make_samples(task, tokenizer, 400, 0.5, 3, seed=1)
    assert made == make_samples(task, tokenizer, 400, 0.5, 3, seed=1)
    others = make_samples(task, tokenizer, 400, 0.5, 3, seed=2)
    assert all(a.answers != b.answers for a, b in zip(made, others, strict=True))
    assert len({sample.answers for sample in made}) == 3


@pytest.mark.parametrize("has_template", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_as_long_as_asked(
    task: str, has_template: bool, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_template:
        monkeypatch.setattr(tokenizer, "chat_template", None)
    for length in (300, 777):
        for sample in make_samples(task, tokenizer, length, 1.0, 2, seed=0):
            assert length - 40 < len(sample.prompt_ids) <= length
            first = tokenizer.convert_ids_to_tokens(sample.prompt_ids[0])
            assert first == ("<role>" if has_template else "<s>")


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("task", ["single_needle", "multi_key"])
def test_the_needle_lies_at_its_depth(task: str, depth: float, tokenizer: Any) -> None:
    for sample in make_samples(task, tokenizer, 1500, depth, 4, seed=0):
        assert abs(place(sample, tokenizer, sample.answers[0]) - depth) < 0.06


@pytest.mark.parametrize("task", ["multi_value", "multi_query"])
def test_several_needles_lie_around_their_depth(task: str, tokenizer: Any) -> None:
    for depth in (0.0, 0.5, 1.0):
        (sample,) = make_samples(task, tokenizer, 1500, depth, 1, seed=0)
        assert len(sample.answers) == 3
        places = [place(sample, tokenizer, answer) for answer in sample.answers]
        assert places == sorted(places)
        middle = sum(places) / 3
        assert abs(middle - (0.1 + 0.8 * depth)) < 0.06


def test_chains_are_assigned_in_order() -> None:
    puzzle = PUZZLES["variable_tracking"](Random(3))
    first, *others = puzzle.needles
    assert first.endswith(f"= {puzzle.question.split('value ')[1].split(',')[0]}.")
    for line, (before, name) in zip(others, pairwise(puzzle.answers), strict=True):
        assert line == f"VAR {name} = VAR {before}."


def test_common_words_are_the_most_common(tokenizer: Any) -> None:
    for sample in make_samples("common_words", tokenizer, 900, 0.5, 3, seed=0):
        text = tokenizer.decode(sample.prompt_ids)
        counts = Counter(word for word in text.split() if word in PLAIN_WORDS)
        common = {word for word, _ in counts.most_common(3)}
        assert common == set(sample.answers)


def test_a_text_is_the_haystack(tokenizer: Any) -> None:
    text = "The old farmer visited the quiet market before lunch again. " * 3
    (sample,) = make_samples("single_needle", tokenizer, 400, 0.5, 1, 0, text)
    prompt = tokenizer.decode(sample.prompt_ids)
    assert prompt.count("farmer visited the quiet market before lunch") > 10


def test_sentences_of_a_text() -> None:
    text = (
        " = Heading = \n\nThis is a whole sentence here. So is this other one, see?\nno"
    )
    assert split_sentences(text) == [
        "This is a whole sentence here.",
        "So is this other one, see?",
    ]
    with pytest.raises(ValueError, match="no sentence"):
        split_sentences(" = Heading = ")


def test_the_score_is_the_share_of_answers() -> None:
    sample = Sample("multi_value", 10, 0.5, [1], ("1234567", "falcon"), 5)
    assert score(sample, " 1234567, Falcon.") == 1.0
    assert score(sample, "it is 1234567") == 0.5
    assert score(sample, "91234567 falcons") == 0.0


def test_a_length_that_is_too_small_is_named(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="retrieval_tokens is 20: valid"):
        make_samples("single_needle", tokenizer, 20, 0.5, num_samples=1, seed=0)


def test_windows_are_spread_and_apart() -> None:
    ids = list(range(1000))
    found = windows(ids, 30, 20, 4)
    for start, (prefix, target) in zip((0, 250, 500, 750), found, strict=True):
        assert prefix == list(range(start, start + 30))
        assert target == list(range(start + 30, start + 50))
    assert len(windows(ids, 80, 20, 10)) == 10


def test_a_text_that_is_too_short_is_named() -> None:
    with pytest.raises(ValueError, match=r"book\.txt has 99 tokens.*up to 1 windows"):
        windows(range(99), 30, 20, 2, "book.txt")


def test_parts_of_a_text_share_nothing(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(map(str, range(500))), encoding="utf-8")
    assert read_part(path, 0, 0.3) + read_part(path, 0.3, 1) == path.read_text()
    with pytest.raises(ValueError, match=r"text_from is 0\.5 and text_to is 0\.2"):
        read_part(path, 0.5, 0.2)


def test_bootstrap_intervals_are_those_of_the_mean() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 400).tolist()
    found = mean_interval(values, seed=0)
    error = np.std(values) / 20
    mean = found["value"]
    assert mean == pytest.approx(np.mean(values))
    assert found["low"] == pytest.approx(mean - 1.96 * error, abs=0.03)
    assert found["high"] == pytest.approx(mean + 1.96 * error, abs=0.03)
    assert found == mean_interval(values, seed=0)
    assert found != mean_interval(values, seed=1)


def test_ratios_are_drawn_in_pairs() -> None:
    losses = [1.0, 5.0, 9.0]
    found = ratio_interval([0.1 * loss for loss in losses], losses, seed=0)
    assert list(found.values()) == pytest.approx([0.1] * 3)
    assert mean_interval(losses, seed=0)["low"] < 2


def test_outputs_match_up_to_the_first_difference() -> None:
    assert match_length([1, 2, 3], [1, 2, 4]) == 2
    assert match_length([1, 2, 3], [1, 2, 3]) == 3
    assert match_length([5], [1]) == 0
    assert match_length([1], [1, 2]) == 1
