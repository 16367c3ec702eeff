"""What the package uses of vLLM, found in the package's own source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace

from vllm_ast import Function, Import, bound_names, kind, members
from vllm_signatures import call_problems, callable_signature, override_problems
from vllm_signatures import signature as signature_of
from vllm_tree import Found, Tree

OURS = "pyramid_vllm"
THEIRS = "vllm"


@dataclass(frozen=True)
class Use:
    """One name of vLLM that a place in the package relies on."""

    kind: str
    """import, attribute, call, override, super or self."""
    name: str
    """vLLM's name, dotted as in the list of names that we read."""
    where: str
    """The file, and the class and method of ours where there is one."""
    target: Found | None
    """None: vLLM has no such name."""
    problems: tuple[str, ...] = ()


def _is_theirs(found: Found | None) -> bool:
    return found is not None and found.module.partition(".")[0] == THEIRS


def _path_of(found: Found, name: str = "") -> str:
    own = getattr(found.node, "name", "")
    qualified = ".".join(filter(None, (own, name)))
    return f"{found.module}:{qualified}" if qualified else found.module


def imports(tree: Tree, module: str) -> Iterator[Use]:
    """Modules and names of vLLM that a module of ours imports, in functions too."""
    found = tree.module(module)
    assert found is not None
    can_miss = set(_may_be_missing(tree, module, found.node))
    for node in ast.walk(found.node):
        if not isinstance(node, Import):
            continue
        for alias, path in _imported_paths(tree, module, node):
            if path.partition(":")[0].partition(".")[0] == THEIRS:
                target = tree.find(path)
                if target is not None or alias not in can_miss:
                    yield Use("import", path, f"{module}:{node.lineno}", target)


def _imported_paths(
    tree: Tree, module: str, node: ast.Import | ast.ImportFrom
) -> list[tuple[ast.alias, str]]:
    if isinstance(node, ast.Import):
        return [(alias, alias.name) for alias in node.names]
    source = tree.imported(module, node)
    return [(alias, f"{source}:{alias.name}") for alias in node.names]


def _may_be_missing(tree: Tree, module: str, body: ast.AST) -> Iterator[ast.alias]:
    """Imports that a ``try`` has another way for."""
    for node in ast.walk(body):
        if not isinstance(node, ast.Try) or "ImportError" not in ast.unparse(node):
            continue
        ways: dict[str, list[tuple[ast.alias, bool]]] = {}
        for part in ast.walk(node):
            if isinstance(part, Import):
                for alias, path in _imported_paths(tree, module, part):
                    is_there = tree.find(path) is not None
                    name = alias.asname or alias.name
                    ways.setdefault(name, []).append((alias, is_there))
        for found in ways.values():
            # A single way has no import instead: its handler does without.
            if len(found) == 1 or any(is_there for _, is_there in found):
                yield from (alias for alias, _ in found)


def attributes(tree: Tree, module: str) -> Iterator[Use]:
    """Names that a module of ours reads of vLLM's modules and classes, and its calls of
    vLLM's functions and constructors."""
    found = tree.module(module)
    assert found is not None
    for node in ast.walk(found.node):
        if isinstance(node, ast.Attribute) and not node.attr.startswith("__"):
            owner = tree.meaning(module, node.value)
            if owner is None or not _is_theirs(owner):
                continue
            if isinstance(owner.node, ast.Module | ast.ClassDef):
                target = tree.member(owner, node.attr)
                if target is not None or tree.is_whole(owner):
                    path = _path_of(owner, node.attr)
                    yield Use("attribute", path, f"{module}:{node.lineno}", target)
        elif isinstance(node, ast.Call):
            called = tree.meaning(module, node.func)
            if called is None or not _is_theirs(called):
                continue
            theirs = callable_signature(tree, called, _is_bound(tree, module, node))
            if theirs is not None:
                where, path = f"{module}:{node.lineno}", _path_of(called)
                problems = tuple(call_problems(node, theirs))
                yield Use("call", path, where, called, problems)


def _is_bound(tree: Tree, module: str, call: ast.Call) -> bool:
    """Whether the call of a class's function fills its first parameter."""
    if not isinstance(call.func, ast.Attribute):
        return False
    owner, called = tree.meaning(module, call.func.value), call.func
    is_of_class = owner is not None and isinstance(owner.node, ast.ClassDef)
    found = tree.meaning(module, called)
    return is_of_class and found is not None and kind(found.node) == "classmethod"


def classes(tree: Tree) -> Iterator[tuple[Found, list[Found]]]:
    """The package's classes with a base of vLLM, and their bases, nearest first."""
    for module in tree.modules(OURS):
        found = tree.module(module)
        assert found is not None
        for node in ast.walk(found.node):
            if isinstance(node, ast.ClassDef):
                mro = tree.mro(Found(module, node))
                if any(_is_theirs(cls) for cls in mro):
                    yield mro[0], mro


def _first(mro: list[Found], name: str) -> tuple[Found, ast.AST] | None:
    for cls in mro:
        assert isinstance(cls.node, ast.ClassDef)
        if name in members(cls.node):
            return cls, members(cls.node)[name]
    return None


def _override(cls: Found, name: str, bases: list[Found]) -> Use | None:
    """A member of ours that takes the place of one of vLLM's."""
    theirs = _first(bases, name)
    if theirs is None:
        return None
    assert isinstance(cls.node, ast.ClassDef)
    (owner, node), ours = theirs, members(cls.node)[name]
    problems = []
    if kind(node) != kind(ours):
        problems.append(f"is a {kind(node)}, our override a {kind(ours)}")
    elif isinstance(node, Function) and isinstance(ours, Function):
        problems = override_problems(signature_of(node, True), signature_of(ours, True))
    target = Found(owner.module, node)
    where = _path_of(cls, name)
    return Use("override", _path_of(owner, name), where, target, tuple(problems))


def overrides(tree: Tree) -> Iterator[Use]:
    """Members of our classes that vLLM's bases have too, those of mix-ins included."""
    for host, mro in classes(tree):
        bases = [base for base in mro if _is_theirs(base)]
        for cls in mro:
            if _is_theirs(cls):
                continue
            assert isinstance(cls.node, ast.ClassDef)
            own_bases = [base for base in tree.mro(cls) if _is_theirs(base)]
            for name, node in sorted(members(cls.node).items()):
                use = _override(cls, name, bases) if _is_class_level(node) else None
                if use is None or (
                    cls != host and use == _override(cls, name, own_bases)
                ):
                    continue
                if cls != host:
                    use = replace(use, where=f"{use.where} in {_path_of(host)}")
                yield use


def _is_class_level(node: ast.AST) -> bool:
    # What an object sets is its own; an annotation without a value overrides nothing.
    if isinstance(node, ast.AnnAssign):
        return node.value is not None
    return not isinstance(node, ast.Attribute)


def through_super(tree: Tree) -> Iterator[Use]:
    """What methods of ours call on ``super()``."""
    for _, mro in classes(tree):
        for i, cls in enumerate(mro):
            if _is_theirs(cls):
                continue
            for method in ast.walk(cls.node):
                if isinstance(method, Function):
                    for call, name in _super_calls(method):
                        yield _super_call(cls, call, name, mro[i + 1 :])


def _super_calls(method: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """Calls on ``super()``, or on a variable that holds it."""
    nodes = list(ast.walk(method))
    assigned = (node for node in nodes if isinstance(node, ast.Assign | ast.AnnAssign))
    held = {
        name for node in assigned if _is_super(node.value) for name in bound_names(node)
    }
    for node in nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if _is_super(owner) or (isinstance(owner, ast.Name) and owner.id in held):
                yield node, node.func.attr


def _is_super(node: ast.AST | None) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "super"
    )


def _super_call(cls: Found, call: ast.Call, name: str, behind: list[Found]) -> Use:
    where = f"{cls.module}:{call.lineno}"
    found = _first(behind, name)
    if found is None:
        theirs = next((base for base in behind if _is_theirs(base)), cls)
        return Use("super", _path_of(theirs, name), where, None)
    owner, node = found
    problems: list[str] = []
    if isinstance(node, Function):
        problems = call_problems(call, signature_of(node, True))
    target = Found(owner.module, node)
    return Use("super", _path_of(owner, name), where, target, tuple(problems))


def own_attributes(tree: Tree) -> Iterator[Use]:
    """Names that our classes read of ``self`` and have from vLLM."""
    for _, mro in classes(tree):
        nearest = next(base for base in mro if _is_theirs(base))
        for cls in mro:
            if _is_theirs(cls):
                continue
            for node in ast.walk(cls.node):
                if not (isinstance(node, ast.Attribute) and _is_self(node.value)):
                    continue
                where, found = f"{cls.module}:{node.lineno}", _first(mro, node.attr)
                if found is None and all(map(tree.is_whole, mro)):
                    yield Use("self", _path_of(nearest, node.attr), where, None)
                elif found is not None and _is_theirs(found[0]):
                    target = Found(found[0].module, found[1])
                    yield Use("self", _path_of(found[0], node.attr), where, target)


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def all_uses(tree: Tree) -> list[Use]:
    """Everything, each use once."""
    found: dict[tuple[str, str, str], Use] = {}
    for module in tree.modules(OURS):
        for use in (*imports(tree, module), *attributes(tree, module)):
            found.setdefault((use.kind, use.name, use.where), use)
    for use in (*overrides(tree), *through_super(tree), *own_attributes(tree)):
        found.setdefault((use.kind, use.name, use.where), use)
    return list(found.values())
