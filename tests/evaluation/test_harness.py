"""Tasks through the harness, against log-likelihoods that plain transformers gives."""

from __future__ import annotations

import json
import random
import socket
import sys

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmbrain as lb
from llmbrain.anatomy.families import anatomy

LIMIT = 20


@pytest.fixture(scope="module")
def piqa(shared_data, tmp_path_factory):
    """A task's YAML file on local files: questions and labels of PIQA, joined."""
    pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra 'harness')")
    folder = tmp_path_factory.mktemp("piqa")
    documents = (shared_data / "corpora/piqa-valid.jsonl").read_text(encoding="utf-8").splitlines()
    labels = (shared_data / "corpora/piqa-valid-labels.lst").read_text(encoding="utf-8").split()
    rows = [json.loads(d) | {"label": int(label)} for d, label in zip(documents, labels, strict=True)]
    (folder / "piqa.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = {
        "task": "piqa_here",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"validation": str(folder / "piqa.jsonl")},
            "cache_dir": str(folder / "cache"),
        },
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_choice": "{{[sol1, sol2]}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / "tasks").mkdir()
    (folder / "tasks" / "piqa_here.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder / "tasks" / "piqa_here.yaml", config, rows


@pytest.fixture(scope="module")
def stories(shared_data):
    folder = shared_data / "models" / "stories260K"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def by_hand(model, tokenizer, rows):
    """Accuracy by the log-likelihood of each solution, and by it divided by the solution's length."""
    hits, normed = [], []
    for row in rows:
        scores = []
        for solution in (row["sol1"], row["sol2"]):
            start = tokenizer(f"Question: {row['goal']}\nAnswer:").input_ids
            whole = tokenizer(f"Question: {row['goal']}\nAnswer: {solution}").input_ids
            n = len(whole) - len(start)
            with torch.inference_mode():
                log_p = torch.log_softmax(model(input_ids=torch.tensor([whole])).logits[0, :-1].double(), -1)
            scores.append(sum(log_p[i - 1, whole[i]].item() for i in range(len(whole) - n, len(whole))))
        hits.append(int(np.argmax(scores)) == row["label"])
        lengths = [len(row["sol1"]), len(row["sol2"])]
        normed.append(int(np.argmax(np.divide(scores, lengths))) == row["label"])
    return np.mean(hits), np.mean(normed)


def values(frame):
    return dict(zip(frame["metric"], frame["value"], strict=True))


def test_equals_log_likelihoods_of_transformers_at_any_batch_size(piqa, stories, monkeypatch):
    path, _, rows = piqa
    reached = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *place, **more: reached.append(place))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    one = lb.evaluate(*stories, path, limit=LIMIT, batch_size=1)
    assert list(one.columns) == ["task", "metric", "value", "stderr"]
    assert set(one["task"]) == {"piqa_here"}
    accuracy, normed = by_hand(*stories, rows[:LIMIT])
    assert values(one) == pytest.approx({"acc": accuracy, "acc_norm": normed})
    expected = (accuracy * (1 - accuracy) / (LIMIT - 1)) ** 0.5
    assert one.loc[one["metric"] == "acc", "stderr"].item() == pytest.approx(expected)
    eight = lb.evaluate(*stories, path, limit=LIMIT, batch_size=8)
    assert eight.equals(one)
    assert not reached, "local files need no network"


def test_names_folders_and_dicts_are_the_same_task(piqa, stories):
    path, config, _ = piqa
    frames = [
        lb.evaluate(*stories, "piqa_here", include_path=path.parent, limit=4),
        lb.evaluate(*stories, path.parent, limit=4),
        lb.evaluate(*stories, [config], limit=4),
    ]
    assert all(frame.equals(frames[0]) for frame in frames[1:])
    assert len(frames[0]) == 2


def test_a_pruned_model_and_its_folder_agree_and_nothing_changes(piqa, shared_data, tmp_path):
    folder = shared_data / "models" / "stories260K"
    model, tokenizer = lb.load_model(folder)
    plan = lb.plan_pruning(model, ratio=0.3, method="magnitude", allocation="global")
    small = lb.prune(model, plan)
    assert len(set(anatomy(small).widths)) > 1
    lb.save_pruned(small, tokenizer, tmp_path / "small")
    small.train()
    before = {name: value.clone() for name, value in small.state_dict().items()}
    padding, states = tokenizer.pad_token_id, (random.getstate(), torch.get_rng_state())
    in_memory = lb.evaluate(small, tokenizer, piqa[0], limit=8, num_fewshot=0)
    assert small.training
    assert "tie_weights" not in vars(small)
    assert tokenizer.pad_token_id == padding
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert all(torch.equal(before[name], value) for name, value in small.state_dict().items())
    assert lb.evaluate(tmp_path / "small", None, piqa[0], limit=8).equals(in_memory)


def test_bad_input_is_named(piqa, stories, tmp_path):
    with pytest.raises(lb.InputError, match="batch_size=0"):
        lb.evaluate(*stories, piqa[0], batch_size=0)
    with pytest.raises(lb.InputError, match="limit=0"):
        lb.evaluate(*stories, piqa[0], limit=0)
    with pytest.raises(lb.InputError, match="names no task"):
        lb.evaluate(*stories, [])
    with pytest.raises(lb.InputError, match="tokenizer=None"):
        lb.evaluate(stories[0], None, piqa[0])
    with pytest.raises(lb.InputError, match="holds no YAML"):
        lb.evaluate(*stories, tmp_path)
    with pytest.raises(lb.InputError, match="predicts no next token"):
        lb.evaluate(stories[0].model, stories[1], piqa[0])
    broken = piqa[1] | {"dataset_kwargs": {"data_files": {"validation": str(tmp_path / "none.jsonl")}}}
    with pytest.raises(lb.InputError, match=r"piqa_here.* cannot be loaded"):
        lb.evaluate(*stories, broken)


@pytest.mark.slow
def test_an_unknown_name_gets_a_hint(piqa, stories):
    with pytest.raises(lb.InputError, match=r"did you mean.*'piqa'"):
        lb.evaluate(*stories, "piqaa")


def test_without_lm_eval_the_extra_is_named(stories, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(lb.InputError, match=r"llmbrain\[harness\]"):
        lb.evaluate(*stories, "piqa")


def test_the_command_prints_and_writes_the_table(piqa, shared_data, monkeypatch, capsys, tmp_path):
    import pandas as pd

    from llmbrain.cli import main

    folder, table = shared_data / "models" / "stories260K", tmp_path / "table.csv"
    arguments = ["evaluate", folder, "--tasks", piqa[0], "--limit", 4, "--device", "cpu", "--out", table]
    monkeypatch.setattr(sys, "argv", ["llmbrain", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code in (0, None)
    assert "piqa_here" in capsys.readouterr().out
    assert list(pd.read_csv(table)["metric"]) == ["acc", "acc_norm"]


def test_a_word_names_a_task_before_a_folder(piqa, monkeypatch, tmp_path):
    from lm_eval.tasks import TaskManager

    from llmbrain.evaluation.harness import _names_a_task

    monkeypatch.chdir(tmp_path)
    (tmp_path / "piqa").mkdir()
    bare = TaskManager(include_defaults=False)
    assert _names_a_task("piqa", bare, [])
    assert not _names_a_task("./piqa", bare, [])
    assert not _names_a_task(tmp_path / "piqa", bare, [])
    assert not _names_a_task("no_such_task", bare, [])
