"""The checker of vLLM's API, on the installed vLLM and on small trees made up here."""

import hashlib
import importlib
import inspect
import json
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts" / "vllm_api"))

from check_vllm_api import app, installed
from vllm_checks import (
    Finding,
    check,
    check_attributes,
    check_functions,
    check_names,
    check_uses,
    pass_problem,
    wrap_problem,
)
from vllm_names import DIGESTS
from vllm_tree import Tree, version_of

PLACE = installed()
assert PLACE is not None

STOCK = {
    "__init__.py": """
        MODULE_ATTRS = {"Lazy": ".base:Base"}
        import typing
        if typing.TYPE_CHECKING:
            from vllm.base import Base as Lazy
        else:
            def __getattr__(name): ...
    """,
    "_version.py": "__version__ = version = '1.2.3'",
    "base.py": """
        from vllm.tools import *
        class Root:
            num_roots = 1
            def __init__(self, config, *, log=False):
                self.requests = {}
            @staticmethod
            def kind(): ...
        class Base(Root):
            def step(self, num_tokens, limit=None): ...
            def stop(self): ...
    """,
    "tools.py": """
        def helper(first, second=None): ...
    """,
}
OURS = """
    from vllm import Lazy
    from vllm.base import Base, helper
    try:
        from vllm.fast import helper as quick
    except ImportError:
        from vllm.tools import helper as quick

    class Mixed:
        def stop(self):
            stock = super()
            return stock.stop()

    class Ours(Mixed, Base):
        num_roots = 2

        def __init__(self, config, *args, **kwargs):
            super().__init__(config, *args, **kwargs)
        def step(self, num_tokens, limit=None):
            helper(num_tokens, second=limit)
            return super().step(num_tokens, limit), self.requests
        @staticmethod
        def kind(): ...
        def of_our_own(self): ...
"""


def write(folder: Path, package: str, files: dict[str, str]) -> Path:
    """A folder that holds a package."""
    for name, text in files.items():
        path = folder / package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(inspect.cleandoc("\n" + text), encoding="utf-8")
    return folder


def uses_in(tmp_path: Path, change: tuple[str, str, str]) -> list[Finding]:
    """Findings where one piece of text of one file is another one."""
    file, before, after = change
    assert before in STOCK[file]
    ours = write(tmp_path / "ours", "pyramid_vllm", {"__init__.py": OURS})
    base = write(tmp_path / "base", "vllm", STOCK)
    changed = STOCK | {file: STOCK[file].replace(before, after)}
    new = write(tmp_path / "new", "vllm", changed)
    return list(
        check_uses(
            Tree({"vllm": new, "pyramid_vllm": ours}),
            Tree({"vllm": base, "pyramid_vllm": ours}),
        )
    )


def test_the_installed_version_has_everything() -> None:
    assert PLACE is not None
    version = version_of(PLACE) or ""
    findings = check(PLACE, PLACE, version)
    assert [f for f in findings if f.status not in ("found", "same")] == []
    overridden = {
        f.where.partition(" in ")[0] for f in findings if f.kind == "override"
    }
    assert overridden >= {
        "pyramid_vllm.scheduler.scheduler:PyramidScheduler.schedule",
        "pyramid_vllm.scheduler.block_manager:TierBlockManager.allocate_new_blocks",
        "pyramid_vllm.attention.cpu:PyramidCPUMetadataBuilder.build",
        "pyramid_vllm.spec:TierAttentionSpec.merge",
        "pyramid_vllm.worker.tiered:TieredWorker.execute_model",
    }
    imported = {f.name for f in findings if f.kind == "import"}
    assert imported >= {
        "vllm:LLM",
        "vllm.v1.core.sched.async_scheduler:AsyncScheduler",
        "vllm.v1.attention.selector:_cached_get_attn_backend",
    }
    assert {f.kind for f in findings} >= {"call", "super", "self", "attribute"}
    read = DIGESTS[version]
    for finding in findings:
        if finding.kind == "override":
            listed = {finding.name, finding.name.rpartition(".")[0]} & set(read)
            assert listed, f"no digest: {finding.name!r}: {finding.digest!r}"


@pytest.mark.parametrize(
    "path",
    [
        "vllm.v1.core.sched.scheduler:Scheduler.schedule",
        "vllm.v1.core.sched.async_scheduler:AsyncScheduler",
        "vllm.v1.kv_cache_interface:FullAttentionSpec",
        "vllm.engine.arg_utils:EngineArgs.from_cli_args",
        "vllm.v1.attention.selector:_cached_get_attn_backend",
        "vllm.v1.worker.gpu_worker:Worker.execute_model",
    ],
)
def test_digests_are_those_of_inspect(path: str) -> None:
    module, _, qualified = path.partition(":")
    target = importlib.import_module(module)
    for part in qualified.split("."):
        target = getattr(target, part)
    source = inspect.getsource(inspect.unwrap(target))
    assert PLACE is not None
    tree = Tree({"vllm": PLACE})
    found = tree.find(path)
    assert found is not None
    assert tree.digest(found) == hashlib.sha256(source.encode()).hexdigest()[:12]


def test_what_is_there_is_found(tmp_path: Path) -> None:
    findings = uses_in(tmp_path, ("base.py", "", ""))
    assert {f.status for f in findings} == {"found", "same"}
    found = {(f.kind, f.name, f.where) for f in findings}
    ours, name = "pyramid_vllm:Ours", "vllm.base:Root.requests"
    assert {place for kind, _, place in found if kind == "override"} == {
        f"{ours}.__init__",
        f"{ours}.kind",
        f"{ours}.num_roots",
        f"{ours}.step",
        f"pyramid_vllm:Mixed.stop in {ours}",
    }
    assert {n for kind, n, _ in found if kind == "self"} == {name}
    assert "vllm.tools:helper" in {n for kind, n, _ in found if kind == "call"}
    assert "vllm.base:Base.stop" in {n for kind, n, _ in found if kind == "super"}
    # The import that has another way.
    assert "vllm.fast:helper" not in {n for _, n, _ in found}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("base.py", "class Base(", "class Basis("), ("import", "gone", "")),
        (
            ("base.py", "def stop(", "def halt("),
            ("override", "gone", "never be called"),
        ),
        (("base.py", "def stop(", "def halt("), ("super", "gone", "")),
        (
            ("base.py", "limit=None", "limit=None, cap=None"),
            ("override", "differs", "gained parameter cap"),
        ),
        (
            ("base.py", "limit=None", "limit=None, *, cap"),
            ("super", "differs", "requires cap"),
        ),
        (
            ("base.py", "num_tokens, limit", "count, limit"),
            (
                "override",
                "differs",
                "parameter 1 is count, our override's is num_tokens",
            ),
        ),
        (
            ("base.py", "(self, num_tokens, limit=None)", "(self)"),
            ("override", "differs", "lost parameter num_tokens"),
        ),
        (
            ("base.py", "@staticmethod", "@classmethod"),
            ("override", "differs", "is a classmethod"),
        ),
        (("base.py", "self.requests", "self.waiting"), ("self", "gone", "")),
        (
            ("tools.py", "second=None", "other=None"),
            ("call", "differs", "has no parameter second"),
        ),
        (("tools.py", "helper", "helps"), ("import", "gone", "")),
        (("base.py", "num_roots = 1", "num_roots = 3"), ("override", "changed", "")),
        (
            ("base.py", "def stop(self): ...", "def stop(self): return 1"),
            ("override", "changed", ""),
        ),
    ],
)
def test_differences_are_reported(
    tmp_path: Path, change: tuple[str, str, str], expected: tuple[str, str, str]
) -> None:
    kind, status, detail = expected
    findings = uses_in(tmp_path, change)
    assert [
        f
        for f in findings
        if (f.kind, f.status) == (kind, status) and detail in f.detail
    ]


def test_listed_names_are_looked_up(tmp_path: Path) -> None:
    tree = Tree({"vllm": write(tmp_path, "vllm", STOCK)})
    step = "vllm.base:Base.step"
    statuses = [
        finding.status
        for finding in check_functions(
            tree,
            "function",
            {
                step: ("num_tokens", "limit"),
                "vllm.base:Lost.step": (),
                "vllm.base:Base.stop": ("force",),
                "vllm.tools:helper": ("second",),
                "vllm.base:Base.kind": ("*",),
            },
            pass_problem,
        )
    ]
    assert statuses == ["found", "gone", "differs", "differs", "found"]
    wrapped = {step: ("num_tokens",), "vllm.base:Base.__init__": ("config", "*")}
    found_wrapped = list(check_functions(tree, "wrapped", wrapped, wrap_problem))
    assert [finding.status for finding in found_wrapped] == ["differs", "found"]
    assert "gained parameter limit" in found_wrapped[0].detail
    attributes = check_attributes(tree, {"vllm:Lazy": "requests num_roots num_trees"})
    assert [finding.status for finding in attributes] == ["found", "found", "gone"]
    found = tree.find(step)
    assert found is not None
    digests = {
        "1": {step: tree.digest(found), "vllm.tools:helper": "old", "vllm.x:y": ""},
        "2": {"vllm.tools:helper": "read otherwise"},
    }
    names = check_names(tree, "2", digests)
    assert [finding.status for finding in names] == ["same", "changed", "gone"]


def test_a_wheel_is_read_like_a_folder(tmp_path: Path) -> None:
    folder, wheel = write(tmp_path, "vllm", STOCK), tmp_path / "vllm-1.2.3.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in (folder / "vllm").iterdir():
            archive.write(path, f"vllm/{path.name}")
    assert version_of(wheel) == version_of(folder) == "1.2.3"
    trees = [Tree({"vllm": place}) for place in (wheel, folder)]
    digests = [
        tree.digest(found) for tree in trees if (found := tree.find("vllm:Lazy"))
    ]
    assert len(digests) == 2
    assert digests[0] == digests[1]


def test_the_command_fails_where_the_package_would(tmp_path: Path) -> None:
    place, report = write(tmp_path, "vllm", STOCK), tmp_path / "report.json"
    arguments = ["--wheel", str(place), "--json", str(report)]
    wrong = CliRunner().invoke(app, ["1.2.4", *arguments])
    assert "valid is 1.2.4" in str(wrong.exception)
    assert CliRunner().invoke(app, ["1.2.3", *arguments]).exit_code == 1
    content = json.loads(report.read_text(encoding="utf-8"))
    gone = {f["name"] for f in content["findings"] if f["status"] == "gone"}
    assert "vllm.v1.core.sched.async_scheduler:AsyncScheduler" in gone
