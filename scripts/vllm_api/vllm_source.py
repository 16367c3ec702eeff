"""Python sources of vLLM and of the package, read without importing either."""

from __future__ import annotations

import ast
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parents[2]
#: Downloaded sources by version; git ignores the folder.
DOWNLOADS = ROOT / "build"


class Sources(griffe.ModulesCollection):
    """Modules of packages, each of which is read when something looks it up.

    Args:
        folders: those in which the packages lie.
    """

    def __init__(self, *folders: Path) -> None:
        super().__init__()
        self._folders, self._lines = folders, griffe.LinesCollection()
        self._read: dict[str, griffe.Module | None] = {}

    def module(self, name: str) -> Any:
        """A module, or a folder of modules; None if there is none."""
        if name not in self._read:
            stems = [folder / name.replace(".", "/") for folder in self._folders]
            suffixes = ("/__init__.py", ".py", "")
            paths = [Path(f"{stem}{suffix}") for stem in stems for suffix in suffixes]
            path = next((path for path in paths if path.exists()), None)
            self._read[name] = self._visit(name, path) if path else None
        return self._read[name]

    def _visit(self, name: str, path: Path) -> griffe.Module:
        owner, _, own = name.rpartition(".")
        parent = self.module(owner) if owner else None
        text = path.read_text("utf-8") if path.is_file() else ""
        self._lines[path] = text.splitlines()
        module = griffe.visit(
            own,
            path,
            text,
            parent=parent,
            lines_collection=self._lines,
            modules_collection=self,
        )
        self._read[name] = module
        (parent or self).set_member(own, module)
        for member in list(module.members.values()):
            starred = getattr(member, "wildcard", None)
            source = self.module(starred) if starred else None
            for each in source.members if source else ():
                alias = griffe.Alias(each, f"{starred}.{each}", parent=module)
                module.members.setdefault(each, alias)
        return module

    def get_member(self, key: str | Sequence[str]) -> Any:
        """See griffe, which looks up imported names and bases here."""
        parts = key.split(".") if isinstance(key, str) else list(key)
        all(self.module(".".join(parts[: i + 1])) for i in range(len(parts)))
        try:
            found = super().get_member(parts)
            return found.final_target if found.is_alias else found
        except griffe.AliasResolutionError as error:
            raise KeyError(key) from error  # Of a package that is not read.

    def find(self, path: str) -> Any:
        """What ``package.module:Class.name`` is, by way of imports and base classes."""
        module, _, names = path.partition(":")
        found = self.module(module)
        for name in filter(None, names.split(".")):
            found = self.member(found, name) if found else None
        return found

    def member(self, owner: Any, name: str) -> Any:
        """A module's or class's name; the class itself where its methods set it."""
        if owner.is_class:
            owner = first_with(name, [owner, *owner.mro()])
            return owner and owner.members.get(name, owner)
        found = self.module(f"{owner.path}.{name}") or owner.members.get(name)
        try:
            return found.final_target if found and found.is_alias else found
        except griffe.AliasResolutionError:
            return found  # It comes from a package that is not read.


def first_with(name: str, classes: list[Any]) -> Any:
    """The first class that has a name, or whose methods set it on ``self``."""
    for cls in classes:
        if name in cls.members:
            return cls
        nodes = ast.walk(ast.parse(cls.source)) if f"self.{name}" in cls.source else ()
        for node in nodes:
            is_set = isinstance(getattr(node, "ctx", None), ast.Store)
            if is_set and ast.unparse(node) == f"self.{name}":
                return cls
    return None


def path_of(found: Any, member: str = "") -> str:
    """``package.module:Class.name`` of an object, or of a member that it has."""
    module = found.module.path
    own = "" if found.is_module else found.path.removeprefix(f"{module}.")
    return f"{module}:{'.'.join(filter(None, (own, member)))}"


def digest(found: Any) -> str:
    """Start of the SHA-256 of a definition's source, as ``inspect`` reads it."""
    text = "\n".join(found.lines)
    text = text.strip() if found.is_attribute else f"{text}\n"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def installed() -> Path:
    """The folder in which the installed vLLM lies."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SystemExit("vLLM is not installed: scripts/setup cpu does that")
    return Path(spec.origin).parents[1]


def unpack(archive: Path, target: Path) -> Path:
    """Unpack the Python files of a wheel or source distribution.

    Returns:
        The folder in which ``vllm`` lies.
    """
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(target, [n for n in wheel.namelist() if n[-3:] == ".py"])
    else:
        with tarfile.open(archive) as sdist:
            members = [m for m in sdist.getmembers() if m.name.endswith(".py")]
            sdist.extractall(target, members, filter="data")
    return next((p.parents[1] for p in target.rglob("vllm/_version.py")), target)


def download(version: str, part: str = "vllm") -> Path:
    """A version's sources from the package index, which are kept for the next use.

    Args:
        version: of vLLM.
        part: the folder of the source distribution; ``tests`` has vLLM's tests.

    Returns:
        The folder in which the part lies.

    Raises:
        SystemExit: pip cannot get them.
    """
    kept = DOWNLOADS / f"vllm-{version}{'' if part == 'vllm' else f'-{part}'}"
    if kept.is_dir():
        return kept
    DOWNLOADS.mkdir(exist_ok=True)
    # The source distribution has a seventh of a wheel's size. pip would go on to build
    # metadata, which runs vLLM's code. These options make it end before that, because
    # what the build needs is not installed, and leave what it has unpacked.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", "vllm", "--no-build-isolation", "--no-clean"]
    command += ["--check-build-dependencies", "--retries", "1", f"vllm=={version}"]
    with tempfile.TemporaryDirectory(dir=DOWNLOADS) as folder:
        env = os.environ | {"TMPDIR": folder}
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, check=False
        )
        for path in Path(folder).glob(f"*/*/{part}/__init__.py"):
            sources = Path(folder, "sources")
            shutil.copytree(path.parent, sources / part, ignore=_without_others)
            # Another process may have been faster.
            return kept if kept.is_dir() else sources.replace(kept)
    raise SystemExit(f"pip cannot download vLLM {version}:\n{done.stderr}")


def _without_others(_folder: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(name).suffix not in ("", ".py")]
