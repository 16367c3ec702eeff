"""The tables of ``vllm_names.yaml``."""

from pathlib import Path
from typing import Any

import yaml

# As text throughout: a digest may look like a number.
_TABLES: dict[str, Any] = yaml.load(
    Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"), yaml.BaseLoader
)
MOVED: dict[str, str] = _TABLES["moved"]
WRAPPED, CALLED, ATTRIBUTES = (
    {name: tuple(words.split()) for name, words in _TABLES[table].items()}
    for table in ("wrapped", "called", "attributes")
)
#: By version and name.
DIGESTS = {
    version: {
        MOVED.get(name, name) if i else name: digests.split()[: i + 1][-1]
        for name, digests in _TABLES["digests"].items()
    }
    for i, version in enumerate(_TABLES["versions"].split())
}
