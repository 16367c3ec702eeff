"""The check of vLLM's API: of the installed vLLM, of the next one, and of small trees.

``test_the_installed_version_has_everything`` also fails when something that we override
has another source than when we read it: read the new one, mend the override, then write
the digest that the failure shows into ``scripts/vllm_api/vllm_names.yaml``.
"""

import hashlib
import importlib
import inspect
import json
import tarfile
import zipfile
from pathlib import Path

import pytest
from check_vllm_api import (
    Finding,
    app,
    call_problem,
    check,
    check_digests,
    check_uses,
    signature,
    version_of,
    wrap_problem,
)
from typer.testing import CliRunner
from vllm_names import DIGESTS
from vllm_source import ROOT, Sources, digest, download, installed, unpack

STOCK = {
    "__init__.py": """
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
            def step(self, num_tokens, limit=None): self.running, self.waiting = [], []
            def stop(self): ...
    """,
    "tools.py": """
        def helper(first, second=None): ...
    """,
}
OURS = """
    from vllm import Lazy, tools
    from vllm.base import Base, helper

    class Mixed:
        def stop(self):
            return super().stop()

    class Ours(Mixed, Base):
        num_roots = 2

        def __init__(self, config, *args, **kwargs):
            super().__init__(config, *args, **kwargs)
        def step(self, num_tokens, limit=None):
            tools.helper(num_tokens, second=limit)
            return super().step(num_tokens, limit), self.requests, self.waiting
        @staticmethod
        def kind(): ...
        def of_our_own(self): ...
"""
#: Sources that somebody has read, of any version.
READ = {"vllm.base:Base": "", "vllm.base:Root": ""}


def write(folder: Path, package: str, files: dict[str, str]) -> Path:
    """A folder that holds a package."""
    for name, text in files.items():
        path = folder / package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(inspect.cleandoc("\n" + text), encoding="utf-8")
    return folder


def uses_in(
    tmp_path: Path, change: tuple[str, str, str], digests: dict[str, str] = READ
) -> list[Finding]:
    """Findings where one piece of text of one file is another one."""
    file, before, after = change
    assert before in STOCK[file]
    ours = write(tmp_path / "ours", "pyramid_vllm", {"__init__.py": OURS})
    base = write(tmp_path / "base", "vllm", STOCK)
    changed = STOCK | {file: STOCK[file].replace(before, after)}
    new = write(tmp_path / "new", "vllm", changed)
    return list(check_uses(Sources(new, ours), Sources(base, ours), ours, digests))


@pytest.fixture(scope="module")
def stock() -> Sources:
    """The installed vLLM and the package."""
    return Sources(installed(), ROOT)


@pytest.fixture(scope="module")
def next_vllm() -> Path:
    """The folder of the sources of vLLM 0.33."""
    try:
        return download("0.33.0")
    except SystemExit as error:
        pytest.skip(str(error))


def test_the_installed_version_has_everything(stock: Sources) -> None:
    assert version_of(stock) in DIGESTS
    findings = check(stock, stock)
    assert [f for f in findings if f.status not in ("found", "same")] == []
    overridden = {f.where for f in findings if f.kind == "override"}
    assert overridden >= {
        "pyramid_vllm.scheduler.scheduler:PyramidScheduler.schedule",
        "pyramid_vllm.scheduler.block_manager:TierBlockManager.allocate_new_blocks",
        "pyramid_vllm.attention.tiered:TieredBuilder.build"
        " in pyramid_vllm.attention.cpu:PyramidCPUMetadataBuilder",
        "pyramid_vllm.spec:TierAttentionSpec.merge",
        "pyramid_vllm.worker.tiered:TieredWorker.execute_model"
        " in pyramid_vllm.worker.gpu:PyramidGPUWorker",
    }
    assert {f.name for f in findings if f.kind == "import"} >= {
        "vllm:LLM",
        "vllm.v1.core.sched.async_scheduler:AsyncScheduler",
        "vllm.v1.attention.selector:_cached_get_attn_backend",
    }
    assert "vllm.v1.core.sched.scheduler:Scheduler.running" in {
        f.name for f in findings if f.kind == "read"
    }


@pytest.mark.timeout(600)
def test_a_parameter_of_the_next_version_is_found(
    stock: Sources, next_vllm: Path, tmp_path: Path
) -> None:
    """0.33 gives a method of the scheduler one more; ours takes it, this one not."""
    narrow = """
        from vllm.v1.core.sched.scheduler import Scheduler
        class Narrow(Scheduler):
            def _get_local_prefix_cache_hit(self, request): ...
    """
    theirs = "vllm.v1.core.sched.scheduler:Scheduler._get_local_prefix_cache_hit"
    write(tmp_path, "pyramid_vllm", {"__init__.py": narrow})
    for ours, status in ((tmp_path, "differs"), (ROOT, "read")):
        tree, base = Sources(next_vllm, ours), Sources(installed(), ours)
        found = check_uses(tree, base, ours, DIGESTS["0.33.0"])
        (finding,) = [f for f in found if f.kind == "override" and f.name == theirs]
        assert finding.status == status
        assert "max_cache_hit_length" in finding.detail


@pytest.mark.parametrize(
    "path",
    [
        "vllm.v1.core.sched.scheduler:Scheduler.schedule",
        "vllm.v1.kv_cache_interface:FullAttentionSpec",
        "vllm.engine.arg_utils:EngineArgs.from_cli_args",
        "vllm.v1.attention.selector:_cached_get_attn_backend",
    ],
)
def test_digests_are_those_of_inspect(stock: Sources, path: str) -> None:
    module, _, qualified = path.partition(":")
    target = importlib.import_module(module)
    for part in qualified.split("."):
        target = getattr(target, part)
    source = inspect.getsource(inspect.unwrap(target))
    expected = hashlib.sha256(source.encode()).hexdigest()[:12]
    assert digest(stock.find(path)) == expected


def test_what_is_there_is_found(tmp_path: Path) -> None:
    findings = uses_in(tmp_path, ("base.py", "", ""))
    assert {f.status for f in findings} == {"found", "same"}
    names = {(f.kind, f.name) for f in findings}
    ours = "pyramid_vllm:Ours"
    assert {f.where for f in findings if f.kind == "override"} == {
        f"{ours}.__init__",
        f"{ours}.kind",
        f"{ours}.num_roots",
        f"{ours}.step",
        f"pyramid_vllm:Mixed.stop in {ours}",
    }
    assert names >= {
        ("import", "vllm:Lazy"),
        ("import", "vllm.tools:helper"),
        ("read", "vllm.base:Root.requests"),
        ("read", "vllm.base:Base.waiting"),
    }


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("base.py", "class Base(", "class Basis("), ("import", "gone", "")),
        (("tools.py", "helper", "helps"), ("import", "gone", "")),
        (("base.py", "def stop(", "def halt("), ("override", "gone", "")),
        (("base.py", "self.requests", "self.asked"), ("read", "gone", "")),
        (("base.py", "self.waiting", "self.asked"), ("read", "gone", "")),
        (
            ("base.py", "limit=None", "limit=None, cap=None"),
            ("override", "differs", "(num_tokens, limit, cap)"),
        ),
        (
            ("base.py", "limit=None", "limit=None, *, cap"),
            ("override", "differs", "unexpected keyword argument 'cap'"),
        ),
        (
            ("base.py", "num_tokens, limit", "count, limit"),
            ("override", "differs", "parameter count is num_tokens in ours"),
        ),
        (
            ("base.py", "(self, num_tokens, limit=None)", "(self)"),
            ("override", "differs", "missing a required argument: 'num_tokens'"),
        ),
        (
            ("base.py", "@staticmethod", "@classmethod"),
            ("override", "differs", "is a classmethod"),
        ),
        (
            ("base.py", "config, *, log", "config, trace=0, *, log"),
            ("override", "changed", "now (config, trace, log)"),
        ),
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


def test_an_override_without_a_digest_is_reported(tmp_path: Path) -> None:
    findings = uses_in(tmp_path, ("base.py", "", ""), {"vllm.base:Base.step": ""})
    unlisted = {f.name for f in findings if f.status == "unlisted"}
    assert unlisted == {
        "vllm.base:Base.stop",
        "vllm.base:Root.__init__",
        "vllm.base:Root.kind",
        "vllm.base:Root.num_roots",
    }


def test_listed_names_are_looked_up(tmp_path: Path) -> None:
    tree = Sources(write(tmp_path, "vllm", STOCK))
    step, kind, helper = (
        signature(tree.find(f"vllm.base:{name}"))
        for name in ("Base.step", "Base.kind", "helper")
    )
    assert not call_problem(step, ("num_tokens", "limit"))
    assert "argument 'force'" in call_problem(step, ("num_tokens", "force"))
    assert "required argument: 'first'" in call_problem(helper, ("second",))
    assert not call_problem(kind, ("*",))
    assert "(num_tokens, limit)" in wrap_problem(step, ("num_tokens",))
    assert not wrap_problem(step, ("num_tokens", "*"))
    digests = {
        "1": {
            "vllm.base:Base.step": digest(tree.find("vllm.base:Base.step")),
            "vllm.tools:helper": "old",
            "vllm.x:y": "",
        },
        "2": {"vllm.tools:helper": "read otherwise"},
    }
    statuses = [finding.status for finding in check_digests(tree, "2", digests)]
    assert statuses == ["same", "changed", "gone"]


def test_archives_are_read_like_folders(tmp_path: Path) -> None:
    folder = write(tmp_path, "vllm", STOCK)
    wheel, sdist = tmp_path / "vllm-1.2.3.whl", tmp_path / "vllm-1.2.3.tar.gz"
    with zipfile.ZipFile(wheel, "w") as archive, tarfile.open(sdist, "w:gz") as tar:
        for path in (folder / "vllm").iterdir():
            archive.write(path, f"vllm/{path.name}")
            tar.add(path, f"vllm-1.2.3/vllm/{path.name}")
    places = [folder, unpack(wheel, tmp_path / "w"), unpack(sdist, tmp_path / "s")]
    trees = [Sources(place) for place in places]
    assert {version_of(tree) for tree in trees} == {"1.2.3"}
    assert len({digest(tree.find("vllm:Lazy")) for tree in trees}) == 1


def test_the_command_fails_where_the_package_would(tmp_path: Path) -> None:
    place, report = write(tmp_path, "vllm", STOCK), tmp_path / "report.json"
    nothing = CliRunner().invoke(app, [str(tmp_path / "vllm")])
    assert "valid is a folder" in str(nothing.exception)
    done = CliRunner().invoke(app, [str(place), "--json", str(report)])
    assert done.exit_code == 1
    content = json.loads(report.read_text(encoding="utf-8"))
    assert content["vllm"] == "1.2.3"
    gone = {f["name"] for f in content["findings"] if f["status"] == "gone"}
    name = "vllm.v1.core.sched.async_scheduler:AsyncScheduler"
    assert name in gone
    assert f"gone  import  {name}" in done.output
