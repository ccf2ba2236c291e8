"""What ranks must be given alike, and ranks without work."""

from __future__ import annotations

from pathlib import Path

import torch
from rank_jobs import hashed, of_one_window, results


def test_ranks_that_were_given_other_things_say_so_and_one_without_text_changes_nothing(tmp_path: Path) -> None:
    zero, one = results(2, "alike", tmp_path)
    for fact, said in one["said"].items():
        if fact == "does not see":
            assert "rank 1 does not see what rank 0 wrote there" in said
            assert "rank 1 does not see what rank 0 wrote there" in zero["said"][fact]
            continue
        assert f"rank 1 of 2 was given other {fact}" in said, (fact, said)
        assert said == zero["said"][fact]
    plan, small = of_one_window()
    alone = hashed(torch.cat([p.detach().flatten() for p in small.parameters()]).numpy())
    for found in (zero, one):
        assert found["half"] == [1.5, 1.5]
        assert found["kept"] == plan.to_dict()["kept"]
        assert found["weights"] == alone
