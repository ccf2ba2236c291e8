"""The steps of the main job, alone: ``scan``, ``decompose``, ``dualreg``, ``evaluate``, ``info``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from llmbrain._validation import InputError
from llmbrain.cli.common import (
    COMPONENTS,
    DEVICE,
    DEVICE_MAP,
    DRY_RUN,
    FIELD,
    MODEL,
    MODEL_DTYPE,
    OUT,
    OVERWRITE,
    RUN_LENGTH,
    SEED,
    one_process,
    open_model,
    parse_components,
    path_of,
    print_table,
    say,
)
from llmbrain.cli.lists import ListCommand, parts
from llmbrain.stats import PUBLISHED_Z

if TYPE_CHECKING:
    from llmbrain.scanning import Stimulus

# Not required, so that the last of several --images is never taken for it.
STUDY = Annotated[
    Path | None,
    typer.Argument(help="Folder of a scan, or that `llmbrain run` wrote; with --images the folder to write, or --out."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (scan, merge, decompose, dualreg, evaluate, info, check):
        app.command(command.__name__, cls=ListCommand)(command)


ROWS = "Rows of TOFU, WMDP, MUSE or plain text (.json, .jsonl, .parquet, .txt)"


def scan(
    model: MODEL,
    out: OUT,
    text: Path | None = typer.Option(
        None, "--text", help=".txt, .json (list of strings) or .jsonl (a field 'text' a line)."
    ),
    forget: Path | None = typer.Option(None, "--forget", help=f"{ROWS}: read as condition 'forget'; needs --retain."),
    retain: Path | None = typer.Option(None, "--retain", help=f"{ROWS}: read as condition 'retain'."),
    site: str = typer.Option("neuron", help="neuron, gate, up, mlp_out, block_out, head; several with commas."),
    n_tokens: int = typer.Option(0, help="Tokens to read of each text; 0 is all.", min=0),
    batch_size: int = typer.Option(8, help="Texts read at once.", min=1),
    block_size: int = typer.Option(0, help="Tokens of context; 0 is the model's own.", min=0),
    dtype: str = typer.Option("", help="float16, bfloat16 or float32; default the model's own."),
    nifti: bool = typer.Option(False, help="Write every run as a 4D NIfTI too."),
    run_length: RUN_LENGTH = 2048,
    rank: int | None = typer.Option(None, "--rank", help="Number of this process, from 0, of several (see --of)."),
    of: int | None = typer.Option(None, "--of", help="How many processes share the scan; torchrun needs neither."),
    dry_run: DRY_RUN = False,
    device: DEVICE = "auto",
    device_map: DEVICE_MAP = "",
    tp_plan: str = typer.Option(
        "", help="For models larger than a device: 'auto' gives each process of torchrun some neurons of every layer."
    ),
    model_dtype: str = typer.Option("", help="What the model computes in: float32, bfloat16, float16."),
    field: FIELD = "text",
) -> None:
    """Record every neuron of a model at every token of a text; several processes may share it (torchrun, --rank)."""
    from llmbrain.datasets import read_rows, unlearning_texts
    from llmbrain.distributed import ranks
    from llmbrain.scanning import scan as scan_model
    from llmbrain.scanning import taking
    from llmbrain.scanning.shares import Share
    from llmbrain.scanning.store import unfinished
    from llmbrain.study import load_texts
    from llmbrain.study.cost import step_cost, told

    if (rank is None) != (of is None):
        raise InputError(f"--rank={rank} --of={of}: give both, or neither")
    with taking(rank, of) if rank is not None and of is not None else nullcontext():
        Share.now()  # says that there is no such rank, before the model is read
    rows = [path for path in (forget, retain) if path is not None]
    if len(rows) == 1 or bool(rows) == (text is not None):
        raise InputError("give --text, or --forget and --retain")
    given = load_texts(text, field) if text is not None else [line for path in rows for line in read_rows(path)]
    loaded, tokenizer = open_model(model, device, dtype=model_dtype, device_map=device_map, tp_plan=tp_plan)
    texts: list[str] | list[Stimulus] = given
    if forget is not None and retain is not None:
        texts = unlearning_texts(forget, retain, tokenizer)
    sites = site.split(",")
    most = n_tokens * len(texts) or None
    told(step_cost(loaded, tokenizer, given, n_tokens=most, site=sites[0], dtype=dtype or None, disk=True), say)
    if dry_run:
        return
    with taking(rank, of) if rank is not None and of is not None else nullcontext():
        scans = scan_model(
            loaded, tokenizer, texts, out=out, site=sites if len(sites) > 1 else sites[0], batch_size=batch_size,
            block_size=block_size or None, n_tokens=n_tokens or None, dtype=dtype or None,
            run_length=run_length or None,
        )  # fmt: skip
    if missing := unfinished(out):
        say(f"rank {rank} of {of} is done; the study still lacks {missing}: {out}")
        return
    if nifti and ranks().leads:
        for run in scans:
            run.to_nifti(out / f"{run.name}.nii")
    say(f"{len(scans)} runs, {sum(s.n_tokens for s in scans):,} tokens x {scans[0].n_neurons:,} units in {out}")


def merge(
    folders: Annotated[list[Path], typer.Argument(help="Folders that ranks of one scan wrote.")],
    out: OUT,
) -> None:
    """Join the folders of a scan whose ranks wrote apart (`llmbrain scan --rank I --of N` on several machines)."""
    from llmbrain.scanning import merge as merge_folders

    scans = merge_folders(folders, out)
    say(f"{len(scans)} runs, {sum(s.n_tokens for s in scans):,} tokens x {scans[0].n_neurons:,} units in {out}")


def decompose(
    study: STUDY = None,
    components: COMPONENTS = "20",
    method: str = typer.Option("fastica", help="fastica, picard, dictlearning, kmeans, nmf, or ulcmod."),
    runs: int = typer.Option(0, help="Use the first N runs; 0 is all.", min=0),
    stability: int = typer.Option(0, help="Repeat R times and report how stable each network is; 0 is once.", min=0),
    threshold: float = typer.Option(PUBLISHED_Z, help="|z| above which a neuron belongs to a network.", min=0),
    out: Path | None = typer.Option(
        None, "--out", parser=path_of, metavar="PATH", help="Folder to write; default STUDY/networks."
    ),
    images: list[Path] = typer.Option(
        [], help="Runs of a brain in place of a scan: NIfTI, CIFTI, GIFTI, parcel tables."
    ),
    mask: Path | None = typer.Option(None, help="Brain mask, for --images that are NIfTI."),
    atlas: Path | None = typer.Option(None, help="Labels image: names the regions of --images."),
    atlas_labels: Path | None = typer.Option(None, help="What its labels are called; default: the table beside it."),
    confounds: list[Path] = typer.Option([], help="Tables of confounds, one for each of --images."),
    confound_columns: list[str] = typer.Option(
        [], help="Their columns: names or patterns; default motion, CSF, white matter, cosines, outliers."
    ),
    scrub: float = typer.Option(0, help="Leave volumes out whose framewise displacement (mm) exceeds this; 0 is none."),
    convention: str = typer.Option("bids", help="bids or fsl: names of the files."),
    device: DEVICE = "auto",
    seed: SEED = 0,
    overwrite: OVERWRITE = False,
) -> None:
    """Group ICA of a scan (or another method): its functional networks. The same command goes on where it stopped."""
    from llmbrain.study import networks

    if images:
        from llmbrain.study.images import decompose_images

        one_process("decompose --images")

        found = decompose_images(
            images, _place(out, study, "networks", "--out"), mask=mask, n_components=parse_components(components),
            confounds=confounds,
            columns=parts(confound_columns), scrub=scrub or None, method=method, threshold=threshold,
            convention=convention, device=device, random_state=seed, overwrite=overwrite, atlas=atlas,
            atlas_labels=atlas_labels,
        )  # fmt: skip
        print_table(found["networks"].summary().reset_index())
        say(f"networks and report: {found['folder']}")
        return
    study = _study(study, {"--mask": mask, "--atlas": atlas, "--atlas-labels": atlas_labels, "--confounds": confounds,
                           "--confound-columns": confound_columns, "--scrub": scrub})  # fmt: skip
    made = networks.decompose(
        study, parse_components(components), method=method, n_runs=runs or None, stability=stability,
        threshold=threshold, out=out, convention=convention, device=device, random_state=seed, overwrite=overwrite,
    )  # fmt: skip
    print_table(made["networks"].summary().reset_index())
    if "stability" in made:
        print_table(made["stability"].to_frame().reset_index(names="network"), "stability")
    say(f"networks and report: {made['folder']}")


def dualreg(
    study: STUDY = None,
    networks: Path | None = typer.Option(None, help="Folder of networks; default STUDY/networks."),
    out: Path | None = typer.Option(
        None, "--out", parser=path_of, metavar="PATH", help="Folder to write; default STUDY/dualreg."
    ),
    normalize: bool = typer.Option(True, help="Unit-variance time courses in stage 2 (FSL's des_norm)."),
    images: list[Path] = typer.Option(
        [], help="Runs of a brain in place of a scan: NIfTI, CIFTI, GIFTI, parcel tables."
    ),
    mask: Path | None = typer.Option(None, help="Brain mask; default the one in the folder of networks."),
    confounds: list[Path] = typer.Option([], help="Tables of confounds, one for each of --images."),
    confound_columns: list[str] = typer.Option([], help="Their columns: names or patterns."),
    scrub: float = typer.Option(0, help="Leave volumes out whose framewise displacement (mm) exceeds this; 0 is none."),
) -> None:
    """Dual regression: each run's own time courses and maps, in FSL's names."""
    from llmbrain.decomposition import dual_regression
    from llmbrain.study import Study

    if images:
        from llmbrain.study.images import dualreg_images

        one_process("dualreg --images")

        place = _place(out, study, "dualreg", "--out")
        made = dualreg_images(
            images, _place(networks, study, "networks", "--networks"), place, mask=mask, confounds=confounds,
            columns=parts(confound_columns), scrub=scrub or None, normalize=normalize,
        )  # fmt: skip
        say(f"{made}: {place}")
        return
    study = _study(study, {"--mask": mask, "--confounds": confounds, "--confound-columns": confound_columns,
                           "--scrub": scrub})  # fmt: skip
    scans, group = Study(study).scans, Study(networks or study).networks
    target = out or study / "dualreg"
    dual_regression(group, scans, normalize=normalize, out=target)
    say(f"{len(scans)} runs x {len(group)} networks: {target}")


def _place(given: Path | None, study: Path | None, name: str, option: str) -> Path:
    """A folder that was named, or the one of this name in the study."""
    if given is None and study is None:
        raise InputError(f"{option}=None: with --images name a folder, or a STUDY that holds it")
    return given if given is not None else cast(Path, study) / name


def _study(study: Path | None, of_images: Mapping[str, object]) -> Path:
    """The study, where no images are given; options that are theirs are refused."""
    if alone := [option for option, value in of_images.items() if value]:
        raise InputError(f"{', '.join(alone)}: only with --images")
    if study is None:
        raise InputError("study=None: give the folder of a scan (or a folder that `llmbrain run` wrote), or --images")
    return study


def evaluate(
    model: MODEL,
    text: Annotated[Path | None, typer.Option(help="Measure perplexity on this .txt, .json or .jsonl.")] = None,
    tasks: list[str] = typer.Option([], help="Tasks of lm-evaluation-harness: names, YAML files or folders."),
    window: int = typer.Option(0, help="Tokens in a window; 0 is the model's context.", min=0),
    max_windows: int = typer.Option(0, help="Use the first N windows; 0 is all.", min=0),
    batch_size: int = typer.Option(8, help="Sequences of a task that are read at once.", min=1),
    limit: int = typer.Option(0, help="Documents of each task; 0 is all.", min=0),
    trust_tasks: Annotated[bool, typer.Option("--trust-tasks", help="Run code that task files carry.")] = False,
    num_fewshot: int = typer.Option(-1, help="Solved examples before each question; -1 is what the task says.", min=-1),
    out: Annotated[
        Path | None,
        typer.Option("--out", parser=path_of, metavar="PATH", help="Write the table of the tasks here (.csv)."),
    ] = None,
    device: DEVICE = "auto",
    device_map: DEVICE_MAP = "",
    dtype: MODEL_DTYPE = "",
    field: FIELD = "text",
) -> None:
    """Perplexity of a model (or of a pruned one) on a text, or its score on tasks."""
    from llmbrain import evaluation
    from llmbrain._files import write_table
    from llmbrain.study import load_texts

    if text is None and not tasks:
        raise InputError("give --text FILE for perplexity, --tasks NAMES for tasks, or both")
    texts = None if text is None else load_texts(text, field)
    loaded, tokenizer = open_model(model, device, dtype=dtype, device_map=device_map)
    if texts is not None:
        value = evaluation.perplexity(loaded, tokenizer, texts, window=window or None, max_windows=max_windows or None)
        typer.echo(f"perplexity {value:.4f}")
    if tasks:
        table = evaluation.evaluate(
            loaded, tokenizer, parts(tasks), batch_size=batch_size, limit=limit or None,
            num_fewshot=None if num_fewshot < 0 else num_fewshot, trust_tasks=trust_tasks,
        )  # fmt: skip
        print_table(table, digits=4)
        if out is not None:
            write_table(out, table)


def info(path: Annotated[Path, typer.Argument(help="Scan, networks, study, model or NIfTI.")]) -> None:
    """Say what is in a folder or a NIfTI."""
    from llmbrain.study import describe_path

    for name, value in describe_path(path).items():
        typer.echo(f"{name}: {value}")


def check(path: Annotated[Path, typer.Argument(help="Study, scan, networks, model, plan or NIfTI.")]) -> None:
    """Compare every file with its checksum: what belongs together, what is damaged, and what makes it anew."""
    from llmbrain.study import check as check_files

    found = check_files(path)
    for part, files in found.groupby("part", sort=False):
        typer.echo(f"{part}: {len(files)} files, {int((files['state'] != 'ok').sum())} damaged")
    damaged = found[found["state"] != "ok"]
    for row in damaged.itertuples():
        typer.echo(f"damaged: {row.file}: {row.state}. Make it anew: {row.anew}")
    if len(damaged):
        raise InputError(f"{len(damaged)} of {len(found)} files in {path} are damaged")
