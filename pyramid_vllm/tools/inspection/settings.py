"""The options of ``pyramid-vllm inspect``."""

from pathlib import Path

from pydantic.dataclasses import dataclass

from pyramid_vllm.tools import options
from pyramid_vllm.tools.options import argument, option

BLOCK_SIZE = 32
#: Arguments of ``LLM`` that an inspection sets, or that its record does not support.
_REFUSED = {
    "model": "the argument MODEL",
    "kv_policy": "--kv-policy",
    "kv_policy_config": "--kv-policy-config",
    "additional_config": "--kv-policy",
    "kv_cache_dtype": "the model's, which is set",
    "block_size": f"{BLOCK_SIZE}, which is set",
    "skip_tokenizer_init": "true, which is set",
    "speculative_config": "none: drafts are not recorded",
    "tensor_parallel_size": "1, its default: what other ranks keep is not recorded",
}


@dataclass(frozen=True, config=options.SETTINGS_CONFIG)
class InspectSettings:
    """Run one prompt and show which of its tokens each tier kept."""

    model: str | None = argument(options.MODEL_NAME, default=None)
    prompt: str | None = option(None, "The prompt.")
    prompt_file: Path | None = option(None, "A text file that holds the prompt.")
    chat: bool = option(False, "Put it into the model's chat template.", "--chat")
    kv_policy: str = option("pyramid", options.POLICY)
    kv_policy_config: str | None = option(None, options.POLICY_OVERRIDES)
    max_tokens: int = option(32, "Most tokens that are generated.", min=1)
    engine_args: options.EngineArgs = option(None, options.ENGINE_ARGS)
    out: Path | None = option(None, "Folder; default: inspect-results.")
    json_only: bool = option(
        False, "Print the JSON; write files only with --out.", "--json"
    )

    def __post_init__(self) -> None:
        for name, valid in _REFUSED.items():
            if name in self.engine_args:
                value = self.engine_args[name]
                raise ValueError(f"engine_args has {name}={value!r}: valid is {valid}")
        if (self.prompt is None) == (self.prompt_file is None):
            given = "none" if self.prompt is None else "both"
            raise ValueError(
                f"prompt, prompt_file: {given} given: valid is one of them"
            )

    @property
    def prompt_text(self) -> str:
        """The prompt, from whichever of the two is given.

        Raises:
            ValueError: it is empty.
            OSError: the file cannot be read.
        """
        file = self.prompt_file
        text = file.read_text(encoding="utf-8") if file else self.prompt
        if not text:
            raise ValueError("the prompt is empty: valid is at least one token")
        return text
