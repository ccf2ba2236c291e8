"""The house: layers, circles, front doors, and what CONTRIBUTING says of it. Read from the source, nothing is run."""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llmbrain"
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TOO_LONG = 500  # lines of a file

MOST_ANY = 68
MOST_UNSAID = 70


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def sources() -> dict[str, ast.Module]:
    """Every module of the package, by name."""
    return {name_of(p): ast.parse(p.read_text(encoding="utf-8")) for p in sorted(PACKAGE.rglob("*.py"))}


@cache
def layers() -> dict[str, int]:
    """Rooms and their height, 0 the ground, from the contract in pyproject.toml."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    floors = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    return {room: -i for i, floor in enumerate(floors) for room in re.split(r"\s*[|:]\s*", floor)}


def attached(tree: ast.Module) -> dict[str, list[str]]:
    """Names that `lazy_loader.attach` brings in, by the submodule they come from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "lazy_loader.attach":
            for keyword in node.keywords:
                if keyword.arg == "submod_attrs":
                    return ast.literal_eval(keyword.value)
    return {}


def imports(module: str, tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Modules of the package that a module imports, with the line: at its top, in functions, lazily, by a string."""
    known = sources()
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import in line {node.lineno}"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else str(node.module) for name in names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
            "import_module",
            "__import__",
        ):
            names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        yield from ((name, node.lineno) for name in names if name in known and name != module)
    yield from ((f"{module}.{name}", 0) for name in attached(tree) if f"{module}.{name}" in known)


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_no_room_imports_a_higher_one_not_even_inside_a_function() -> None:
    height = layers()
    upward = [
        f"{module}:{line} imports {other}"
        for module, tree in sources().items()
        if module != "llmbrain"
        for other, line in imports(module, tree)
        if other == "llmbrain" or height[room_of(other)] > height[room_of(module)]
    ]
    assert upward == []


def test_a_hidden_import_is_found() -> None:
    hidden = ast.parse("def f():\n    import_module('llmbrain.cli.common')\n    from llmbrain.pruning import plan")
    assert sorted(imports("llmbrain.stats.nulls", hidden)) == [("llmbrain.cli.common", 2), ("llmbrain.pruning.plan", 3)]


def circles_of(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    return [sorted(c) for c in nx.strongly_connected_components(nx.DiGraph(edges)) if len(c) > 1]


def test_no_circle_of_files() -> None:
    assert circles_of((module, other) for module, tree in sources().items() for other, _ in imports(module, tree)) == []
    assert circles_of([("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")]) == [["a", "b", "c"]]


def public(room: str) -> dict[str, str]:
    """Public names of a room and the modules they come from."""
    tree = sources()[f"llmbrain.{room}"]
    names = {name: f"llmbrain.{room}.{module}" for module, given in attached(tree).items() for name in given}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("llmbrain."):
            names |= {alias.name: str(node.module) for alias in node.names}
    return names


def rooms() -> list[str]:
    return sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py"))


@pytest.mark.parametrize("room", rooms())
def test_every_room_has_a_front_door(room: str) -> None:
    tree = sources()[f"llmbrain.{room}"]
    assigned = {ast.unparse(target) for node in tree.body if isinstance(node, ast.Assign) for target in node.targets}
    assert "__all__" in " ".join(assigned), f"llmbrain/{room}/__init__.py has no __all__"
    assert ast.get_docstring(tree)
    if room not in ("cli", "_files"):
        assert room in layers()


def vague(annotation: ast.expr | None) -> bool:
    """Whether an annotation says `Any` of what is passed (values of a JSON record, and numbers of an array, may be)."""
    if annotation is None:
        return False
    plain = re.sub(r"(dict|Mapping)\[str, Any\]|NDArray\[Any\]", "", ast.unparse(annotation))
    return bool(re.search(r"\bAny\b", plain))


def any_in_signatures() -> list[str]:
    """Parameters and results of public functions and methods that are typed `Any`."""
    found = []
    for room in rooms():
        for name, module in public(room).items():
            for node in sources().get(module, ast.Module([], [])).body:
                if getattr(node, "name", None) != name:
                    continue
                methods = node.body if isinstance(node, ast.ClassDef) else [node]
                for f in methods:
                    if isinstance(f, ast.FunctionDef) and (f.name == "__init__" or not f.name.startswith("_")):
                        arguments = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
                        where = f"{module}.{name}" + (f".{f.name}" if f is not node else "")
                        found += [f"{where}({a.arg})" for a in arguments if vague(a.annotation)]
                        found += [f"{where} ->"] if vague(f.returns) else []
    return found


def test_any_does_not_spread() -> None:
    """`MOST_ANY` is how many there were when it was last counted: lower it, never raise it."""
    found = any_in_signatures()
    assert len(found) <= MOST_ANY, "\n".join(found)


def defined(module: str, name: str) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """A function or class of a module, without its overloads."""
    for node in sources().get(module, ast.Module([], [])).body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name != name:
            continue
        if "overload" not in [ast.unparse(decorator) for decorator in node.decorator_list]:
            yield node


def signatures() -> Iterator[tuple[str, ast.FunctionDef, str]]:
    """Public functions (and ``__init__`` of public classes), with the docstring that speaks for them."""
    for room in rooms():
        for name, module in public(room).items():
            for node in defined(module, name):
                if isinstance(node, ast.FunctionDef):
                    yield f"{module}.{name}", node, ast.get_docstring(node) or ""
                    continue
                for f in node.body:
                    if isinstance(f, ast.FunctionDef) and f.name == "__init__":
                        yield f"{module}.{name}", f, ast.get_docstring(node) or ""


def documented(text: str) -> set[str]:
    """Names of the parameters that a numpydoc docstring describes."""
    found: set[str] = set()
    lines = text.splitlines()
    for i, line in enumerate(lines[1:], 1):
        if set(line) == {"-"} and lines[i - 1] in ("Parameters", "Other Parameters"):
            for entry, below in zip(lines[i + 1 :], [*lines[i + 2 :], ""]):
                if set(below) == {"-"}:  # the next heading
                    break
                if re.match(r"[*\w]", entry):
                    found |= {name.strip().lstrip("*") for name in entry.split(" :")[0].split(",")}
    return found


def parameters(f: ast.FunctionDef) -> list[ast.arg]:
    return [a for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs) if a.arg not in ("self", "cls")]


def test_every_public_name_says_what_it_is() -> None:
    silent = [
        f"{module}.{name}"
        for room in rooms()
        for name, module in public(room).items()
        for node in defined(module, name)
        if not ast.get_docstring(node)
    ]
    assert silent == []


def test_docstrings_describe_parameters() -> None:
    """None that is gone; and those that mean the same everywhere are never left out where others are described.

    `MOST_UNSAID` is how many functions leave out another one: lower it, never raise it.
    """
    gone, shared, unsaid = [], [], []
    for where, f, text in signatures():
        has, said = {a.arg for a in parameters(f)}, documented(text)
        extra = {a.arg for a in (f.args.vararg, f.args.kwarg) if a}
        gone += [f"{where}({name})" for name in said - has - extra if name.isidentifier()]
        shared += [f"{where}({name})" for name in (has - said) & {"random_state", "progress"} if said]
        inner = where.startswith(("llmbrain._files.", "llmbrain.cli."))
        unsaid += [where] if has - said and not inner else []
    assert gone == []
    assert shared == []
    assert len(unsaid) <= MOST_UNSAID, "\n".join(unsaid)


def test_random_state_takes_none_everywhere() -> None:
    assert [
        where
        for where, f, _ in signatures()
        for a in parameters(f)
        if a.arg == "random_state" and "None" not in ast.unparse(a.annotation or ast.Constant(0))
    ] == []


def test_files_are_short() -> None:
    long = {name_of(p): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text("utf-8").splitlines())) > TOO_LONG}
    assert long == {}


def section(title: str) -> str:
    match = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", CONTRIBUTING, re.MULTILINE | re.DOTALL)
    assert match, f"CONTRIBUTING.md has no section {title!r}"
    return match.group(1)


def test_the_rooms_of_contributing_are_those_of_the_package() -> None:
    listed = re.findall(r"^\| `([a-z_]+)/?(?:\.py)?`", section("Architecture: the rooms"), re.MULTILINE)
    assert sorted(listed) == sorted(set(layers()) - {"__main__"})
    assert sorted(listed, key=lambda room: layers()[room]) == listed, "from the ground up"


def test_the_files_of_the_ten_changes_exist() -> None:
    rows = re.findall(r"^\| (a new .+?) \| (.+) \|$", section("Where a change goes"), re.MULTILINE)
    assert len(rows) == 10
    for change, where in rows:
        paths = re.findall(r"`(llmbrain/[\w/.]+)`", where)
        assert paths, change
        for path in paths:
            assert (ROOT / path).exists(), f"{change}: {path}"


def test_the_way_of_an_activation_enters_no_room_twice() -> None:
    steps = re.findall(r"^\d+\. `([\w.]+)`", section("The way of an activation"), re.MULTILINE)
    assert len(steps) >= 8
    visited: list[str] = []
    for step in steps:
        room = step.split(".")[0]
        if not visited or visited[-1] != room:
            assert room not in visited or room == "scanning", f"{step}: {room} is entered twice"
            visited.append(room)
        parts = ["llmbrain", *step.split(".")]
        module = max((".".join(parts[:i]) for i in range(2, len(parts)) if ".".join(parts[:i]) in sources()), key=len)
        value: object = importlib.import_module(module)
        for part in step.split(".")[module.count(".") :]:
            value = getattr(value, part)
        assert callable(value), step
