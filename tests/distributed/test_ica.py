"""Group ICA, dual regression and lesions that several processes share: the same result as of one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from ica_data import matched
from rank_jobs import demo_runs, hashed, lesioned, phantom_runs, results

import llmbrain as lb
from llmbrain.decomposition.prepare.pca import GroupPCA


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_find_what_one_process_finds(tmp_path: Path, size: int) -> None:
    told = results(size, "ica", tmp_path)
    for found in told[1:]:  # the last entries say who failed
        assert {k: v for k, v in found.items() if k not in ("nan", "rank")} == {
            k: v for k, v in told[0].items() if k not in ("nan", "rank")
        }
    runs = phantom_runs()
    alone = lb.GroupICA(5).fit(runs)
    found = np.load(tmp_path / "found.npz")
    assert matched(found["maps"], alone.components_).min() > 0.999
    assert (matched(found["few"], lb.GroupICA(5).fit(runs[:3]).components_) > 1 - 1e-9).all()  # nothing was cut off
    for i, course in enumerate(alone.mixing_):
        assert matched(found[f"mixing-{i}"].T, course.T).min() > 0.999
    assert np.allclose(np.sort(told[0]["explained"]), np.sort(alone.explained_variance_ratio_), rtol=1e-3)
    assert told[0]["converged"][:2] == [True, len(runs)]
    assert told[0]["order"] == lb.GroupICA("parallel").fit(runs[:3]).order_estimates_

    back = lb.dual_regression(found["maps"], runs[:5], out=tmp_path / "one", mask="varying")
    assert hashed(back.maps) == told[0]["back"][0]
    assert hashed(lb.dual_regression(found["maps"], runs[:5]).maps) == told[0]["kept"]
    assert files(tmp_path / "dualreg") == files(tmp_path / "one")

    table = lesioned()
    assert told[0]["lesions"] == told[0]["again"]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "lesions.csv", index_col=0), table.frame, rtol=1e-6, atol=1e-9)

    assert all("n_components=400 is more than the data allow" in found["rank"] for found in told)
    assert told[0]["other"].startswith("group ICA: rank 1 of")
    assert "was given other runs than rank 0" in told[0]["other"]
    assert "was given other parameters than rank 0" in told[0]["settings"]
    assert all("run 1 holds nan at token 0" in found["nan"] for found in told)


@pytest.mark.slow
def test_maps_of_the_demo_brain_are_the_same(tmp_path: Path) -> None:
    alone = lb.GroupICA(16).fit(demo_runs())
    for size in (2, 4):
        results(size, "demo_ica", tmp_path)
        assert matched(np.load(tmp_path / f"demo-{size}.npy"), alone.components_).min() > 0.999


def test_memory_of_a_state_does_not_grow_with_runs() -> None:
    import torch

    generator = torch.Generator().manual_seed(0)
    pca, most = GroupPCA(10), 0
    for number in range(40):
        pca.add(torch.randn(6, 50, generator=generator), number)
        most = max(most, pca.n_rows)
    assert most <= 20
    few = GroupPCA(10)
    parts = [torch.randn(4, 50, generator=generator) for _ in range(3)]
    for number in (2, 0, 1):  # as they come from ranks
        few.add(parts[number], number)
    assert torch.equal(few.stack(), torch.cat(parts))
