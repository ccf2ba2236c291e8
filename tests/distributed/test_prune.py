"""Plans and repairs over shared calibration text: those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rank_jobs import pruned, results
from safetensors.torch import load_file


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_prune_as_one_process_does(tmp_path: Path, size: int) -> None:
    told = results(size, "prune", tmp_path)
    assert all(found["weights"] == told[0]["weights"] for found in told)
    assert all(found["plans"] == told[0]["plans"] for found in told)
    alone = pruned()
    for name, plan in alone["plans"].items():
        if name != "drawn":
            assert told[0]["plans"][name] == plan.to_dict()["kept"], name
    assert told[0]["heads"] == alone["plans"]["obs"].to_dict()["kept_heads"]
    assert told[0]["details"] == alone["plans"]["networks"].details.get("search")
    for name, model in alone["small"].items():
        found = load_file(tmp_path / f"{name}.safetensors")
        for key, value in model.state_dict().items():
            assert torch.allclose(found[key], value, rtol=1e-5, atol=1e-5), (name, key)
    for what, fact in {"text": "windows", "ratio": "ratio", "model": "weights"}.items():
        assert all(found[what] == told[0][what] for found in told)
        assert f"rank 1 of {size} was given other {fact} than rank 0" in told[0][what]
