"""Options that several commands have. Each is the type of a field of their settings.

A field's type says all that an option needs: its help, its bounds, how its text is
read. ``tools/cli/from_settings.py`` makes a command of such a class.
"""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict
from typer import Option

from pyramid_vllm.tools.json_settings import json_object
from pyramid_vllm.tools.sizes import parse_bytes

_Value = TypeVar("_Value")

#: Of settings: options are read from text where they are not values already.
SETTINGS_CONFIG = ConfigDict(validate_default=True)


def _engine_args(given: Any) -> Any:
    return given if isinstance(given, dict) else json_object("--engine-args", given)


def _bytes(given: Any) -> Any:
    return parse_bytes(given) if isinstance(given, str) else given


def as_text(default: str) -> Any:
    """A default that is written, and read, like the option's text."""
    return default


def once(values: tuple[_Value, ...]) -> tuple[_Value, ...]:
    """The values in their order, each once."""
    return tuple(dict.fromkeys(values))


ONCE = AfterValidator(once)

Model = Annotated[str, Option(help="Folder or hub name; default: the bundled one.")]
KVPolicy = Annotated[str, Option(help="A preset, a YAML file or inline JSON.")]
KVPolicyConfig = Annotated[
    str | None, Option(help="Settings that replace the policy's, as JSON.")
]
EngineArgs = Annotated[
    dict[str, Any],
    BeforeValidator(_engine_args),
    Option(help="More arguments of vLLM's LLM, as JSON."),
]
KVBytes = Annotated[
    int,
    BeforeValidator(_bytes),
    Option("--kv-memory", help="Bytes, or with KiB, MiB, GiB."),
]
TextFrom = Annotated[float, Option(help="Share of the text where it begins.")]
TextTo = Annotated[float, Option(help="Share of the text where it ends.")]
Out = Annotated[Path, Option(help="Folder of what is written.")]
