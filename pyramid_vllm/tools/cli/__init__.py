"""The ``pyramid-vllm`` command."""

from pyramid_vllm.tools.cli.app import app

__all__ = ["app"]
