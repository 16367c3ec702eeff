"""Conversations as token ids, by a model's chat template, and how answers end."""

from typing import Any


def has_template(tokenizer: Any) -> bool:
    """Whether the model has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without the special tokens that begin a prompt."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def chat_ids(tokenizer: Any, *turns: str, answer_start: str = "") -> list[int]:
    """Token ids of a conversation up to where the assistant goes on.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        turns: the user's, the assistant's and so on, the user's last.
        answer_start: how the assistant's answer begins.
    """
    messages = [
        {"role": ("user", "assistant")[index % 2], "content": turn}
        for index, turn in enumerate(turns)
    ]
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    return encode(tokenizer, text + answer_start)


def stop_ids(model: str, tokenizer: Any) -> list[int]:
    """Tokens that end an answer."""
    from transformers import GenerationConfig

    try:
        given = GenerationConfig.from_pretrained(model).eos_token_id
    except OSError:  # not every model has one
        given = None
    found = given if isinstance(given, list) else [given]
    ids = {*found, tokenizer.eos_token_id} - {None}
    return sorted(ids)
