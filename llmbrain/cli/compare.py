"""``llmbrain compare``: networks of a model against fMRI of people who heard the same words."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmbrain._validation import InputError
from llmbrain.cli.common import COMPONENTS, DEVICE, OUT, OVERWRITE, SEED, print_table, say
from llmbrain.cli.lists import ListCommand

if TYPE_CHECKING:
    import numpy as np

SOUND = re.compile(r"(?i)snd_?pwr|sound_?(power|level)|rms|loudness|envelope")


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("compare", cls=ListCommand)(compare)


def compare(
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
    regions: str = typer.Option("", help="Names of the regions, with commas, or a file with one a line."),
    pattern: str = typer.Option("*", help="Which files of the folder are subjects, such as '*run-1*'."),
    orientation: str = typer.Option(
        "auto", help="Of tables: volumes-first, regions-first; default told from the data."
    ),
    n_volumes: int = typer.Option(0, help="Keep the first so many volumes of every subject; 0 is all."),
    drop: int = typer.Option(0, help="Volumes to drop at the start."),
    rule: str = typer.Option("offset", help="When in a word it counts: offset, onset, midpoint."),
    aggregate: str = typer.Option("mean", help="Tokens of a word: mean, last, sum."),
    hrf: str = typer.Option("spm", help="Response: spm or glover."),
    high_pass: float = typer.Option(128.0, help="Cut-off period, seconds, of both sides; 0 is none."),
    null: str = typer.Option("circular", help="circular (shifts) or phase (randomisation)."),
    n_permutations: int = typer.Option(
        0, "--n-permutations", "--n-null", help="Null draws; 0 is every shift, or 1000 phases."
    ),
    correction: str = typer.Option("max", help="max (family-wise) or fdr."),
    encoding: Annotated[
        bool | None, typer.Option("--encoding/--no-encoding", help="Encoding models; default up to 100 regions.")
    ] = None,
    device: DEVICE = "auto",
    seed: SEED = 0,
    overwrite: OVERWRITE = False,
) -> None:
    """Compare networks of a model with fMRI of people who heard the same words; tables, figures and a report."""
    from llmbrain.brains import load_fmri, load_words
    from llmbrain.brains.series import check_tr
    from llmbrain.cli.common import claim, open_model, parse_components, provenance
    from llmbrain.comparison import compare as compare_brains
    from llmbrain.comparison.sources import expected_volumes
    from llmbrain.reporting import comparison_figures, comparison_report

    given = {k: v for k, v in locals().items() if isinstance(v, (str, int, float, bool, Path, list)) or v is None}
    settings = {k: os.fspath(v) if isinstance(v, Path) else v for k, v in given.items()}
    for name in ("out", "overwrite", "source", "device"):
        settings.pop(name)
    if tr is not None:
        check_tr(tr)
    k = parse_components(components)
    with _noted() as said:
        table = load_words(words, columns=parse_columns(columns), tier=tier or None)
        brain = load_fmri(
            fmri, atlas=atlas, pattern=pattern, regions=parse_regions(regions), n_volumes=n_volumes or None, tr=tr,
            orientation=orientation, expected=expected_volumes(table, tr, offset),
        )  # fmt: skip
        check_tr(brain.tr)
        more = read_controls(controls or [], brain.n_volumes)
        story = text.read_text(encoding="utf-8-sig") if text is not None else None
        claim(out, {"model": source, **settings}, overwrite=overwrite)
        is_scan = any((Path(source) / p).is_file() for p in ("manifest.json", "scan/manifest.json"))
        if is_scan and untrained:
            raise InputError("--untrained needs a model, not a scan: pass the model's folder")
        result = compare_brains(
            source if is_scan else open_model(source, device), brain, table, tr=tr, offset=offset, text=story,
            networks=networks, n_components=k, controls=more, rule=rule, aggregate=aggregate, hrf=hrf,
            high_pass=high_pass or None, drop=drop, null=null,
            n_permutations=n_permutations or None, correction=correction, encoding=encoding,
            untrained=untrained, random_state=seed, progress=say,
        )  # fmt: skip
        result.report["model"] = source
        result.save(out)
        say("figures and report")
        figures = comparison_figures(result, brain.masker)
        for name, (figure, _) in figures.items():
            figure.savefig(out / f"figure-{name}.png", dpi=150)
        if brain.masker is not None:
            brain.masker.inverse_transform(_filled(result.coupling.r)).to_filename(out / "coupling.nii.gz")
    record = provenance(source, [" ".join(table["word"]) if story is None else story], **settings)
    page = comparison_report(
        result, title=f"llmbrain compare: {Path(source).name} and {fmri.name}", figures=figures,
        warnings=[line for line in said if not _repeats(line)], provenance=record,
    )  # fmt: skip
    page.save(out / "report.html")
    show(result)
    say(f"tables, figures and report: {out / 'report.html'}")


def show(result: Any) -> None:
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
    if Path(value).is_file():
        lines = Path(value).read_text(encoding="utf-8-sig").splitlines()
        return [re.split(r"[\t,]", line)[-1].strip() for line in lines if line.strip()]
    return [name.strip() for name in value.split(",")]


def read_controls(given: list[str], n_volumes: int) -> dict[str, np.ndarray]:
    """Control series of files, by name: of the column, else of the file; sound power is recognised."""
    from llmbrain.brains.tables import read_table

    found: dict[str, np.ndarray] = {}
    for entry in given:
        name, equals, place = entry.partition("=")
        path = Path(place if equals and not Path(entry).is_file() else entry)
        if not path.is_file():
            raise FileNotFoundError(f"--controls: no file at {path}")
        own = name if equals and not Path(entry).is_file() else path.stem
        for key, table in read_table(path, own).items():
            values = table.values.T if table.values.shape[1] == n_volumes != len(table.values) else table.values
            if len(values) != n_volumes:
                raise InputError(f"--controls: {path.name} has {len(values)} values for {n_volumes} volumes")
            names = table.regions if table.regions and len(table.regions) == values.shape[1] else None
            if names is None:
                names = [key] if values.shape[1] == 1 else [f"{key} {i}" for i in range(values.shape[1])]
            for label, series in zip(names, values.T):
                found["sound power" if SOUND.search(label) and "sound power" not in found else label] = series
    return found


@contextmanager
def _noted() -> Iterator[list[str]]:
    """Warnings are said as they come, and kept for the report."""
    said: list[str] = []
    with warnings.catch_warnings():
        before = warnings.showwarning

        def note(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, (UserWarning, RuntimeWarning)):
                said.append(" ".join(str(message).split()))
            before(message, category, *place, **more)

        warnings.showwarning = note
        yield said


def _repeats(line: str) -> bool:
    """Whether the comparison's own cautions say it too."""
    return "is left out: " in line or "series are constant and become NaN" in line


def _filled(values: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.nan_to_num(values).astype(np.float32)
