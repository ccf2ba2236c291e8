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


@job
def spread(folder: Path, team: Any) -> dict[str, Any]:
    """Models spread over ranks: scanned by all of them together; all else is refused."""
    import torch

    import llmbrain as lb
    from llmbrain.scanning import schedule
    from llmbrain.scanning.store import FileShards

    schedule.SHARD_BYTES = 4000

    known: dict[str, Any] = {}

    def opened(name: str, **options: Any) -> Any:
        key = f"{name} {options}"
        known[key] = known.get(key) or lb.load_model(folder / name, tp_plan="auto", **options)
        return known[key]

    def read(name: str, out: Path | None, model: Any = None, **options: Any) -> list[Any]:
        loaded, tokenizer = opened(name)
        return lb.scan(model or loaded, tokenizer, TEXTS, out=out, batch_size=4, **options)

    sites = {"llama": ("neuron", "gate", "up", "mlp_out", "block_out", "head"), "qwen3": ("neuron", "up", "head"),
             "phi3": ("neuron", "gate")}  # fmt: skip
    for name, of in sites.items():
        read(name, folder / f"{name}-scan", site=of)
    kept = read("llama", None)
    half = read("llama", None, model=opened("llama", dtype="bfloat16")[0])
    if team.leads:
        (folder / "llama-scan/shards/0002.safetensors").unlink()
    read("llama", folder / "llama-scan", site=sites["llama"])  # goes on
    model, tokenizer = opened("llama")
    plan = lb.PruningPlan.load(folder / "plan.json")
    found = {
        "kept": hashed(kept[3].data()),
        "half": hashed(half[3].data()),
        "values": half[3].data().tolist(),
        "perplexity": lb.perplexity(model, tokenizer, TEXTS, window=16),
        "gpt2": said(lambda: opened("gpt2")),
        "heads": said(lambda: opened("heads")),
        "mixture": said(lambda: read("mixtral", None)),
        "fused": said(lambda: read("phi3", None, site="up")),
        "plan": said(lambda: lb.plan_pruning(model, ratio=0.3, method="magnitude")),
        "prune": said(lambda: lb.prune(model, plan)),
        "save": said(lambda: lb.save_pruned(model, tokenizer, folder / "small")),
        "lesion": said(lambda: lb.lesion(model, [1, 2]).__enter__()),
        "table": said(lambda: lb.lesion_table(model, {"a": [1]}, {"t": TEXTS}, tokenizer=tokenizer)),
        "both": said(lambda: opened("llama", device_map="auto")),
        "other": said(lambda: lb.scan(model, tokenizer, TEXTS[team.rank :], out=folder / "other")),
    }
    write = FileShards.write

    def fails(self: Any, index: int, tensors: Any) -> None:
        raise lb.InputError("the disk is gone")

    FileShards.write = fails  # type: ignore[method-assign]
    found["disk"] = said(lambda: read("llama", folder / "no-disk"))
    FileShards.write = write  # type: ignore[method-assign]
    if team.rank == 1:
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.to_local()[0] = float("nan")
    found["nan"] = said(lambda: read("llama", folder / "nan", model=model))
    return found


@job
def killed_spread(folder: Path, team: Any) -> dict[str, Any]:
    """Rank 1 is killed while the model that is spread over it reads."""
    import llmbrain as lb
    from llmbrain.scanning import schedule

    schedule.SHARD_BYTES = 4000
    model, tokenizer = lb.load_model(folder / "llama", tp_plan="auto")
    left = [6]

    def dies(*_: Any) -> None:
        left[0] -= 1
        if team.rank == 1 and not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    model.model.layers[1].mlp.register_forward_pre_hook(dies)
    lb.scan(model, tokenizer, TEXTS, out=folder / "study", batch_size=4)
    return {}


@job
def commands(folder: Path, team: Any) -> list[int]:
    """Commands of ``commands.json``, one after another in the same ranks, each as torchrun starts it; exit codes."""
    from contextlib import redirect_stdout

    from llmbrain import cli

    codes = []
    os.chdir(folder)
    for arguments in json.loads((folder / "commands.json").read_text()):
        sys.argv = ["llmbrain", *arguments]
        try:
            with redirect_stdout(sys.stderr):
                cli._run()
            codes.append(0)
        except SystemExit as stop:
            codes.append(int(stop.code or 0))
        team.meet(" ".join(arguments))
    return codes


@job
def killed_share(folder: Path, team: Any) -> dict[str, Any]:
    """A job of an array, rank 0 of 2 that do not talk, is killed after its first shard."""
    from llmbrain.scanning import taking
    from llmbrain.scanning.store import FileShards

    write = FileShards.write

    def dies(self: Any, index: int, tensors: Any) -> None:
        write(self, index, tensors)
        os.kill(os.getpid(), signal.SIGKILL)

    FileShards.write = dies  # type: ignore[method-assign]
    with taking(0, 2):
        small_scan(folder)
    return {}


def phantom_runs() -> list[Any]:
    """More runs than a state of the group PCA holds at once."""
    from llmbrain.datasets import make_phantom

    return list(make_phantom(n_sources=5, n_runs=20, n_tokens=120, n_neurons=2000, random_state=0).scans)


def demo_runs() -> list[Any]:
    """Runs of the demo brain."""
    import llmbrain as lb
    from llmbrain.datasets import load_demo

    demo = load_demo()
    return list(lb.scan(demo.model, demo.tokenizer, demo.texts("calibration", n=12, seed=11)))


def lesioned(out: Path | None = None) -> Any:
    """A table of lesions of five sets of neurons."""
    import numpy as np
    from tiny_models import tiny, tiny_tokenizer

    import llmbrain as lb

    rng = np.random.default_rng(0)
    sets = {f"set-{i}": rng.choice(48, 6, replace=False) for i in range(5)}
    texts = {"abc": ["abcdefgh" * 4], "other": ["the rain in spain" * 3]}
    return lb.lesion_table(
        tiny("llama"),
        sets,
        texts,
        tokenizer=tiny_tokenizer(),
        n_random=3,
        window=16,
        n_bootstrap=20,
        out=out,
        progress=False,
    )


def hashed(array: Any) -> str:
    import hashlib

    import numpy as np

    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@job
def ica(folder: Path, team: Any) -> dict[str, Any]:
    """Group ICA, dual regression and lesions, shared."""
    import numpy as np

    import llmbrain as lb

    runs = phantom_runs()
    fit = lb.GroupICA(5).fit(runs)
    few = lb.GroupICA(5).fit(runs[:3])
    back = lb.dual_regression(fit.components_, runs[:5], mask="varying", out=folder / "dualreg")
    kept = lb.dual_regression(fit.components_, runs[:5])
    table = lesioned(folder / "lesions")
    again = lesioned(folder / "lesions")
    if team.leads:
        np.savez(folder / "found.npz", maps=fit.components_, few=few.components_, back=np.asarray(back.maps),
                 **{f"mixing-{i}": course for i, course in enumerate(fit.mixing_)})  # fmt: skip
        table.frame.to_csv(folder / "lesions.csv")
    return {
        "maps": hashed(fit.components_),
        "mixing": [hashed(course) for course in fit.mixing_],
        "explained": fit.explained_variance_ratio_.tolist(),
        "converged": [bool(fit.converged_), len(fit.preprocessing_report_), fit.n_iter_],
        "order": lb.GroupICA("parallel").fit(runs[:3]).order_estimates_,
        "back": [hashed(back.maps), hashed(back.z_maps), [hashed(course) for course in back.time_courses]],
        "kept": hashed(kept.maps),
        "lesions": table.frame.round(12).to_json(),
        "again": again.frame.round(12).to_json(),
        "rank": said(lambda: lb.GroupICA(400).fit(runs[:2])),
        "other": said(lambda: lb.GroupICA(5).fit(runs[: 4 + team.rank])),
        "settings": said(lambda: lb.GroupICA(5 + team.rank).fit(runs[:4])),
        "nan": said(lambda: lb.GroupICA(5).fit([runs[0], np.where(np.arange(2000) == 7, np.nan, runs[1].data())])),
    }


@job
def demo_ica(folder: Path, team: Any) -> dict[str, Any]:
    """Group ICA of the demo brain."""
    import numpy as np

    import llmbrain as lb

    fit = lb.GroupICA(16).fit(demo_runs())
    if team.leads:
        np.save(folder / f"demo-{team.size}.npy", fit.components_)
    return {"maps": hashed(fit.components_)}


def pruned(folder: Path | None = None) -> dict[str, Any]:
    """Plans of several methods and a repair, of a tiny model."""
    import torch
    from tiny_models import VOCAB, tiny

    import llmbrain as lb
    from llmbrain.networks import FunctionalNetworks

    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(3, VOCAB, (37, 24), generator=generator)
    model = tiny("llama", num_hidden_layers=3, intermediate_size=32)
    maps = torch.randn(4, 96, generator=generator, dtype=torch.float64).numpy()
    networks = FunctionalNetworks(maps, space=lb.NeuronSpace([32] * 3), threshold=1.5)
    asked: dict[str, dict[str, Any]] = {
        "obs": {"method": "obs", "allocation": "global", "head_ratio": 0.5},
        "flap": {"method": "flap", "allocation": "global"},
        "networks": {"method": "networks", "networks": networks, "passes": 30},
        "sensitivity": {"method": "wanda-sp", "allocation": "sensitivity", "passes": 60},
        "taylor": {"method": "taylor"},
        "relp": {"method": "relp"},
        "published": {"method": "published", "rule": {"n_components": 8}},
        "random": {"method": "random", "sequential": True},
        "drawn": {"method": "random", "allocation": "sensitivity", "passes": 60, "random_state": None if folder else 0},
    }
    plans = {name: lb.plan_pruning(model, ratio=0.4, calibration=windows, **how) for name, how in asked.items()}
    small = {
        name: lb.prune(model, plans[of], calibration=windows, compensate=kind, sequential=sequential)
        for name, of, kind, sequential in (
            ("repaired", "obs", "least-squares", True),
            ("apart", "flap", "least-squares", False),
            ("bias", "networks", "bias", True),
        )
    }
    how = {"calibration": windows, "compensate": "least-squares", "propagation": 0.5}
    small["propagated"] = lb.prune(model, plans["obs"], **how)
    bert = tiny("bert", intermediate_size=32)
    states = {"allocation": "sensitivity", "passes": 60}  # by what the model says at its last block
    plans["bert"] = lb.plan_pruning(bert, ratio=0.3, method="obs-gradient", calibration=windows, **states)
    return {"plans": plans, "small": small}


@job
def prune(folder: Path, team: Any) -> dict[str, Any]:
    """Plans and repairs over shared calibration text."""
    import torch
    from safetensors.torch import save_file
    from tiny_models import VOCAB, tiny

    import llmbrain as lb

    made = pruned(folder)
    if team.leads:
        for name, model in made["small"].items():
            save_file(model.state_dict(), folder / f"{name}.safetensors")
    windows = torch.randint(3, VOCAB, (9, 24), generator=torch.Generator().manual_seed(team.rank))
    return {
        "plans": {name: plan.to_dict()["kept"] for name, plan in made["plans"].items()},
        "heads": made["plans"]["obs"].to_dict()["kept_heads"],
        "details": made["plans"]["networks"].details.get("search"),
        "weights": {name: hashed(torch.cat([p.detach().flatten() for p in model.parameters()]).numpy())
                    for name, model in made["small"].items()},
        "text": said(lambda: lb.plan_pruning(tiny("llama"), ratio=0.4, method="flap", calibration=windows)),
        "ratio": said(lambda: lb.plan_pruning(tiny("llama"), ratio=0.4 + team.rank / 10, method="magnitude")),
        "model": said(lambda: lb.plan_pruning(tiny("llama", seed=team.rank), ratio=0.4, method="magnitude")),
    }  # fmt: skip


def of_one_window() -> Any:
    """A plan and a repair on text of one window: of two ranks one has none."""
    import torch
    from tiny_models import tiny

    import llmbrain as lb

    windows, model = torch.randint(3, 40, (1, 48), generator=torch.Generator().manual_seed(1)), tiny("llama")
    plan = lb.plan_pruning(model, ratio=0.4, method="obs-gradient", allocation="global", calibration=windows)
    return plan, lb.prune(model, plan, calibration=windows, compensate="least-squares")


@job
def alike(folder: Path, team: Any) -> dict[str, Any]:
    """What ranks are given otherwise than rank 0 and did not say before; a rank without work."""
    import numpy as np
    import torch
    from tiny_models import tiny, tiny_tokenizer

    import llmbrain as lb
    from llmbrain.distributed import alone
    from llmbrain.scanning import shares
    from llmbrain.study import networks

    shares.SEEN = 0.2
    with alone():
        small_scan(folder / f"same-{team.rank}")
        small_scan(folder / f"own-{team.rank}", seed=team.rank)
    runs, windows = phantom_runs()[:3], torch.randint(3, 40, (9, 24), generator=torch.Generator().manual_seed(0))
    model, maps = tiny("llama"), np.random.default_rng(0).normal(size=(2, 48))
    plan, mask = lb.plan_pruning(model, ratio=0.4, method="magnitude"), np.arange(2000) != 5 + team.rank
    course = np.arange(120.0)[:, None] ** (1 + team.rank)

    def lesions(model: Any, **more: Any) -> str:
        how = {"tokenizer": tiny_tokenizer(), "n_random": 1, "window": 16, "progress": False, **more}
        return said(lambda: lb.lesion_table(model, {"a": [1]}, {"t": TEXTS}, **how))

    one, small = of_one_window()
    return {
        "half": team.sum([torch.full((2,), 0.25 + team.rank, dtype=torch.bfloat16)], "half")[0].tolist(),
        "weights": hashed(torch.cat([p.detach().flatten() for p in small.parameters()]).numpy()),
        "kept": one.to_dict()["kept"],
        "said": {
            "does not see": said(lambda: small_scan(folder / f"same-{team.rank}")),
            "weights ": lesions(tiny("llama", seed=team.rank)),
            "level ": lesions(model, level=0.9 + 0.05 * team.rank),
            "reference ": lesions(model, reference=np.full((5, 48), 1.0 + team.rank)),
            "mask ": said(lambda: lb.GroupICA(3, mask=mask).fit(runs)),
            "runs ": said(lambda: lb.GroupICA(3).fit(runs, confounds=[course] * 3)),
            "runs": said(lambda: lb.dual_regression(maps, lb.load_scans(folder / f"own-{team.rank}"))),
            "counts ": said(lambda: lb.plan_pruning(
                model, ratio=0.4, method="flap", calibration=windows, weights=torch.ones(9, 24) + team.rank)),
            "sequential ": said(lambda: lb.prune(
                model, plan, calibration=windows, compensate="least-squares", sequential=not team.rank)),
            "threshold ": said(lambda: networks.decompose(folder / "own-0", 2, threshold=2.0 + team.rank)),
        },
    }  # fmt: skip


@job
def frozen(folder: Path, team: Any) -> dict[str, Any]:
    """A rank freezes while tensors are under way: the one that the folder is called after."""
    import torch

    team.watch.limit = 1.0
    if team.rank == int(folder.name):
        torch.distributed.all_reduce = lambda *_, **__: os.kill(os.getpid(), signal.SIGSTOP)
    team.sum([torch.ones(3)], "sums")
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
