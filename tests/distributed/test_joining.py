"""How processes become ranks, and what is said where one is missing."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rank_jobs import ended, free_port, start

from llmbrain._validation import InputError
from llmbrain.distributed import ALONE, Parcel, RankError, Ranks, joined, ranks


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "LLMBRAIN_RANK_TIMEOUT": "0.5",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return monkeypatch


def join() -> None:
    with joined():
        pass


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "8")  # some systems say it to every process
    with joined() as team:
        assert team is ranks() is ALONE
        with team.job("work", fact=1):
            assert team.gather("x", 5) == [5]
            assert [p.record for p in team.each(3, "x", lambda i: Parcel(record=i))] == [0, 1, 2]
            assert list(team.mine(3)) == [0, 1, 2]


def test_a_rank_that_never_arrives_is_named(place: pytest.MonkeyPatch) -> None:
    with pytest.raises(RankError, match=r"ranks 1, 2 of 3 never arrived: waited 0\.?\d* s"):
        join()
    place.setenv("RANK", "1")
    place.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(RankError, match="rank 0 of 3 never arrived: rank 1 found nobody of this job at"):
        join()


def test_a_port_in_use_is_one_line(place: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        place.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(RankError, match="the port is in use by another program") as raised:
            join()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "3"}, "RANK must be in 0 to WORLD_SIZE - 1"),
        ({"RANK": "x"}, "must be whole numbers"),
        ({"MASTER_PORT": ""}, "must be whole numbers"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT in 1 to 65535"),
        ({"MASTER_ADDR": ""}, "ranks need MASTER_ADDR and MASTER_PORT to meet"),
        ({"LOCAL_RANK": "first"}, "LOCAL_RANK='first' must be a whole number"),
        ({"LLMBRAIN_RANK_TIMEOUT": "soon"}, "LLMBRAIN_RANK_TIMEOUT='soon' must be seconds above 0"),
    ],
)
def test_variables_that_make_no_sense(place: pytest.MonkeyPatch, changes: dict[str, str], message: str) -> None:
    for name, value in changes.items():
        place.setenv(name, value)
    with pytest.raises(InputError, match=message):
        join()


@pytest.mark.slow
def test_ranks_that_cannot_talk_say_so(tmp_path: Path) -> None:
    for code, _, said in ended(start(2, "frozen", tmp_path / "2", GLOO_SOCKET_IFNAME="nothing0")):
        assert code == 2
        assert "they cannot talk to each other" in said.splitlines()[-1]


@pytest.mark.parametrize(("who", "message"), [
    (1, "error: sums: rank 1 of 2 is gone: no sign of life for 1 s. What was written is kept"),
    pytest.param(0, "error: (rank 1 of 2 lost the others: .* does not answer for 1 s|sums: rank 0 of 2 is gone)",
                 marks=pytest.mark.slow),
])  # fmt: skip
def test_a_rank_that_freezes_while_tensors_are_under_way(tmp_path: Path, who: int, message: str) -> None:
    """Nothing interrupts torch's own call: the other says who it is, and ends."""
    processes = start(2, "frozen", tmp_path / str(who))
    try:
        _, said = processes[1 - who].communicate(timeout=60)
        assert processes[1 - who].returncode == 2
        assert re.search(message, said), said
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_more_ranks_than_gpus_are_no_place_for_a_model_that_is_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmbrain.checkpoints import placing

    monkeypatch.setattr(placing, "ranks", lambda: Ranks(3, 4))
    monkeypatch.setattr(placing.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(placing.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(InputError, match=r"Ranks\(3 of 4\) has no GPU of its own, there are 2 here"):
        placing.Placement(tp_plan="auto")


def test_a_stranger_at_the_port_is_no_rank(place: pytest.MonkeyPatch) -> None:
    """A program that takes connections and says nothing."""
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        thread = threading.Thread(target=lambda: stranger.accept()[0].close(), daemon=True)
        thread.start()
        place.setenv("RANK", "1")
        place.setenv("MASTER_PORT", str(stranger.getsockname()[1]))
        with pytest.raises(RankError, match="rank 0 of 3 never arrived"):
            join()
