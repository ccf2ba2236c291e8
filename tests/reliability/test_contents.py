"""A folder holds one thing: a second, different command into it is refused, at once or afterwards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from cli_calls import call
from reliability import campaign
from tiny_models import tiny, tiny_tokenizer

import llmbrain as lb
from llmbrain import InputError
from llmbrain._files import BusyError, owner, read_json, transaction, write_json, writing
from llmbrain._files.contents import MARKS
from llmbrain.checkpoints import export_onnx
from llmbrain.intervention import lesion_table
from llmbrain.study import Study, smaller
from llmbrain.study.again import making
from llmbrain.study.folder import claim

TEXT = "hello there, how are you? the quick brown fox jumps. " * 8


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its text, with a study of it beside them."""
    folder = tmp_path_factory.mktemp("contents")
    tiny("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    campaign.make(folder / "study")
    return folder


def save(folder: Path) -> None:
    lb.save_pruned(tiny("llama"), None, folder, overwrite=True)


def save_by_part(folder: Path) -> None:
    plan = lb.plan_pruning(tiny("llama"), ratio=0.3, method="magnitude")
    lb.prune_offloaded(tiny("llama"), plan, folder, overwrite=True)


def scan(folder: Path) -> None:
    lb.scan(tiny("llama"), tiny_tokenizer(), campaign.TEXTS, out=folder, block_size=32)


def lesions(folder: Path) -> None:
    sets = {"a": np.arange(48) < 5}
    lesion_table(tiny("llama"), sets, {"x": [TEXT]}, tokenizer=tiny_tokenizer(), n_random=1, out=folder,
                 max_windows=1, progress=False)  # fmt: skip


def dualreg(folder: Path) -> None:
    rng = np.random.default_rng(0)
    lb.dual_regression(rng.standard_normal((2, 9)), [rng.standard_normal((20, 9))], out=folder, progress=False)


def study(folder: Path) -> None:
    with claim(folder, {"n": 1}, overwrite=True):
        pass


WRITERS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "save_pruned": (save, ("a model",)),
    "prune_offloaded": (save_by_part, ("a model",)),
    "scan": (scan, ("a scan",)),
    "lesion": (lesions, ("lesions",)),
    "dualreg": (dualreg, ("a dual regression",)),
    "run": (study, ("a study", "networks", "an ICA", "a comparison")),
    "export": (lambda folder: export_onnx(tiny("llama"), None, folder, overwrite=True), ("an ONNX graph",)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_no_writer_takes_the_folder_of_something_else(name: str, tmp_path: Path) -> None:
    write, own = WRITERS[name]
    if name == "export":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    for mark, kind in MARKS.items():
        if kind in own or (name == "export" and mark == "config.json"):
            continue
        folder = tmp_path / mark.replace(".", "-")
        write_json(folder / mark, {"format": "llmbrain-scan"})
        before = campaign.keep(folder)
        with pytest.raises(InputError, match=rf"holds {kind} already \({mark}\), and a folder holds one thing"):
            write(folder)
        assert campaign.keep(folder) == before


def test_a_manifest_of_others_is_no_scan(tmp_path: Path) -> None:
    write_json(tmp_path / "manifest.json", {"name": "an app"})
    save(tmp_path)
    assert (tmp_path / "config.json").is_file()


@pytest.mark.parametrize("words", [
    ("prune", "MODEL", "--text", "TEXT", "--method", "magnitude"),
    ("recover", "MODEL", "--text", "TEXT", "--steps", 1),
    ("export", "MODEL", "--format", "onnx"),
    ("scan", "MODEL", "--text", "TEXT"),
    ("networks", "STUDY"),
    ("lesion", "MODEL", "--text", "TEXT", "--networks", "STUDY"),
    ("dualreg", "STUDY"),
], ids=lambda words: words[0])  # fmt: skip
def test_commands_say_so_in_one_line(words, made: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Into the folder of a model, whose study is another; with `--overwrite` as well, where there is one."""
    places = {"MODEL": made / "model", "TEXT": made / "text.txt", "STUDY": made / "study"}
    target = tmp_path / "target"
    write_json(target / "study.json", {"n": 1})
    write_json(target / "lesions.json", {"n": 1})
    before = campaign.keep(target)
    for more in ([], ["--overwrite"]) if words[0] in ("prune", "recover", "export") else ([],):
        code, _, said = call(monkeypatch, capsys, *(places.get(w, w) for w in words), "--out", target, *more)
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert (code, len(errors)) == (2, 1), said
        assert "a folder holds one thing" in errors[0]
        assert campaign.keep(target) == before


def test_the_plan_of_a_study_is_not_replaced(made: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "study.json", {"n": 1})
    write_json(tmp_path / "plan.json", {"n": 1})
    with pytest.raises(InputError, match=r"says what was cut in the study .*: give another name"):
        smaller.plan(tiny("llama"), None, out=tmp_path / "plan.json", method="magnitude", progress=False)
    assert read_json(tmp_path / "plan.json") == {"n": 1}


def test_a_study_has_one_smaller_model(tmp_path: Path) -> None:
    write_json(tmp_path / "study.json", {"n": 1})
    (tmp_path / "pruned.gguf").touch()
    with (
        pytest.raises(InputError, match=r"has a smaller model already, pruned\.gguf"),
        making(tmp_path / "pruned", True),
    ):
        raise AssertionError
    (tmp_path / "pruned.gguf").unlink()
    write_json(tmp_path / "pruned" / "config.json", {})
    with pytest.raises(InputError, match="has a smaller model already, pruned: "):
        smaller.cut(tiny("llama"), None, out=tmp_path / "pruned.gguf", format="gguf", overwrite=True, progress=False)
    assert Study(tmp_path).has("pruned")


# -- at once -----------------------------------------------------------------------------------------------------------


@contextmanager
def another_process(folder: Path) -> Iterator[None]:
    """A process that owns a folder while the block runs."""
    (here, there), (stop, end) = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        try:
            with owner(folder, "llmbrain run"):
                os.write(there, b"!")
                os.close(end)
                os.read(stop, 1)
        finally:
            os._exit(0)
    os.close(stop)
    try:
        assert os.read(here, 1)
        yield
    finally:
        os.close(end)
        os.waitpid(child, 0)
        os.close(here)
        os.close(there)


def test_two_different_commands_at_once(made: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """`prune` into the folder that `run` has just begun; and what was computed before it is not put there."""
    target = tmp_path / "target"
    words = ["prune", made / "model", "--text", made / "text.txt", "--method", "magnitude", "--out", target]
    with another_process(target):
        code, _, said = call(monkeypatch, capsys, *words)
        assert code == 2
        assert "is in use by process" in said
        assert "(llmbrain run)" in said
        with pytest.raises(BusyError, match="is in use by process"):
            save(target)
        assert not (target / "config.json").exists()
    assert not target.exists()


def test_what_was_there_sooner_stays(tmp_path: Path) -> None:
    """Another process is faster: after the folder was looked at, before the model is whole."""
    target = tmp_path / "target"
    for name, said in (("study.json", "holds a study already"), ("config.json", "another process was faster")):
        with pytest.raises(InputError, match=said):
            lb.save_pruned(
                tiny("llama"), None, target, beside=lambda _, name=name: write_json(target / name, {"n": 1})
            )  # fmt: skip
        assert [path.name for path in target.iterdir()] == [name]
        (target / name).unlink()
        target.rmdir()
    save(target)
    lb.load_pruned(target)


def write_after(path: Path, other: Callable[[], object]) -> None:
    with writing(path, fresh=True) as mine:
        mine.write_text("mine")
        other()


@pytest.mark.parametrize("listed", [False, True])
def test_a_fresh_file_replaces_none(listed: bool, tmp_path: Path, monkeypatch) -> None:
    if listed:
        with transaction(tmp_path) as new:
            (new / "other").touch()
    path = tmp_path / "small.gguf"
    for links in (True, False):
        if not links:  # a disk without them
            monkeypatch.setattr(os, "link", Mock(side_effect=PermissionError))
        with pytest.raises(FileExistsError, match="another process was faster"):
            write_after(path, lambda: path.write_text("theirs"))
        assert path.read_text() == "theirs"
        path.unlink()
        write_after(path, lambda: None)
        assert path.read_text() == "mine"
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".tmp")]
        path.unlink()


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path: Path) -> None:
    def fail() -> None:
        with making(tmp_path / "a", False):
            assert (tmp_path / "a").is_dir()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list(tmp_path.iterdir())
    (tmp_path / "b").mkdir()
    with making(tmp_path / "b", False):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
