"""`llmbrain networks` and `llmbrain lesion`, as a person types them."""

import json

import numpy as np
import pandas as pd
import pytest
from cli_calls import call
from tiny_models import tiny, tiny_tokenizer

import llmbrain as lb


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A model, its scan with conditions, its networks, and a text."""
    folder = tmp_path_factory.mktemp("study")
    model, tokenizer = tiny("llama"), tiny_tokenizer()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    texts = [
        lb.Stimulus.from_segments([("the cat sat. ", "cat"), ("a dog ran! ", "dog")] * 2, tokenizer, f"run{i}")
        for i in range(3)
    ]
    scans = lb.scan(model, tokenizer, texts, out=folder / "scan")
    ica = lb.GroupICA(3, random_state=0).fit(scans)
    lb.FunctionalNetworks.from_ica(ica, threshold=1.5).save(folder / "networks")
    (folder / "words.txt").write_text("the cat and the dog ran home and sat. " * 20)
    (folder / "more.json").write_text(json.dumps(["who is it? it is the cat! "] * 20))
    return folder


def test_networks_writes_tables_and_figures(study, monkeypatch, capsys, tmp_path):
    code, out, err = call(monkeypatch, capsys, "networks", study, "--out", tmp_path, "--permutations", "9")
    assert code == 0, err
    table = pd.read_csv(tmp_path / "table-networks.tsv", sep="\t")
    assert table.network.tolist() == ["IC00", "IC01", "IC02"]
    assert {"size", "layers", "tokens", "t", "p_fwe"} <= set(table)
    assert len(pd.read_csv(tmp_path / "table-connectivity.tsv", sep="\t")) == 3
    assert (tmp_path / "figure-layer_profile.png").stat().st_size > 1000
    assert "IC00" in out


def test_lesion_prints_effects_and_controls(study, monkeypatch, capsys, tmp_path):
    arguments = ["lesion", study / "model", "--networks", study, "--text", study / "words.txt", "--text",
                 study / "more.json", "--window", "32", "--n-random", "3", "--out", tmp_path]  # fmt: skip
    code, _, err = call(monkeypatch, capsys, *arguments)
    assert code == 0, err
    table = pd.read_csv(tmp_path / "lesion_table.tsv", sep="\t")
    assert table.evaluation.unique().tolist() == ["words", "more"]
    assert len(table) == 6
    model, tokenizer = lb.load_model(study / "model")
    networks = lb.FunctionalNetworks.load(study / "networks")
    text = [(study / "words.txt").read_text()]
    with lb.lesion(model, networks["IC01"]):
        inside = np.log(lb.perplexity(model, tokenizer, text, window=32, max_windows=32))
    intact = np.log(lb.perplexity(model, tokenizer, text, window=32, max_windows=32))
    row = table[(table.network == "IC01") & (table.evaluation == "words")].iloc[0]
    assert row.effect == pytest.approx(inside - intact, abs=1e-5)
    code, _, err = call(monkeypatch, capsys, *arguments[:-4], "--n-random", "4", "--out", tmp_path)
    assert code == 2
    assert "holds another lesion table" in err


@pytest.mark.parametrize("method", ["ulcmod", "kmeans", "nmf"])
def test_rivals_of_an_ica_are_found_saved_and_lesioned(study, monkeypatch, capsys, tmp_path, method):
    found = tmp_path / "found"
    decompose = ["decompose", study / "scan", "--method", method, "--components", "3", "--out", found]
    threshold = [] if method == "ulcmod" else ["--threshold", "1"]
    code, _out, err = call(monkeypatch, capsys, *decompose, *threshold)
    assert code == 0, err
    networks, fit = lb.FunctionalNetworks.load(found), lb.read_ica(found / "ica")
    assert type(fit) is (lb.decomposition.ULCMOD if method == "ulcmod" else lb.GroupICA)
    assert networks.masks.any(axis=1).all()
    if method == "ulcmod":
        np.testing.assert_array_equal(networks.masks, [fit.labels_ == k for k in range(3)])
    page = (found / "report.html").read_text(encoding="utf-8")
    assert ("independent components were" in page) is False
    assert {"ulcmod": "ULCMOD", "kmeans": "k-means of the neurons", "nmf": "semi-nonnegative"}[method] in page
    code, _, err = call(monkeypatch, capsys, *decompose, *threshold)
    assert code == 0, err
    assert "done before" in err
    lesion = ["lesion", study / "model", "--networks", found, "--text", study / "words.txt", "--window", "32"]
    code, _, err = call(monkeypatch, capsys, *lesion, "--n-random", "2", "--out", tmp_path / "lesions")
    assert code == 0, err
    table = pd.read_csv(tmp_path / "lesions/lesion_table.tsv", sep="\t")
    assert (table.effect != 0).all()
    # random starts are not compared: there are none (of k-means those of an ICA were taken for its own)
    code, _, err = call(monkeypatch, capsys, *decompose, "--overwrite", "--stability", "3")
    assert (code, f"method='{method}' does not have" in err) == (2, True)
    if method == "ulcmod":
        for wrong, said in (
            (["--threshold", "2"], "say themselves"),
            (["--components", "auto"], "n_components='auto'"),
        ):
            code, _, err = call(monkeypatch, capsys, *decompose, "--overwrite", *wrong)
            assert (code, said in err) == (2, True), err


def test_bad_input_is_one_line(study, monkeypatch, capsys, tmp_path):
    code, _, err = call(monkeypatch, capsys, "networks", tmp_path)
    assert (code, err.count("\n")) == (2, 1)
    assert "holds no networks" in err
    same = ["--text", study / "words.txt"] * 2
    code, _, err = call(monkeypatch, capsys, "lesion", study / "model", "--networks", study, *same)
    assert code == 2
    assert "same name" in err
