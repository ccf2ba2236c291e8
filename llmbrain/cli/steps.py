"""The steps of the main job, alone: ``scan``, ``decompose``, ``dualreg``, ``evaluate``, ``info``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llmbrain._validation import InputError
from llmbrain.cli.common import (
    COMPONENTS,
    DEVICE,
    FIELD,
    MODEL,
    OUT,
    OVERWRITE,
    SEED,
    TEXT,
    print_table,
    say,
)
from llmbrain.cli.lists import ListCommand, parts
from llmbrain.stats import PUBLISHED_Z

STUDY = Annotated[Path, typer.Argument(help="Folder of a scan, or a folder that `llmbrain run` wrote.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (scan, decompose, dualreg, evaluate, info):
        app.command(command.__name__, cls=ListCommand)(command)


def scan_folder(study: Path) -> Path:
    """The scan store of a study: the folder itself, or its ``scan/``."""
    for folder in (study, study / "scan"):
        if (folder / "manifest.json").is_file():
            return folder
    if not study.exists():
        raise InputError(f"study {study} does not exist")
    raise InputError(f"study {study} holds no scan (no manifest.json in it or in its scan/)")


def scan(
    model: MODEL,
    text: TEXT,
    out: OUT,
    site: str = typer.Option("neuron", help="neuron, gate, up, mlp_out, block_out, head; several with commas."),
    n_tokens: int = typer.Option(0, help="Tokens to read of each text; 0 is all."),
    batch_size: int = typer.Option(8, help="Texts read at once."),
    block_size: int = typer.Option(0, help="Tokens of context; 0 is the model's own."),
    dtype: str = typer.Option("", help="float16, bfloat16 or float32; default the model's own."),
    nifti: bool = typer.Option(False, help="Write every run as a 4D NIfTI too."),
    device: DEVICE = "auto",
    field: FIELD = "text",
) -> None:
    """Record every neuron of a model at every token of a text."""
    from llmbrain.cli.common import open_model, read_texts
    from llmbrain.scanning import scan as scan_model

    texts = read_texts(text, field)
    loaded, tokenizer = open_model(model, device)
    sites = site.split(",")
    scans = scan_model(
        loaded, tokenizer, texts, out=out, site=sites if len(sites) > 1 else sites[0], batch_size=batch_size,
        block_size=block_size or None, n_tokens=n_tokens or None, dtype=dtype or None,
    )  # fmt: skip
    if nifti:
        for run in scans:
            run.to_nifti(out / f"{run.name}.nii")
    say(f"{len(scans)} runs, {sum(s.n_tokens for s in scans):,} tokens x {scans[0].n_neurons:,} units in {out}")


def decompose(
    study: STUDY,
    components: COMPONENTS = "20",
    method: str = typer.Option("fastica", help="fastica, picard or dictlearning."),
    runs: int = typer.Option(0, help="Use the first N runs; 0 is all."),
    stability: int = typer.Option(0, help="Repeat R times and report how stable each network is; 0 is once."),
    threshold: float = typer.Option(PUBLISHED_Z, help="|z| above which a neuron belongs to a network."),
    out: Path | None = typer.Option(None, help="Folder to write; default STUDY/networks."),
    convention: str = typer.Option("bids", help="bids or fsl: names of the files."),
    device: DEVICE = "auto",
    seed: SEED = 0,
    overwrite: OVERWRITE = False,
) -> None:
    """Group ICA of a scan: its functional networks. The same command goes on where it was stopped."""
    from llmbrain._validation import check_option
    from llmbrain.cli.common import claim, file_hash, parse_components
    from llmbrain.decomposition import GroupICA, ica_stability, read_ica
    from llmbrain.networks import FunctionalNetworks
    from llmbrain.scanning import load_scans

    check_option("--convention", convention, ("bids", "fsl"))
    check_option("--method", method, ("fastica", "picard", "dictlearning"))
    k = parse_components(components)
    folder = scan_folder(study)
    scans = load_scans(folder)[: runs or None]
    target = out or study / "networks"
    settings = {
        "components": k, "method": method, "runs": len(scans), "seed": seed, "scan": file_hash(folder / "manifest.json")
    }  # fmt: skip
    claim(target, settings, overwrite=overwrite)
    if (target / "ica" / "ica.json").is_file() and not overwrite:
        say("group ICA: done before")
        ica = read_ica(target / "ica")
    else:
        ica = GroupICA(k, method=method, random_state=seed, device=device, progress=sys.stderr.isatty()).fit(scans)
        ica.save(target / "ica", overwrite=True)
    networks = FunctionalNetworks.from_ica(ica, threshold=threshold)
    networks.save(target, overwrite=True)
    if convention == "fsl":
        from llmbrain.imaging import write_melodic

        write_melodic(ica, target)
    report: dict[str, Any] = {"scans": scans, "ica": ica, "networks": networks}
    table = networks.summary().reset_index()
    if stability:
        report["stability"] = ica_stability(
            scans, n_components=ica.n_components_, n_starts=stability, random_state=seed, device=device
        )
    from llmbrain.reporting import write_report

    write_report(target / "report.html", title=f"Networks of {study}", **report)
    print_table(table)
    if stability:
        print_table(report["stability"].to_frame().reset_index(names="network"), "stability")
    say(f"networks and report: {target}")


def dualreg(
    study: STUDY,
    networks: Path | None = typer.Option(None, help="Folder of networks; default STUDY/networks."),
    out: Path | None = typer.Option(None, help="Folder to write; default STUDY/dualreg."),
    normalize: bool = typer.Option(True, help="Unit-variance time courses in stage 2 (FSL's des_norm)."),
) -> None:
    """Dual regression: each run's own time courses and maps, in FSL's names."""
    from llmbrain.decomposition import dual_regression
    from llmbrain.networks import FunctionalNetworks
    from llmbrain.scanning import load_scans

    scans = load_scans(scan_folder(study))
    group = FunctionalNetworks.load(networks or study / "networks")
    target = out or study / "dualreg"
    dual_regression(group, scans, normalize=normalize, out=target)
    say(f"{len(scans)} runs x {len(group)} networks: {target}")


def evaluate(
    model: MODEL,
    text: Annotated[Path | None, typer.Option(help="Measure perplexity on this .txt, .json or .jsonl.")] = None,
    tasks: list[str] = typer.Option([], help="Tasks of lm-evaluation-harness: names, YAML files or folders."),
    window: int = typer.Option(0, help="Tokens in a window; 0 is the model's context."),
    max_windows: int = typer.Option(0, help="Use the first N windows; 0 is all."),
    batch_size: int = typer.Option(8, help="Sequences of a task that are read at once."),
    limit: int = typer.Option(0, help="Documents of each task; 0 is all."),
    num_fewshot: int = typer.Option(-1, help="Solved examples before each question; -1 is what the task says."),
    out: Annotated[Path | None, typer.Option(help="Write the table of the tasks here (.csv).")] = None,
    device: DEVICE = "auto",
    field: FIELD = "text",
) -> None:
    """Perplexity of a model (or of a pruned one) on a text, or its score on tasks."""
    from llmbrain import evaluation
    from llmbrain.cli.common import open_model, read_texts

    if text is None and not tasks:
        raise InputError("give --text FILE for perplexity, --tasks NAMES for tasks, or both")
    texts = None if text is None else read_texts(text, field)
    loaded, tokenizer = open_model(model, device)
    if texts is not None:
        value = evaluation.perplexity(loaded, tokenizer, texts, window=window or None, max_windows=max_windows or None)
        typer.echo(f"perplexity {value:.4f}")
    if tasks:
        table = evaluation.evaluate(
            loaded, tokenizer, parts(tasks), batch_size=batch_size, limit=limit or None,
            num_fewshot=None if num_fewshot < 0 else num_fewshot,
        )  # fmt: skip
        print_table(table, digits=4)
        if out is not None:
            table.to_csv(out, index=False)


def info(path: Annotated[Path, typer.Argument(help="Scan, networks, study, model or NIfTI.")]) -> None:
    """Say what is in a folder or a NIfTI."""
    from llmbrain.cli.inspect import describe_path

    for name, value in describe_path(path).items():
        typer.echo(f"{name}: {value}")
