"""Who may import whom."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pyramid_vllm"

#: Part of the package -> prefixes that it must not import.
FORBIDDEN = {
    "policy": ("torch", "vllm", "pyramid_vllm.scheduler", "pyramid_vllm.worker"),
    "plan.py": ("torch", "vllm", "pyramid_vllm.scheduler", "pyramid_vllm.worker"),
    "model_shape.py": ("torch", "vllm"),
    "model_config.py": ("torch", "vllm"),
    "native.py": (
        "torch",
        "pyramid_vllm.scheduler",
        "pyramid_vllm.worker",
        "pyramid_vllm.attention",
    ),
    "kernels": ("vllm", "pyramid_vllm.scheduler", "pyramid_vllm.worker"),
    "scheduler": ("torch", "pyramid_vllm.worker", "pyramid_vllm.attention"),
    "worker": ("pyramid_vllm.scheduler",),
    "attention": ("pyramid_vllm.scheduler", "pyramid_vllm.worker"),
    "bench": ("pyramid_vllm.cli",),
    "simulate": ("pyramid_vllm.cli", "pyramid_vllm.worker", "pyramid_vllm.attention"),
    "quality": ("pyramid_vllm.cli",),
    "analysis": (
        "vllm",
        "pyramid_vllm.scheduler",
        "pyramid_vllm.attention",
        "pyramid_vllm.cli",
    ),
    "stats.py": ("torch", "vllm", "pyramid_vllm"),
    "metrics": (
        "torch",
        "pyramid_vllm.scheduler",
        "pyramid_vllm.worker",
        "pyramid_vllm.cli",
    ),
    "monitor": (
        "torch",
        "vllm",
        "pyramid_vllm.scheduler",
        "pyramid_vllm.metrics",
        "pyramid_vllm.cli",
    ),
    "inspection": (
        "torch",
        "pyramid_vllm.scheduler",
        "pyramid_vllm.worker",
        "pyramid_vllm.attention",
        "pyramid_vllm.cli",
    ),
    "spec.py": ("pyramid_vllm.scheduler", "pyramid_vllm.worker"),
}


def imports(source: Path) -> set[str]:
    """Modules that a file imports, those for type checking included."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def files(part: str) -> list[Path]:
    place = PACKAGE / part
    return [place] if place.is_file() else sorted(place.rglob("*.py"))


@pytest.mark.parametrize("part", FORBIDDEN)
def test_parts_import_only_what_they_may(part: str) -> None:
    assert files(part), f"{part} is gone"
    for source in files(part):
        for module in imports(source):
            for prefix in FORBIDDEN[part]:
                wrong = module == prefix or module.startswith(prefix + ".")
                assert not wrong, f"{source.name} imports {module}"


def test_functions_stay_short() -> None:
    for source in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 50, f"{source.name}:{node.name} has {length} lines"
