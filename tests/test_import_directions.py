"""Who may import whom."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pyramid_vllm"

#: What serves requests: nothing of it needs the command line or its tools.
TOOLS = "pyramid_vllm.tools"
SCHEDULER, WORKER = "pyramid_vllm.scheduler", "pyramid_vllm.worker"
ATTENTION, CLI = "pyramid_vllm.attention", "pyramid_vllm.tools.cli"
#: Part of the package -> prefixes that it must not import.
FORBIDDEN = {
    "policy": ("torch", "vllm", SCHEDULER, WORKER, TOOLS),
    "plan.py": ("torch", "vllm", SCHEDULER, WORKER, TOOLS),
    "model_shape.py": ("torch", "vllm", TOOLS),
    "stats.py": ("torch", "vllm", "pyramid_vllm"),
    "spec.py": (SCHEDULER, WORKER, TOOLS),
    "kernels": ("vllm", SCHEDULER, WORKER, TOOLS),
    "scheduler": ("torch", WORKER, ATTENTION, TOOLS),
    "worker": (SCHEDULER, TOOLS),
    "attention": (SCHEDULER, WORKER, TOOLS),
    "metrics": ("torch", SCHEDULER, WORKER, TOOLS),
    "tools/analysis": ("vllm", SCHEDULER, ATTENTION, CLI),
    "tools/bench": (CLI,),
    "tools/inspection": ("torch", SCHEDULER, WORKER, ATTENTION, CLI),
    "tools/model_config.py": ("torch", "vllm"),
    "tools/monitor": ("torch", "vllm", SCHEDULER, "pyramid_vllm.metrics", CLI),
    "tools/quality": (CLI,),
    "tools/simulate": (WORKER, ATTENTION, CLI),
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


def test_no_file_needs_itself() -> None:
    """No file imports itself through its imports, those for type checking included."""
    files = {}
    for source in PACKAGE.rglob("*.py"):
        parts = source.relative_to(PACKAGE.parent).with_suffix("").parts
        files[".".join(parts).removesuffix(".__init__")] = source
    graph: dict[str, set[str]] = {}
    for module, source in files.items():
        graph[module] = set()
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in files:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[module] |= (inner & files.keys()) or {node.module}
    assert sum(map(len, graph.values())) > 200
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


def test_functions_stay_short() -> None:
    for source in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 50, f"{source.name}:{node.name} has {length} lines"
