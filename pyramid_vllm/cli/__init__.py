"""The ``pyramid-vllm`` command."""

from pyramid_vllm.cli.app import app

__all__ = ["app"]
