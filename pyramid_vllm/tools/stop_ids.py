"""How a model ends its answers."""

from typing import Any


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
