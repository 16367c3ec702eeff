"""Real long text that every Python carries: the language reference of ``pydoc``."""

from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Any

_QUESTION = "Explain the page below to a colleague, in a few short paragraphs.\n\n"


def long_prompts(tokenizer: Any, num_prompts: int, num_tokens: int) -> list[list[int]]:
    """Chat prompts over different pages, each of about ``num_tokens`` tokens.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        num_prompts: how many.
        num_tokens: length of each, in tokens.

    Raises:
        ValueError: there is not that much text.
    """
    prompts: list[list[int]] = []
    for page in _pages(tokenizer, num_tokens):
        if len(prompts) == num_prompts:
            break
        prompts.append(_fit(tokenizer, page, num_tokens))
    if len(prompts) < num_prompts:
        raise ValueError(
            f"num_prompts is {num_prompts}: valid is up to {len(prompts)} prompts of "
            f"{num_tokens} tokens"
        )
    return prompts


def _pages(tokenizer: Any, num_tokens: int) -> Iterator[list[int]]:
    """Runs of tokens, each longer than a prompt and none used twice."""
    tokens: list[int] = []
    for name in sorted(topics):
        tokens += tokenizer.encode(topics[name], add_special_tokens=False)
        while len(tokens) >= num_tokens:
            yield tokens[:num_tokens]
            del tokens[:num_tokens]


def _fit(tokenizer: Any, page: list[int], num_tokens: int) -> list[int]:
    """The chat prompt over as much of a page as fits."""
    empty = _chat(tokenizer, "")
    return _chat(tokenizer, tokenizer.decode(page[: num_tokens - len(empty)]))


def _chat(tokenizer: Any, page: str) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": _QUESTION + page}],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids
