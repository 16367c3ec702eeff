"""What an inspection is asked for."""

from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass
from typer import Argument, Option

from pyramid_vllm.tools import option_types as options

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


@dataclass(frozen=True, config=options.SETTINGS_CONFIG)
class InspectSettings:
    """The options of the command."""

    model: Annotated[
        str, Argument(help="Folder or hub name; default: the bundled one.")
    ]
    prompt: Annotated[str | None, Option(help="The prompt.")] = None
    prompt_file: Annotated[
        Path | None, Option(help="A text file that holds the prompt.")
    ] = None
    chat: Annotated[
        bool, Option("--chat", help="Put it into the model's chat template.")
    ] = False
    kv_policy: options.KVPolicy = "pyramid"
    kv_policy_config: options.KVPolicyConfig = None
    max_tokens: Annotated[
        int, Option(min=1, help="Most tokens that are generated.")
    ] = 32
    engine_args: options.EngineArgs = Field(default_factory=dict)

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
