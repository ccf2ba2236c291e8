"""The main job in Python: `lb.run`, and what `lb.Study` finds in its folder afterwards."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

import llmbrain as lb
from llmbrain import InputError
from llmbrain.page.text import number
from llmbrain.study.folder import claim
from llmbrain.study.settings import Settings

prune_module = sys.modules[lb.prune.__module__]

pytestmark = pytest.mark.filterwarnings("ignore::llmbrain.hooks.text.ScanWarning")


@pytest.fixture(scope="module")
def made(subject, texts, tmp_path_factory):
    """The study as `run` gives it back."""
    model, tokenizer = subject
    said = []
    folder = tmp_path_factory.mktemp("study") / "s"
    study = lb.run(
        model, tokenizer, texts, out=folder, n_components=4, method="flap", name="tiny", progress=said.append
    )
    assert [line[:3] for line in said if "/5 " in line] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    return study


def test_a_study_is_read_from_its_folder(made, subject):
    study = lb.Study(made.folder)
    assert vars(study).keys() == {"folder"}  # nothing is read before it is asked for
    np.testing.assert_array_equal(study.networks.maps, made.networks.maps)
    assert [run.name for run in study.scans] == [run.name for run in made.scans]
    assert study.plan.widths == made.plan.widths
    assert study.summary == json.loads(json.dumps(made.summary))
    ids = torch.tensor([[1, 5, 9, 7]])
    torch.testing.assert_close(study.model(input_ids=ids).logits, made.model(input_ids=ids).logits)
    assert study.tokenizer("abc").input_ids == subject[1]("abc").input_ids
    assert study.summary["pruned"]["parameters"] == sum(p.numel() for p in study.model.parameters())
    with pytest.raises(InputError, match="holds no lesion table"):
        _ = study.lesions


def test_the_report_of_a_study_holds_what_is_there(made, subject, tmp_path):
    study = lb.Study(made.folder)
    page = study.report.save(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "flap" in page
    assert "llmbrain: tiny" in page
    table = lb.lesion_table(subject[0], study.networks, {"letters": torch.ones(2, 8, dtype=torch.long)}, n_random=2,
                            n_matched=0, progress=False)  # fmt: skip
    table.save(made.folder / "lesions")
    again = lb.Study(made.folder)
    np.testing.assert_allclose(again.lesions.matrix("effect"), table.matrix("effect"))
    assert again.lesions.provenance == table.provenance
    assert "letters" in lb.report(again).html()


def test_the_report_says_what_was_held_out_and_how_it_was_cut(made, tmp_path):
    study = lb.Study(made.folder)
    page = study.report.save(tmp_path / "report.html").read_text(encoding="utf-8")
    held, sample = study.summary["held_out"], study.summary["sample"]
    assert "Perplexity, held-out text" in page
    assert number(held["pruned_perplexity"], 4) in page
    assert f"held-out text ({held['windows']} windows, {held['tokens']:,} tokens; neither the networks nor" in page
    assert f"{number(held['loss_added'])} nats a token more (standard error {number(held['loss_added_se'], 2)}" in page
    assert f"perplexities are of {sample['windows']} windows of {sample['window']} tokens" in page
    assert "perplexity se" not in page  # an error is no number to compare
    read = study.summary["cut"]["calibration"]
    assert f"The calibration text was {read['windows']} windows of {read['window']} tokens" in page
    assert read["own_windows"] == 0
    assert "the model wrote itself" not in page
    record = made.model.llmbrain_pruning[-1]
    assert study.summary["cut"]["compensate"] == record["compensate"] == "least-squares"
    # what a budget or a deep model would add
    summary = {**study.summary, "gave_up": ["method: flap instead of networks"]}
    done = {"compensate": "least-squares", "propagation": 0.5, "calibration": {**read, "own_windows": 2}}
    other = lb.reporting.report(study, summary={**summary, "cut": done}).save(tmp_path / "other.html").read_text()
    for line in ("given up for the budget: method: flap instead of networks", "2 of which the model wrote itself",
                 "0.5 of the error that the layers before it left", "arXiv:2504.09629"):  # fmt: skip
        assert line in other
        assert line not in page


def test_the_report_says_what_networks_had_to_do_with_the_choice(made, subject, texts, tmp_path):
    model, tokenizer = subject
    for balance in (0.5, 0.0):
        plan = lb.plan_pruning(
            model, made.networks, ratio=0.3, allocation="uniform", token_balance=balance, tokenizer=tokenizer,
            calibration=texts,
        )  # fmt: skip
        page = lb.reporting.report(plan).save(tmp_path / "plan.html").read_text(encoding="utf-8")
        assert "output gradients: Kurtic et al. 2023; van der Ouderaa et al. 2024)" in page
        assert "each of 4 networks keeps at least 0.5 of the key neurons that it would keep" in page
        weighted = "tokens weighted by the energy that networks leave unexplained (strength 0.5)"
        assert (weighted in page) == (balance > 0)
        assert ("tokens weighted" in page) == (balance > 0)


def test_the_forecast_leaves_texts_of_a_token_out(subject, texts, tmp_path):
    model, tokenizer = subject
    study = lb.run(
        model, tokenizer, [*texts, "a", texts[0], "b"], out=tmp_path / "s", n_components=4, method="magnitude",
        progress=False,
    )  # fmt: skip
    rows = study.summary["forecast_by_function"]
    assert study.summary["forecast_on"] == "held_out"
    assert all(row["tokens"] > 0 and np.isfinite(row["measured"]) for row in rows)


def test_networks_and_calibration_read_the_same_ids(subject, texts, tmp_path, monkeypatch):
    """What repairs the weights is the text that the networks were found in, token by token."""
    model, tokenizer = subject
    calibrated, repair = [], prune_module.repair

    def listening(*args, **kwargs):
        calibrated.extend(a for a in [*args, *kwargs.values()] if isinstance(a, torch.Tensor) and a.dtype == torch.long)
        return repair(*args, **kwargs)

    monkeypatch.setattr(prune_module, "repair", listening)
    made = lb.run(model, tokenizer, texts, out=tmp_path / "s", n_components=3, name="tiny", progress=False)
    scanned = np.concatenate([scan.token_ids for scan in made.scans])
    assert len(calibrated) == 1
    read = calibrated[0].flatten().numpy()
    assert len(scanned) - calibrated[0].shape[1] < len(read) <= len(scanned)  # whole windows
    np.testing.assert_array_equal(read, scanned[: len(read)])
    assert made.plan.details["calibration"]["shape"] == list(calibrated[0].shape)


def test_whole_blocks_may_go(subject, texts, tmp_path):
    model, tokenizer = subject
    options = {"n_components": 2, "method": "flap", "ratio": 0.5, "drop": ["attention", "mlp"], "eval_tokens": 1024,
               "n_tokens": 2048}  # fmt: skip
    study = lb.run(model, tokenizer, texts, out=tmp_path / "s", name="tiny", progress=False, **options)
    tried = study.plan.details["blocks"]["tried"]
    assert len(tried) > 1
    assert tried[0]["attention"] == tried[0]["mlp"] == []
    assert 'drop = ["attention", "mlp"]' in (tmp_path / "s/config.toml").read_text()
    for wrong, message in (({"format": "uniform"}, "whole layers of one width only"),
                           ({"head_ratio": 0.5}, "attentions go whole, or single heads do")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            lb.run(model, tokenizer, texts, out=tmp_path / "t", progress=False, **options | wrong)
    assert not (tmp_path / "t").exists()


def test_parts_alone_are_a_study(made):
    assert len(lb.Study(made.folder / "networks").networks) == 4
    assert len(lb.Study(made.folder / "scan").scans) == len(made.scans)
    with pytest.raises(InputError, match="holds no networks"):
        _ = lb.Study(made.folder / "scan").networks
    with pytest.raises(InputError, match="does not exist"):
        lb.Study(made.folder / "nowhere")


def test_the_model_comes_back_untouched_and_the_same_call_goes_on(made, subject, texts):
    model, tokenizer = subject
    before = {k: v.clone() for k, v in model.state_dict().items()}
    options = {"out": made.folder, "n_components": 4, "name": "tiny", "progress": False}
    again = lb.run(model, tokenizer, texts, method="flap", **options)
    assert again.plan.widths == made.plan.widths
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(InputError, match="already holds another study"):
        lb.run(model, tokenizer, texts, method="random", **options)
    with pytest.raises(InputError, match="texts are empty"):
        lb.run(model, tokenizer, [" "], method="flap", **options)


def test_a_seed_that_is_drawn_is_recorded():
    drawn = Settings(random_state=None)
    assert drawn.random_state != Settings(random_state=None).random_state
    assert drawn.to_dict()["seed"] == Settings.of(drawn, ratio=0.5).random_state == drawn.random_state


@pytest.mark.parametrize("name", ["keep", "forget", "drop", "protect", "site", "like", "n_components", "ratio"])
@pytest.mark.parametrize("value", [1.5, 10**400, True, [[]], [{}], {"a": 1}, [1.9], b"mlp"])
def test_values_of_another_kind_are_one_line(name, value):
    with pytest.raises(InputError, match=name):
        Settings(**{name: value})


def test_one_name_is_a_list_of_one():
    assert Settings(keep="code", forget=("a", "a"), ratio=0.2).keep == ("code",)
    assert Settings(drop="mlp").drop == ("mlp",)
    assert Settings(keep=[]).keep is None
    assert Settings(protect=[]).protect == ()
    assert Settings(protect=range(2)).protect == (0, 1)


@pytest.mark.parametrize("text", ["a = " + "[" * 5000, "seed = " + "1" * 5000, "protect = 3", "drop = [1]", "like = 5"])
def test_a_file_of_settings_that_makes_no_sense(text, tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(InputError):
        Settings.from_toml(path)


def test_what_is_to_last_and_to_be_unnamed_stands_in_the_file_that_repeats_it(tmp_path):
    how = Settings(forget=("a",), last=True, indices=False)
    (tmp_path / "config.toml").write_text(how.to_toml())
    assert "last = true\nindices = false\n" in how.to_toml()
    assert Settings.from_toml(tmp_path / "config.toml") == how
    for wrong, message in (({"last": True}, "is an option of forget"), ({"last": "yes"}, "must be true or false"),
                           ({"last": True, "forget": "a", "compensate": None}, "that makes forgetting last"),
                           ({"indices": False, "format": "masked"}, "which names what went"),
                           ({"indices": False, "expert_ratio": 0.5}, "which names what went")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            Settings(**wrong)


def test_a_folder_is_claimed(tmp_path):
    def held(name, **options):
        with claim(tmp_path / name, *options.pop("settings"), **options):
            return sorted(p.name for p in (tmp_path / name).iterdir())

    assert held("s", settings=[{"a": 1}]) == [".llmbrain-lock", "SHA256SUMS", "study.json"]
    (tmp_path / "s" / "scan").mkdir()
    (tmp_path / "s" / "scan" / "manifest.json").touch()
    (tmp_path / "s" / "mine.txt").touch()
    held("s", settings=[{"a": 1}])
    with pytest.raises(InputError, match="a: 1 there, 2 now"):
        held("s", settings=[{"a": 2}])
    assert (tmp_path / "s" / "scan").is_dir()
    # what other settings made is gone, and nothing else
    assert held("s", settings=[{"a": 2}], overwrite=True) == [".llmbrain-lock", "SHA256SUMS", "mine.txt", "study.json"]
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".tmp-000000-1-0-set").mkdir()
    (tmp_path / "killed" / ".llmbrain-lock").touch()
    assert "study.json" in held("killed", settings=[{"a": 1}])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    with pytest.raises(InputError, match="no study"):
        held("other", settings=[{"a": 1}])
