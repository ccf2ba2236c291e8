"""Pages that are made from the code: the API by room, the commands, the tables that benchmarks wrote."""

from __future__ import annotations

import ast
import inspect
import json
import re
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
LONGEST_TABLE = 60

# Room, title, and names beside the room's __all__ (which is documented whole).
ROOMS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("anatomy", "Anatomy", ()),
    ("checkpoints", "Checkpoints", ()),
    ("scanning", "Scanning", ()),
    ("imaging", "Imaging", ()),
    ("decomposition", "Decomposition", ()),
    ("networks", "Networks", ("thresholds.fit_mixture",)),
    ("intervention", "Intervention", ("controls.random_masks", "controls.matched_masks")),
    ("pruning", "Pruning", ("criteria.register", "criteria.Criterion", "criteria.Evidence", "criteria.Material")),
    ("evaluation", "Evaluation", ()),
    ("brains", "Brains", ("hrf.double_gamma",)),
    ("comparison", "Comparison", ()),
    ("datasets", "Data sets", ("phantom.Phantom", "abilities.Example")),
    ("plotting", "Figures", ()),
    ("stats", "Statistics", ()),
    ("distributed", "Ranks", ()),
    ("hooks", "Hooks", ()),
    ("page", "Report pages", ()),
    ("reporting", "Report and viewer", ("viewer.serve",)),
    ("study", "Studies", ()),
)  # fmt: skip


def write_all(folder: Path) -> None:
    """Write every made page into `folder`; a page that would stay the same is not touched."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = set()
    for room, title, more in ROOMS:
        page = api_page(room, title, more)
        listed |= {line.strip() for line in page.splitlines() if line.startswith("   llmbrain.")}
        _write(folder / f"{room}.rst", page)
    for stale in folder.glob("llmbrain.*.rst"):  # of a name that is public no more
        if stale.stem not in listed:
            stale.unlink()
    _write(folder / "commands.md", commands_page())
    _write(folder / "results.md", results_page())


def _write(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def api_page(room: str, title: str, more: tuple[str, ...] = ()) -> str:
    """The public names of a room, as an autosummary."""
    module = import_module(f"llmbrain.{room}")
    names = [n for n in getattr(module, "__all__", ()) if n not in more]
    listed = [n for n in [*names, *more] if _is_documented(module, n)]
    described = inspect.getdoc(module) or ""
    first = described.split("\n")[0]
    heading = f"{title}: ``llmbrain.{room}``"
    lines = [heading, "=" * len(heading), "", first, "", ".. autosummary::", "   :toctree: .", "   :nosignatures:", ""]
    return "\n".join([*lines, *(f"   llmbrain.{room}.{n}" for n in listed), ""])


def _is_documented(module: Any, name: str) -> bool:
    """Whether a name has a page here: classes and functions have one, in the room that they are written in."""
    value = module
    for part in name.split("."):
        value = getattr(value, part, None) or import_module(f"{value.__name__}.{part}")
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return False
    home = value.__module__.split(".")[1] if value.__module__.startswith("llmbrain.") else ""
    room = module.__name__.split(".")[1]
    documented = {other for other, _, _ in ROOMS}
    return home == room or home not in documented or name not in import_module(f"llmbrain.{home}").__all__


def commands_page() -> str:
    """What ``--help`` says, of every command."""
    import typer

    from llmbrain.cli import app

    group: Any = typer.main.get_command(app)
    lines = ["# Commands", "", "Every command has `--help`; bad input is one line and exit code 2.", ""]
    for name, command in sorted(group.commands.items()):
        lines += [f"## `llmbrain {name}`", "", (command.help or "").strip(), "", "| | default | |", "|---|---|---|"]
        for option in command.params:
            flags = option.name.upper() if option.param_type_name == "argument" else ", ".join(option.opts)
            value = getattr(option, "default", None)
            plain = isinstance(value, (str, int, float, Path)) and str(value) != ""
            default = f"`{value}`" if plain else ("required" if option.required else "")
            words = (getattr(option, "help", "") or "").replace("|", "\\|")
            lines.append(f"| `{flags}` | {default} | {words} |")
        lines.append("")
    return "\n".join(lines)


def results_page() -> str:
    """What each script in ``benchmarks`` asks, and every table in ``benchmarks/results``: Markdown as it is, JSON rows
    as a table."""
    scripts = {p.stem: p for p in sorted(RESULTS.parent.glob("*.py"))}
    parts = ["# Questions and tables", ""]
    for script in scripts.values():
        described = (ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "").split("\n\n")[0]
        parts += [f"`benchmarks/{script.name}`", f": {' '.join(described.split())}", ""]
    parts += ["Each script says in its first lines how it is run and what is measured; here is what it wrote.", ""]
    written = {p.stem for p in RESULTS.glob("*.md")}
    for file in sorted([*RESULTS.glob("*.md"), *RESULTS.glob("*.json")], key=lambda p: p.stem):
        if file.suffix == ".json" and file.stem in written:
            continue
        maker = max((s for s in scripts if file.stem.startswith(s)), key=len, default=None)
        parts += [f"## {file.stem}", ""] + ([f"`benchmarks/{maker}.py`", ""] if maker else [])
        if file.suffix == ".md":
            parts += [_within_page(file), ""]
            continue
        record = json.loads(file.read_text(encoding="utf-8"))
        tables = {name: rows for name, rows in record.items() if _is_table(rows)} if isinstance(record, dict) else {}
        for name, rows in tables.items():
            parts += [f"### {name}", "", _table(pd.DataFrame(rows)), ""]
    return "\n".join(parts)


def _within_page(file: Path) -> str:
    """Markdown of a result: headings below ours, links to files beside it as words, of long tables the first rows."""
    text = re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:)[^)]*\)", r"\1", file.read_text(encoding="utf-8"))
    lines: list[str] = []
    for is_table, block in groupby(text.splitlines(), key=lambda line: line.startswith("|")):
        rows = [f"##{line}" if line.startswith("#") else line for line in block]
        left_out = len(rows) - LONGEST_TABLE - 2 if is_table else 0  # a head and a rule above the rows
        lines += [*rows[:-left_out], "", f"{left_out} more rows stand in the file."] if left_out > 0 else rows
    return "\n".join(lines)


def escape_learned(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """scikit-learn's names end in an underscore, which in bare text would be a link: escape it."""
    for i, line in enumerate(lines):
        parts = re.split(r"(``.*?``)", line)  # what is between double backticks is shown as it is
        parts[::2] = [re.sub(r"(?<![`\w])(\w+)_(?=[,)])", r"\1\_", part) for part in parts[::2]]
        lines[i] = "".join(parts)


def _is_table(rows: Any) -> bool:
    return isinstance(rows, list) and bool(rows) and all(isinstance(row, dict) for row in rows)


def _table(frame: pd.DataFrame) -> str:
    """A Markdown table; rows that differ by seed alone are averaged, and that is said."""
    frame = frame[[c for c in frame.columns if not frame[c].map(lambda v: isinstance(v, (list, dict))).any()]]
    note = ""
    if "seed" in frame.columns:
        keys = [c for c in frame.columns if c != "seed" and not pd.api.types.is_numeric_dtype(frame[c])]
        seeds = frame["seed"].nunique()
        if keys:
            frame = frame.drop(columns="seed").groupby(keys, sort=False).mean(numeric_only=True).reset_index()
            note = f"Means over {seeds} seeds.\n\n"
    if len(frame) > LONGEST_TABLE:
        note += f"The first {LONGEST_TABLE} of {len(frame)} rows.\n\n"
        frame = frame[:LONGEST_TABLE]
    cells = [[_cell(v) for v in row] for row in frame.itertuples(index=False)]
    head = [str(c).replace("|", "\\|") for c in frame.columns]
    return note + "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *cells])


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
