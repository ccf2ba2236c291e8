"""A small part of ``benchmarks/calibration.py``: tests hold their level where there is nothing to find, or warn."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).parents[2] / "benchmarks/calibration.py"
SMALL = {
    "couple": {"T": 150, "AR": 0.6, "pairs": "1 x 1", "null": "circular"},
    "compare, word rate": {"brain": "on and off", "window": "stimulus"},
    "sign_flip_test": {"subjects": 12, "pairs": 24},
    "lesion_table": {"control": "matched", "neurons": 20},
    "connectivity": {"T": 200, "AR": 0.9, "networks": 5},
}


@pytest.fixture(scope="module")
def calibration():
    spec = importlib.util.spec_from_file_location("calibration", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["calibration"] = module  # a dataclass looks its module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["calibration"]


@pytest.mark.parametrize("name", SMALL)
def test_level(calibration, name):
    case = calibration.CASES[name]
    assert SMALL[name] in case.cells
    row = calibration.run(case, SMALL[name], 60)
    assert calibration.held(row), row


def test_a_case_that_does_not_hold_is_outside_unless_it_warned(calibration):
    row = calibration.run(calibration.Case("bad", lambda rng: rng.random() ** 4, [{}]), {}, 60)
    assert row["level"] > 0.3
    assert not calibration.held(row)
    row["warned"] = 1.0
    assert calibration.held(row)
    fair = calibration.run(calibration.Case("fair", lambda rng: rng.random(), [{}]), {}, 60)
    assert calibration.held(fair)
    assert "| `fair` |" in calibration.table([fair])


def test_the_windows_that_do_not_hold_are_warned_of(calibration):
    row = calibration.run(calibration.CASES["compare, word rate"], {"brain": "on and off", "window": "all"}, 15)
    assert row["level"] > 0.5
    assert row["warned"] == 1
    smooth = {"T": 150, "AR": 0.9, "pairs": "1 x 1", "null": "circular"}
    assert calibration.run(calibration.CASES["couple"], smooth, 20)["warned"] > 0.5
    assert calibration.run(calibration.CASES["couple"], smooth | {"null": "phase"}, 5)["warned"] == 0


def test_another_case_registers_from_outside(calibration):
    @calibration.register("mine", sides=(2, 6))
    def die(rng: np.random.Generator, sides: int) -> float:
        return float(rng.integers(1, sides + 1) / sides)

    assert [dict(cell) for cell in calibration.CASES.pop("mine").cells] == [{"sides": 2}, {"sides": 6}]
