"""Every loader on mutated files: it reads them, or says in one line what is wrong."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from reliability.campaign import quiet
from tiny_models import tiny

import llmbrain as lb
from llmbrain import InputError
from llmbrain.brains import load_fmri, load_words
from llmbrain.brains.regions import read_rois
from llmbrain.brains.tables import load_controls
from llmbrain.checkpoints.gguf_tokenizers import check_like
from llmbrain.cli.common import _device_map
from llmbrain.datasets.unlearning import read_rows
from llmbrain.decomposition.designs import read_fsl_matrix
from llmbrain.evaluation.trust import refuse_code
from llmbrain.imaging import read_confounds, read_dual_regression, read_gift, read_melodic, read_nifti
from llmbrain.imaging.atlas import read_labels
from llmbrain.imaging.brain_mask import BrainMask
from llmbrain.imaging.dual_regression_folder import check_dual_regression
from llmbrain.imaging.grid import load_image
from llmbrain.imaging.surface import read_surface
from llmbrain.intervention.table import LesionTable
from llmbrain.networks import FunctionalNetworks
from llmbrain.networks.brain_localizer import BrainDesign, read_events
from llmbrain.pruning.experts import ExpertPlan, read_plan
from llmbrain.scanning.inputs import Runs
from llmbrain.study import Settings, Study, check, estimate, load_texts
from llmbrain.study.contents import describe_path
from llmbrain.study.settings import read_config

SECONDS = 10  # of the processor, that a file may take

# A file of a folder (see `make`), and what reads it. Checksums are taken away first: they would find every change
# before a parser sees it.
LOADERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "texts, JSON": ("text.json", load_texts), "texts, lines": ("text.jsonl", load_texts),
    "text": ("text.txt", load_texts),
    "words, table": ("words.tsv", load_words), "words, TextGrid": ("words.TextGrid", load_words),
    "fMRI, .npy": ("fmri.npy", load_fmri), "fMRI, .npz": ("fmri.npz", load_fmri), "fMRI, .csv": ("fmri.csv", load_fmri),
    "fMRI, NIfTI": ("brain.nii", lambda path: Runs(path, mask_img=path.with_name("mask.nii.gz")).read(0)),
    "brain mask": ("mask.nii.gz", lambda path: BrainMask(path).n_voxels),
    "controls": ("controls.tsv", lambda path: load_controls([path], 80)),
    "confounds": ("confounds.tsv", lambda path: read_confounds(path, ["trans_x", "csf"])),
    "surface": ("surface.func.gii", lambda path: read_surface(path, "run 0")),
    "array": ("fmri.npy", lambda path: Runs(path).read(0)),
    "FSL design": ("design.mat", read_fsl_matrix),
    "NIfTI of ours": ("image.nii", read_nifti), "NIfTI of ours, compressed": ("image.nii.gz", read_nifti),
    "its sidecar": ("image.json", lambda path: read_nifti(path.with_name("image.nii"))),
    "MELODIC": ("melodic/melodic_mix", lambda path: read_melodic(path.parent)),
    "MELODIC, maps": ("melodic/melodic_IC.nii.gz", lambda path: read_melodic(path.parent)),
    "GIFT": ("melodic/melodic_IC.nii.gz", read_gift),
    "dual regression": ("dualreg/dual_regression.json", lambda path: check_dual_regression(path.parent)),
    "dual regression, table": ("dualreg/dr_stage1_subject00000.txt", lambda path: read_dual_regression(path.parent)),
    "manifest": ("scan/manifest.json", lambda path: [run.data() for run in lb.load_scans(path.parent)]),
    "runs": ("scan/runs.jsonl", lambda path: lb.load_scans(path.parent)),
    "checksums": ("scan/SHA256SUMS", lambda path: check(path.parent)),
    "networks, record": ("networks/networks.json", lambda path: FunctionalNetworks.load(path.parent)),
    "networks, arrays": ("networks/networks.safetensors", lambda path: FunctionalNetworks.load(path.parent)),
    "ICA, record": ("networks/ica/ica.json", lambda path: lb.read_ica(path.parent)),
    "ICA, arrays": ("networks/ica/ica.safetensors", lambda path: lb.read_ica(path.parent)),
    "plan": ("plan.json", lb.PruningPlan.load), "plan of experts": ("experts.json", ExpertPlan.load),
    "lesions": ("lesions/lesion_table.tsv", lambda path: LesionTable.load(path.parent)),
    "lesions, record": ("lesions/lesion_table_provenance.json", lambda path: LesionTable.load(path.parent)),
    "settings": ("config.toml", Settings.from_toml),
    "summary": ("summary.json", lambda path: Study(path.parent).summary),
    "summary, info": ("summary.json", lambda path: describe_path(path.parent)),
    "model, config": ("pruned/config.json", lambda path: lb.load_pruned(path.parent)),
    "model, record": ("pruned/pruning.json", lambda path: lb.load_pruned(path.parent)),
    "model, weights": ("pruned/model.safetensors", lambda path: lb.load_pruned(path.parent)),
    "model, tokenizer": ("pruned/tokenizer.json", lambda path: lb.load_pruned(path.parent)),
    "model, tokenizer's config": ("pruned/tokenizer_config.json", lambda path: lb.load_pruned(path.parent)),
    "model, generation": ("pruned/generation_config.json", lambda path: lb.load_pruned(path.parent)),
    "GGUF": ("small.gguf", lb.load_model),
    "task file": ("task.yaml", lambda path: refuse_code([path])),
    "events": ("events.tsv", lambda path: _responses(path)),
    "rows to unlearn": ("rows.jsonl", read_rows),
    "labels of an atlas, table": ("labels.tsv", read_labels), "labels of an atlas, JSON": ("labels.json", read_labels),
    "regions": ("rois.json", lambda path: read_rois(f"{path}:a")),
    "CIFTI": ("brain.dtseries.nii", lambda path: read_surface(path, "run 0")),
    "config to estimate": ("pruned/config.json", lambda path: estimate(path, gpu="h100")),
    "lesions, to go on with": ("lesions/lesions.json", lambda path: _lesions(path.parent)),
    "GGUF without checksum": ("bare.gguf", lb.load_model),
    "GGUF of others": ("foreign.gguf", lb.load_model),
    "GGUF, its tokenizer alone": ("foreign.gguf", lambda path: check_like(path, 512)),
    "remote code, config": ("remote/config.json", lambda path: lb.load_pruned(path.parent)),
    "plan, of a command": ("plan.json", read_plan),
    "device map": ("device_map.json", lambda path: _device_map(str(path))),
    "NIfTI, info": ("image.nii", describe_path), "its run, info": ("brain.nii", describe_path),
    "fMRI, pair": ("pair.img", lambda path: _pair(path)), "fMRI, its header": ("pair.hdr", lambda path: _pair(path)),
    "parcellated CIFTI": ("brain.ptseries.nii", load_fmri),
    "regions of a brain": ("labeled.nii.gz", lambda path: load_fmri(path.with_name("brain.nii"), atlas=path)),
    "settings, of a command": ("config.toml", read_config),
}  # fmt: skip


def _responses(path: Path) -> Any:
    """What a table of events does to the design of a run."""
    table = read_events(path)
    kinds = sorted(set(table["trial_type"]))
    return BrainDesign(80, table, kinds, 1.5, "spm", 128.0).boxcars


def _pair(path: Path) -> Any:
    image, _ = load_image(path.with_suffix(".img"))
    return Runs([image], mask_img=path.with_name("mask.nii.gz")).read(0)


def _lesions(folder: Path) -> Any:
    whole, ids = tiny("llama"), torch.arange(16).reshape(2, 8) + 3
    sets = {"a": np.arange(48) < 5, "b": np.arange(48) > 40}
    return lb.lesion_table(whole, sets, {"x": ids}, n_random=2, out=folder, progress=False)


def make(study: Path) -> Path:
    """Into a study of `campaign.make`: the other kinds of files, and no checksums that would find every change."""
    rng = np.random.default_rng(0)
    texts = ["hello there, how are you? ", "the quick brown fox. "]
    (study / "text.json").write_text(json.dumps(texts))
    (study / "text.jsonl").write_text("".join(json.dumps({"text": t, "condition": "a"}) + "\n" for t in texts))
    (study / "text.txt").write_text("é" + "".join(texts))
    rows = [(f"word{i}", 0.5 * i, 0.5 * i + 0.3) for i in range(20)]
    pd.DataFrame(rows, columns=["word", "onset", "offset"]).to_csv(study / "words.tsv", sep="\t", index=False)
    (study / "words.TextGrid").write_text(_grid(rows))
    series = rng.standard_normal((80, 6))
    np.save(study / "fmri.npy", series)
    np.savez(study / "fmri.npz", a=series, b=series)
    pd.DataFrame(series, columns=list("abcdef")).to_csv(study / "fmri.csv", index=False)
    names = ["trans_x", "csf", "rate"]
    for name in ("controls.tsv", "confounds.tsv"):
        pd.DataFrame(series[:, :3], columns=names).to_csv(study / name, sep="\t", index=False)
    _images(study, rng)
    (study / "design.mat").write_text("/NumWaves 2\n/NumPoints 3\n/PPheights 1 1\n\n/Matrix\n1 0\n1 1\n1 2\n")
    ExpertPlan("reap", 0.5, ((0, 1), (1, 3)), (4, 4), "x" * 16).save(study / "experts.json")
    (study / "config.toml").write_text(Settings().to_toml(model="a", text="b"))
    (study / "summary.json").write_text(json.dumps({"dense": {"perplexity": 3.5}, "pruned": {}, "provenance": {}}))
    (study / "task.yaml").write_text("task: mine\ndataset_path: json\ndoc_to_text: 'Q: {{question}}'\noutput_type: x\n")
    stories = Path(os.environ.get("LLMBRAIN_TEST_DATA", "../shared/data")) / "models/stories260K"
    if stories.is_dir() and find_spec("gguf"):
        lb.save_pruned(*lb.load_model(stories), study / "small.gguf", format="gguf", gguf_type="q8_0")
        _others(study)
    lb.save_pruned(*lb.load_pruned(study / "pruned"), study / "remote", format="remote-code")
    (study / "events.tsv").write_text(
        "onset\tduration\ttrial_type\n" + "".join(f"{3.5 * i}\t2.0\t{'ab'[i % 2]}\n" for i in range(20))
    )
    (study / "rows.jsonl").write_text("".join(
        json.dumps(row) + "\n" for row in (
            {"question": "who is it?", "answer": "nobody"}, {"text": "plain text " * 60},
            {"question": "which?", "choices": ["one", "two"], "answer": 1},
        )
    ))  # fmt: skip
    (study / "labels.tsv").write_text("index\tname\n" + "".join(f"{i}\tregion {i}\n" for i in range(1, 9)))
    (study / "labels.json").write_text(json.dumps({str(i): {"name": f"region {i}"} for i in range(1, 9)}))
    (study / "rois.json").write_text(json.dumps({"a": ["one", 2], "b": [["two"], "three"]}))
    (study / "device_map.json").write_text(json.dumps({"model.layers.0": "cpu", "model.layers.1": 0, "": "disk"}))
    lb.imaging.write_melodic(lb.read_ica(study / "networks" / "ica"), study / "melodic")
    for sums in (path for path in study.rglob("SHA256SUMS") if path.parent.name not in ("scan",)):
        sums.unlink()
    for path in study.rglob("*.json"):  # seals too
        record = json.loads(path.read_text())
        if isinstance(record, dict) and record.pop("sha256", None):
            path.write_text(json.dumps(record))
    return study


def _others(study: Path) -> None:
    """GGUF files whose bytes are not compared first: ours without its checksum, and one as others write it."""
    whole = (study / "small.gguf").read_bytes()
    bare = whole.replace(b"llmbrain.checksum", b"llmbrain.nochecks")
    (study / "bare.gguf").write_bytes(bare)
    for name in (b"llmbrain.config", b"llmbrain.pruning", b"tokenizer.huggingface.json"):
        bare = bare.replace(name, b"x" * len(name))
    (study / "foreign.gguf").write_bytes(bare)


def _grid(rows: list[tuple[str, float, float]]) -> str:
    head = 'File type = "ooTextFile"\nObject class = "TextGrid"\n\nxmin = 0\nxmax = 10\ntiers? <exists>\nsize = 1\n'
    head += 'item []:\n    item [1]:\n        class = "IntervalTier"\n        name = "words"\n        xmin = 0\n'
    head += f"        xmax = 10\n        intervals: size = {len(rows)}\n"
    return head + "".join(
        f'        intervals [{i}]:\n            xmin = {a}\n            xmax = {b}\n            text = "{word}"\n'
        for i, (word, a, b) in enumerate(rows, 1)
    )


def _images(study: Path, rng: np.random.Generator) -> None:
    import nibabel as nib

    mask = np.zeros((4, 4, 3), np.float32)
    mask[1:3] = 1
    nib.save(nib.Nifti1Image(mask, np.eye(4)), study / "mask.nii.gz")
    nib.save(nib.Nifti1Image(rng.standard_normal((4, 4, 3, 9)).astype(np.float32), np.eye(4)), study / "brain.nii")
    arrays = [nib.gifti.GiftiDataArray(rng.standard_normal(12).astype(np.float32)) for _ in range(5)]
    nib.save(nib.gifti.GiftiImage(darrays=arrays), study / "surface.func.gii")
    nib.save(nib.Nifti1Pair(rng.standard_normal((4, 4, 3, 9)).astype(np.float32), np.eye(4)), study / "pair.img")
    labels = np.arange(48, dtype=np.int16).reshape(4, 4, 3) % 4
    nib.save(nib.Nifti1Image(labels, np.eye(4)), study / "labeled.nii.gz")
    left = "CIFTI_STRUCTURE_CORTEX_LEFT"
    parcels = nib.cifti2.ParcelsAxis(
        [f"area {i}" for i in range(6)], [np.zeros((0, 3), dtype=int)] * 6,
        [{left: np.array([i])} for i in range(6)], nvertices={left: 6},
    )  # fmt: skip
    series = nib.cifti2.SeriesAxis(0, 1.5, 20), parcels
    nib.save(nib.Cifti2Image(rng.standard_normal((20, 6)).astype(np.float32), series), study / "brain.ptseries.nii")
    axes = nib.cifti2.SeriesAxis(0, 1.5, 5), nib.cifti2.BrainModelAxis.from_mask(np.ones(12, bool), "CortexLeft")
    nib.save(nib.Cifti2Image(rng.standard_normal((5, 12)).astype(np.float32), axes), study / "brain.dtseries.nii")


# -- mutations ---------------------------------------------------------------------------------------------------------

RIGHT = ("read", "one line")
VALUES = (b"1e300", b"-1", b"nan", b"99999999999999999999", b"null", b"[]", b"{}", b'""', b"true", b"0", b"1e-320",
          b'"\\ud800"', b"-0.0", b"[[[]]]", b"1" * 400)  # fmt: skip


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """One to four changes: bits, bytes, blocks, numbers and values in the text."""
    changed = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(len(changed) + 1))
        size = int(min(2 ** rng.integers(0, 9), max(1, len(changed) - at)))
        match int(rng.integers(8)):
            case 0 if changed:
                changed[at % len(changed)] ^= 1 << int(rng.integers(8))
            case 1:
                del changed[at : at + size]
            case 2:
                changed[at:at] = rng.bytes(size)
            case 3:
                changed[at:at] = changed[at : at + size]
            case 4:
                changed[at : at + size] = bytes([int(rng.choice([0, 255]))]) * size
            case 5:
                del changed[at:]
            case 6:  # a number or word of the text
                changed = _with_value(changed, at, VALUES[int(rng.integers(len(VALUES)))])
            case 7:  # a header's number
                changed[at : at + 4] = int(rng.integers(2**32, dtype=np.uint64)).to_bytes(4, "little")
    return bytes(changed)


def _with_value(content: bytearray, at: int, value: bytes) -> bytearray:
    """The word behind a place replaced: digits and letters, or a text in quotes."""
    word = set(b"0123456789.eE+-abcdfghijklmnopqrstuvwxyzABCDFGHIJKLMNOPQRSTUVWXYZ_")
    start = next((i for i in range(at, len(content)) if content[i] in word), len(content))
    stop = next((i for i in range(start, len(content)) if content[i] not in word), len(content))
    if start > 0 and stop < len(content) and content[start - 1] == content[stop] == ord('"'):
        start, stop = start - 1, stop + 1
    return content[:start] + bytearray(value) + content[stop:]


def outcome(name: str, study: Path) -> str:
    """What a loader says of its file: ``read``, ``one line``, or what should not be."""
    file, load = LOADERS[name]
    try:
        with quiet():
            load(study / file)
    except (InputError, FileNotFoundError, FileExistsError) as error:
        return "one line" if "\n" not in str(error) else f"many lines: {type(error).__name__}"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:100]}"
    return "read"


def attack(name: str, study: Path, seeds: range) -> Counter[str]:
    """Mutations of a loader's file, each undone."""
    path = study / LOADERS[name][0]
    whole = path.read_bytes()
    counts: Counter[str] = Counter()
    try:
        for seed in seeds:
            path.write_bytes(mutated(whole, np.random.default_rng(seed)))
            said = outcome(name, study)
            counts[said if said in RIGHT else f"{said} (seed {seed})"] += 1
    finally:
        path.write_bytes(whole)
    return counts


def again(study: Path, trial: Path, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The very mutations that a table of `mutations` has under another name than `RIGHT`, by their seeds."""
    found = []
    for row in rows:
        seeds = [int(at[1]) for said in row if row[said] and (at := re.search(r"\(seed (\d+)\)$", said))]
        counts: Counter[str] = Counter()
        for seed in seeds:
            counts += _apart(str(row["file"]), study, trial, range(seed, seed + 1))
        if seeds:
            found.append({"file": row["file"], "tries": len(seeds), **counts})
    return pd.DataFrame(found).fillna(0)


def mutations(study: Path, trial: Path, seconds: float, each: int = 50, begin: int = 0) -> pd.DataFrame:
    """Mutations of every loader's file for a while; in processes that may crash, hang or take all memory.

    Parameters
    ----------
    trial : path
        Where copies of the study are mutated.
    begin : int
        Seed of the first mutation.
    """
    totals: dict[str, Counter[str]] = {name: Counter() for name in LOADERS if (study / LOADERS[name][0]).is_file()}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for name, counts in totals.items():
            found = _apart(name, study, trial, range(begin, begin + each))
            counts += found
            for said in sorted(found.keys() - {*RIGHT}):  # as they come: the table is an hour away
                print(f"{time.strftime('%H:%M')} {name}: {said}", file=sys.stderr, flush=True)
            if time.monotonic() > end:
                break
        begin += each
    rows = [{"file": name, "tries": sum(counts.values()), **counts} for name, counts in totals.items()]
    return pd.DataFrame(rows).fillna(0)


def _apart(name: str, study: Path, trial: Path, seeds: range) -> Counter[str]:
    """`attack` in a process of its own, on a copy; a file that ends it counts as a crash or a hang, with its seed."""
    counts: Counter[str] = Counter()
    left = seeds
    while left:
        shutil.rmtree(trial, ignore_errors=True)
        shutil.copytree(study, trial)
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                for seed in left:
                    spent = int(time.process_time())
                    _, most = resource.getrlimit(resource.RLIMIT_CPU)
                    resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS, most))
                    signal.alarm(20 * SECONDS)
                    for said, n in attack(name, trial, range(seed, seed + 1)).items():
                        assert n == 1
                        os.write(write, (said.replace("\n", " ") + "\n").encode("utf-8", "replace"))
            except BaseException:  # of the campaign itself: `ended` before its time
                os._exit(1)
            os._exit(0)
        os.close(write)
        with os.fdopen(read, errors="replace") as pipe:
            said = pipe.read().splitlines()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        counts.update(said)
        if code == 0:
            break
        bad = left[len(said)]
        hang = code in (-signal.SIGXCPU, -signal.SIGALRM)
        counts[f"{'hang' if hang else f'crash {code}'} (seed {bad})"] += 1
        left = range(bad + 1, left.stop)
    return counts
