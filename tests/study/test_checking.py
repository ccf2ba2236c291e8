"""`lb.check` of single files, and of files that carry their own checksum."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import llmbrain as lb
from llmbrain import InputError
from llmbrain import _files as files
from llmbrain.pruning.experts import ExpertPlan


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_plan_of_experts_is_a_plan(tmp_path: Path) -> None:
    path = ExpertPlan("reap", 0.5, ((0, 1), (1, 3)), (4, 4), "x" * 16).save(tmp_path / "plan.json")
    for place in (path, tmp_path):
        assert lb.check(place)["state"].tolist() == ["ok"]
    flip(path, path.read_bytes().find(b"0.5"))
    for place in (path, tmp_path):
        assert "does not match its checksum" in lb.check(place)["state"].item()


@pytest.mark.parametrize(
    "wrong",
    [{"kept": [[0, 1.9], [1, 3]]}, {"kept": [[True, 2], [1, 3]]}, {"kept": "01"}, {"kept": [3, 4]}, {"ratio": -1},
     {"ratio": float("nan")}, {"before": [4]}, {"before": [4, 4.5]}, {"kept": [[0, 4], [1, 3]]}, {"digest": 3},
     {"kept": [[1, 0], [1, 3]]}, {"kept": [[], [1]]}, {"parameters": -1}, {"parameters_removed": 0.5},
     {"details": []}, {"method": None}],
)  # fmt: skip
def test_plans_of_experts_that_cannot_be(tmp_path: Path, wrong: dict) -> None:
    record = {"method": "reap", "ratio": 0.5, "kept": [[0, 1], [1, 3]], "before": [4, 4], "digest": "x"}
    ExpertPlan(**record)
    with pytest.raises(InputError):
        ExpertPlan(**(record | wrong))
    (tmp_path / "plan.json").write_text(json.dumps({"llmbrain": "expert plan", **record, **wrong}))
    with pytest.raises(InputError, match=r"plan\.json"):
        ExpertPlan.load(tmp_path / "plan.json")


def test_a_single_file_of_a_set(tmp_path: Path) -> None:
    with files.transaction(tmp_path / "set") as new:
        files.write_json(new / "networks.json", {"a": 1})
        files.write_tensors(new / "networks.safetensors", {"x": np.arange(5.0)})
    for name, at in (("networks.json", -4), ("networks.safetensors", -1)):
        path = tmp_path / "set" / name
        assert lb.check(path)["state"].item() == "ok"
        flip(path, at)
        assert "does not match its checksum" in lb.check(path)["state"].item()
    shutil.copy(path, tmp_path / "alone.safetensors")
    with pytest.raises(InputError, match="carries no checksum"):
        lb.check(tmp_path / "alone.safetensors")


def test_a_gguf_file(tmp_path: Path, shared_data: Path) -> None:
    pytest.importorskip("gguf")
    path = lb.save_pruned(*lb.load_model(shared_data / "models/stories260K"), tmp_path / "a.gguf", format="gguf")
    for place in (path, tmp_path):
        assert lb.check(place)["state"].tolist() == ["ok"]
    flip(path, path.stat().st_size // 2)
    for place in (path, tmp_path):
        assert "does not match its checksum" in lb.check(place)["state"].item()
    foreign = tmp_path / "b.gguf"
    foreign.write_bytes(path.read_bytes().replace(b"llmbrain.checksum", b"xxxxxxxx.checksum"))
    assert lb.check(tmp_path)["file"].tolist() == ["a.gguf"]
    with pytest.raises(InputError, match="carries no checksum"):
        lb.check(foreign)
