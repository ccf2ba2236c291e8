"""A scan that several processes share: the same files, to the bit, whoever was killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rank_jobs import TEXTS, ended, results, small_scan, start
from tiny_models import tiny, tiny_tokenizer

import llmbrain as lb
from llmbrain._files import BusyError, owner
from llmbrain.scanning import CorruptStoreError, schedule, taking
from llmbrain.scanning.store import FileShards


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "SHARD_BYTES", 4000)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a single process writes."""
    before = schedule.SHARD_BYTES
    folder = tmp_path_factory.mktemp("whole") / "study"
    try:
        small_scan(folder)
    finally:
        schedule.SHARD_BYTES = before
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def scan_as(out: Path, rank: int, of: int, **options: Any) -> list[lb.Scan]:
    with taking(rank, of):
        return small_scan(out, **options)


# -- ranks that do not talk --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("of", "order"), [(2, (1, 0)), (3, (2, 0, 1)), (9, tuple(range(9)))])
def test_ranks_of_an_array_write_one_study(tmp_path: Path, whole: Path, of: int, order: tuple[int, ...]) -> None:
    for rank in order[:-1]:
        scan_as(tmp_path, rank, of)
        if of == 9 and rank == 4:  # there are five shards: nothing is left to do
            break
        with pytest.raises(CorruptStoreError, match=rf"still to be made \(those of ranks? [\d, ]+ of {of}\)"):
            lb.load_scans(tmp_path)
    scan_as(tmp_path, order[-1], of)
    assert contents(tmp_path) == contents(whole)


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    for rank in (0, 1, 3):
        scan_as(tmp_path, rank, 4)
    with pytest.raises(CorruptStoreError, match=r"\(those of rank 2 of 4\)"):
        lb.load_scans(tmp_path)


def test_a_killed_job_of_an_array_goes_on(tmp_path: Path, whole: Path) -> None:
    """Folders apart, as on machines without a common disk: rank 0 is killed, started again, and joined to rank 1."""
    parts = [tmp_path / "part-0", tmp_path / "part-1"]
    ((code, _, _),) = ended(start(1, "killed_share", parts[0]))
    assert code == -9
    made = contents(parts[0] / "shards")
    assert len(made) == 1
    scan_as(parts[1], 1, 2)
    with pytest.raises(lb.InputError, match=r"\(those of rank 0 of 2\)"):
        lb.merge(parts, tmp_path / "study")
    scan_as(parts[0], 0, 2)
    assert {name: contents(parts[0] / "shards")[name] for name in made} == made
    lb.merge(parts, tmp_path / "study")
    assert contents(tmp_path / "study") == contents(whole)


@pytest.mark.parametrize("then", [None, (0, 2), (1, 2)])
def test_another_number_of_ranks_goes_on(tmp_path: Path, whole: Path, then: tuple[int, int] | None) -> None:
    scan_as(tmp_path, 1, 3)
    (tmp_path / "shards/0001.safetensors").write_bytes(b"damaged")
    if then is None:
        with pytest.warns(UserWarning, match="made anew"):
            small_scan(tmp_path)
    else:
        scan_as(tmp_path, then[0], then[1])
        with pytest.warns(UserWarning, match="made anew") if then[0] == 0 else _nothing():
            scan_as(tmp_path, 1 - then[0], 2)
    assert contents(tmp_path) == contents(whole)


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def test_ranks_read_alike(tmp_path: Path) -> None:
    scan_as(tmp_path, 0, 2)
    with pytest.raises(lb.InputError, match="batch_size=5, but the ranks that wrote there had 4"):
        scan_as(tmp_path, 1, 2, batch_size=5)
    with pytest.raises(lb.InputError, match="already holds another study: its runs_sha256"):
        scan_as(tmp_path, 1, 2, texts=TEXTS[:-1])
    with pytest.raises(lb.InputError, match="already holds another study: its weights_sum"):
        scan_as(tmp_path, 1, 2, seed=3)


def test_ranks_that_begin_at_the_same_time_read_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 begins before rank 0 has written a shard, with another batch size: one of them stops."""
    write, begun = FileShards.write, []

    def begins(self: FileShards, index: int, tensors: Any) -> None:
        if not begun:
            begun.append(index)
            scan_as(tmp_path, 1, 2, batch_size=5)
        write(self, index, tensors)

    monkeypatch.setattr(FileShards, "write", begins)
    with pytest.raises(lb.InputError, match="batch_size=4, but the ranks that wrote there had 5"):
        scan_as(tmp_path, 0, 2)
    monkeypatch.undo()
    with pytest.raises(lb.InputError, match="batch_size=4, but the ranks that wrote there had 5"):
        scan_as(tmp_path, 2, 3)  # of another number, too
    with pytest.raises(lb.InputError, match="batch_size=4, but the ranks that wrote there had 5"):
        small_scan(tmp_path)


def test_a_mixture_of_experts_is_shared_too(tmp_path: Path) -> None:
    how = {"site": ("neuron", "router"), "run_length": 9}
    model = tiny("mixtral")
    for rank in (None, 0, 1):
        with taking(rank, 2) if rank is not None else _nothing():
            out = tmp_path / ("one" if rank is None else "two")
            lb.scan(model, tiny_tokenizer(), TEXTS, out=out, batch_size=2, **how)
    assert len(list((tmp_path / "one/shards").iterdir())) > 2
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize(("rank", "of"), [(2, 2), (-1, 2), (0, 0), (1.5, 2)])
def test_no_such_rank(tmp_path: Path, rank: Any, of: Any) -> None:
    with pytest.raises(lb.InputError, match=r"rank=|of="):
        scan_as(tmp_path, rank, of)


def test_ranks_of_one_job_own_a_folder_together(tmp_path: Path) -> None:
    """In one process a folder is owned several times over: another process is a copy of the lock's file."""
    from llmbrain._files import owner as module

    held = __import__("sys").modules[module.__module__]
    with owner(tmp_path, among=2):
        held._held.clear()  # as another process sees it
        with owner(tmp_path, among=2):
            pass
        with pytest.raises(BusyError, match="one of 2 ranks, and this is one of 3"), owner(tmp_path, among=3):
            pass
        with pytest.raises(BusyError, match="in use by process"), owner(tmp_path):
            pass
        held._held[tmp_path.resolve()] = 1
    with owner(tmp_path):
        held._held.clear()
        with pytest.raises(BusyError, match="in use by process"), owner(tmp_path, among=2):
            pass
        held._held[tmp_path.resolve()] = 1
    assert list(tmp_path.iterdir()) == []


# -- folders of several machines ---------------------------------------------------------------------------------------


def test_merge(tmp_path: Path, whole: Path) -> None:
    parts = [tmp_path / f"part-{rank}" for rank in range(3)]
    for rank in (0, 1):
        scan_as(parts[rank], rank, 3)
    with pytest.raises(lb.InputError, match=r"lack \d of \d shards \(those of rank 2 of 3\)"):
        lb.merge(parts[:2], tmp_path / "study")
    assert not (tmp_path / "study").exists()
    scan_as(parts[2], 2, 3)
    before = [contents(part) for part in parts]
    scans = lb.merge(parts[::-1], tmp_path / "study")
    assert contents(tmp_path / "study") == contents(whole)
    assert [s.name for s in scans] == [s.name for s in lb.load_scans(whole)]
    assert [contents(part) for part in parts] == before
    (tmp_path / "study/shards/0002.safetensors").unlink()  # begun already
    lb.merge(parts, tmp_path / "study")
    assert contents(tmp_path / "study") == contents(whole)
    lb.merge([parts[1], parts[2], parts[0]], parts[0])  # into one of them
    assert contents(parts[0]) == contents(whole)


def test_merge_refuses_what_does_not_belong_together(tmp_path: Path) -> None:
    scan_as(tmp_path / "a", 0, 2)
    scan_as(tmp_path / "b", 1, 2, texts=TEXTS[:-1])
    scan_as(tmp_path / "c", 1, 2, batch_size=2)
    scan_as(tmp_path / "d", 1, 2)
    out = tmp_path / "study"
    with pytest.raises(lb.InputError, match=r"holds another study than .*a: its runs_sha256 is"):
        lb.merge([tmp_path / "a", tmp_path / "b"], out)
    with pytest.raises(lb.InputError, match="was cut into other shards than"):
        lb.merge([tmp_path / "a", tmp_path / "c"], out)
    with pytest.raises(lb.InputError, match="folders is empty"):
        lb.merge([], out)
    with pytest.raises(lb.InputError, match="holds no scan"):
        lb.merge([tmp_path / "a", tmp_path], out)
    scan_as(tmp_path / "e", 1, 2, verify=False)
    with pytest.raises(
        lb.InputError, match=r"e was scanned with verify=False, .*a with True: all ranks must read alike"
    ):
        lb.merge([tmp_path / "a", tmp_path / "e"], out)
    shard = tmp_path / "d/shards/0001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x00")
    with pytest.raises(CorruptStoreError, match=r"0001\.safetensors does not match its checksum"):
        lb.merge([tmp_path / "a", tmp_path / "d"], out)


def test_merge_refuses_shards_that_differ(tmp_path: Path) -> None:
    scan_as(tmp_path / "a", 0, 1)
    scan_as(tmp_path / "b", 0, 2)
    sums = tmp_path / "b/ranks/0-of-2/SHA256SUMS"
    sums.write_text("0" * 64 + sums.read_text()[64:])
    with pytest.raises(lb.InputError, match="differ: the same text gave other numbers there"):
        lb.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "study")


# -- a process group ---------------------------------------------------------------------------------------------------


def test_a_process_group_shares_a_scan(tmp_path: Path, whole: Path) -> None:
    """Two processes: the same study, and one clear error on both where they were given different things."""
    zero, one = results(2, "scan", tmp_path)
    assert contents(tmp_path / "study") == contents(whole)
    scans = lb.load_scans(whole)
    for found in (zero, one):
        assert found["tokens"] == sum(s.n_tokens for s in scans)
        assert found["read"] == sum(float(s.data().sum()) for s in scans)
        assert found["again"] == found["alone"] == len(TEXTS)
    for what, message in {
        "texts": "scan: rank 1 of 2 was given other runs_sha256 than rank 0",
        "model": "scan: rank 1 of 2 was given other weights_sum than rank 0",
        "batch": "scan: rank 1 of 2 was given other batch_size than rank 0 (5, not 4): all ranks must",
    }.items():
        assert zero[what] == one[what]
        assert zero[what].startswith(message), zero[what]
    assert one["failed"].startswith("block_size=1000000 must be a whole number")
    assert zero["failed"] == f"{one['failed']} (rank 1 of 2)"
    assert "rank 1 does not see what rank 0 wrote there" in one["disk"]
    assert "rank 1 does not see what rank 0 wrote there" in zero["disk"]
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_killed_rank_is_named_and_the_rest_goes_on(tmp_path: Path, whole: Path) -> None:
    (code, _, error), (died, _, _) = ended(start(2, "killed", tmp_path, timeout=4))
    assert died == -9
    assert code == 2
    assert "rank 1 of 2 is gone" in error
    assert "the same command goes on from there" in error
    assert len(list((tmp_path / "study/shards").glob("*.safetensors"))) < len(list((whole / "shards").iterdir()))
    scan_as(tmp_path / "study", 1, 2)  # the killed one alone; the other had finished its own
    assert contents(tmp_path / "study") == contents(whole)
