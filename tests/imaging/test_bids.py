"""The BIDS-derivatives-style folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from image_data import values
from tiny_models import tiny, tiny_tokenizer

import llmbrain as lb
from llmbrain._validation import InputError
from llmbrain.imaging import export_bids, read_nifti


class FittedICA:
    """What `export_bids` needs of a GroupICA."""

    def __init__(self, scans: list[lb.Scan], k: int = 2) -> None:
        self.components_ = values(k, scans[0].space)
        self.mixing_ = [values(s.n_tokens, lb.NeuronSpace([k]), seed=i) for i, s in enumerate(scans)]
        self.n_iter_, self.converged_ = 7, True

    def get_params(self) -> dict[str, Any]:
        return {"n_components": 2, "random_state": 0}


def study() -> list[lb.Scan]:
    tokenizer = tiny_tokenizer()
    named = lb.Stimulus.from_segments([("one two", "count"), (" yes.", "answer")], tokenizer, name="two parts")
    return lb.scan(tiny("llama"), tokenizer, [named, "plain text", named])


def test_bids_folder(tmp_path: Path) -> None:
    scans = study()
    ica = FittedICA(scans)
    folder = export_bids(scans, tmp_path / "bids", ica)
    func = folder / "sub-LlamaForCausalLM" / "func"
    stems = [f"sub-LlamaForCausalLM_task-{t}" for t in ("twoparts_run-1", "reading_run-1", "twoparts_run-2")]
    for stem, scan, courses in zip(stems, scans, ica.mixing_):
        data, space = read_nifti(func / f"{stem}_space-neuron_desc-scan_bold.nii.gz")
        assert (data == scan.data()).all()
        assert space == scan.space
        assert json.loads((func / f"{stem}_space-neuron_desc-scan_bold.json").read_text())["RepetitionTime"] == 1.0
        mixing = pd.read_csv(func / f"{stem}_space-neuron_desc-ICA_mixing.tsv", sep="\t")
        np.testing.assert_allclose(mixing.to_numpy(), courses, rtol=1e-6)
        tokens = (func / f"{stem}_tokens.tsv").read_text().splitlines()[1:]
        assert [json.loads(line.split("\t")[2]) for line in tokens] == scan.tokens
    events = pd.read_csv(func / f"{stems[0]}_events.tsv", sep="\t")
    assert events.to_numpy().tolist() == [[1, 7, "count"], [8, 5, "answer"]]
    maps, _ = read_nifti(folder / "group_space-neuron_desc-ICA_stat-z_components.nii.gz")
    assert (maps == ica.components_).all()
    description = json.loads((folder / "dataset_description.json").read_text())
    assert description["DatasetType"] == "derivative"
    assert description["GeneratedBy"][0]["Name"] == "llmbrain"
    registry = json.loads((folder / "desc-llmbrain_registry.json").read_text())
    assert registry["space-neuron"]["widths"] == [24, 24]
    assert all((folder / name).is_file() for name in registry["files"])
    assert len(registry["files"]) == 3 * 4 - 1 + 2  # a text without conditions has no events
    assert "*_mixing.tsv" in (folder / ".bidsignore").read_text()


def test_nilearn_builds_a_first_level_model_from_the_folder(tmp_path: Path) -> None:
    from nilearn.glm.first_level import first_level_from_bids

    export_bids(study(), tmp_path / "bids")
    models, runs, events, _ = first_level_from_bids(
        tmp_path / "bids", "twoparts", space_label="neuron", img_filters=[("desc", "scan")],
        derivatives_folder=".", slice_time_ref=0.0,
    )  # fmt: skip
    assert len(models) == 1
    assert len(runs[0]) == 2
    assert models[0].t_r == 1.0
    assert [table["trial_type"].tolist() for table in events[0]] == [["count", "answer"]] * 2


def test_the_official_validator_finds_no_error_and_no_warning(tmp_path: Path) -> None:
    beside = Path(sys.executable).with_name("bids-validator-deno")
    validator = str(beside) if beside.is_file() else shutil.which("bids-validator-deno")
    if validator is None:
        pytest.skip("bids-validator-deno is not installed: pip install 'llmbrain[bids]'")
    scans = study()
    folder = export_bids(scans, tmp_path / "bids", FittedICA(scans))

    def issues() -> list[str]:
        done = subprocess.run([validator, str(folder), "--json"], capture_output=True, text=True, timeout=120)
        return [issue["code"] for issue in json.loads(done.stdout)["issues"]["issues"]]

    assert issues() == []
    (folder / ".bidsignore").unlink()
    assert "NOT_INCLUDED" in issues()  # it does look


def test_bids_bad_input(tmp_path: Path) -> None:
    scans = study()
    with pytest.raises(InputError, match="scans is empty"):
        export_bids([], tmp_path)
    with pytest.raises(InputError, match="was not fitted on these scans"):
        export_bids(scans, tmp_path / "a", FittedICA(scans[:2]))
    export_bids(scans, tmp_path / "a", images=False)
    with pytest.raises(InputError, match="is not empty"):
        export_bids(scans, tmp_path / "a")
    export_bids(scans, tmp_path / "a", images=False, overwrite=True)
    assert not list((tmp_path / "a").rglob("*.nii.gz"))
