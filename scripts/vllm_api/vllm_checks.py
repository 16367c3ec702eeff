"""What the package relies on, looked up in one version of vLLM's sources."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_names import ATTRIBUTES, DIGESTS, FUNCTIONS, MOVED, PATCHED, WRAPPED
from vllm_signatures import (
    Parameter,
    Signature,
    callable_signature,
    override_problems,
)
from vllm_tree import Tree
from vllm_uses import OURS, THEIRS, Use, all_uses

ROOT = Path(__file__).resolve().parents[2]
#: What does not work; "changed" is to be read.
ERRORS = ("gone", "differs")


@dataclass(frozen=True)
class Finding:
    """What became of one name."""

    kind: str
    name: str
    status: str
    """found, same, read, changed, gone or differs."""
    detail: str = ""
    where: str = ""
    digest: str = ""
    """Of a source that is to be read, as ``DIGESTS`` has it."""

    @property
    def is_error(self) -> bool:
        """Whether the package cannot work so."""
        return self.status in ERRORS


def check_names(
    tree: Tree, version: str, digests: dict[str, dict[str, str]]
) -> Iterator[Finding]:
    """The names whose source we read, against their digests in the first version."""
    first = next(iter(digests))
    read = digests.get(version, {})
    for name, digest in digests[first].items():
        found, detail, path = tree.find(name), "", name
        if found is None and name in MOVED:
            path = MOVED[name]
            found, detail = tree.find(path), f"now {path}"
        if found is None:
            yield Finding("name", name, "gone", f"was in {first}")
            continue
        now = tree.digest(found)
        status = "same" if now == digest else "changed"
        if status == "changed" and read.get(path) == now:
            status = "read"
        yield Finding("name", name, status, detail, digest=now)


def check_functions(
    tree: Tree,
    kind: str,
    functions: dict[str, tuple[str, ...]],
    problem_of: Callable[[Signature, tuple[str, ...]], str],
) -> Iterator[Finding]:
    """Functions that are not overridden, but wrapped or called on objects."""
    for name, parameters in functions.items():
        owner, _, function = name.rpartition(".")
        is_constructor = function == "__init__"
        found = tree.find(owner if is_constructor else name)
        if found is None:
            yield Finding(kind, name, "gone")
            continue
        bound = "." in name.partition(":")[2]
        theirs = callable_signature(tree, found, bound)
        problem = "" if theirs is None else problem_of(theirs, parameters)
        yield Finding(kind, name, "differs" if problem else "found", problem)


def wrap_problem(theirs: Signature, taken: tuple[str, ...]) -> str:
    """Why callers of a function could not call one of ours in its place."""
    named = tuple(Parameter(name, True) for name in taken if name != "*")
    is_open = "*" in taken
    ours = Signature(named, has_args=is_open, has_kwargs=is_open)
    return "; ".join(override_problems(theirs, ours))


def pass_problem(theirs: Signature, passed: tuple[str, ...]) -> str:
    """Why we could not call a function."""
    gone = [n for n in passed if n not in theirs.names and not theirs.has_kwargs]
    new = [n for n in theirs.required() if n not in passed and "*" not in passed]
    said = [f"has no parameter {n}, which we pass" for n in gone if n != "*"]
    said += [f"requires {n}, which we do not pass" for n in new]
    order = [p.name for p in theirs.positional if p.name in passed]
    expected = [n for n in passed if n in order]
    if order != expected:
        said.append(f"parameters are in the order {', '.join(order)}")
    return "; ".join(said)


def check_attributes(tree: Tree, attributes: dict[str, str]) -> Iterator[Finding]:
    """What is read of objects."""
    for owner, names in attributes.items():
        found = tree.find(owner)
        if found is None:
            yield Finding("class", owner, "gone")
            continue
        for name in names.split():
            status = "found" if tree.member(found, name) else "gone"
            yield Finding("attribute", f"{owner}.{name}", status)


def check_uses(
    tree: Tree, base: Tree, read: dict[str, str] | None = None
) -> Iterator[Finding]:
    """What the package's own source shows.

    Args:
        tree: the version in question and the package.
        base: the version that the overrides were written for, and the package.
        read: names whose sources in that version somebody has read -> their digests.
    """
    sources = {name: tree.find(name) for name in read or {}}
    as_read = {
        name
        for name, found in sources.items()
        if read and found and tree.digest(found) == read[name]
    }
    before = {(use.kind, use.where, use.name): use for use in all_uses(base)}
    overridden = {use.where: use for use in before.values() if use.kind == "override"}
    for use in all_uses(tree):
        if use.kind == "override":
            was = overridden.pop(use.where, None)
            finding = _override(tree, base, use, was)
            if finding.status == "changed" and {use.name, _owner(use.name)} & as_read:
                finding = replace(finding, status="read")
            yield finding
            continue
        if use.target is None and re.split("[.:]", use.name)[-1] in PATCHED:
            continue
        status = "gone" if use.target is None else "found"
        status = "differs" if use.problems else status
        yield Finding(use.kind, use.name, status, "; ".join(use.problems), use.where)
    for where, use in overridden.items():
        detail = "our override would never be called"
        yield Finding("override", use.name, "gone", detail, where)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _override(tree: Tree, base: Tree, use: Use, was: Use | None) -> Finding:
    assert use.target is not None
    detail, status = "; ".join(use.problems), "differs"
    digest = tree.digest(use.target)
    if not use.problems:
        old = None if was is None or was.target is None else base.digest(was.target)
        status = "same" if digest == old else "changed"
        if was is not None and was.name != use.name:
            detail = f"was {was.name}"
        elif was is None:
            detail = "vLLM did not have it before"
    return Finding("override", use.name, status, detail, use.where, digest)


def check(place: Path, base: Path, version: str, ours: Path = ROOT) -> list[Finding]:
    """All findings.

    Args:
        place: the wheel, or the folder that holds ``vllm``.
        base: the folder of the version that our overrides were written for.
        version: of ``place``.
        ours: the folder that holds the package.
    """
    tree = Tree({THEIRS: place, OURS: ours})
    reference = Tree({THEIRS: base, OURS: ours})
    return [
        *check_names(tree, version, DIGESTS),
        *check_functions(tree, "wrapped", WRAPPED, wrap_problem),
        *check_functions(tree, "function", FUNCTIONS, pass_problem),
        *check_attributes(tree, ATTRIBUTES),
        *check_uses(tree, reference, DIGESTS.get(version, {})),
    ]
