"""`llmbrain._files`: whole or absent, old or new, damaged or not."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from llmbrain import _files as files
from llmbrain._files import DamagedError, FileError, sets
from llmbrain._validation import InputError


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def save(folder: Path, value: int, extra: bool = False) -> None:
    with files.transaction(folder, replaces=["net.*"]) as new:
        files.write_json(new / "net.json", {"value": value})
        files.write_tensors(new / "net.safetensors", {"a": np.full(3, value)})
        if extra:
            files.write_text(new / "net.extra", "more")


def load(folder: Path) -> int:
    with files.reading(folder) as stored:
        value = stored.json("net.json")["value"]
        assert (stored.tensors("net.safetensors")["a"] == value).all()
    return value


def test_one_file_is_whole_or_as_before(tmp_path: Path) -> None:
    path = files.write_text(tmp_path / "deep" / "a.txt", "old")
    with pytest.raises(RuntimeError), files.writing(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise RuntimeError
    assert contents(tmp_path) == {"deep/a.txt": b"old"}


def test_kinds_of_files(tmp_path: Path) -> None:
    frame = pd.DataFrame({"a": [1, 2]})
    assert files.write_table(tmp_path / "a.tsv", frame).read_bytes() == b"a\n1\n2\n"
    assert files.write_table(tmp_path / "b.csv", frame.assign(b=3)).read_bytes() == b"a,b\n1,3\n2,3\n"
    assert json.loads(files.write_json(tmp_path / "c.json", {"x": np.float32(0.5), "p": tmp_path}).read_text()) == {
        "x": 0.5, "p": str(tmp_path)}  # fmt: skip
    assert sorted(contents(tmp_path)) == ["a.tsv", "b.csv", "c.json"]


def test_a_set_replaces_what_it_is_told_and_keeps_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    save(folder, 1, extra=True)
    (folder / "mine.txt").write_text("mine")
    files.write_text(folder / "late.txt", "late")  # joins the checksums of its folder
    save(folder, 2)
    assert load(folder) == 2
    assert sorted(contents(folder)) == ["SHA256SUMS", "late.txt", "mine.txt", "net.json", "net.safetensors"]
    assert "late.txt" in (folder / "SHA256SUMS").read_text()
    assert files.damages(folder) == {}
    files.discard(folder, ["*"])
    assert contents(folder) == {}


def test_an_error_leaves_the_old_set(tmp_path: Path) -> None:
    save(tmp_path / "set", 1)
    before = contents(tmp_path)
    with pytest.raises(RuntimeError), files.transaction(tmp_path / "set") as new:  # noqa: PT012
        files.write_text(new / "net.json", "half")
        raise RuntimeError
    assert contents(tmp_path) == before


EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir")


def killed_at(n: int, folder: Path, work: Callable[[], None]) -> bool:
    """Run `work` in a child that is killed when it touches `folder` for the n-th time; False if it ended before."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = iter(range(n))

    def count(event: str, args: tuple[object, ...]) -> None:
        if event in EVENTS and str(folder) in str(args) and next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    try:
        work()
    finally:
        os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_any_event(tmp_path: Path) -> None:
    """kill -9 at the n-th time that a file is opened, renamed or removed: the old set or the new one."""
    seen = set()
    for event in range(200):
        folder = tmp_path / f"{event}" / "set"
        save(folder, 1, extra=True)
        killed = killed_at(event, folder.parent, lambda folder=folder: save(folder, 2))
        value = load(folder)
        assert files.damages(folder) == {}
        assert ("net.extra" in contents(folder)) == (value == 1)
        save(folder, 3)
        assert load(folder) == 3
        assert sorted(p.name for p in folder.iterdir()) == ["SHA256SUMS", "net.json", "net.safetensors"]
        seen.add(value)
        if not killed:
            break
    assert seen == {1, 2}
    assert event > 20


@pytest.mark.parametrize("stop", range(1, 6))
def test_interrupted_moves_are_finished_by_the_reader(tmp_path: Path, monkeypatch, stop: int) -> None:
    folder = tmp_path / "set"
    save(folder, 1, extra=True)
    left = iter(range(stop))
    replace = Path.replace

    def breaking(self: Path, target: Path) -> Path:
        if next(left, None) is None and ".llmbrain-commit" in str(self):
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", breaking)
    try:
        save(folder, 2)
    except KeyboardInterrupt:
        assert (folder / sets.COMMIT).is_dir()
    monkeypatch.undo()
    assert load(folder) == 2
    assert not (folder / sets.COMMIT).exists()
    assert files.damages(folder) == {}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EFBIG, errno.ENOENT])
def test_what_the_disk_says_is_one_line(tmp_path: Path, monkeypatch, code: int) -> None:
    save(tmp_path / "set", 1)
    before = contents(tmp_path)

    def full(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    for write in (
        lambda: save(tmp_path / "set", 2), lambda: save(tmp_path / "new", 2),
        lambda: files.write_text(tmp_path / "x.txt", "x"),
    ):  # fmt: skip
        with pytest.raises(FileError, match=r"cannot be written: ") as caught:
            write()
        assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before


def test_space_is_checked_before(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"needs 1e\+06 TB, but only .* are free"), files.transaction(
        tmp_path / "set", needed=10**18
    ):  # fmt: skip
        raise AssertionError
    assert contents(tmp_path) == {}


def test_a_folder_that_vanishes_is_an_error(tmp_path: Path) -> None:
    import shutil

    save(tmp_path / "set", 1)
    with pytest.raises(FileError, match="gone"), files.transaction(tmp_path / "set") as new:  # noqa: PT012
        files.write_text(new / "a", "a")
        shutil.rmtree(tmp_path / "set")
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("name", ["net.json", "net.safetensors", "SHA256SUMS"])
def test_every_flip_and_cut_is_found(tmp_path: Path, name: str) -> None:
    save(tmp_path / "set", 1)
    path = tmp_path / "set" / name
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.integers(len(whole) * 8, size=40):
        broken = bytearray(whole)
        broken[at // 8] ^= 1 << (at % 8)
        path.write_bytes(broken)
        with pytest.raises(DamagedError, match=name if name != "SHA256SUMS" else "set"):
            load(tmp_path / "set")
    for length in rng.integers(len(whole) - 1, size=10):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedError):
            load(tmp_path / "set")
    assert files.damages(tmp_path / "set")
    path.write_bytes(whole)
    assert load(tmp_path / "set") == 1


def test_a_sealed_record_tells_every_change(tmp_path: Path) -> None:
    record = {"kept": [1, 2.5e-7, float("nan")], "name": "caf\u00e9 \ud800", "n": 3}
    path = files.write_json(tmp_path / "plan.json", record, seal=True)
    assert str(files.read_json(path)) == str(record)
    whole = path.read_bytes()
    for at in range(len(whole) * 8):
        broken = bytearray(whole)
        broken[at // 8] ^= 1 << (at % 8)
        path.write_bytes(broken)
        try:
            found = files.read_json(path)
        except DamagedError:
            continue
        assert {k: str(v) for k, v in found.items() if k in record} == {k: str(v) for k, v in record.items()}


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "not JSON"), (b"\xff\xfe", "not UTF-8"), (b"[1]", "holds a list"), (b"[" * 10**5, "not JSON"),
     (b'{"format": "x"}', "has format 'x'"), (b'{"format": "f", "format_version": 9}', "update llmbrain"),
     (b'{"a": ' + b"9" * 5000 + b"}", "not JSON")],
)  # fmt: skip
def test_what_is_no_record(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        files.read_json(tmp_path / "a.json", format="f", version=1, anew="make it again")
    assert str(tmp_path / "a.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_leftovers_of_dead_processes_go(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    host = files.parts.HOST
    (tmp_path / f".tmp-{host}-{int(dead.stdout)}-0-a.txt").write_text("half")
    (tmp_path / f".tmp-{host}-{os.getppid()}-0-a.txt").write_text("alive")
    files.write_text(tmp_path / "a.txt", "a")
    assert sorted(contents(tmp_path)) == [f".tmp-{host}-{os.getppid()}-0-a.txt", "a.txt"]


def test_a_foreign_list_of_checksums_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_text("not ours\n")
    files.write_text(tmp_path / "a.txt", "a")
    assert (tmp_path / "SHA256SUMS").read_text() == "not ours\n"


def test_the_fast_checksum_tells_every_change(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = rng.integers(256, size=3 * 4096 + 77, dtype=np.uint8)
    path = tmp_path / "a.bin"
    path.write_bytes(whole.tobytes())
    right = files.file_pages(path)
    assert files.file_pages(path) == right
    assert files.file_pages(path, slice(10, 20)) != right
    pages = whole[: 3 * 4096].reshape(3, 4096)
    changed = [
        whole[:-1], np.append(whole, np.uint8(0)), np.append(pages[[1, 0, 2]].ravel(), whole[-77:]),
        np.append(pages * np.array([[1], [0], [1]], np.uint8), whole[-77:]), whole[4096:],
    ]  # fmt: skip
    for at in rng.integers(len(whole) * 8, size=300):
        flipped = whole.copy()
        flipped[at // 8] ^= 1 << (at % 8)
        changed.append(flipped)
    for content in changed:
        path.write_bytes(content.tobytes())
        assert files.file_pages(path) != right
    path.write_bytes(b"")
    assert files.file_pages(path) != right


def test_large_files_are_read_by_the_fast_checksum_and_checked_by_sha256(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("llmbrain._files.digests.LARGE", 1)
    save(tmp_path / "set", 1)
    sums = (tmp_path / "set" / "SHA256SUMS").read_text()
    assert sums.count("# pages ") == 2
    tool = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=tmp_path / "set", capture_output=True, check=False)
    assert tool.returncode == 0, tool.stderr
    asked = []
    monkeypatch.setattr("llmbrain._files.digests.file_sha256", lambda path: asked.append(path) or "")
    assert load(tmp_path / "set") == 1
    assert asked == []
    monkeypatch.undo()
    assert files.damages(tmp_path / "set") == {}
    line = next(line for line in sums.splitlines() if line.startswith("# pages") and line.endswith("net.json"))
    (tmp_path / "set" / "SHA256SUMS").write_text(sums.replace(line, line.replace(line[8:12], "0000")))
    assert load(tmp_path / "set") == 1  # SHA-256 decides
    assert files.damages(tmp_path / "set") == {"SHA256SUMS": "has a damaged line: the fast checksum of net.json"}
    path = tmp_path / "set" / "net.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DamagedError, match=r"net\.safetensors does not match"):
        load(tmp_path / "set")


@pytest.mark.parametrize("said", ['["../other"]', '["/tmp/llmbrain-other"]', "[1]", "{", "[" * 5000])
def test_a_damaged_list_of_what_goes(tmp_path: Path, said: str) -> None:
    folder = tmp_path / "set"
    save(folder, 1)
    (tmp_path / "other").touch()
    (folder / sets.COMMIT).mkdir()
    (folder / sets.COMMIT / sets._REMOVED).write_text(said)
    with pytest.raises(InputError, match="list of files that a save replaces"):
        load(folder)
    assert (tmp_path / "other").exists()
    shutil.rmtree(folder / sets.COMMIT)  # as it says
    assert load(folder) == 1
