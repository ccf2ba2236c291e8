"""The commands as a person types them: in a process of their own where it matters, else through the application."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from cli_calls import call
from tiny_models import CHARACTERS, tiny, tiny_tokenizer

from llmbrain.cli.common import parse_components
from llmbrain.cli.lists import spread


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random Llama with a character tokenizer, saved as a transformers folder."""
    folder = tmp_path_factory.mktemp("model")
    tiny("llama", seed=3, intermediate_size=40).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    rng = np.random.default_rng(0)
    letters = np.array(list(CHARACTERS))
    path = tmp_path_factory.mktemp("text") / "texts.json"
    path.write_text(json.dumps(["".join(rng.choice(letters, 300)) for _ in range(8)]))
    return path


def test_help_answers_at_once():
    command = [sys.executable, "-m", "llmbrain", "--help"]
    subprocess.run(command, check=True, capture_output=True)  # warm the disk
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "run" in done.stdout
    assert time.perf_counter() - start < 5  # the aim is 0.7 s; what makes it so is tested below, without a clock


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['llmbrain', '--help']\n"
        "from llmbrain.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'nilearn', 'nibabel', 'pandas', 'matplotlib', 'sklearn', 'scipy', 'numpy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip().endswith("[]")


@pytest.mark.parametrize("method", ["published", "magnitude", "random", "networks"])
def test_run_writes_a_study_that_holds_together(monkeypatch, capsys, tmp_path, model_folder, text_file, method):
    import llmbrain as lb

    out = tmp_path / "study"
    arguments = ["run", model_folder, "--text", text_file, "--out", out, "--components", 5, "--ratio", 0.25]
    code, printed, err = call(monkeypatch, capsys, *arguments, "--method", method)
    assert code == 0, err
    assert "pruned" in printed
    summary = json.loads((out / "summary.json").read_text())
    assert {"perplexity", "parameters", "mlp_neurons", "tokens_per_second"} <= summary["dense"].keys()
    assert summary["dense"]["mlp_neurons"] == 80
    assert summary["pruned"]["mlp_neurons"] == 60
    assert summary["pruned"]["parameters"] < summary["dense"]["parameters"]
    assert summary["networks"]["n_components"] == 5
    for name in ("report.html", "plan.json", "scan/manifest.json", "networks/mixing.tsv", "networks/key_neurons.tsv"):
        assert (out / name).is_file(), name
    assert list((out / "networks").glob("*.nii*"))
    small = lb.load_pruned(out / "pruned")[0]
    _, tokenizer = lb.load_model(out / "pruned")
    texts = lb.load_texts(text_file)
    assert lb.perplexity(small, tokenizer, texts) == pytest.approx(summary["pruned"]["perplexity"], rel=1e-5)


def test_steps_alone(monkeypatch, capsys, tmp_path, model_folder, text_file):
    study = tmp_path / "scan"
    code, _, err = call(monkeypatch, capsys, "scan", model_folder, "--text", text_file, "--out", study)
    assert code == 0, err
    code, printed, err = call(monkeypatch, capsys, "decompose", study, "--components", 4, "--stability", 3)
    assert code == 0, err
    code, _, err = call(monkeypatch, capsys, "dualreg", study)
    assert code == 0, err
    assert (study / "dualreg" / "dr_stage1_subject00000.txt").is_file()
    small = tmp_path / "small"
    code, _, err = call(monkeypatch, capsys, "prune", model_folder, "--study", study, "--ratio", 0.5, "--out", small)
    assert code == 0, err
    code, printed, err = call(monkeypatch, capsys, "evaluate", small, "--text", text_file)
    assert code == 0, err
    assert float(printed.split()[-1]) > 1
    assert call(monkeypatch, capsys, "evaluate", small)[0] == 2  # nothing to measure
    for path, word in ((study, "scan"), (study / "networks", "networks"), (small, "LlamaForCausalLM")):
        code, printed, err = call(monkeypatch, capsys, "info", path)
        assert code == 0, err
        assert word in printed


def test_plans_take_heads_and_protect_layers(monkeypatch, capsys, tmp_path, model_folder, text_file):
    import llmbrain as lb
    from llmbrain.anatomy.families import anatomy

    made, cut = tmp_path / "plan.json", ["--ratio", 0.3, "--head-ratio", 0.3, "--protect", -1, "--passes", 9]
    code, printed, err = call(monkeypatch, capsys, "plan", model_folder, "--text", text_file, "--out", made, *cut)
    assert code == 0, err
    assert "groups_kept" in printed
    assert "key/value groups" in err
    plan = lb.PruningPlan.load(made)
    assert made.with_suffix(".png").is_file()
    assert plan.protect == (1,)
    assert len(plan.kept_heads[1]) == plan.groups_before[1] == 2
    assert plan.widths[1] == 40
    small = tmp_path / "small"
    code, _, err = call(monkeypatch, capsys, "prune", model_folder, "--text", text_file, "--plan", made, "--out", small)
    assert code == 0, err
    assert [layer.n_kv_heads for layer in anatomy(lb.load_pruned(small)[0]).layers] == [len(k) for k in plan.kept_heads]
    code, _, err = call(monkeypatch, capsys, "plan", model_folder, "--text", text_file, "--protect", "last")
    assert code == 2
    assert "--protect=last must be whole numbers" in err


def test_a_model_is_pruned_on_text_of_its_own(monkeypatch, capsys, tmp_path, model_folder, text_file):
    import llmbrain as lb

    sizes = {}
    for name, text in (("alone", []), ("mixed", ["--text", text_file])):
        out = tmp_path / name
        code, _, err = call(
            monkeypatch, capsys, "prune", model_folder, *text, "--self-text", 20, "--ratio", 0.5, "--out", out
        )
        assert code == 0, err
        small = lb.load_pruned(out)[0]
        sizes[name] = small.llmbrain_pruning[-1]["calibration"]["shape"]
        assert sum(small.llmbrain_pruning[-1]["widths_before"]) == 2 * sum(
            len(k) for k in small.llmbrain_pruning[-1]["kept"]
        )
    assert sizes["alone"] == [20, 64]
    assert sizes["mixed"][0] > 40
    code, _, err = call(monkeypatch, capsys, "prune", model_folder, "--ratio", 0.5, "--out", tmp_path / "none")
    assert code == 2
    assert "needs calibration texts" in err


@pytest.mark.parametrize("command", ["plan", "prune"])
def test_pruning_commands_have_the_defaults_of_the_library(command):
    import inspect

    import llmbrain as lb
    from llmbrain.cli import pruning
    from llmbrain.pruning import PlanOptions

    ours, named = (inspect.signature(f).parameters for f in (getattr(pruning, command), lb.plan_pruning))
    library = {name: p.default for name, p in named.items()} | vars(PlanOptions())
    for name in ("method", "multiple_of", "head_ratio", "passes", "token_balance"):
        assert ours[name].default == library[name], name


def test_the_same_run_goes_on_and_another_is_refused(monkeypatch, capsys, tmp_path, model_folder, text_file):
    arguments = ["run", model_folder, "--text", text_file, "--out", tmp_path / "s", "--components", 4]
    assert call(monkeypatch, capsys, *arguments, "--method", "random")[0] == 0
    before = (tmp_path / "s" / "summary.json").read_bytes()
    code, _, err = call(monkeypatch, capsys, *arguments, "--method", "random", "--seed", 1)
    assert code == 2
    assert "already holds another study" in err
    assert (tmp_path / "s" / "summary.json").read_bytes() == before
    assert call(monkeypatch, capsys, *arguments, "--method", "random")[0] == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--ratio", "1.5"], "ratio=1.5"),
        (["--method", "guess"], "guess"),
        (["--components", "many"], "many"),
        (["--components", "5000"], "5000"),
        (["--site", "soul"], "soul"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--device", "abacus"], "abacus"),
        (["--compensate", "prayer"], "prayer"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(monkeypatch, capsys, tmp_path, model_folder, text_file, change, named):
    arguments = ["run", model_folder, "--text", text_file, "--out", tmp_path / "s", *change]
    code, _, err = call(monkeypatch, capsys, *arguments)
    assert code == 2
    last = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(last) == 1
    assert named in last[0]


def test_empty_and_short_texts(monkeypatch, capsys, tmp_path, model_folder):
    for content, named in (("", "empty"), ("ab", "fewer than one window")):
        path = tmp_path / "text.txt"
        path.write_text(content)
        code, _, err = call(monkeypatch, capsys, "run", model_folder, "--text", path, "--out", tmp_path / "s")
        assert code == 2
        assert named in err


def test_info_of_nothing(monkeypatch, capsys, tmp_path):
    assert call(monkeypatch, capsys, "info", tmp_path / "no")[0] == 2
    code, _, err = call(monkeypatch, capsys, "info", tmp_path)
    assert code == 2
    assert "nothing that llmbrain knows" in err


def test_components():
    assert [parse_components(v) for v in ("20", "0.9", "auto")] == [20, 0.9, "auto"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("M --text a b --seed 1", "M --text a --text b --seed 1"),
        ("--text a b M", "--text a --text b M"),
        ("--text a --text b M", "--text a --text b M"),
        ("--seed 1 --text a b --fast M", "--seed 1 --text a --text b --fast M"),
        ("--text a", "--text a"),
        ("M --text --seed 1", "M --text --seed 1"),
        ("M --seed=1 --text -1 -2", "M --seed=1 --text -1 --text -2"),
    ],
)
def test_values_one_after_the_other(typed, meant):
    assert " ".join(spread(typed.split(), {"--text"}, {"--seed"}, 1)) == meant


@pytest.mark.parametrize("separate", [" ", ","])
def test_lists_of_the_benchmark_command(separate, model_folder, text_file, tmp_path, monkeypatch, capsys):
    lists = ["--ratios", *f"0.2{separate}0.4".split(" "), "--methods", *f"random{separate}magnitude".split(" ")]
    windows = ["--window", 16, "--max-windows", 8, "--test-windows", 4]
    out = tmp_path / "out.csv"
    code, _, err = call(
        monkeypatch, capsys, "benchmark", model_folder, "--text", text_file, *windows, *lists, "--out", out
    )
    assert code == 0, err
    table = pd.read_csv(out)
    assert set(table["ratio"].dropna()) >= {0.2, 0.4}
    assert set(table["method"].dropna()) >= {"random", "magnitude"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["decompose", "study", "--runs", "-1"], "--runs"),
        (["run", "MODEL", "--text", "TEXT", "--out", "s", "--seed", "-1"], "--seed"),
        (["run", "MODEL", "--text", "TEXT", "--out", "s", "--components", "inf"], "--components"),
        (["run", "MODEL", "--text", "TEXT", "--out", ""], "--out"),
        (["run", "MODEL", "--text", "TEXT"], "--out"),
        (["run", "MODEL", "--text", "TEXT", "--out", "s", "--budget", "soon"], "budget='soon'"),
        (["run", "MODEL", "--text", "TEXT", "--out", "s", "--budget", "0.2s"], "is too small"),
        (["run", "MODEL", "--text", "TEXT", "--out", "s", "--eval-tokens", "100000"], "shorter than the sample"),
        (["run", "MODEL", "--text", "TEXT", "--out", "s", "--config", "none.toml"], "none.toml"),
        (["prune", "MODEL", "--text", "TEXT", "--out", "s", "--head-ratio", "2"], "--head-ratio"),
    ],
)
def test_options_have_their_range(monkeypatch, capsys, tmp_path, model_folder, text_file, arguments, named):
    monkeypatch.chdir(tmp_path)
    code, _, err = call(
        monkeypatch, capsys, *({"MODEL": model_folder, "TEXT": text_file}.get(word, word) for word in arguments)
    )
    assert code == 2
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, err
    assert "Traceback" not in err
    assert named in said[0]
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("command", ["run", "scan", "plan", "prune", "benchmark"])
def test_a_dry_run_says_its_cost_and_writes_nothing(monkeypatch, capsys, tmp_path, model_folder, text_file, command):
    out = tmp_path / "s"
    code, said, err = call(monkeypatch, capsys, command, model_folder, "--text", text_file, "--out", out, "--dry-run")
    assert code == 0, err
    assert "tokens through the model" in said + err
    assert "tokens a second" in said + err
    assert not out.exists()


def test_a_study_is_repeated_by_its_own_file(monkeypatch, capsys, tmp_path, model_folder, text_file):
    first, again = tmp_path / "a", tmp_path / "b"
    arguments = ["run", model_folder, "--text", text_file, "--out", first, "--components", 3, "--method", "flap"]
    code, _, err = call(monkeypatch, capsys, *arguments, "--ratio", 0.3, "--protect", 0)
    assert code == 0, err
    code, _, err = call(monkeypatch, capsys, "run", "--config", first / "config.toml", "--out", again)
    assert code == 0, err
    plans = [json.loads((folder / "plan.json").read_text())["kept"] for folder in (first, again)]
    assert plans[0] == plans[1]
    assert len(plans[0][0]) == 40
