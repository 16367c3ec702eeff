"""What functions take, and whether it is what others pass: from their source alone."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass, replace

from vllm_ast import Function, is_decorated, kind, members
from vllm_tree import Found, Tree

#: Decorators and bases whose classes take their annotated fields.
_FIELD_DECORATORS = ("dataclass", "config")
_FIELD_BASES = ("Struct", "NamedTuple", "BaseModel")


@dataclass(frozen=True)
class Parameter:
    """One parameter."""

    name: str
    is_required: bool


@dataclass(frozen=True)
class Signature:
    """What a call may pass, without ``self`` or ``cls``."""

    positional: tuple[Parameter, ...]
    keyword: tuple[Parameter, ...] = ()
    """Those that are passed by name alone."""
    has_args: bool = False
    has_kwargs: bool = False

    @property
    def names(self) -> set[str]:
        """Of all parameters."""
        return {parameter.name for parameter in (*self.positional, *self.keyword)}

    def required(self) -> list[str]:
        """Names of the parameters without a default."""
        all_of_them = (*self.positional, *self.keyword)
        return [parameter.name for parameter in all_of_them if parameter.is_required]


def signature(node: ast.FunctionDef | ast.AsyncFunctionDef, bound: bool) -> Signature:
    """A function's parameters.

    Args:
        node: the function.
        bound: whether it is called on an object or class that fills the first one.
    """
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    num_required = len(positional) - len(arguments.defaults)
    parameters = [
        Parameter(argument.arg, i < num_required)
        for i, argument in enumerate(positional)
    ]
    return Signature(
        tuple(parameters[bound and kind(node) != "staticmethod" :]),
        tuple(
            Parameter(argument.arg, default is None)
            for argument, default in zip(
                arguments.kwonlyargs, arguments.kw_defaults, strict=True
            )
        ),
        arguments.vararg is not None,
        arguments.kwarg is not None,
    )


def constructor(tree: Tree, cls: Found) -> Signature | None:
    """What making an object of a class takes; None where its source does not say."""
    mro = tree.mro(cls)
    for base in mro:
        assert isinstance(base.node, ast.ClassDef)
        init = members(base.node).get("__init__")
        if isinstance(init, Function):
            return signature(init, bound=True)
        bases = {ast.unparse(b).rpartition(".")[2] for b in base.node.bases}
        if is_decorated(base.node, *_FIELD_DECORATORS) or bases & {*_FIELD_BASES}:
            return _of_fields(reversed(mro))
    return None


def _of_fields(classes: Iterable[Found]) -> Signature:
    fields: dict[str, Parameter] = {}
    for cls in classes:
        for node in getattr(cls.node, "body", ()):
            if not isinstance(node, ast.AnnAssign) or "ClassVar" in ast.dump(
                node.annotation
            ):
                continue
            assert isinstance(node.target, ast.Name)
            value = ast.unparse(node.value) if node.value else ""
            if "init=False" in value:
                continue
            has_default = bool(value) and not (
                value.startswith("field(") and "default" not in value
            )
            name = node.target.id
            fields[name] = Parameter(name, not has_default)
    return Signature(tuple(fields.values()))


def callable_signature(tree: Tree, found: Found, bound: bool) -> Signature | None:
    """Of a function, or of a class's constructor."""
    if isinstance(found.node, Function):
        return signature(found.node, bound)
    if isinstance(found.node, ast.ClassDef):
        return constructor(tree, found)
    return None


def override_problems(theirs: Signature, ours: Signature) -> list[str]:
    """Why callers of ``theirs`` could not call ``ours``."""
    problems, taken = [], {p.name for p in ours.keyword}
    for i, parameter in enumerate(theirs.positional):
        name = parameter.name
        if i < len(ours.positional):
            here = ours.positional[i].name
            if here != name:
                problems.append(
                    f"parameter {i + 1} is {name}, our override's is {here}"
                )
        elif name not in taken and not (ours.has_args or ours.has_kwargs):
            problems.append(f"gained parameter {name} that our override does not take")
    for parameter in theirs.keyword:
        if parameter.name not in ours.names and not ours.has_kwargs:
            problems.append(
                f"gained parameter {parameter.name} that our override does not take"
            )
    open_ended = theirs.has_args or theirs.has_kwargs
    behind = replace(ours, positional=ours.positional[len(theirs.positional) :])
    for name in behind.required():
        if name not in theirs.names and not open_ended:
            problems.append(f"lost parameter {name} that our override requires")
    return problems


def call_problems(call: ast.Call, theirs: Signature) -> list[str]:
    """Why a function could not be called so."""
    has_star = any(isinstance(a, ast.Starred) for a in call.args)
    named = [keyword.arg for keyword in call.keywords]
    passed = [a for a in call.args if not isinstance(a, ast.Starred)]
    problems = []
    most = len(theirs.positional)
    if len(passed) > most and not theirs.has_args:
        problems.append(f"takes {most} positional arguments, we pass {len(passed)}")
    for name in named:
        if name is not None and name not in theirs.names and not theirs.has_kwargs:
            problems.append(f"has no parameter {name}, which we pass")
    if has_star or None in named:
        return problems
    given = {p.name for p in theirs.positional[: len(passed)]} | set(named)
    for name in theirs.required():
        if name not in given:
            problems.append(f"requires {name}, which we do not pass")
    return problems
