"""What is said while work goes on, and where."""

from __future__ import annotations

import time

import pytest

from llmbrain import InputError, _progress
from llmbrain._progress import bar, say, seconds_of, span, speaker, watched


def test_times_as_people_type_them():
    typed = {"90": 90, "45s": 45, "10m": 600, "10 min": 600, "1.5h": 5400, "1h30m": 5400, 7.5: 7.5}
    assert {value: seconds_of(value) for value in typed} == typed
    for wrong in ("", "soon", "-3m", "0", "nan", "inf", "10x", "1e99"):
        with pytest.raises(InputError, match="is no time"):
            seconds_of(wrong)
    assert [span(s) for s in (0.2, 45, 200, 7200)] == ["1 s", "45 s", "3 min", "2 h 0 min"]


def test_a_line_comes_when_nothing_was_said_for_long_and_the_log_has_all(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(_progress, "EVERY", 0.5)
    monkeypatch.setattr(_progress._desk, "bars", [])  # an interrupted generator of another test may hold one yet
    log = tmp_path / "log.txt"
    with watched(log):
        say("1/2 first")
        with bar[None](total=10, desc="scan", unit="token") as progress:
            progress.update(4)
            deadline = time.monotonic() + 20
            while "scan 4 of 10" not in log.read_text(encoding="utf-8") and time.monotonic() < deadline:
                time.sleep(0.05)
        say("2/2 second")
    said = capsys.readouterr().err
    assert "    ... scan 4 of 10, about" in said
    lines = [line.split(" ", 1)[1] for line in log.read_text(encoding="utf-8").splitlines()]
    assert lines[0] == "1/2 first"
    assert lines[-1] == "2/2 second"
    say("afterwards")
    assert "afterwards" not in log.read_text(encoding="utf-8")
    assert not _progress._desk.bars


def test_bars_iterate_and_leave_nothing_behind(capsys, monkeypatch):
    monkeypatch.setattr(_progress._desk, "bars", [])
    assert list(bar(range(3), desc="runs")) == [0, 1, 2]
    for item in bar(range(3)):
        if item == 1:
            break
    assert not _progress._desk.bars
    assert capsys.readouterr().err == ""  # not a terminal: nothing is drawn


def test_progress_means_the_same_everywhere(capsys):
    told = []
    speaker(told.append)("a line")
    speaker(False)("nothing")
    speaker(True)("aloud")
    assert told == ["a line"]
    assert capsys.readouterr().err == "aloud\n"
