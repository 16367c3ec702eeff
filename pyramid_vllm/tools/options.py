"""Options of commands as fields of dataclasses."""

from dataclasses import field
from typing import Any

import typer


def option(default: Any, help: str | None = None, *names: str, **settings: Any) -> Any:
    """A field that is an option.

    Args:
        default: of the field.
        help: what ``--help`` shows.
        names: of the option, where it is not called as the field.
        settings: of typer's, such as ``min``.
    """
    made = typer.Option(*names, help=help, **settings)
    return field(default=default, metadata={"option": made})


def argument(help: str) -> Any:
    """A field that is an argument of the command."""
    return field(metadata={"option": typer.Argument(help=help)})


#: What several commands have.
MODEL = "A model's folder; default: the bundled one."
POLICY = "A preset, a YAML file or inline JSON."
POLICIES = (
    "A preset, a YAML file or inline JSON; repeat it to compare more. Stock vLLM is "
    "always there. Default: pyramid."
)
OVERRIDES = "Settings that replace it, as JSON."
JSON_FILE = "Write the figures to this file."
