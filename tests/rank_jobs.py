"""Jobs that several processes run together, and how tests start them: ``python rank_jobs.py JOB FOLDER``.

Each job is a function of a folder and the ranks; what it returns is printed as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TEXTS = [letter * (5 + i) for i, letter in enumerate("abcdefghijklmnopqrst")]  # 20 texts of 6 to 25 tokens
PATIENCE = 150  # seconds until a job that hangs is stopped


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def start(
    n: int, job: str, folder: Path, *, timeout: float = 60, only: list[int] | None = None, **env: str
) -> list[Any]:
    """Processes of a job of n ranks, on this machine alone."""
    place = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(n), "OMP_NUM_THREADS": "1",
        "LLMBRAIN_RANK_TIMEOUT": str(timeout), "PYTHONPATH": f"{HERE.parent}:{HERE}", "MPLBACKEND": "Agg", **env,
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, str(HERE / "rank_jobs.py"), job, str(folder)],
            env={**os.environ, **place, "RANK": str(r)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for r in (range(n) if only is None else only)
    ]  # fmt: skip


def ended(processes: list[Any]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each; one that hangs is killed and fails the test."""
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=PATIENCE)
            found.append((process.returncode, out, err))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return found


def results(n: int, job: str, folder: Path, **options: Any) -> list[Any]:
    """What a job gave on each rank; it must have ended well."""
    done = ended(start(n, job, folder, **options))
    assert [code for code, _, _ in done] == [0] * n, "\n".join(err for _, _, err in done)
    return [json.loads(out.splitlines()[-1]) for _, out, _ in done]


# -- jobs --------------------------------------------------------------------------------------------------------------

JOBS: dict[str, Callable[..., Any]] = {}


def job(function: Callable[..., Any]) -> Callable[..., Any]:
    JOBS[function.__name__] = function
    return function


def small_scan(out: Path | None, texts: list[str] | None = None, seed: int = 0, **options: Any) -> list[Any]:
    """A scan of a tiny model in shards of a batch or two."""
    from tiny_models import tiny, tiny_tokenizer

    import llmbrain as lb
    from llmbrain.scanning import schedule

    schedule.SHARD_BYTES = 4000
    options = {"batch_size": 4, **options}
    return lb.scan(tiny("llama", seed=seed), tiny_tokenizer(), TEXTS if texts is None else texts, out=out, **options)


def said(call: Callable[[], Any]) -> str:
    """The error of a call."""
    from llmbrain import InputError

    try:
        call()
    except InputError as error:
        return str(error)
    return "no error"


@job
def scan(folder: Path, team: Any) -> dict[str, Any]:
    """A study, and what is refused."""
    scans = small_scan(folder / "study")
    return {
        "tokens": sum(s.n_tokens for s in scans),
        "read": float(sum(float(s.data().sum()) for s in scans)),
        "again": len(small_scan(folder / "study")),
        "alone": len(small_scan(None)),
        "texts": said(lambda: small_scan(folder / "other", texts=TEXTS[: 20 - team.rank])),
        "model": said(lambda: small_scan(folder / "other", seed=team.rank)),
        "batch": said(lambda: small_scan(folder / "other", batch_size=4 + team.rank)),
        "failed": said(lambda: small_scan(folder / "other", block_size=10**6 if team.rank else None)),
        "disk": said(lambda: small_scan(folder / f"of-{team.rank}")),
    }


@job
def killed(folder: Path, team: Any) -> dict[str, Any]:
    """Rank 1 is killed after its first shard."""
    from llmbrain.scanning.store import FileShards

    write = FileShards.write

    def dies(self: Any, index: int, tensors: Any) -> None:
        write(self, index, tensors)
        if team.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    FileShards.write = dies  # type: ignore[method-assign]
    small_scan(folder / "study")
    return {}


def main() -> None:
    from llmbrain._validation import InputError
    from llmbrain.distributed import joined

    try:
        with joined() as team:
            print(json.dumps(JOBS[sys.argv[1]](Path(sys.argv[2]), team)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
