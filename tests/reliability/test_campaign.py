"""The attacks of `benchmarks/reliability.py` in small: nothing silent, no traceback, no manual step."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd
import pytest
from reliability import campaign

from llmbrain import InputError
from llmbrain._files import BusyError, owner
from llmbrain.evaluation.trust import refuse_code

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return campaign.make(tmp_path_factory.mktemp("campaign") / "study")


def test_check_of_a_whole_study(study: Path) -> None:
    found = campaign.checked(study)
    assert set(found["state"]) == {"ok"}
    parts = {"scan", "networks", "ICA", "pruned model", "dual regression", "lesions", "BIDS folder"}
    assert parts <= set(found["part"])
    assert {"dr_maps.npy", "runs.jsonl"} <= {Path(name).name for name in found["file"]}


@pytest.mark.parametrize(
    "name",
    ["scan/shards/0000.safetensors", "scan/manifest.json", "networks/mixing.tsv", "networks/study.json",
     "networks/report.html", "pruned/model.safetensors", "dualreg/dr_z_maps.npy", "bids/participants.tsv",
     "networks/SHA256SUMS"],
)  # fmt: skip
def test_check_names_what_is_damaged_and_what_makes_it_anew(study: Path, name: str) -> None:
    path = study / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:])
    found = campaign.checked(study)
    path.write_bytes(whole)
    bad = found[found["state"] != "ok"]
    assert len(bad)
    assert name in set(bad["file"]) or name.endswith("SHA256SUMS")  # whose line is then that of no file
    assert (bad["anew"] != "").all()
    assert set(campaign.checked(study)["state"]) == {"ok"}


def test_nothing_to_check(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(InputError):
            campaign.checked(path)


def none(frame: pd.DataFrame, *begins: str) -> bool:
    return not [c for c in frame.columns if str(c).startswith(begins)]


@pytest.mark.slow
def test_flips_and_cuts(study: Path) -> None:
    found = campaign.flips(study, 3, seed=1)
    assert none(found, "silent", "traceback", "found, in"), found.to_string()
    assert found["found"].sum() > 100


@pytest.mark.slow
@needs_fork
def test_kill(tmp_path: Path) -> None:
    found = campaign.kills(tmp_path, 2, seed=1)
    assert (found["equal"] == found["tries"]).all(), found.to_string()


@pytest.mark.slow
@needs_fork
def test_full_and_read_only_disks(tmp_path: Path) -> None:
    found = campaign.disks(tmp_path)
    assert set(found.columns) == {"disk", "writer", "tries", "one line", "done"}, found.to_string()
    assert (found["one line"] >= 2).all()


@needs_fork
def test_one_owner_at_a_time(tmp_path: Path) -> None:
    def second() -> None:
        with owner(tmp_path, "second"):
            pass

    with owner(tmp_path, "first"), owner(tmp_path, "first, within"):
        code, said = campaign.in_child(lambda: campaign_without_memory(second), lambda *_: None)
        assert code == 2
        assert f"in use by process {os.getpid()}" in said
        assert "(first)" in said
    assert list(tmp_path.iterdir()) == []
    assert campaign.in_child(lambda: campaign_without_memory(second), lambda *_: None)[0] == 0


def campaign_without_memory(work) -> None:
    """A forked child must not take its parent's folders for its own."""
    import sys

    from llmbrain._files import owner as module

    sys.modules[module.__module__]._held.clear()
    work()


def test_a_lock_of_a_dead_process_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".llmbrain-lock").write_text('{"pid": 1, "host": "gone"}')
    with owner(tmp_path):
        assert (tmp_path / ".llmbrain-lock").read_text().startswith('{"host"')
    assert list(tmp_path.iterdir()) == []
    assert issubclass(BusyError, InputError)


@pytest.mark.parametrize(
    ("text", "code"),
    [("doc_to_text: 'Q: {{question}} {{ answers.text[0] }}'", ""), ('doc_to_choice: "{{[a, b]}}"', ""),
     ("process_docs: !function utils.run", "!function"), ("x: [{y: !function a.b}]", "!function"),
     ("doc_to_text: '{{ x.__class__ }}'", "doc_to_text"),
     ("doc_to_text: '{% for a in b %}{% endfor %}'", "doc_to_text"),
     ("doc_to_text: '{{ cycler() }}'", "doc_to_text"), ("include: other.yaml", "!function"),
     ("dataset_kwargs: {trust_remote_code: true}", "trust_remote_code"), ("dataset_path: load.py", "dataset_path"),
     ("include: &a other.yaml\nz: *a", "!function"), ("class: &a other.Task\nz: *a", "class"),
     ("? !function utils.run\n: 1", "!function"), ("x: [{? !function utils.run : 1}]", "!function"),
     ("metric_list: [{metric: acc}, {metric: exact_match}]", ""), ("metric_list: [{metric: ./mine}]", "metric"),
     ("metric_list: [{metric: rouge_of_somebody}]", "metric"),
     ("metric_list: [{metric: acc, hf_evaluate: true}]", "hf_evaluate"),
     ("class: !!python/object:os.system {}", "class"), ("a: &a [*a, *a]\nb: '{{q}}'", "")],
)  # fmt: skip
def test_task_files_with_code(tmp_path: Path, text: str, code: str) -> None:
    pytest.importorskip("yaml")
    (tmp_path / "other.yaml").write_text("process_docs: !function utils.run\n")
    task = tmp_path / "task.yaml"
    task.write_text(text)
    if not code:
        refuse_code([task])
        return
    with pytest.raises(InputError, match="carries code") as caught:
        refuse_code([task])
    assert code in str(caught.value)
