"""Real long text that every Python carries: the language reference of ``pydoc``."""

from pydoc_data.topics import topics
from typing import Any

from pyramid_vllm.tools.chat import chat_ids

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
    tokens: list[int] = []
    for name in sorted(topics):
        tokens += tokenizer.encode(topics[name], add_special_tokens=False)
        if len(tokens) >= num_prompts * num_tokens:
            break
    else:
        raise ValueError(
            f"num_prompts is {num_prompts}: valid is up to {len(tokens) // num_tokens} "
            f"prompts of {num_tokens} tokens"
        )
    length = num_tokens - len(chat_ids(tokenizer, _QUESTION))
    starts = range(0, num_prompts * num_tokens, num_tokens)
    pages = [tokens[start : start + length] for start in starts]
    return [chat_ids(tokenizer, _QUESTION + tokenizer.decode(page)) for page in pages]
