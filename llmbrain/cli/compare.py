"""``llmbrain compare``: networks of a model against fMRI of people who heard the same words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmbrain._validation import InputError
from llmbrain.cli.common import COMPONENTS, DEVICE, DRY_RUN, OUT, OVERWRITE, RUN_LENGTH, SEED, print_table, say
from llmbrain.cli.lists import ListCommand

if TYPE_CHECKING:
    from llmbrain.comparison import Comparison


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("compare", cls=ListCommand)(compare_command)


def compare_command(
    source: Annotated[
        str,
        typer.Argument(metavar="SCAN|MODEL", help="A model, or a scan or study in which a model reads the story."),
    ],
    fmri: Annotated[
        Path, typer.Option("--fmri", help="A file (.nii.gz, .npy, .npz, .csv, ...) or folder of subjects.")
    ],
    words: Annotated[
        Path, typer.Option("--words", help="When each word was heard: .tsv, .csv, BIDS events, TextGrid.")
    ],
    out: OUT,
    tr: Annotated[
        float | None, typer.Option("--tr", help="Repetition time, seconds; a NIfTI may say it itself.")
    ] = None,
    offset: float = typer.Option(0.0, help="Stimulus time of the first volume, seconds."),
    columns: str = typer.Option("", help="Columns of the word table: word=2,onset=0 or word=text,offset=end."),
    tier: str = typer.Option("", help="Tier of a TextGrid; default: word or words."),
    text: Annotated[Path | None, typer.Option("--text", help="The story as running text; default: the words.")] = None,
    networks: Annotated[
        Path | None, typer.Option("--networks", help="Networks found before; default: found in this story.")
    ] = None,
    components: COMPONENTS = "20",
    untrained: bool = typer.Option(False, help="Also with random weights, and the model beyond that; needs a model."),
    controls: Annotated[
        list[str] | None,
        typer.Option(
            "--controls", help="Series at the volumes (.tsv, .csv, .txt, .npy, .npz), or name=FILE; repeatable."
        ),
    ] = None,
    atlas: Annotated[
        Path | None, typer.Option("--atlas", help="Labels image: regions of a NIfTI, or where table columns lie.")
    ] = None,
    atlas_labels: Annotated[
        Path | None,
        typer.Option(
            "--atlas-labels", help="Names of the labels: .tsv, .csv, lookup table, .json; default: beside it."
        ),
    ] = None,
    regions: str = typer.Option("", help="Names of the regions, with commas, or a file with one a line."),
    rois: str = typer.Option("", help="Only these regions: names with commas, or a file (.json, .txt)."),
    isc: Annotated[
        float | None,
        typer.Option(help="Only regions whose ISC reaches this in half of the listeners; the others are compared."),
    ] = None,
    pattern: str = typer.Option("*", help="Which files of the folder are subjects, such as '*run-1*'."),
    orientation: str = typer.Option(
        "auto", help="Of tables: volumes-first, regions-first; default told from the data."
    ),
    n_volumes: int = typer.Option(0, help="Keep the first so many volumes of every subject; 0 is all.", min=0),
    drop: int = typer.Option(0, help="Volumes to drop at the start.", min=0),
    window: str = typer.Option("stimulus", help="Volumes of the story only (stimulus), or all."),
    rule: str = typer.Option("offset", help="When in a word it counts: offset, onset, midpoint."),
    aggregate: str = typer.Option("mean", help="Tokens of a word: mean, last, sum."),
    hrf: str = typer.Option("spm", help="Response: spm or glover."),
    high_pass: float = typer.Option(128.0, help="Cut-off period, seconds, of both sides; 0 is none.", min=0),
    null: str = typer.Option("circular", help="circular (shifts) or phase (randomisation)."),
    n_permutations: int = typer.Option(
        0, "--n-permutations", "--n-null", help="Null draws; 0 is every shift, or 1000 phases.", min=0
    ),
    correction: str = typer.Option("max", help="max (family-wise) or fdr."),
    encoding: Annotated[
        bool | None, typer.Option("--encoding/--no-encoding", help="Encoding models; default up to 100 regions.")
    ] = None,
    run_length: RUN_LENGTH = 2048,
    device: DEVICE = "auto",
    seed: SEED = 0,
    dry_run: DRY_RUN = False,
    overwrite: OVERWRITE = False,
) -> None:
    """Compare networks of a model with fMRI of people who heard the same words; tables, figures and a report."""
    from llmbrain.brains.plain import read_plain
    from llmbrain.cli.common import parse_components
    from llmbrain.study import Study, compare
    from llmbrain.study.story import compare_dry

    if untrained and Path(source).is_dir() and Study(source).has("scans"):
        raise InputError("--untrained needs a model, not a scan: pass the model's folder")
    reading = {
        "columns": parse_columns(columns), "tier": tier or None, "atlas": atlas, "atlas_labels": atlas_labels,
        "pattern": pattern, "regions": parse_regions(regions), "rois": rois or None, "n_volumes": n_volumes or None,
        "orientation": orientation,
    }  # fmt: skip
    story = None if text is None else read_plain(text, "--text")
    found = parse_components(components)
    if dry_run:
        costs = compare_dry(
            source, words, columns=parse_columns(columns), tier=tier or None, text=story, networks=networks,
            n_components=found, untrained=untrained, run_length=run_length or None, device=device,
        )  # fmt: skip
        for line in costs.lines() if costs else ["cost: the story was scanned before; the rest takes seconds"]:
            typer.echo(line)
        return
    result = compare(
        source, fmri, words, out=out, reading=reading, tr=tr, offset=offset,
        text=story, networks=networks, n_components=found, run_length=run_length or None,
        controls=controls, rule=rule, aggregate=aggregate, hrf=hrf,
        high_pass=high_pass or None, drop=drop, window=window, isc=isc, null=null,
        n_permutations=n_permutations or None, correction=correction,
        encoding=encoding, untrained=untrained, random_state=seed, device=device, overwrite=overwrite,
    )  # fmt: skip
    show(result)
    say(f"tables, figures and report: {out / 'report.html'}")


def show(result: Comparison) -> None:
    """Print the findings, the strongest pairs and what to know before believing them."""
    facts = result.report
    typer.echo(
        f"{facts['n_subjects']} subjects, {facts['n_volumes']} volumes, {facts['n_regions']} regions; "
        f"{facts['n_networks']} networks, {facts['n_tokens']:,} tokens, {facts['words']['used']} words"
    )
    for line in result.findings():
        typer.echo(line)
    pairs = ["network", "region", "r", "p", "p_corrected", "significant"]
    print_table(result.tables["controls"][pairs].head(12), "controls")
    print_table(result.tables["coupling"][pairs].head(8), "strongest pairs beyond the controls")
    if len(result.tables["summary"]) > 1:
        print_table(result.tables["summary"], "trained and untrained")
    for line in facts["cautions"]:
        typer.echo(f"note: {line}")


def parse_columns(value: str) -> dict[str, str | int] | None:
    """``word=2,onset=0`` -> places from 0; ``word=text`` -> names."""
    if not value:
        return None
    found: dict[str, str | int] = {}
    for pair in value.split(","):
        role, equals, column = (piece.strip() for piece in pair.partition("="))
        if not equals or not role or not column:
            raise InputError(f"--columns={value!r} must read like word=2,onset=0 or word=text,onset=start")
        found[role] = int(column) if column.isdigit() else column
    return found


def parse_regions(value: str) -> list[str] | None:
    """Names with commas, or of a file with one a line (the last cell, where lines have several)."""
    if not value:
        return None
    from llmbrain.brains.plain import read_plain

    if Path(value).is_file():
        lines = read_plain(Path(value), "--regions").split("\n")
        return [re.split(r"[\t,]", line)[-1].strip() for line in lines if line.strip()]
    return [name.strip() for name in value.split(",")]
