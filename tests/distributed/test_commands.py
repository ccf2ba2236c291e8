"""The commands of the page on clusters (docs/guide/cluster.md), typed as written, with a small model."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from cli_calls import call
from rank_jobs import free_port, results
from tiny_models import tiny, tiny_tokenizer

import llmbrain as lb

PAGE = Path(__file__).resolve().parents[2] / "docs/guide/cluster.md"
TEXT = "the cat sat on the mat, and the dog ran away. who is there? nobody, said the bird in the tree.\n"
TORCHRUN = "torchrun --nproc-per-node 2 -m llmbrain "


def lines() -> list[str]:
    """Commands of the page, with the names of the model and the text put in."""
    inside, found = False, []
    for line in PAGE.read_text().splitlines():
        inside ^= line.startswith("```")
        if not inside and line.startswith(("    torchrun ", "    llmbrain ")):
            found.append(line.strip().replace("MODEL", "model").replace("FILE", "text.txt"))
    return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT * 40)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_of_one_process(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = [line for line in lines() if not line.startswith("torchrun")]
    assert len(typed) >= 10
    for number, line in enumerate(typed):
        job = "0" if "$SLURM" in line else None
        for rank in range(8) if job else (0,):
            arguments = shlex.split(line.replace("$SLURM_ARRAY_TASK_ID", str(rank)))[1:]
            if "study" in arguments and ("--of" not in arguments or arguments[-3:-2] == ["0"]) and not rank:
                arguments = [f"study-{number}" if a == "study" else a for a in arguments]  # one folder a section
                folder = f"study-{number}"
            elif "study" in arguments:
                arguments = [folder if a == "study" else a for a in arguments]
            if "small/" in arguments:
                arguments += ["--ratio", "0.3"]
            code, _, said = call(monkeypatch, capsys, *arguments)
            assert code == 0, f"{line}\n{said}"
    shares = [folder for folder in sorted(place.glob("study-*")) if (folder / "manifest.json").is_file()]
    assert len(shares) >= 4
    wanted = lb.load_scans(shares[0])
    for folder in shares[1:]:
        assert [s.data().sum() for s in lb.load_scans(folder)] == [s.data().sum() for s in wanted]


def test_commands_of_two_ranks(place: Path) -> None:
    """All in one pair of processes: what torchrun adds is tried below."""
    typed = [line for line in lines() if line.startswith("torchrun")]
    assert len(typed) >= 7
    assert all(line.startswith(TORCHRUN) for line in typed)
    commands = [shlex.split(line.removeprefix(TORCHRUN)) for line in typed]
    for arguments in commands:
        if "--tp-plan" in arguments:
            arguments[arguments.index("study")] = "spread"
    (place / "commands.json").write_text(json.dumps(commands))
    for codes in results(2, "commands", place):
        assert dict(zip(typed, codes)) == dict.fromkeys(typed, 0)
    assert (place / "small/config.json").is_file()
    assert [s.n_tokens for s in lb.load_scans(place / "spread")] == [s.n_tokens for s in lb.load_scans(place / "study")]


@pytest.mark.slow
def test_torchrun_itself(place: Path) -> None:
    """With its own port given by the variable that it reads, since others may run here too."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**os.environ, "PET_MASTER_PORT": str(free_port()), "PATH": path}
    done = subprocess.run(lines()[0], shell=True, cwd=place, env=env, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert "2 ranks" in done.stderr
    assert lb.load_scans(place / "study")
