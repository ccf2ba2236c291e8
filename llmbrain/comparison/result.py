"""What `compare` found: tables, sentences, and what to know before believing them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from llmbrain._files import transaction, write_json, write_table
from llmbrain.brains.fmri import FMRI
from llmbrain.comparison.coupling import Coupling
from llmbrain.comparison.encoding import Encoding

FEW_WORDS, FEW_VOLUMES, TOKENS_PER_NETWORK = 200, 100, 50
ALPHA = 0.05
TABLES = ("regions", "coupling", "matches", "lags", "controls", "mirrored", "ceilings", "encoding", "similarity",
          "coupling_beyond_untrained", "encoding_beyond_untrained", "summary")  # fmt: skip


@dataclass
class Comparison:
    """Result of `compare`.

    Attributes
    ----------
    tables : dict of DataFrame
        ``coupling`` (every network with every region, beyond the controls), ``matches``, ``lags``, ``controls`` (word
        rate and the other controls with every region), ``mirrored`` (the word rate of the story read backwards in
        time: should couple with nothing), ``ceilings`` (several subjects), ``encoding`` (with himalaya),
        ``similarity``; with `untrained`, ``coupling_beyond_untrained`` and ``encoding_beyond_untrained`` (with the
        networks of the model with random weights among the controls); ``summary`` has one row a model; ``regions``
        where the regions lie (with an atlas, or voxels).
    report : dict
        What was used and what was left out, with the settings; ``cautions`` are sentences to read before concluding.
    coupling, controls : Coupling
    brain : FMRI or None
        The listeners and regions that were compared.
    """

    tables: dict[str, pd.DataFrame]
    report: dict[str, Any]
    coupling: Coupling = field(repr=False)
    controls: Coupling = field(repr=False)
    encoding: Encoding | None = field(default=None, repr=False)
    brain: FMRI | None = field(default=None, repr=False)

    def findings(self) -> list[str]:
        """The answers in sentences: controls first, then the networks, then the networks beyond an untrained copy."""
        controls, n_regions = self.tables["controls"], len(self.coupling.regions)
        rate = controls[controls["network"] == "word rate"]
        mirrored = self.tables["mirrored"]
        said = []
        if len(rate):
            said.append(
                f"Control: the word rate couples with {int(rate['significant'].sum())} of {n_regions} regions (r "
                f"{_span(rate['r'])}; |r| beyond {self.controls.threshold:.3f} is significant), the story mirrored in "
                f"time with {int(mirrored['significant'].sum())} (largest |r| {mirrored['r'].abs().max():.3f})."
            )
        table = self.tables["coupling"]
        said.append(
            f"Beyond {', '.join(self.controls.networks)}, {int(table['significant'].sum())} of {len(table)} pairs of "
            f"network and region couple (largest |r| {table['r'].abs().max():.3f}, smallest corrected p "
            f"{table['p_corrected'].min():.3f}; |r| beyond {self.coupling.threshold:.3f} is significant)."
        )
        for name, what in (("encoding", "the controls"), ("encoding_beyond_untrained", "controls and untrained copy")):
            if name in self.tables:
                frame = self.tables[name]
                p = frame["gain_networks_p_corrected"]
                said.append(
                    f"In encoding models the networks add {frame['gain_networks'].mean():+.3f} to the held-out r of "
                    f"{what} (mean over regions; significant in {int((p <= ALPHA).sum())} of {n_regions}, smallest "
                    f"corrected p {p.min():.3f})."
                )
        if "untrained" in set(self.tables["summary"]["weights"]):
            row = self.tables["summary"].set_index("weights").to_dict("index")["untrained"]
            said.append(
                f"An untrained copy: {int(row['n_significant'])} pairs couple (largest |r| {row['largest_r']:.3f}, "
                f"smallest corrected p {row['smallest_p_corrected']:.3f})."
            )
        return said

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write every table as TSV and the report as JSON; returns the folder."""
        with transaction(folder, replaces=[f"{name}.tsv" for name in TABLES]) as new:
            for name, table in self.tables.items():
                write_table(new / f"{name}.tsv", table, na_rep="n/a", float_format="%.6g")
            write_json(new / "comparison.json", self.report, default=str)
        return Path(folder)


def cautions(report: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing the numbers.

    Parameters
    ----------
    report : mapping
        `Comparison.report`.
    """
    said = [f"subject {name} is left out: {reason}" for name, reason in report["excluded"].items()]
    if report["dead"]:
        held = [name for names in report["dead"].values() for name in names]
        everybody = sorted(r for r in set(held) if held.count(r) == report["n_subjects"])
        gone = f", {len(everybody)} of them in everybody ({', '.join(everybody[:5])})" if everybody else ""
        said.append(
            f"{len(held)} dead series in {len(report['dead'])} of {report['n_subjects']} subjects are left out of the "
            f"means{gone}"
        )
    words = report["words"]
    lost = {"have no times": words["untimed"], "are not in the text": words["not_in_text"],
            "fall outside the scan": words["outside_scan"]}  # fmt: skip
    said += [f"{count} of {words['n_words']} words {what}" for what, count in lost.items() if count]
    if words["used"] < FEW_WORDS:
        said.append(f"only {words['used']} words reach the brain: too few for more than a demonstration")
    if report["n_tokens"] < TOKENS_PER_NETWORK * report["n_networks"]:
        said.append(f"{report['n_tokens']} tokens for {report['n_networks']} networks: their time courses are unstable")
    if report["n_volumes"] < FEW_VOLUMES:
        said.append(f"{report['n_volumes']} volumes: only strong coupling can be seen")
    if report["n_subjects"] < 2:
        said.append("one subject: no noise ceiling, and nothing about other people")
    if report["n_permutations"] < 99:
        said.append(f"{report['n_permutations']} null draws: no p is below {1 / (report['n_permutations'] + 1):.3f}")
    if report["controls_missing"]:
        said.append(f"without the controls {' and '.join(report['controls_missing'])}: coupling may be theirs")
    return said


def _span(values: pd.Series) -> str:
    return f"{values.min():.3f} to {values.max():.3f}"
