"""Bad input for every option of every command, and for every file that a command reads."""

from __future__ import annotations

import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import typer
from reliability.commands import call, fresh, last, names, typed

from llmbrain.cli import app

NUMBERS = ("-1", "0", "1.5", "nan", "inf", "-inf", "1e300", "1e-300", "99999999999999999999", "-99999999999999999999",
           "2147483648", "x", "", "0x10", "1,5")  # fmt: skip
TEXTS = ("", " ", "x", "é\u202e", "a" * 5000, "../..", "-", "%s%n", "0", "nan", ",", "auto,auto", "--out")
PATHS = ("", " ", "@/nothing", "@/text.json/below", "/dev/null", "/dev/zero", "/proc/self/mem", "@", "@/" + "a" * 300,
         "@/empty", "@/loop", "@/model", "@/words.tsv", "@/brain.nii.gz", "@/binary", "/")  # fmt: skip
# Places to write: nothing outside the folder may be one.
OUTS = ("", " ", "@/text.json/below", "/dev/null/x", "/proc/x", "@/" + "a" * 300, "@/text.json", "@/loop/x", "@/empty",
        "/sys/x")  # fmt: skip
# A short call of every command, which the hostile value is put into; the last of an option counts.
EXTRA = {
    "evaluate": "evaluate @/model --text @/text.json --window 32 --max-windows 2 --device cpu",
    "info": "info @/study", "check": "check @/study", "view": "view @/nothing --no-browser",
    "demo": "demo --out @/text.json/below",
}  # fmt: skip


def options() -> Iterator[tuple[str, Any]]:
    """Every command and parameter of the application."""
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        for parameter in command.params:
            if parameter.name != "help":
                yield name, parameter


def hostile() -> list[tuple[str, list[str]]]:
    """Command lines with one bad value each: its name, and what is typed (``@`` for the folder)."""
    bases = {name.split()[0]: typed(name, Path("@")) for name in reversed(names()) if name != "decompose --images"}
    bases |= {name: line.split() for name, line in EXTRA.items()}
    tries = []
    for name, parameter in options():
        if name not in bases:
            continue
        base = bases[name]
        if parameter.param_type_name == "argument":
            for value in PATHS:
                tries.append((f"{name} {parameter.name}", [name, value, *base[2:]]))
            continue
        option = next((o for o in parameter.opts if o.startswith("--")), parameter.opts[0])
        described = getattr(parameter, "type_descriptor", None) or parameter.type  # what typer or click keep
        kind = str(getattr(described, "annotation", described)).lower()
        if getattr(parameter, "is_flag", False):
            tries.append((f"{name} {option}", [*base, f"{option}=maybe"]))
            continue
        if option == "--out":
            values: tuple[str, ...] = OUTS
        elif "int" in kind or "float" in kind or parameter.name in ("components", "ratios", "protect"):
            values = NUMBERS
        elif "path" in kind or parameter.name in ("text", "fmri", "words", "networks", "images", "mask", "confounds",
                                                   "config", "study", "controls", "atlas", "regions"):  # fmt: skip
            values = PATHS
        else:
            values = TEXTS
        tries += [(f"{name} {option}", [*base, option, value]) for value in values]
    return tries


def prepare(folder: Path) -> Path:
    """Files that are none: empty, binary, a link to itself."""
    (folder / "empty").write_bytes(b"")
    (folder / "binary").write_bytes(np.random.default_rng(0).bytes(5000))
    os.symlink(folder / "loop", folder / "loop")
    pd.DataFrame({"trans_x": np.arange(40.0), "csf": np.arange(40.0) ** 2}).to_csv(
        folder / "confounds.tsv", sep="\t", index=False
    )
    return folder


# A file (or pattern), and the command that reads it.
READ_BY = {
    "text.json": "scan @/model --text @/text.json --out @/made --device cpu",
    "words.tsv": "compare", "fmri/sub-1.npy": "compare",
    "study/plan.json": "prune @/model --plan @/study/plan.json --text @/text.json --out @/made --device cpu",
    "job/config.toml": "run --config @/job/config.toml @/model --text @/text.json --out @/made --device cpu",
    "job/study.json": "run @/model --text @/text.json --components 3 --method magnitude --out @/job --device cpu",
    "job/summary.json": "info @/job",
    "model/config.json": "scan", "model/model.safetensors": "scan", "model/tokenizer.json": "scan",
    "model/tokenizer_config.json": "scan", "model/generation_config.json": "scan",
    "study/pruned/config.json": "info @/study/pruned", "study/pruned/model.safetensors": "info @/study/pruned",
    "study/pruned/pruning.json": "info @/study/pruned", "study/pruned/SHA256SUMS": "info @/study/pruned",
    "study/scan/manifest.json": "decompose", "study/scan/runs.jsonl": "decompose", "study/scan/SHA256SUMS": "decompose",
    "study/scan/shards/0000.safetensors": "decompose",
    "study/networks/networks.json": "networks", "study/networks/networks.safetensors": "networks",
    "study/networks/SHA256SUMS": "networks", "study/networks/ica/ica.json": "check @/study",
    "study/networks/study.json": "decompose @/study --components 3 --device cpu",
    "study/dualreg/dual_regression.json": "dualreg @/study", "study/dualreg/dr_maps.npy": "check @/study",
    "brain.nii.gz": "decompose --images", "mask.nii.gz": "decompose --images",
    "confounds.tsv": "decompose @/study --images @/brain.nii.gz --mask @/mask.nii.gz --confounds @/confounds.tsv "
    "--confound-columns trans_x csf --components 2 --out @/made --device cpu",
    "brains/mask.nii.gz": "dualreg @/brains --images @/brain.nii.gz --networks @/brains --out @/made",
    "study/small.gguf": "evaluate @/study/small.gguf --text @/text.json --max-windows 1 --device cpu",
}  # fmt: skip


def damaged(content: bytes, rng: np.random.Generator) -> dict[str, bytes | None]:
    """A file in eleven wrong forms; None is a folder in its place."""
    flipped = bytearray(content)
    for at in rng.integers(len(content) * 8, size=8):
        flipped[at // 8] ^= 1 << (at % 8)
    return {
        "empty": b"", "cut": content[: len(content) // 2], "one byte less": content[:-1],
        "noise": rng.bytes(len(content)), "zeros": bytes(len(content)), "flipped": bytes(flipped), "a list": b"[]",
        "null": b"null", "not UTF-8": b"\xff\xfe\xff" + content, "deep": b"[" * 100_000, "a folder": None,
    }  # fmt: skip


def of_files() -> list[tuple[str, list[str]]]:
    """Files and the command lines that read them."""
    known = names()
    lines = []
    for file, line in READ_BY.items():
        if "gguf" in file and "export" not in known:
            continue
        lines.append((file, typed(line, Path("@")) if line in known else line.split()))
    return lines


def outcome(code: int, said: str) -> str:
    """What became of a call: ``one line``, ``done``, or what should not be."""
    if code in (-signal.SIGXCPU, -signal.SIGALRM, -signal.SIGKILL):
        return "hang"
    if code == 2 and "Traceback" not in said and sum(x.startswith("error: ") for x in said.splitlines()) == 1:
        return "one line"
    return "done" if code == 0 else f"exit {code}: {last(said)}"


def bad_options(base: Path, trial: Path, part: slice = slice(None)) -> pd.DataFrame:
    """Every bad value of every option: counts of what became of it, by command; and each that should not be."""
    rows: dict[str, Counter[str]] = {}
    prepare(fresh(base, trial))
    for name, line in hostile()[part]:
        arguments = [word.replace("@", str(trial)) for word in line]
        for made in trial.glob("made*"):
            shutil.rmtree(made) if made.is_dir() else made.unlink()
        found = outcome(*call(arguments, trial))
        if found not in ("one line", "done"):
            found = f"{' '.join(line)[:80]}: {found}"[:200]
        rows.setdefault(name.split()[0], Counter())[found] += 1
        if found == "done":
            prepare(fresh(base, trial))
    return _table("command", rows)


def bad_files(base: Path, trial: Path, seed: int = 0, part: slice = slice(None)) -> pd.DataFrame:
    """Every file that a command reads, in wrong forms."""
    rows: dict[str, Counter[str]] = {}
    rng = np.random.default_rng(seed)
    for file, line in of_files()[part]:
        content = (prepare(fresh(base, trial)) / file).read_bytes()
        for how, wrong in damaged(content, rng).items():
            path = prepare(fresh(base, trial)) / file
            path.unlink()
            path.mkdir() if wrong is None else path.write_bytes(wrong)
            found = outcome(*call([word.replace("@", str(trial)) for word in line], trial))
            if found not in ("one line", "done"):
                found = f"{how}: {found}"[:200]
            rows.setdefault(file, Counter())[found] += 1
    return _table("file", rows)


def _table(what: str, rows: dict[str, Counter[str]]) -> pd.DataFrame:
    frame = pd.DataFrame([{what: name, "tries": sum(found.values()), **found} for name, found in rows.items()])
    return frame.fillna(0)
