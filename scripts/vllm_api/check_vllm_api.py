"""Whether a version of vLLM has what the package relies on, from its sources alone.

Nothing of that version is imported or run. It is compared with the installed version,
for which the overrides were written.
"""

import ast
import inspect
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from vllm_names import ATTRIBUTES, CALLED, DIGESTS, MOVED, WRAPPED
from vllm_source import (
    ROOT,
    Sources,
    digest,
    download,
    first_with,
    installed,
    path_of,
    unpack,
)

from pyramid_vllm.tools.provenance import write_report

#: Statuses that break the package, and those that somebody has to read.
ERRORS = ("gone", "differs")
TO_READ = ("unlisted", "changed")
Parameter = inspect.Parameter
_KINDS = {kind.description: kind for kind in inspect._ParameterKind}
_VARIADIC = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Finding:
    """The result for one name."""

    kind: str
    """source, wrapped, called, read, import or override."""
    name: str
    status: str
    """One of ``ERRORS`` or ``TO_READ``; found, same, or read: changed, and known."""
    detail: str = ""
    where: str = ""
    digest: str = ""
    """Of the source in this version."""

    def __str__(self) -> str:
        parts = (self.status, self.kind, self.name, self.digest, self.where)
        return "  ".join(filter(None, (*parts, self.detail)))


def signature(function: Any) -> inspect.Signature:
    """A function's parameters, without ``self`` and ``cls``."""
    parameters = []
    for p in function.parameters:
        made = Parameter(p.name, _KINDS[p.kind.value])
        # griffe gives *args the default ().
        has_default = not p.required and made.kind not in _VARIADIC
        parameters.append(made.replace(default=p.default) if has_default else made)
    is_bound = function.parent.is_class and "staticmethod" not in function.labels
    return inspect.Signature(parameters[is_bound:])


def override_problem(theirs: inspect.Signature, ours: inspect.Signature) -> str:
    """Why callers of ``theirs`` could not call ``ours``; empty if they can."""
    fixed = [p for p in theirs.parameters.values() if p.kind not in _VARIADIC]
    kinds = [p.kind for p in ours.parameters.values()]
    num_positional = sum(kind <= Parameter.POSITIONAL_OR_KEYWORD for kind in kinds)
    if Parameter.VAR_POSITIONAL in kinds:
        num_positional = len(fixed)
    # With *args or **kwargs of theirs, not all arguments are known.
    bind = ours.bind if len(fixed) == len(theirs.parameters) else ours.bind_partial
    for passed in (fixed, [p for p in fixed if p.default is p.empty]):
        positional = [p.name for p in passed if p.kind is not p.KEYWORD_ONLY]
        positional = positional[:num_positional]
        named = {p.name: "" for p in passed if p.name not in positional}
        try:
            arguments = bind(*positional, **named).arguments
        except TypeError as error:
            return f"{error}: vLLM's takes {_shown(theirs)}, ours {_shown(ours)}"
        for name, value in arguments.items():
            if isinstance(value, str) and value and value != name:
                return f"vLLM's parameter {value} is {name} in ours"
    return ""


def call_problem(theirs: inspect.Signature, passed: tuple[str, ...]) -> str:
    """Why parameters could not be passed to a function; empty if they can."""
    named = dict.fromkeys(name for name in passed if name != "*")
    try:
        (theirs.bind_partial if "*" in passed else theirs.bind)(**named)
    except TypeError as error:
        return f"{error}: it takes {_shown(theirs)}"
    return ""


def wrap_problem(theirs: inspect.Signature, taken: tuple[str, ...]) -> str:
    """Why callers could not call a wrapper that takes some parameters."""
    named = [name for name in taken if name != "*"]
    ours = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in named]
    if "*" in taken:
        ours += [Parameter(kind.name, kind) for kind in _VARIADIC]
    return override_problem(theirs, inspect.Signature(ours))


def _shown(parameters: inspect.Signature) -> str:
    return f"({', '.join(parameters.parameters)})"


def check_digests(
    tree: Sources, version: str, digests: dict[str, dict[str, str]]
) -> Iterator[Finding]:
    """Compare names whose sources we have read with their digests in the first
    version."""
    first = next(iter(digests))
    for name, expected in digests[first].items():
        path = name if tree.find(name) else MOVED.get(name, name)
        found = tree.find(path)
        if found is None:
            yield Finding("source", name, "gone", f"it was in {first}")
            continue
        now = digest(found)
        is_read = digests.get(version, {}).get(path) == now
        status = "same" if now == expected else "read" if is_read else "changed"
        yield Finding("source", path, status, digest=now)


def check_tables(tree: Sources) -> Iterator[Finding]:
    """Check what is wrapped, and what is called or read on objects that vLLM passes."""
    tables = (("wrapped", WRAPPED, wrap_problem), ("called", CALLED, call_problem))
    for kind, functions, problem_of in tables:
        for name, parameters in functions.items():
            # A dataclass has no __init__ of its own.
            found = tree.find(name) or tree.find(name.removesuffix(".__init__"))
            problem = ""
            if found is not None and found.is_function:
                problem = problem_of(signature(found), parameters)
            status = "differs" if problem else "found" if found else "gone"
            yield Finding(kind, name, status, problem)
    for owner, names in ATTRIBUTES.items():
        for name in (f"{owner}.{name}" for name in names):
            yield Finding("read", name, "found" if tree.find(name) else "gone")


def imports(tree: Sources, ours: Path) -> Iterator[tuple[str, str]]:
    """What the package imports of vLLM, and reads of such modules and classes.

    Yields:
        vLLM's name, and the module and line of ours.
    """
    for module in _modules(tree, ours):
        nodes = list(ast.walk(ast.parse(module.source)))
        bound: dict[str, str] = {}
        for node in nodes:
            for name, path in _imported(node):
                bound[name] = path
                yield path, f"{module.path}:{node.lineno}"
        for node in nodes:
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                path = bound.get(node.value.id)
                owner = tree.find(path) if path else None
                if owner is not None and (owner.is_class or owner.is_module):
                    yield path_of(owner, node.attr), f"{module.path}:{node.lineno}"


def _imported(node: Any) -> Iterator[tuple[str, str]]:
    """What an import binds of vLLM: our name and vLLM's name."""
    if isinstance(node, ast.ImportFrom | ast.Import):
        module = getattr(node, "module", None)
        for alias in node.names:
            path = f"{module}:{alias.name}" if module else alias.name
            if path.replace(":", ".").split(".")[0] == "vllm":
                yield alias.asname or alias.name, path


def _modules(tree: Sources, ours: Path) -> Iterator[Any]:
    for path in sorted((ours / "pyramid_vllm").rglob("*.py")):
        name = ".".join(path.relative_to(ours).with_suffix("").parts)
        yield tree.module(name.removesuffix(".__init__"))


def inherited(tree: Sources, ours: Path) -> dict[tuple[str, str], tuple[Any, Any]]:
    """What our classes have of vLLM's: overrides, and names read of ``self``.

    Returns:
        By kind and our name, of a mix-in with the class that has it: the member of ours
        and of vLLM; for a name that is read, vLLM's class alone.
    """
    found: dict[tuple[str, str], tuple[Any, Any]] = {}
    for module in _modules(tree, ours):
        for host in module.members.values():
            if host.is_alias or not host.is_class:
                continue
            classes = [host, *host.mro()]
            for i, cls in enumerate(classes):
                bases = list(filter(_is_theirs, classes[i + 1 :]))
                if _is_theirs(cls) or not bases:
                    continue
                suffix = "" if cls is host else f" in {path_of(host)}"
                for name, member in cls.members.items():
                    base = next((base for base in bases if name in base.members), None)
                    if base and _kind(member):
                        key = "override", path_of(cls, name) + suffix
                        found[key] = member, base.members[name]
                for name in _read_of_self(cls):
                    base = first_with(name, classes)
                    if base and _is_theirs(base):
                        found["read", path_of(host, name)] = None, base
    return found


def _is_theirs(found: Any) -> bool:
    return found.path.startswith("vllm.")


def _read_of_self(cls: Any) -> set[str]:
    nodes = [n for n in ast.walk(ast.parse(cls.source)) if isinstance(n, ast.Attribute)]
    owners = ("self", "cls", "super()")
    return {node.attr for node in nodes if ast.unparse(node.value) in owners}


def _kind(member: Any) -> str:
    """How a class's member is looked up; empty for one that only objects have."""
    if member.is_attribute:
        is_of_class = {"property", "class-attribute"} & member.labels
        return "attribute" if is_of_class else ""
    return "".join({"staticmethod", "classmethod"} & member.labels) or "method"


def check_uses(
    tree: Sources, base: Sources, ours: Path, digests: dict[str, str]
) -> Iterator[Finding]:
    """Check the uses that the package's own source shows.

    Args:
        tree: the version in question and the package.
        base: the version that the overrides were written for, and the package.
        ours: where the package lies.
        digests: names whose sources somebody has read, in that version if any.
    """
    for name, where in dict.fromkeys(imports(tree, ours)):
        yield Finding("import", name, "found" if tree.find(name) else "gone", "", where)
    before, now = inherited(base, ours), inherited(tree, ours)
    for kind, where in before | now:
        member, was = before.get((kind, where), (None, None))
        member, theirs = now.get((kind, where), (member, None))
        if theirs is None:
            name = path_of(was) if member else path_of(was, where.rpartition(".")[2])
            yield Finding(kind, name, "gone", "we have it from there", where)
        elif member is None:
            name = path_of(theirs, where.rpartition(".")[2])
            yield Finding(kind, name, "found", "", where)
        else:
            status, detail = _override(tree, member, theirs, was, digests)
            path = path_of(theirs)
            yield Finding(kind, path, status, detail, where, digest(theirs))


def _override(
    tree: Sources, ours: Any, theirs: Any, was: Any, digests: dict[str, str]
) -> tuple[str, str]:
    """An override's status and the reason."""
    detail = "" if was else "vLLM did not have it before"
    if _kind(ours) != (_kind(theirs) or "attribute"):
        return "differs", f"it is a {_kind(theirs)}, our override a {_kind(ours)}"
    if ours.is_function and theirs.is_function:
        if problem := override_problem(signature(theirs), signature(ours)):
            return "differs", problem
        old, new = _shown(signature(was or theirs)), _shown(signature(theirs))
        detail = f"it took {old}, now {new}" if old != new else detail
    name = path_of(theirs)
    listed = {name, name.rpartition(".")[0]} & digests.keys()
    if not listed:
        return "unlisted", "the digests have neither it nor its class"
    if was and digest(was) == digest(theirs):
        return "same", detail
    is_read = any(
        found and digest(found) == digests[each]
        for each in listed
        if (found := tree.find(each))
    )
    return "read" if is_read else "changed", detail


def version_of(tree: Sources) -> str:
    """The version of vLLM.

    Raises:
        SystemExit: there is no vLLM.
    """
    found = tree.find("vllm._version:version")
    if found is None:
        raise SystemExit("no vLLM: valid is a folder, wheel or sdist that has vllm/")
    return str(ast.literal_eval(str(found.value)))


def check(tree: Sources, base: Sources, ours: Path = ROOT) -> list[Finding]:
    """All findings; the arguments are those of ``check_uses``."""
    version = version_of(tree)
    listed = DIGESTS.get(version, DIGESTS[next(iter(DIGESTS))])
    return [
        *check_digests(tree, version, DIGESTS),
        *check_tables(tree),
        *check_uses(tree, base, ours, listed),
    ]


app = typer.Typer(add_completion=False)


@app.command()
def main(
    vllm: Annotated[
        str, typer.Argument(help="A version, as 0.33.0; or a wheel, sdist or folder.")
    ],
    show_all: Annotated[bool, typer.Option("--all", help="Each name found.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Check vLLM's sources; exit status 1 if the package cannot work with them."""
    with tempfile.TemporaryDirectory() as unpacked:
        place = Path(vllm) if Path(vllm).exists() else download(vllm)
        folder = unpack(place, Path(unpacked)) if place.is_file() else place
        tree, base = Sources(folder, ROOT), Sources(installed(), ROOT)
        findings = check(tree, base)
    for status in (*ERRORS, *TO_READ, "read", "same", "found"):
        for finding in findings:
            is_shown = show_all or status in (*ERRORS, *TO_READ) or finding.detail
            if finding.status == status and is_shown:
                print(finding)
    counts = Counter(f"{finding.kind} {finding.status}" for finding in findings)
    print(version_of(tree), *(f"{n} {name}" for name, n in counts.items()), sep=", ")
    if json_file is not None:
        content = {"vllm": version_of(tree), "compared_with": version_of(base)}
        found = {"findings": [asdict(finding) for finding in findings]}
        write_report(json_file, content | found, 0)
    raise typer.Exit(any(finding.status in ERRORS for finding in findings))


if __name__ == "__main__":
    app()
