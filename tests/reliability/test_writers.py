"""Nothing is written past `llmbrain._files`."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "llmbrain"
WRITES = {"write_text", "write_bytes", "to_csv", "savefig", "to_filename", "save_file", "savetxt", "save_pretrained",
          "open_memmap"}  # fmt: skip
THROUGH = {"writing", "transaction"}


def calls(tree: ast.AST, within: bool = False):
    """Every call, and whether it stands in a ``with`` of `THROUGH`."""
    for node in ast.iter_child_nodes(tree):
        inside = within
        if isinstance(node, ast.With):
            names = {n.id for i in node.items for n in ast.walk(i.context_expr) if isinstance(n, ast.Name)}
            inside = within or bool(THROUGH & names)
        if isinstance(node, ast.Call):
            yield node, within
        yield from calls(node, inside)


def writes(call: ast.Call) -> str:
    """What a call writes with, or nothing."""
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    owner = getattr(getattr(function, "value", None), "id", "")
    modes = [a.value for a in (*call.args, *(k.value for k in call.keywords)) if isinstance(a, ast.Constant)]
    if name == "open" and any(isinstance(m, str) and set(m) <= set("wxabt+") and set(m) & set("wxa") for m in modes):
        return "open"
    if name in ("save", "savez") and owner in ("np", "numpy", "nib", "nibabel", "torch"):
        return f"{owner}.{name}"
    return name if name in WRITES else ""


def test_every_writer_goes_through_files() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent.name == "_files":
            continue
        names = {a.asname or a.name for n in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                 if isinstance(n, ast.ImportFrom) and n.module == "llmbrain._files" for a in n.names}  # fmt: skip
        for call, within in calls(ast.parse(path.read_text(encoding="utf-8"))):
            how = writes(call)
            if how and how not in names and not within:
                found.append(f"{path.relative_to(PACKAGE)}:{call.lineno}: {how}")
    # a figure as text of a page, in memory; a model into the folder of its caller's transaction; a log, which grows
    allowed = ("page/report.py", "checkpoints/saving.py", "checkpoints/parts.py", "_progress.py")
    assert not [line for line in found if not line.startswith(allowed)]
