"""The store: what a killed, truncated, edited or foreign folder does, and that nothing is lost or invented."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny, tiny_tokenizer

import llmbrain as lb
from llmbrain._validation import InputError
from llmbrain.hooks.text import ScanWarning
from llmbrain.scanning import CorruptStoreError, schedule
from llmbrain.scanning import manifest as study_module
from llmbrain.scanning.store import FileShards

LETTERS = "abcdefghijklmnopqrst"
TEXTS = [letter * (5 + i) for i, letter in enumerate(LETTERS)]  # 20 texts of 6 to 25 tokens


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of a batch or two, so that a tiny study has several."""
    monkeypatch.setattr(schedule, "SHARD_BYTES", 4000)


def run(out: Path | None, model: Any = None, **options: Any) -> list[lb.Scan]:
    options = {"batch_size": 4, "site": ("neuron", "head"), **options}
    texts = options.pop("texts", TEXTS)
    return lb.scan(tiny("llama") if model is None else model, tiny_tokenizer(), texts, out=out, **options)


def shard_files(folder: Path) -> list[Path]:
    return sorted((folder / "shards").iterdir())


def same(scans: list[lb.Scan], others: list[lb.Scan]) -> bool:
    return len(scans) == len(others) and all(
        (a.data(site=site) == b.data(site=site)).all() for a, b in zip(scans, others) for site in a.sites
    )


# -- round trip ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_shards")
def test_round_trip(tmp_path: Path) -> None:
    events = {"onset": [1], "duration": [3], "trial_type": ["x"]}
    texts = [*TEXTS, lb.Stimulus("línes\u2028and \n ends", events, name="odd")]  # type: ignore[arg-type]
    kept = run(None, texts=texts)
    written = run(tmp_path, texts=texts)
    loaded = lb.load_scans(tmp_path)
    assert len(shard_files(tmp_path)) == 6
    assert same(kept, written)
    assert same(kept, loaded)
    for a, b in zip(kept, loaded):
        for name in ("name", "text", "tokens", "sites", "site", "spaces", "n_tokens", "n_neurons", "model_id"):
            assert getattr(a, name) == getattr(b, name), name
        for name in ("token_ids", "positions", "offsets"):
            assert (getattr(a, name) == getattr(b, name)).all(), name
        assert a.events.equals(b.events)
    assert loaded[-1].name == "odd"
    assert loaded[-1].events.to_numpy().tolist() == [[1, 3, "x"]]


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_round_trip_in_half_precision(tmp_path: Path, dtype: str) -> None:
    assert same(run(None, dtype=dtype), run(tmp_path, dtype=dtype))


@pytest.mark.usefixtures("small_shards")
def test_files_are_what_they_say(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    scans = run(tmp_path)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    shards = {f"shards/{i:04d}.safetensors" for i in range(5)}
    assert names == {"manifest.json", "runs.jsonl", "SHA256SUMS", *shards}
    sums = dict(reversed(line.split("  ")) for line in (tmp_path / "SHA256SUMS").read_text().splitlines())
    assert sums == {name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in shards}
    # The tokens of all runs, one after another, are the rows of the shards one after another.
    tensors = [load_file(path) for path in shard_files(tmp_path)]
    first_layer = torch.cat([shard["neuron.0"] for shard in tensors]).numpy()
    assert (first_layer == np.concatenate([scan.data(0) for scan in scans])).all()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["study"]["sites"]["neuron"] == {"dtype": "float32", "widths": [24, 24]}
    assert manifest["runs"][3]["text_sha256"] == hashlib.sha256(TEXTS[3].encode()).hexdigest()
    assert {"llmbrain", "torch", "transformers"} <= manifest["versions"].keys()
    assert json.loads((tmp_path / "runs.jsonl").read_text().splitlines()[0])["token_ids"] == [1, 3, 3, 3, 3, 3]


@pytest.mark.usefixtures("small_shards")
def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = run(tmp_path)[9]  # tokens 6 + ... + 14 = 90 to 105 of the study
    asked, given = [], []
    original = FileShards.read

    def watched(self: FileShards, index: int, keys: Any, start: int, stop: int) -> list[torch.Tensor]:
        asked.append((keys, stop - start))
        given.extend(original(self, index, keys, start, stop))
        return given[-len(keys) :]

    monkeypatch.setattr(FileShards, "read", watched)
    scan.data(layers=1, tokens=slice(4, 7))
    assert asked == [(["neuron.1"], 3)]
    assert [tuple(tensor.shape) for tensor in given] == [(3, 24)]


def test_the_disk_need_is_printed_before_the_first_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, printed = tiny("llama"), []
    model.model.register_forward_pre_hook(lambda m, a: printed.append(capsys.readouterr().err))
    run(tmp_path, model, site="neuron")
    n_tokens = sum(len(text) + 1 for text in TEXTS)
    need = f"{n_tokens} tokens need {n_tokens * 48 * 4 / 1000:.3g} kB of disk in {tmp_path}"
    assert need in "".join(printed[:2])  # the first pass only looks at the sizes


def test_too_little_disk_is_said_before_the_first_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil._ntuple_diskusage(100, 90, 10)  # type: ignore[attr-defined]
    monkeypatch.setattr(study_module.shutil, "disk_usage", lambda path: full)
    with pytest.raises(InputError, match="but only 10 B are free"):
        run(tmp_path)
    assert not (tmp_path / "shards").exists()


# -- stopped and resumed -------------------------------------------------------------------------------------------


def stop_after(monkeypatch: pytest.MonkeyPatch, n: int, during: str) -> None:
    """Make the writing of shard n fail: before it begins, or in the middle."""
    import safetensors.torch

    save = safetensors.torch.save_file

    def fail(tensors: Any, path: Path) -> None:
        if f"{n:04d}" in Path(path).name:
            if during == "middle":
                Path(path).write_bytes(b"half of a sha")
            raise KeyboardInterrupt
        save(tensors, path)

    monkeypatch.setattr(safetensors.torch, "save_file", fail)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("during", ["before", "middle"])
def test_a_stopped_scan_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 3, during)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    assert [path.name for path in shard_files(tmp_path)] == [f"{i:04d}.safetensors" for i in range(3)]
    with pytest.raises(CorruptStoreError, match=r"0003.safetensors is missing: the study has 2 of 5 shards still"):
        lb.load_scans(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in shard_files(tmp_path)}
    model, passes = tiny("llama"), []
    model.model.register_forward_hook(lambda m, a, o: passes.append(o[0].shape[:2]))
    resumed = run(tmp_path, model)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(passes) == 6  # sizes, the check that it is the same study, a text alone and in a batch, two batches
    assert same(resumed, run(None))
    assert same(lb.load_scans(tmp_path), resumed)


@pytest.mark.usefixtures("small_shards")
def test_resuming_with_another_batch_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 2, "before")
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    for one, other in zip(run(tmp_path, batch_size=3), run(None)):
        assert abs(one.data() - other.data()).max() < 1e-5


@pytest.mark.usefixtures("small_shards")
def test_a_finished_study_is_not_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in shard_files(tmp_path)}
    capsys.readouterr()
    assert same(run(tmp_path), first)
    assert "scan: 0 tokens need 0 B" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in shard_files(tmp_path)} == before


@pytest.mark.usefixtures("small_shards")
def test_a_checksum_line_cut_short(tmp_path: Path) -> None:
    expected = run(tmp_path)
    sums = tmp_path / "SHA256SUMS"
    sums.write_text(sums.read_text()[:-30])
    with pytest.raises(CorruptStoreError, match=r"0004.safetensors is missing"):
        lb.load_scans(tmp_path)
    assert same(run(tmp_path), expected)
    assert same(lb.load_scans(tmp_path), expected)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_a_killed_process_resumes(tmp_path: Path) -> None:
    program = f"""
import os, signal, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
import safetensors.torch
import test_store
from llmbrain.scanning import schedule
schedule.SHARD_BYTES = 4000
save = safetensors.torch.save_file
def die(tensors, path):
    save(tensors, path)
    if "0002" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
safetensors.torch.save_file = die
test_store.run(test_store.Path({str(tmp_path)!r}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env={**os.environ})
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    names = [path.name for path in shard_files(tmp_path)]
    assert names[1:] == ["0000.safetensors", "0001.safetensors"]
    assert len(names) == 3
    assert names[0].startswith(".tmp-")  # whole, but never promised
    assert same(run(tmp_path), run(None))
    assert [path.name for path in shard_files(tmp_path)] == [f"{i:04d}.safetensors" for i in range(5)]


# -- damage --------------------------------------------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[:-10])
    elif how == "edited":
        content[-3] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("how", ["truncated", "edited"])
def test_a_damaged_shard_is_found_when_read_and_made_anew(tmp_path: Path, how: str) -> None:
    expected = run(tmp_path)
    damage(tmp_path / "shards" / "0001.safetensors", how)
    scans = lb.load_scans(tmp_path)
    assert (scans[0].data() == expected[0].data()).all()  # this one lies in another shard
    with pytest.raises(CorruptStoreError, match=r"0001.safetensors does not match its checksum: .*edited"):
        scans[5].data(layers=0, tokens=0)
    with pytest.warns(ScanWarning, match=r"0001.safetensors does not match its checksum.*made anew"):
        again = run(tmp_path)
    assert same(again, run(None))
    assert same(lb.load_scans(tmp_path), again)


@pytest.mark.usefixtures("small_shards")
def test_a_deleted_shard_is_named_and_made_anew(tmp_path: Path) -> None:
    expected = run(tmp_path)
    scans = lb.load_scans(tmp_path)
    damage(tmp_path / "shards" / "0000.safetensors", "deleted")
    with pytest.raises(CorruptStoreError, match=r"0000.safetensors is missing"):
        scans[0].data()
    assert same(run(tmp_path), expected)


@pytest.mark.parametrize("name", ["manifest.json", "runs.jsonl"])
@pytest.mark.parametrize("how", ["truncated", "edited", "deleted"])
def test_damaged_records_are_named(tmp_path: Path, name: str, how: str) -> None:
    run(tmp_path)
    if (name, how) == ("manifest.json", "edited"):  # any other edit of it is a change of facts, not of form
        manifest = json.loads((tmp_path / name).read_text())
        del manifest["study"]["sites"], manifest["sha256"]
        (tmp_path / name).write_text(json.dumps(manifest))
    else:
        damage(tmp_path / name, how)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        lb.load_scans(tmp_path)
    if name == "runs.jsonl":  # the same scan again puts it right
        assert same(run(tmp_path), lb.load_scans(tmp_path))


def test_shards_that_do_not_fit_the_manifest(tmp_path: Path) -> None:
    run(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest["study"]["sites"]["neuron"]["widths"] = [24, 25]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CorruptStoreError, match=r"0000.safetensors does not hold what manifest.json says"):
        lb.load_scans(tmp_path)[0].data()
    manifest["study"]["sites"]["neuron"]["widths"] = [24, 24, 24]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CorruptStoreError, match=r"0000.safetensors does not hold what manifest.json says"):
        lb.load_scans(tmp_path)[0].data()


def test_a_folder_without_a_study(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no scan: there is no manifest.json"):
        lb.load_scans(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "something else"}')
    with pytest.raises(InputError, match="is not the manifest of a scan"):
        lb.load_scans(tmp_path)
    with pytest.raises(InputError, match="is not the manifest of a scan"):
        run(tmp_path)
    (tmp_path / "manifest.json").write_text('{"format": "llmbrain-scan", "format_version": 99}')
    with pytest.raises(InputError, match="format version 99"):
        lb.load_scans(tmp_path)


def test_half_a_surrogate_pair_is_no_name_of_a_site(tmp_path: Path) -> None:
    run(tmp_path)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["sha256"]
    manifest["study"]["sites"]["\ud800"] = manifest["study"]["sites"].pop("neuron")
    path.write_text(json.dumps(manifest))
    with pytest.raises(CorruptStoreError, match=r"manifest.json lacks entries"):
        [scan.data() for scan in lb.load_scans(tmp_path)]


# -- another study -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"texts": TEXTS[:-1]}, "runs_sha256"),
        ({"site": "neuron"}, "sites"),
        ({"dtype": "float16"}, "sites"),
        ({"block_size": 7}, "block_size"),
        ({"model": tiny("llama", seed=1)}, "weights_sum"),
        ({"model": tiny("mistral")}, "model_config_sha256"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*texts are longer")
def test_another_study_is_refused_and_nothing_lost(tmp_path: Path, options: dict[str, Any], what: str) -> None:
    expected = run(tmp_path)
    with pytest.raises(InputError, match=f"already holds another study: its {what} is"):
        run(tmp_path, **options)
    assert same(lb.load_scans(tmp_path), expected)


def test_weights_sum_sees_one_bit_and_no_device() -> None:
    model = torch.nn.Module()
    storage = torch.randn(30)
    model.whole = torch.nn.Parameter(storage[:8].bfloat16())
    model.odd = torch.nn.Parameter(storage[1:12])  # neither begins nor ends at a word
    before = study_module.weights_sum(model)
    assert study_module.weights_sum(model) == before
    with torch.no_grad():
        for i in range(11):
            kept = float(model.odd[i])
            model.odd[i] = float(np.nextafter(np.float32(kept), np.float32(9)))
            assert study_module.weights_sum(model) != before
            model.odd[i] = kept
    assert study_module.weights_sum(model) == before


def test_a_lesioned_model_is_another_study(tmp_path: Path) -> None:
    from llmbrain.intervention import lesion

    model = tiny("llama")
    expected = run(tmp_path, model)
    with lesion(model, np.arange(48) < 4), pytest.raises(InputError, match=r"holds another study: neuron.0"):
        run(tmp_path, model)
    assert same(run(tmp_path, model), expected)


# -- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory of a process from Linux")
def test_memory_does_not_grow_with_tokens(tmp_path: Path) -> None:
    """8 times the tokens (360 MB more on disk) take no more memory than once."""
    program = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from tiny_models import tiny, tiny_tokenizer
import llmbrain as lb
from llmbrain.scanning import schedule
schedule.SHARD_BYTES = 2**23
n = int(sys.argv[1])
scans = lb.scan(tiny("llama", intermediate_size=4096), tiny_tokenizer(), ["hello there " * 5] * n, out=sys.argv[2])
for scan in scans:
    scan.data()
status = open("/proc/self/status").read()  # getrusage would count the parent's memory before exec too
print(int(status.split("VmHWM:")[1].split()[0]) / 1024)
"""
    peaks = []
    for n in (25, 200):
        command = [sys.executable, "-c", program, str(n), str(tmp_path / str(n))]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
        peaks.append(float(done.stdout.split()[0]))
    written = [sum(f.stat().st_size for f in shard_files(tmp_path / str(n))) / 2**20 for n in (25, 200)]
    assert written[1] - written[0] > 300
    assert peaks[1] - peaks[0] < 40
