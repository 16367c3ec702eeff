"""A model's configuration, read without transformers where the file says it all.

Importing transformers takes seconds; the arithmetic on a configuration takes none.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from pyramid_vllm.policy.presets import config_dir
from pyramid_vllm.policy.profiles import IDENTITY

_FILE = "config.json"
#: Settings that a file must hold as positive integers: they have no default.
_INTEGERS = (*(n for n in IDENTITY if n != "model_type"), "max_position_embeddings")
#: Settings that hold other configurations, or replace this one by another.
_NESTED = (
    "text_config",
    "text_encoder",
    "decoder",
    "generator",
    "per_layer_config",
    "configuration_files",
)
_LAYER_TYPES = ("full_attention", "sliding_attention")
_DTYPES = (None, "float32", "float16", "bfloat16")
#: The model types that are read from the file: whose class of transformers has no
#: layers but those of ``layer_types``, or whose layers are all alike.
_TYPED = ("gpt_oss", "qwen2", "qwen3", "smollm3")
_ALIKE = ("llama", "mistral", "mixtral", "qwen3_moe")
#: Those with a default of ``head_dim`` that is not ``hidden_size`` over heads.
_OWN_HEAD_DIM = ("gpt_oss", "qwen3")


class FileConfig(SimpleNamespace):
    """The settings of a file as attributes, like a Hugging Face text configuration."""

    def get_text_config(self) -> "FileConfig":
        """Itself: composite configurations are left to transformers."""
        return self


def shape_names() -> list[str]:
    """Names of the bundled shapes, sorted."""
    files = config_dir("shapes").glob(f"*/{_FILE}")
    return sorted((file.parent.name for file in files), key=str.lower)


def bundled_shape(name: str) -> Path | None:
    """The folder of a bundled shape, whatever the case of its name."""
    shapes = {known.lower(): config_dir("shapes") / known for known in shape_names()}
    return shapes.get(name.lower())


def read_config(model: str) -> Any:
    """Read a model's configuration.

    Args:
        model: a folder with ``config.json``, a bundled shape's name or a Hugging Face
            hub name; looked for in this order.

    Returns:
        The settings as attributes, and ``get_text_config()``: a ``FileConfig``, or
        transformers' own class where the file alone does not say it all.

    Raises:
        OSError: there is no such model, or its file cannot be read.
        ValueError: the file is no configuration.
    """
    path, shape = Path(model).expanduser(), bundled_shape(model)
    file = path if path.name == _FILE else path / _FILE
    if not file.is_file():
        file = shape / _FILE if shape else _hub_file(model)
    settings = _read(file)
    # ``torch_dtype`` is the old name of ``dtype``.
    if settings.get("dtype") is None:
        settings["dtype"] = settings.get("torch_dtype")
    if _says_it_all(settings):
        return FileConfig(**settings)
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(file.parent))


def _hub_file(model: str) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    try:
        # The cache first: the hub's client asks the network even for cached files.
        cached = try_to_load_from_cache(model, _FILE)
        return Path(
            cached if isinstance(cached, str) else hf_hub_download(model, _FILE)
        )
    except (OSError, ValueError, EntryNotFoundError) as error:
        detail = " ".join(str(error).split())
        raise OSError(
            f"model is '{model}': valid is a folder with {_FILE}, a bundled shape "
            f"({', '.join(shape_names())}) or a Hugging Face hub name, but the hub "
            f"answers: {detail}"
        ) from None


def _read(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"model file '{file}' is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(
            f"model file '{file}' holds {type(settings).__name__}: "
            "valid is a JSON object of settings"
        )
    return settings


def _says_it_all(settings: Mapping[str, Any]) -> bool:
    """Whether transformers' class would change no setting that is read here."""
    kind, head_dim = settings.get("model_type"), settings.get("head_dim")
    return (
        kind in (*_TYPED, *_ALIKE)
        and all(_is_count(settings.get(name)) for name in _INTEGERS)
        and not any(name in settings for name in _NESTED)
        and (_is_count(head_dim) or (head_dim is None and kind not in _OWN_HEAD_DIM))
        and settings["hidden_size"] % settings["num_attention_heads"] == 0
        and settings["dtype"] in _DTYPES
        and _has_known_layers(settings)
    )


def _has_known_layers(settings: Mapping[str, Any]) -> bool:
    """Whether the file lists its layers' kinds, or rules sliding windows out."""
    layers, kind = settings.get("layer_types"), settings["model_type"]
    if layers is not None or kind == "gpt_oss":
        return (
            kind in _TYPED
            and isinstance(layers, list)
            and len(layers) == settings["num_hidden_layers"]
            and all(layer in _LAYER_TYPES for layer in layers)
        )
    # Without the setting, a class may have a window of its own.
    window = None if kind == "llama" else settings.get("sliding_window", "its own")
    return window is None or settings.get("use_sliding_window") is False


def _is_count(value: Any) -> bool:
    return type(value) is int and value > 0
