"""Run the checks over families, and write the table of the docs: ``make families``.

``python tests/families/table.py [NAME ...]`` prints the outcomes of some; without names, all are built and
docs/families.md is written. With ``--keep FILE`` (and ``--batches N``) it can be done in pieces.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import mixtures  # noqa: E402
import torch  # noqa: E402
from checks import COLUMNS, IDS, check  # noqa: E402
from configs import LEFT_OUT, build, rows  # noqa: E402

from llmbrain.anatomy.experts import has_experts  # noqa: E402

BATCH = 20  # families whose folders are on disk at once
PAGE = HERE.parents[1] / "docs" / "families.md"
MISTAKES = ("wrong", "error")


def examine(names: Iterable[str], *, formats: bool = True, echo: bool = False) -> dict[str, dict[str, str]]:
    """Outcomes by family and column; with `formats`, folders are opened in a fresh process, many in each."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    known, names = rows(), list(names)
    table: dict[str, dict[str, str]] = {}
    for start in range(0, len(names), BATCH):
        with tempfile.TemporaryDirectory() as temporary:
            root = Path(temporary)
            torch.save(IDS, root / "ids")
            for name in names[start : start + BATCH]:
                table[name] = _one(name, known[name], root if formats else None)
                if echo:
                    print(name, json.dumps(table[name]), flush=True)
            if formats:
                _open_fresh(root, table)
    return table


def _one(name: str, model_type: str, root: Path | None) -> dict[str, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = build(name, model_type)
        except Exception as error:  # a family that cannot be built tiny is a row, too
            return {"found": f"unbuilt: {type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        return (mixtures.check if has_experts(model) else check)(name, model, root)


def _open_fresh(root: Path, table: dict[str, dict[str, str]]) -> None:
    for flags in ([], ["with-llmbrain"]):
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "hf"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(HERE / "fresh.py"), str(root), *flags]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        for folder, said in json.loads(done.stdout.splitlines()[-1]).items():
            name, form = folder.split(".", 1)
            if table[name][form] == "ok":
                table[name][form] = said


def mistakes(row: dict[str, str]) -> dict[str, str]:
    """The outcomes of a family that are neither right nor refused."""
    return {column: said for column, said in row.items() if said.startswith(MISTAKES)}


def third(which: int) -> list[str]:
    """Every third family."""
    return list(rows())[which % 3 :: 3]


# -- the page --------------------------------------------------------------------------------------------------------

HEAD = """# Families

What works for each model class of transformers {version}: {n} families, built tiny and at random from their configs
and checked by `make families`, which writes this page. A tick is an equality that was tested to rounding: what is
recorded and what plain hooks hear, a model that is cut and the same units zeroed, moments of the calibration and those
of plain passes, a model in memory and the folder opened in a fresh process. A number is a refusal, with its reason
below.

Of {n} families {found} are read, {mixtures} of them mixtures of experts, which [are below](#mixtures-of-experts);
of the others, neurons of {neurons} and heads of {heads} can be cut.

| class | {columns} |
|---|{rules}|
"""
TITLES = {"recorded": "scan", "batch": "in a batch", "lesion": "lesion", "neurons": "cut", "heads": "cut heads",
          "moments": "calibration", "causal": "perplexity", "per-layer": "`per-layer`", "remote-code": "`remote-code`",
          "uniform": "`uniform`", "padded": "`padded`", "masked": "`masked`"}  # fmt: skip


MIXED = """
## Mixtures of experts

Scans are held against a plain pass through the weights of the experts that each token calls; lesions and cuts of
neurons against zeros in the weights; cut experts against routers that may not choose them. Repairs of both run, and
that of experts adds no error on held-out text. The folders hold half of the experts, with half of their neurons (in the
uneven one layers differ), and are opened again.

| class | {columns} |
|---|{rules}
"""
MIXED_TITLES = {"recorded": "scan", "lesion": "lesion", "experts": "cut experts", "neurons": "cut neurons",
                "repair": "repair", "per-layer": "`per-layer`",
                "remote-code": "`remote-code`", "uniform": "`uniform`", "uneven": "uneven"}  # fmt: skip


def write_page(table: dict[str, dict[str, str]]) -> str:
    """The outcomes as a page of the docs."""
    import transformers

    built = {name: row for name, row in table.items() if not row["found"].startswith("unbuilt")}
    unbuilt = [name for name in table if name not in built]
    reasons: dict[str, int] = {}

    def cell(name: str, said: str) -> str:
        if said == "ok":
            return "✓"
        if said.startswith("refused"):
            return str(reasons.setdefault(_reason(name, said), len(reasons) + 1))
        return "✗"

    lines = []
    for name, row in built.items():
        if "recorded" in row and "experts" not in row:
            lines.append(f"| {name} | " + " | ".join(cell(name, row.get(c, "")) for c in TITLES) + " |")
    mixed = [
        f"| {name} | " + " | ".join(cell(name, row.get(c, "")) for c in MIXED_TITLES) + " |"
        for name, row in built.items()
        if "experts" in row
    ]
    refused = [f"| {name} | {_reason(name, row['found'])} |" for name, row in built.items() if "recorded" not in row]
    count = {c: sum(row.get(c) == "ok" for row in built.values() if "experts" not in row) for c in COLUMNS}
    page = HEAD.format(
        version=transformers.__version__, n=len(built), found=len(lines) + len(mixed), mixtures=len(mixed),
        neurons=count["neurons"], heads=count["heads"], columns=" | ".join(TITLES.values()), rules="---|" * len(TITLES),
    ).replace("|---||---|", "|---|---|").replace("---||", "---|")  # fmt: skip
    page += "\n".join(lines) + "\n"
    page += MIXED.format(columns=" | ".join(MIXED_TITLES.values()), rules="---|" * len(MIXED_TITLES))
    page += "\n".join(mixed) + "\n\n## Reasons\n\n"
    page += "\n".join(f"{number}. {reason}" for reason, number in reasons.items())
    page += "\n\n## Refused as a whole\n\n| class | reason |\n|---|---|\n" + "\n".join(refused) + "\n"
    left = sorted({**LEFT_OUT, **dict.fromkeys(unbuilt, "")})
    if left:
        page += "\nNot built tiny here, so nothing is said of them: " + ", ".join(left) + ".\n"
    return page


def _reason(name: str, said: str) -> str:
    text = said.removeprefix("refused: ").removeprefix("error: ").replace(name, "...")
    text = re.sub(r"\S*/tmp\S*", "...", text)
    text = re.sub(r"(\b\w+\.)+\d+(\.\w+)*", "...", text)  # the path of one layer
    text = re.sub(r"of \.\.\. models|of [\w ()',.]*? models cannot", lambda m: m.group(0), text)
    return text.replace("|", "\\|")


def main() -> int:
    """Examine what is named, or all and write the page; how many rows are wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="classes; default: all, and the page is written")
    parser.add_argument("--keep", type=Path, help="a JSON file of rows that are done: the same call goes on from there")
    parser.add_argument("--batches", type=int, help="stop after so many batches of twenty families")
    options = parser.parse_args()
    chosen = options.names or list(rows())
    keep = options.keep or Path(tempfile.gettempdir(), "families.json")
    known = json.loads(keep.read_text(encoding="utf-8")) if options.keep and keep.is_file() else {}
    found = {name: known[name] for name in chosen if name in known}
    left = [name for name in chosen if name not in found]
    for start in range(0, len(left), BATCH)[: options.batches]:
        found |= examine(left[start : start + BATCH], echo=True)
        keep.write_text(json.dumps({**known, **found}, indent=1), encoding="utf-8")
    wrong = {name: bad for name, row in found.items() if (bad := mistakes(row))}
    print(json.dumps(wrong, indent=1))
    if not options.names and len(found) == len(chosen):
        PAGE.write_text(write_page({name: found[name] for name in chosen}), encoding="utf-8")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(bool(main()))
