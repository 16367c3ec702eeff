"""What an inspection is asked for."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK_SIZE = 32
#: Arguments of ``LLM`` that an inspection sets or that a record does not follow.
_REFUSED = {
    "model": "the argument MODEL",
    "kv_policy": "--kv-policy",
    "kv_policy_config": "--kv-policy-config",
    "additional_config": "--kv-policy",
    "kv_cache_dtype": "the model's, which is set",
    "block_size": f"{BLOCK_SIZE}, which is set",
    "skip_tokenizer_init": "true, which is set",
    "speculative_config": "none: drafts are not recorded",
}


@dataclass(frozen=True)
class InspectSettings:
    """The options of the command."""

    model: str
    kv_policy: str
    kv_policy_config: str | None
    prompt: str
    chat: bool
    max_tokens: int
    engine_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, valid in _REFUSED.items():
            if name in self.engine_args:
                value = self.engine_args[name]
                raise ValueError(f"engine_args has {name}={value!r}: valid is {valid}")
        ranks = self.engine_args.get("tensor_parallel_size", 1)
        if ranks != 1:
            raise ValueError(
                f"engine_args has tensor_parallel_size={ranks}: valid is 1, what other "
                "ranks keep is not recorded"
            )


def read_prompt(text: str | None, file: Path | None) -> str:
    """The prompt, from whichever of the two is given.

    Raises:
        ValueError: none is given, both are, or it is empty.
        OSError: the file cannot be read.
    """
    if (text is None) == (file is None):
        given = "none" if text is None else "both"
        raise ValueError(f"prompt, prompt_file: {given} given: valid is one of them")
    prompt = text if file is None else file.read_text(encoding="utf-8")
    if not prompt:
        raise ValueError("the prompt is empty: valid is at least one token")
    return prompt
