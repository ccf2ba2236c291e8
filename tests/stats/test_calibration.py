"""A small part of ``benchmarks/calibration.py``: tests hold their level where there is nothing to find, or warn."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
PARTS = ("calibration_cases", "calibration_series", "calibration_sets")
# A fair test is outside these limits in one of 50,000 runs of 60 draws; one that finds something in a third of all is.
MOST = 0.2
SMALL = {
    "couple": {"T": 150, "AR": 0.6, "pairs": "1 x 1", "null": "circular"},
    "compare, word rate": {"brain": "on and off", "window": "stimulus"},
    "compare, isc": {"people": "others"},
    "sign_flip_test": {"subjects": 12, "pairs": 24},
    "permutation_test": {"runs": "the same, welch"},
    "localizer": {"T": 200, "AR": 0.9, "permute": "shift"},
    "networks.split_half": {"data": "AR 0"},
    "lesion_table": {"control": "matched", "neurons": 20},
    "connectivity": {"T": 200, "AR": 0.9, "kind": "correlation"},
}
LOUD = {  # where a test does not hold its level, and must say so
    "compare, word rate": {"brain": "on and off", "window": "all"},
    "permutation_test": {"runs": "5 subjects of 4 runs as 20 runs"},
    "networks.split_half": {"data": "smooth image"},
}


@pytest.fixture(scope="module")
def calibration():
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("calibration", FOLDER / "calibration.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(FOLDER))
        for name in PARTS:
            sys.modules.pop(name, None)


@pytest.mark.parametrize("name", SMALL)
def test_level(calibration, name):
    case = calibration.CASES[name]
    assert SMALL[name] in case.cells
    row = calibration.run(case, SMALL[name], 60)
    assert row["level"] <= MOST or row["warned"] > 0.5, row


@pytest.mark.parametrize("name", LOUD)
def test_what_does_not_hold_is_warned_of(calibration, name):
    case = calibration.CASES[name]
    assert LOUD[name] in case.cells
    row = calibration.run(case, LOUD[name], 15)
    assert row["level"] > 0.1, row
    assert row["warned"] > 0.5, row


def test_images_are_refused_not_only_warned_of(calibration):
    case = calibration.Case("refused", calibration.CASES["couple"].draw, [{}])
    row = calibration.run(case, {"T": 20, "AR": 0.5, "pairs": "1 x 1", "null": "circular"}, 5)
    assert (row["level"], row["warned"]) == (0, 1)


def test_a_case_that_does_not_hold_is_outside_unless_it_warned(calibration):
    bad = calibration.run(calibration.Case("bad", lambda rng: rng.random() ** 4, [{}]), {}, 60, 90)
    assert bad["level"] > 0.3
    assert bad["draws"] == 90
    assert not calibration.held(bad)
    bad["warned"] = 1.0
    assert calibration.held(bad)
    timid = calibration.run(calibration.Case("timid", lambda rng: 1.0, [{}]), {}, 60)
    assert not calibration.held(timid)
    assert calibration.held(timid | {"at_most": True})
    text = calibration.table([bad, timid])
    assert "**`bad`**" in text
    assert "1 of them are outside" in text


def test_another_case_registers_from_outside(calibration):
    @calibration.register("mine", sides=(2, 6))
    def die(rng: np.random.Generator, sides: int) -> float:
        return float(rng.integers(1, sides + 1) / sides)

    assert [dict(cell) for cell in calibration.CASES.pop("mine").cells] == [{"sides": 2}, {"sides": 6}]
