"""What single statements of Python source bind and say."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache

Function = ast.FunctionDef | ast.AsyncFunctionDef
Import = ast.Import | ast.ImportFrom


def statements(body: Iterable[ast.AST], typing: bool = False) -> Iterator[ast.AST]:
    """Statements of a module or class, those in branches included.

    Args:
        body: statements.
        typing: whether branches for type checking count.
    """
    for node in body:
        yield node
        if isinstance(node, ast.ClassDef | Function):
            continue
        is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for block in ("body", "orelse", "finalbody", "handlers"):
            if block != "body" or typing or not is_typing:
                yield from statements(getattr(node, block, ()), typing)


def bound_names(node: ast.AST) -> list[str]:
    """Names that a statement binds."""
    if isinstance(node, ast.ClassDef | Function):
        return [node.name]
    if isinstance(node, ast.ImportFrom):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.Import):
        return [a.asname or a.name.partition(".")[0] for a in node.names]
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    parts = (part for target in targets for part in ast.walk(target))
    return [part.id for part in parts if isinstance(part, ast.Name)]


def by_name(nodes: Iterable[ast.AST]) -> dict[str, list[ast.AST]]:
    """Statements by the names that they bind."""
    found: dict[str, list[ast.AST]] = {}
    for node in nodes:
        for name in bound_names(node):
            found.setdefault(name, []).append(node)
    return found


@cache
def members(node: ast.ClassDef) -> dict[str, ast.AST]:
    """What a class's body defines, and what its methods set on ``self``."""
    found: dict[str, ast.AST] = {
        part.attr: part
        for part in ast.walk(node)
        if isinstance(part, ast.Attribute)
        and isinstance(part.ctx, ast.Store)
        and isinstance(part.value, ast.Name)
        and part.value.id == "self"
    }
    return found | {k: nodes[-1] for k, nodes in by_name(statements(node.body)).items()}


def is_decorated(node: ast.AST, *names: str) -> bool:
    """Whether one of the decorators has one of the names."""
    for decorator in getattr(node, "decorator_list", ()):
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        if ast.unparse(called).rpartition(".")[2] in names:
            return True
    return False


def kind(node: ast.AST) -> str:
    """How a class's member is looked up: it must stay so where we override it."""
    if not isinstance(node, Function):
        return "attribute"
    if is_decorated(node, "property", "cached_property", "setter"):
        return "attribute"
    for name in ("staticmethod", "classmethod"):
        if is_decorated(node, name):
            return name
    return "method"
