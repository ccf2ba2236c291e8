"""What belongs together is known by what it was made from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from cli_calls import call
from reliability import campaign
from tiny_models import tiny, tiny_tokenizer

import llmbrain as lb
from llmbrain import InputError
from llmbrain import _files as files
from llmbrain._files import UnverifiedWarning, read_json
from llmbrain._files.parts import HOST
from llmbrain.checkpoints.gguf_opening import check_gguf
from llmbrain.checkpoints.gguf_reading import load_gguf
from llmbrain.imaging.dual_regression_folder import check_dual_regression
from llmbrain.scanning.manifest import warn_of_other_model
from llmbrain.study import Study, decompose
from llmbrain.study import folder as folder_module
from llmbrain.study.folder import claim


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return campaign.make(tmp_path_factory.mktemp("belonging") / "study")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same texts in a model of the same shape: every length is the same."""
    folder = tmp_path_factory.mktemp("belonging") / "other"
    lb.scan(tiny("llama", seed=5), tiny_tokenizer(), campaign.TEXTS, out=folder / "scan", block_size=32)
    with campaign.quiet():
        decompose(folder, 3, progress=False)
    return folder


def test_networks_of_another_study_are_refused_by_name(study: Path, other: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(study, mixed)
    shutil.rmtree(mixed / "networks")
    shutil.copytree(other / "networks", mixed / "networks")
    for part in ("networks", "ica"):
        with pytest.raises(InputError, match=rf"in {mixed}/networks are of another study: found in a scan of"):
            getattr(Study(mixed), part)
    assert len(Study(study).networks) == len(Study(study).ica.components_)


def test_a_scan_does_not_take_the_folder_of_something_else(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study / "networks", tmp_path / "networks")
    before = campaign.keep(tmp_path)
    with pytest.raises(InputError, match=r"already holds files that are no scan \(.*\): give another folder"):
        lb.scan(tiny("llama"), tiny_tokenizer(), campaign.TEXTS, out=tmp_path / "networks", block_size=32)
    assert campaign.keep(tmp_path) == before
    (tmp_path / "networks/SHA256SUMS").unlink()


def test_a_folder_is_looked_at_by_its_owner(tmp_path: Path, monkeypatch) -> None:
    """Another process may have written there, and ended, just before."""
    own = folder_module.owner

    @contextmanager
    def late(folder: Path):
        files.write_text(folder / "manifest.json", "{}")
        with own(folder):
            yield folder

    monkeypatch.setattr(folder_module, "owner", late)
    with pytest.raises(InputError, match="already holds files that are no study"), claim(tmp_path / "a", {"n": 1}):
        raise AssertionError


def test_networks_of_another_model_are_said(study: Path, other: Path, recwarn) -> None:
    networks = Study(study).networks
    warn_of_other_model(networks, tiny("llama"))
    warn_of_other_model(networks, lb.load_scans(study / "scan")[0].origin)
    assert not recwarn.list
    for here in (tiny("llama", seed=5), lb.load_scans(other / "scan")[0].origin):
        with pytest.warns(UserWarning, match="found in other weights"):
            warn_of_other_model(networks, here)
    with pytest.warns(UserWarning, match="found in other weights"):
        lb.dual_regression(networks, lb.load_scans(other / "scan"), device="cpu")


def test_a_dual_regression_of_other_data_is_refused(study: Path, other: Path, tmp_path: Path) -> None:
    out, networks = tmp_path / "dr", Study(study).networks
    scans = lb.load_scans(study / "scan")
    first = lb.dual_regression(networks, scans, out=out, device="cpu")
    again = lb.dual_regression(networks, scans, out=out, device="cpu")
    assert np.array_equal(first.maps, again.maps)
    with pytest.raises(FileExistsError, match="other data in run 0"), campaign.quiet():
        lb.dual_regression(networks, lb.load_scans(other / "scan"), out=out, device="cpu")
    arrays = [scan.data() for scan in scans]
    lb.dual_regression(networks, arrays, out=tmp_path / "arrays", device="cpu")
    lb.dual_regression(networks, arrays, out=tmp_path / "arrays", device="cpu")
    arrays[1] = arrays[1] + np.float32(1e-3)
    with pytest.raises(FileExistsError, match="other data in run 1"):
        lb.dual_regression(networks, arrays, out=tmp_path / "arrays", device="cpu")


def test_a_plan_and_a_summary_of_another_study_are_found(study: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(study, mixed)
    with files.transaction(mixed) as new:
        files.write_json(new / "summary.json", {"pruned": 1})
        shutil.copy(mixed / "plan.json", new / "plan.json")
    assert Study(mixed).summary == {"pruned": 1}
    (mixed / "summary.json").write_text('{"pruned": 2}')
    whole = tiny("llama", seed=5)
    lb.plan_pruning(whole, ratio=0.5, method="magnitude").save(tmp_path / "plan.json")
    shutil.copy(tmp_path / "plan.json", mixed / "plan.json")
    for part in ("summary", "plan"):
        with pytest.raises(InputError, match=rf"{part}\.json does not match its checksum"):
            getattr(Study(mixed), part)


def test_a_model_without_checksums_says_so(study: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(study / "pruned", moved)
    (moved / "SHA256SUMS").unlink()
    found = lb.check(moved)
    assert found.loc[found["state"] != "ok", "file"].tolist() == ["SHA256SUMS"]
    assert "is missing: files of this folder cannot be verified" in found["state"].iloc[0]
    with pytest.warns(UnverifiedWarning, match=r"holds no SHA256SUMS: its files are not verified \(copy that file"):
        lb.load_pruned(moved)
    lines = "".join(f"{files.file_sha256(p)}  {p.name}\n" for p in sorted(moved.glob("*.*")))
    (moved / "SHA256SUMS").write_text(lines)  # what `sha256sum *.*` prints
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnverifiedWarning)
        lb.load_pruned(moved)
    assert set(lb.check(moved)["state"]) == {"ok"}


@pytest.mark.parametrize("part", ["networks", "networks/ica", "pruned", "lesions"])
def test_a_part_without_checksums_is_named(study: Path, tmp_path: Path, part: str) -> None:
    shutil.copytree(study, tmp_path / "study")
    (tmp_path / "study" / part / "SHA256SUMS").unlink()
    with campaign.quiet():
        found = lb.check(tmp_path / "study")
    assert found.loc[found["state"] != "ok", "file"].tolist() == [f"{part}/SHA256SUMS"]


@pytest.mark.parametrize(
    "name",
    ["scan/manifest.json", "networks/networks.json", "networks/ica/ica.json", "networks/study.json", "plan.json",
     "pruned/pruning.json", "dualreg/dual_regression.json", "lesions/lesions.json", "image.json"],
)  # fmt: skip
def test_what_a_newer_version_wrote_is_refused(study: Path, tmp_path: Path, name: str) -> None:
    """In one line that names the file, and nothing is made anew over it."""
    newer = tmp_path / "study"
    shutil.copytree(study, newer)
    record = read_json(newer / name)
    (newer / name).write_text(json.dumps(record | {"format_version": 2}))
    (newer / name).with_name("SHA256SUMS").unlink(missing_ok=True)
    before = campaign.keep(newer)
    read = {
        "scan": lambda: lb.load_scans(newer / "scan"), "networks": lambda: Study(newer).networks,
        "ica": lambda: Study(newer).ica, "study.json": lambda: campaign.networks(newer, overwrite=False),
        "plan.json": lambda: lb.PruningPlan.load(newer / name), "pruned": lambda: lb.load_pruned(newer / "pruned"),
        "dualreg": lambda: campaign.dualreg(newer), "lesions": lambda: campaign.lesions(newer),
        "image.json": lambda: lb.read_nifti(newer / "image.nii"),
    }  # fmt: skip
    work = read.get(Path(name).name) or read[Path(name).parent.name]
    with (
        campaign.quiet(),
        pytest.raises(InputError, match=r"format version 2; .* reads 1: update llmbrain") as said,
    ):
        work()
    assert Path(name).name in str(said.value)
    assert campaign.keep(newer) == before


@pytest.mark.parametrize("what", ["parameters", "windows", "space", "components", "run"])
def test_records_whose_entries_are_not_theirs(study: Path, tmp_path: Path, what: str) -> None:
    """What the mutations of `benchmarks/reliability.py` found."""
    shutil.copytree(study, tmp_path / "study")
    path = tmp_path / "study" / ("dualreg/dual_regression.json" if what == "run" else "networks/ica/ica.json")
    record = read_json(path)
    match what:
        case "parameters":
            record["parameters"]["outnull"] = record["parameters"].pop("n_components")
        case "run":
            record["runs"] *= 2
        case "components":
            record["windows"] = [["a", "b"]]
        case _:
            del record[what]
    path.with_name("SHA256SUMS").unlink()
    path.write_text(json.dumps(record))
    with campaign.quiet(), pytest.raises(InputError, match=path.name) as said:
        (lb.read_ica if what != "run" else check_dual_regression)(path.parent)
    assert "\n" not in str(said.value)


def test_every_flip_in_a_gguf_is_found(tmp_path: Path, shared_data: Path) -> None:
    pytest.importorskip("gguf")
    model = lb.load_model(shared_data / "models/stories260K")
    path = lb.save_pruned(*model, tmp_path / "a.gguf", format="gguf", gguf_type="q8_0")
    whole = path.read_bytes()
    right, counts = str(load_gguf(path)[0].state_dict()), Counter[str]()
    rng = np.random.default_rng(0)
    for at in [*rng.integers(len(whole) * 8, size=20), whole.find(b"llmbrain.checksum") * 8]:
        broken = bytearray(whole)
        broken[at // 8] ^= 1 << (at % 8)
        path.write_bytes(broken)
        said = campaign.outcome(lambda path: str(load_gguf(path)[0].state_dict()), path, right)
        assert said in ("found", "harmless")
        counts[said] += 1
    assert counts["harmless"] <= 1


def test_a_gguf_that_another_program_made_of_ours_is_read(tmp_path: Path, shared_data: Path) -> None:
    """``llama-quantize`` and ``gguf-split --merge`` copy all entries, the checksum of the old file among them."""
    gguf = pytest.importorskip("gguf")
    dense = lb.load_model(shared_data / "models/stories260K")
    path = lb.save_pruned(*dense, tmp_path / "a.gguf", format="gguf", gguf_type="f32")
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    for name, field in reader.fields.items():
        kind = field.types[0]
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        if kind == gguf.GGUFValueType.ARRAY:
            writer.add_array(name, field.contents())
        else:
            writer.add_key_value(name, field.contents(), kind)
    for tensor in reader.tensors:
        value, q8_0 = np.array(tensor.data), gguf.GGMLQuantizationType.Q8_0
        if value.ndim == 2 and value.shape[1] % 32 == 0:
            writer.add_tensor(tensor.name, gguf.quants.quantize(value, q8_0), raw_dtype=q8_0)
        else:
            writer.add_tensor(tensor.name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert check_gguf(path)
    assert not check_gguf(tmp_path / "b.gguf")
    model, other = (lb.load_model(tmp_path / name)[0] for name in ("a.gguf", "b.gguf"))
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(other.state_dict()[name].numpy(), value.numpy(), atol=0.02)
    whole = (tmp_path / "b.gguf").read_bytes()
    for end in (len(whole) - 33, len(whole) // 2, 700):
        (tmp_path / "b.gguf").write_bytes(whole[:end])
        with pytest.raises(InputError, match=r"b\.gguf"):
            lb.load_model(tmp_path / "b.gguf")


def test_the_same_command_again_is_done_before(tmp_path: Path, monkeypatch, capsys) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("".join(campaign.TEXTS) * 4)
    prune = ["prune", tmp_path / "model", "--method", "magnitude", "--text", tmp_path / "text.txt"]
    out = tmp_path / "small"
    assert call(monkeypatch, capsys, *prune, "--out", out)[0] == 0
    assert read_json(out / "pruning.json")["made_from"]
    before = campaign.keep(out)
    code, _, err = call(monkeypatch, capsys, *prune, "--out", out)
    assert code == 0, err
    assert "done before" in err
    assert campaign.keep(out) == before
    code, _, err = call(monkeypatch, capsys, *prune, "--out", out, "--ratio", "0.5")
    assert code == 2
    assert "holds a model already" in err


def test_the_same_export_again_is_done_before(tmp_path: Path, monkeypatch, capsys, shared_data: Path) -> None:
    pytest.importorskip("gguf")
    export = ["export", shared_data / "models/stories260K", "--format", "gguf", "--out", tmp_path / "a.gguf"]
    assert call(monkeypatch, capsys, *export)[0] == 0
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = tmp_path / f".tmp-{HOST}-{gone.pid}-0-a.gguf"
    left.hardlink_to(tmp_path / "a.gguf")  # killed between its last two steps
    code, _, err = call(monkeypatch, capsys, *export)
    assert (code, "done before" in err) == (0, True), err
    assert not left.exists()
    assert call(monkeypatch, capsys, *export, "--gguf-type", "f32")[0] == 2


def test_a_merge_does_not_take_the_folder_of_something_else(study: Path, tmp_path: Path) -> None:
    shutil.copytree(study / "networks", tmp_path / "networks")
    before = campaign.keep(tmp_path)
    with pytest.raises(InputError, match="already holds files that are no scan"):
        lb.merge([study / "scan"], tmp_path / "networks")
    assert campaign.keep(tmp_path) == before
