"""Python sources of packages, read without importing any of them."""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

from vllm_ast import Function, Import, by_name, members, statements

_SUFFIXES = (".py", ".so")
#: Bases from elsewhere that add no names of their own.
_NAMELESS_BASES = ("ABC", "Generic", "Protocol", "NamedTuple", "Struct", "object")


@dataclass(frozen=True)
class Found:
    """A name's definition.

    ``node`` is that of a module, class, function, assignment or attribute; of an import
    where the name comes from a package that was not read.
    """

    module: str
    node: ast.AST


class Tree:
    """Modules by name, and what their names mean.

    Args:
        places: by package: the wheel, or the folder that holds it.
    """

    def __init__(self, places: dict[str, Path]) -> None:
        self.packages = tuple(places)
        self._places: dict[str, zipfile.ZipFile | Path] = {}
        """By file."""
        for package, place in places.items():
            self._places |= _files(package, place)
        self._folders = {path.rpartition("/")[0] for path in self._places}
        self._stems = {
            path.split(".")[0] for path in self._places if path.endswith(".so")
        }
        self._seen: set[tuple[str, str]] = set()
        self._parsed: dict[str, ast.Module] = {}
        self._bindings: dict[str, dict[str, list[ast.AST]]] = {}
        self._imports: dict[str, dict[str, list[ast.AST]]] = {}
        """Of whole modules, their functions included."""
        self._mro: dict[Found, list[Found]] = {}

    def modules(self, package: str) -> list[str]:
        """Names of a package's modules."""
        paths = [p for p in self._places if p.startswith(package + "/")]
        return sorted(
            path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            for path in paths
            if path.endswith(".py")
        )

    def _path(self, module: str) -> str | None:
        stem = module.replace(".", "/")
        paths = (f"{stem}/__init__.py", f"{stem}.py")
        return next((path for path in paths if path in self._places), None)

    def source(self, module: str) -> str:
        """A module's text; of an extension or a bare folder there is none."""
        path = self._path(module)
        if path is None:
            return ""
        place = self._places[path]
        data = place.read(path) if isinstance(place, zipfile.ZipFile) else None
        text = data.decode() if data is not None else (place / path).read_text("utf-8")
        return text.replace("\r\n", "\n")

    def module(self, name: str) -> Found | None:
        """A module, extension or folder of modules."""
        stem = name.replace(".", "/")
        if not (self._path(name) or stem in self._folders or stem in self._stems):
            return None
        if name not in self._parsed:
            self._parsed[name] = ast.parse(self.source(name))
        return Found(name, self._parsed[name])

    def bindings(self, module: str) -> dict[str, list[ast.AST]]:
        """A module's own names and the statements that bind them."""
        if module not in self._bindings:
            found = self.module(module)
            assert found is not None
            body = found.node.body  # type: ignore[attr-defined]
            bound = by_name(statements(body))
            if "__getattr__" in bound:
                # What a lazy module offers is what it tells type checkers.
                bound = by_name(statements(body, typing=True))
            self._bindings[module] = bound
        return self._bindings[module]

    def find(self, path: str) -> Found | None:
        """What ``package.module:Class.name`` is, bases and re-exports followed."""
        module, _, names = path.partition(":")
        found = self.module(module)
        for name in filter(None, names.split(".")):
            found = self.member(found, name) if found else None
        return found

    def member(self, found: Found, name: str) -> Found | None:
        """A module's or class's name."""
        if isinstance(found.node, ast.ClassDef):
            for cls in self.mro(found):
                if name in members(cls.node):  # type: ignore[arg-type]
                    return Found(cls.module, members(cls.node)[name])  # type: ignore[arg-type]
            return None
        if not isinstance(found.node, ast.Module):
            return None
        key = (found.module, name)
        if key in self._seen:
            return None
        self._seen.add(key)
        try:
            return self._module_member(found.module, name)
        finally:
            self._seen.discard(key)

    def _module_member(self, module: str, name: str) -> Found | None:
        bound = self.bindings(module)
        for node in reversed(bound.get(name, [])):
            found = self._bound(module, node, name)
            if found is not None:
                return found
        for node in bound.get("*", []):
            assert isinstance(node, ast.ImportFrom)
            found = self.find(f"{self.imported(module, node)}:{name}")
            if found is not None:
                return found
        return self.module(f"{module}.{name}")

    def _bound(self, module: str, node: ast.AST, name: str) -> Found | None:
        if isinstance(node, ast.ImportFrom):
            alias = next(a for a in node.names if name == (a.asname or a.name))
            source = self.imported(module, node)
            if source.partition(".")[0] not in self.packages:
                return Found(module, node)
            return self.find(f"{source}:{alias.name}")
        if isinstance(node, ast.Import):
            full = [a.name for a in node.names if a.asname == name]
            target = full[0] if full else name
            if target.partition(".")[0] not in self.packages:
                return Found(module, node)
            return self.module(target)
        value = getattr(node, "value", None)
        if isinstance(node, ast.Assign) and isinstance(value, ast.Name | ast.Attribute):
            return self.meaning(module, value) or Found(module, node)
        return Found(module, node)

    def imported(self, module: str, node: ast.ImportFrom) -> str:
        """The module that a statement of ``module`` imports from."""
        if not node.level:
            return node.module or ""
        is_package = (self._path(module) or "").endswith("__init__.py")
        parts = module.split(".")
        base = parts[: len(parts) - node.level + is_package]
        return ".".join([*base, *([node.module] if node.module else [])])

    def meaning(self, module: str, node: ast.expr) -> Found | None:
        """What ``Name`` or ``name.attribute`` refers to at a module's top level, or by
        an import anywhere in it."""
        if isinstance(node, ast.Subscript):
            return self.meaning(module, node.value)
        if isinstance(node, ast.Attribute):
            found = self.meaning(module, node.value)
            return self.member(found, node.attr) if found else None
        if not isinstance(node, ast.Name):
            return None
        owner = self.module(module)
        found = self.member(owner, node.id) if owner else None
        if found is not None or owner is None:
            return found
        if module not in self._imports:
            parts = (p for p in ast.walk(owner.node) if isinstance(p, Import))
            self._imports[module] = by_name(parts)
        inner = self._imports[module].get(node.id)
        return self._bound(module, inner[-1], node.id) if inner else None

    def mro(self, cls: Found) -> list[Found]:
        """A class and its bases as far as they can be read, nearest first."""
        if cls not in self._mro:
            found = [cls]
            for base in getattr(cls.node, "bases", ()):
                known = self.meaning(cls.module, base)
                if known is not None and isinstance(known.node, ast.ClassDef):
                    found += self.mro(known)
            # The base that several bases share comes behind all of them.
            unique = [c for i, c in enumerate(found) if c not in found[i + 1 :]]
            self._mro[cls] = unique
        return self._mro[cls]

    def is_whole(self, found: Found) -> bool:
        """Whether every name of a module or class can be read."""
        if isinstance(found.node, ast.Module):
            return bool(found.node.body)
        for cls in self.mro(found):
            for base in getattr(cls.node, "bases", ()):
                known = self.meaning(cls.module, base)
                is_read = known is not None and isinstance(known.node, ast.ClassDef)
                name = ast.unparse(base).partition("[")[0].rpartition(".")[2]
                if not is_read and name not in _NAMELESS_BASES:
                    return False
        return True

    def digest(self, found: Found) -> str:
        """Start of the SHA-256 of a definition's source, as ``inspect`` reads it."""
        node = found.node
        decorators = getattr(node, "decorator_list", None)
        text = self.source(found.module)
        if isinstance(node, ast.ClassDef | Function):
            first = decorators[0].lineno if decorators else node.lineno
            lines = text.splitlines(keepends=True)[first - 1 :]
            text = "".join(inspect.getblock(lines))
        else:
            text = ast.get_source_segment(text, node) or text
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _files(package: str, place: Path) -> dict[str, zipfile.ZipFile | Path]:
    archive = zipfile.ZipFile(place) if place.suffix == ".whl" else None
    if archive is not None:
        names = [n for n in archive.namelist() if n.startswith(f"{package}/")]
    else:
        paths = (place / package).rglob("*")
        names = [path.relative_to(place).as_posix() for path in paths]
    return {name: archive or place for name in names if name.endswith(_SUFFIXES)}


def version_of(place: Path) -> str | None:
    """The version of vLLM in a wheel or folder."""
    tree = Tree({"vllm": place})
    match = re.search(r"""version = ["'](\d[\w.]*)""", tree.source("vllm._version"))
    return match.group(1) if match else None
