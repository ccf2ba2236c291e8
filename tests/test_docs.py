"""The pages say what the code says: quoted messages, rooms, commands, benchmarks."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import llmbrain

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    p for p in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")] if not {"_build", "generated"} & set(p.parts)
)
SHORTEST = 10  # characters that a piece of a message needs to tell anything


def strings_of(tree):
    """Every string of a file; what an f-string fills in is a NUL."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(p.value) if isinstance(p, ast.Constant) else "\0" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.fixture(scope="module")
def code():
    files = sorted((ROOT / "llmbrain").rglob("*.py"))
    return "\n".join(text for file in files for text in strings_of(ast.parse(file.read_text(encoding="utf-8"))))


def quoted_messages():
    for line in (ROOT / "docs/errors.md").read_text(encoding="utf-8").splitlines():
        first = line.split(" | ")[0]
        if line.startswith("| ") and first != "| message":
            yield from re.findall(r"`([^`]+)`", first)


def pieces(message):
    """The words between what the code fills in: values (after ``=``), numbers and names."""
    parts = re.split(r"\.\.\.|\w+=(?:'[^']*'|\[[^\]]*\]|\S+)", message)
    return [p for p in (p.strip(" '\":;,.[]()=") for p in parts) if len(p) >= SHORTEST]


@pytest.mark.parametrize("message", list(quoted_messages()))
def test_every_quoted_message_is_in_the_code(message, code):
    assert pieces(message), f"nothing to look for in {message!r}"
    assert [p for p in pieces(message) if p not in code] == []


def test_a_message_that_nobody_writes_is_found_out(code):
    assert pieces("texts=... is far too green for layer ...")[0] not in code


def test_every_public_room_is_in_the_reference():
    index = (ROOT / "docs/api/index.md").read_text(encoding="utf-8")
    for room in llmbrain.ROOMS:
        assert f"generated/{room}\n" in index


def test_every_command_is_named_in_the_readme():
    import typer

    from llmbrain.cli import app

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in typer.main.get_command(app).commands:
        assert f"`{name}`" in readme or f"llmbrain {name}" in readme, name


def test_every_benchmark_and_result_is_on_its_page(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs/_ext"))
    import pages

    page = pages.results_page()
    for script in (ROOT / "benchmarks").glob("*.py"):
        assert f"`benchmarks/{script.name}`\n: " in page, script.name
    for result in (ROOT / "benchmarks/results").iterdir():
        if result.suffix in (".md", ".json"):
            assert f"## {result.stem}\n" in page, result.name


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_and_names_that_pages_show_exist(page):
    from llmbrain.cli import app

    text = page.read_text(encoding="utf-8")
    commands = {c.name or c.callback.__name__ for c in app.registered_commands}
    for name in re.findall(r"(?:`|^    |bin/)llmbrain ([a-z]+)", text, re.MULTILINE):
        assert name in commands, f"llmbrain {name}"
    for name in re.findall(r"\blb\.([A-Za-z_]+)", text):
        assert name in llmbrain.__all__, f"lb.{name}"
    for room, name in re.findall(r"`llmbrain\.([a-z]+)\.([A-Za-z_]+)", text):
        if room in llmbrain.ROOMS:
            assert hasattr(getattr(llmbrain, room), name), f"llmbrain.{room}.{name}"
