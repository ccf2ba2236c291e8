"""Mixtures of experts go through scan, lesion, both kinds of pruning, save and load; all of them: ``make families``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from configs import build, rows
from mixtures import check
from table import mistakes

FAMILIES = (
    "MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM", "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM", "GptOssForCausalLM", "Glm4MoeForCausalLM", "GraniteMoeForCausalLM",
    "GraniteMoeSharedForCausalLM", "PhimoeForCausalLM", "Llama4ForCausalLM",
    "JambaForCausalLM", "HunYuanMoEV1ForCausalLM",
)  # fmt: skip
REFUSED = {
    "JetMoeForCausalLM": r"no known layout",
    "DeepseekV4ForCausalLM": "no known layout",
}


@pytest.mark.parametrize("name", FAMILIES)
def test_goes_all_the_way(name: str, tmp_path: Path) -> None:
    row = check(name, build(name, rows()[name]), tmp_path)
    assert {column: said for column, said in row.items() if column != "found" and said != "ok"} == {}
    assert not mistakes(row)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_on_no_common_interface_is_refused(name: str) -> None:
    from llmbrain import InputError
    from llmbrain.anatomy.experts import expert_anatomy

    with pytest.raises(InputError, match=REFUSED[name]):
        expert_anatomy(build(name, rows()[name]))
