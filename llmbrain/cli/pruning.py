"""Making models smaller: ``plan``, ``prune``, ``recover``, ``benchmark``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from llmbrain._validation import InputError
from llmbrain.cli.common import (
    COMPENSATE,
    DEVICE,
    FIELD,
    METHOD,
    MODEL,
    OUT,
    OVERWRITE,
    SEED,
    TEXT,
    print_table,
    say,
)
from llmbrain.cli.lists import ListCommand, parts

CALIBRATION = Annotated[
    Path | None, typer.Option("--text", help="Calibration text (.txt, .json, .jsonl); default: that of the study.")
]
STUDY = Annotated[Path | None, typer.Option("--study", help="Folder that `llmbrain run`, `scan` or `decompose` wrote.")]
ALLOCATION = Annotated[
    str,
    typer.Option("--allocation", help="uniform, global, clamped, sensitivity or search; default: the method's own."),
]
MULTIPLE = Annotated[int, typer.Option("--multiple-of", help="Widths are multiples of it (8 to 256).")]
PROTECT = Annotated[
    list[str] | None, typer.Option("--protect", help="Layers that are not cut; negative ones count from the end.")
]
HEADS = Annotated[
    float, typer.Option("--head-ratio", help="Share of the attention heads to remove, in key/value groups.")
]
PASSES = Annotated[
    float, typer.Option("--passes", help="Forward passes over the calibration text that a search may take.")
]
BALANCE = Annotated[
    float,
    typer.Option("--token-balance", help="How much tokens that networks leave unexplained count more: 0 to 1."),
]
SELF_TEXT = Annotated[
    int, typer.Option("--self-text", help="Windows of calibration text that the model writes itself, beside the text.")
]
KEEP = Annotated[list[str] | None, typer.Option("--keep", help="Conditions whose function stays.")]
SHARE = Annotated[
    float | None,
    typer.Option("--ratio", help="Share of the MLP neurons to remove; default 0.3, with --forget as many as it takes."),
]
FORGET = Annotated[list[str] | None, typer.Option("--forget", help="Conditions whose function goes.")]
DEFAULT_RATIO = 0.3
PLAN_COMPONENTS = 64  # networks that are found where none are given; fewer in small models and texts
TEXT_WINDOWS = 128  # windows of the text that are mixed with the model's own
NEURONS_EACH, TOKENS_EACH = 10, 50  # that there are for each
PLAN_TOKENS = 32768  # and how much text is scanned for them


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (plan, prune, recover, benchmark):
        app.command(command.__name__, cls=ListCommand)(command)


@dataclass
class _Evidence:
    """What a plan is made from."""

    networks: Any
    scans: Any
    texts: list[str] | None
    windows: Any = None  # instead of the texts, where the model wrote some

    @property
    def calibration(self) -> dict[str, Any]:
        """What calibrates, as `plan_pruning` and `prune` take it."""
        if self.windows is None:
            return {"calibration": self.texts}
        return {"calibration": self.windows, "max_windows": len(self.windows)}


def _evidence(
    model: Any, tokenizer: Any, study: Path | None, text: Path | None, field: str, method: str, seed: int,
    self_text: int = 0,
) -> _Evidence:  # fmt: skip
    """Texts, scans and networks: those of the study, or found now where the method uses networks."""
    from llmbrain.cli.common import read_texts
    from llmbrain.cli.steps import scan_folder
    from llmbrain.networks import FunctionalNetworks
    from llmbrain.scanning import load_scans

    scans = load_scans(scan_folder(study)) if study else None
    folder = study / "networks" if study else None
    networks = FunctionalNetworks.load(folder) if folder and (folder / "networks.json").is_file() else None
    if text is not None:
        texts = read_texts(text, field)
    else:
        texts = [scan.text for scan in scans or () if scan.text]
    windows = None
    if self_text:
        from llmbrain.hooks.text import as_windows
        from llmbrain.pruning.calibrate.windows import mixed_windows, write_windows

        say(f"the model writes {self_text} windows of calibration text")
        windows = mixed_windows(
            as_windows(model, tokenizer, texts, None, TEXT_WINDOWS) if texts else None,
            write_windows(model, tokenizer, self_text, random_state=seed),
            random_state=seed,
        )
    if method == "networks" and networks is None and (scans or texts or windows is not None):
        networks = _find_networks(model, tokenizer, texts, scans, windows, seed=seed)
    return _Evidence(networks, scans, texts or None, windows)


def _find_networks(
    model: Any, tokenizer: Any, texts: list[str] | None, scans: Any = None, windows: Any = None, *,
    components: int = 0, seed: int, device: str = "auto",
) -> Any:  # fmt: skip
    """Networks of the scans, or of the first texts or windows scanned now."""
    from llmbrain.anatomy.families import anatomy
    from llmbrain.cli.main_job import limit_tokens
    from llmbrain.decomposition import GroupICA
    from llmbrain.networks import FunctionalNetworks
    from llmbrain.pruning.calibrate.windows import signals_of_windows
    from llmbrain.scanning import scan

    if scans:
        runs = scans
    elif texts:
        runs = scan(model, tokenizer, limit_tokens(texts, tokenizer, PLAN_TOKENS))
    else:
        first = windows[: max(1, PLAN_TOKENS // windows.shape[1])]
        runs = signals_of_windows(model, anatomy(model), first, ("neuron",))
    most = min(runs[0].n_neurons // NEURONS_EACH, sum(run.n_tokens for run in runs) // TOKENS_EACH)
    components = components or max(2, min(PLAN_COMPONENTS, most))
    say(f"finding {components} networks in the calibration text")
    ica = GroupICA(components, random_state=seed, device=device)
    return FunctionalNetworks.from_ica(ica.fit(runs))


def _make_plan(
    model: Any, tokenizer: Any, evidence: _Evidence, *, ratio: float | None, allocation: str, multiple_of: int,
    head_ratio: float, protect: list[str] | None, keep: list[str] | None, forget: list[str] | None,
    one_width: bool = False, **options: Any,
) -> Any:  # fmt: skip
    from llmbrain.anatomy.families import anatomy
    from llmbrain.pruning import plan_pruning

    if ratio is None and not forget:
        ratio = DEFAULT_RATIO
    widths = anatomy(model).widths
    given: Any = allocation or None
    if one_width and forget:
        raise InputError("--format uniform: --forget says itself how wide each layer stays; use per-layer or masked")
    if one_width and protect:
        raise InputError("--format uniform: one width everywhere protects no layer; use per-layer or masked")
    if one_width and ratio is not None and not allocation and len(set(widths)) == 1:
        # the ratio as nearly as one width allows
        given = [max(1, round((1 - ratio) * widths[0] / multiple_of)) * multiple_of] * len(widths)
    if one_width and head_ratio:
        groups = min(layer.out.units if layer.out else 1 for layer in anatomy(model).layers)
        head_ratio = min(round(head_ratio * groups), groups - 1) / groups

    functions = bool(keep or forget)
    if functions and evidence.scans is None:
        raise InputError("--keep and --forget need --study: a scan whose texts have conditions")
    if functions and evidence.windows is not None:
        raise InputError("--self-text has no conditions: leave it away with --keep and --forget")
    return plan_pruning(
        model, evidence.networks, evidence.scans, ratio=ratio, tokenizer=tokenizer, allocation=given,
        multiple_of=multiple_of, protect=_layers(protect), head_ratio=head_ratio, keep=parts(keep) or None,
        forget=parts(forget) or None, **({} if functions else evidence.calibration), **options,
    )  # fmt: skip


def _layers(protect: list[str] | None) -> list[int] | None:
    try:
        return [int(layer) for layer in parts(protect)] or None
    except ValueError:
        raise InputError(f"--protect={' '.join(protect or ())} must be whole numbers, layers of the model") from None


def plan(
    model: MODEL,
    text: CALIBRATION = None,
    study: STUDY = None,
    out: Path = typer.Option(Path("plan.json"), "--out", help="Where to write the plan; a figure goes beside it."),
    ratio: SHARE = None,
    method: METHOD = "networks",
    allocation: ALLOCATION = "",
    multiple_of: MULTIPLE = 1,
    protect: PROTECT = None,
    head_ratio: HEADS = 0.0,
    passes: PASSES = 24,
    token_balance: BALANCE = 0.5,
    self_text: SELF_TEXT = 0,
    keep: KEEP = None,
    forget: FORGET = None,
    device: DEVICE = "auto",
    seed: SEED = 0,
    field: FIELD = "text",
) -> None:
    """Say what a cut would remove, layer by layer; nothing is cut."""
    from llmbrain.cli.common import open_model
    from llmbrain.plotting import plot_widths

    loaded, tokenizer = open_model(model, device)
    evidence = _evidence(loaded, tokenizer, study, text, field, method, seed, self_text)
    made = _make_plan(
        loaded, tokenizer, evidence, ratio=ratio, method=method, allocation=allocation, multiple_of=multiple_of,
        protect=protect, head_ratio=head_ratio, passes=passes, token_balance=token_balance, keep=keep, forget=forget,
        random_state=seed,
    )  # fmt: skip
    made.save(out)
    plot_widths(made).savefig(out.with_suffix(".png"), dpi=130)
    print_table(made.to_frame())
    say(made.summary())
    say(f"plan: {out}")


def prune(
    model: MODEL,
    out: OUT,
    text: CALIBRATION = None,
    study: STUDY = None,
    from_plan: Path | None = typer.Option(None, "--plan", help="Plan that `llmbrain plan` wrote; else one is made."),
    ratio: SHARE = None,
    method: METHOD = "networks",
    allocation: ALLOCATION = "",
    compensate: COMPENSATE = "least-squares",
    format: str = typer.Option("per-layer", help="per-layer, remote-code, uniform or masked."),
    multiple_of: MULTIPLE = 1,
    protect: PROTECT = None,
    head_ratio: HEADS = 0.0,
    passes: PASSES = 24,
    token_balance: BALANCE = 0.5,
    self_text: SELF_TEXT = 0,
    keep: KEEP = None,
    forget: FORGET = None,
    device: DEVICE = "auto",
    seed: SEED = 0,
    field: FIELD = "text",
    overwrite: OVERWRITE = False,
) -> None:
    """Cut neurons out of a model and save the smaller one."""
    from llmbrain.checkpoints import save_pruned
    from llmbrain.cli.common import open_model
    from llmbrain.pruning import PruningPlan
    from llmbrain.pruning import prune as cut
    from llmbrain.reporting import write_report

    _check_free(out, overwrite)
    loaded, tokenizer = open_model(model, device)
    evidence = _evidence(loaded, tokenizer, study, text, field, "" if from_plan else method, seed, self_text)
    if from_plan is not None:
        made = PruningPlan.load(from_plan)
    else:
        made = _make_plan(
            loaded, tokenizer, evidence, ratio=ratio, method=method, allocation=allocation, multiple_of=multiple_of,
            protect=protect, head_ratio=head_ratio, passes=passes, token_balance=token_balance, keep=keep,
            forget=forget, random_state=seed, one_width=format == "uniform",
        )  # fmt: skip
    calibration = {"calibration": evidence.scans} if made.details.get("functions") else evidence.calibration
    small = cut(
        loaded, made, tokenizer=tokenizer, compensate=None if compensate == "none" else compensate,
        intercept=format != "uniform", **calibration,
    )  # fmt: skip
    save_pruned(small, tokenizer, out, format=format, overwrite=overwrite)
    write_report(out / "report.html", title=f"{model}, pruned", plan=made, networks=evidence.networks)
    say(made.summary())
    say(f"saved: {out}")


def _check_free(out: Path, overwrite: bool) -> None:
    """Before the work, not after it."""
    if (out / "config.json").exists() and not overwrite:
        raise InputError(f"--out={out} holds a model already: choose another folder, or --overwrite")


def recover(
    model: MODEL,
    text: TEXT,
    out: OUT,
    steps: int = typer.Option(100, help="Optimiser steps."),
    rank: int = typer.Option(8, help="Rank of the updates (LoRA)."),
    device: DEVICE = "auto",
    seed: SEED = 0,
    field: FIELD = "text",
    overwrite: OVERWRITE = False,
) -> None:
    """Train a pruned model for a while with low-rank updates, merge them, save it."""
    from llmbrain.checkpoints import save_pruned
    from llmbrain.cli.common import open_model, read_texts
    from llmbrain.pruning import recover as train

    _check_free(out, overwrite)
    texts = read_texts(text, field)
    loaded, tokenizer = open_model(model, device)
    better, table = train(loaded, tokenizer, texts, steps=steps, rank=rank, random_state=seed, inplace=True)
    save_pruned(better, tokenizer, out, overwrite=overwrite)
    print_table(table)
    say(f"saved: {out}")


def benchmark(
    model: MODEL,
    text: TEXT,
    ratios: list[str] = typer.Option(["0.2", "0.3", "0.5"], help="Shares of the MLP neurons to remove."),
    methods: list[str] = typer.Option([], help="Criteria; default all."),
    components: int = typer.Option(0, help="Networks to find for the method that uses them; 0: up to 64."),
    draws: int = typer.Option(3, help="Calibration draws of the main rows, for intervals; 1 for none."),
    window: int = typer.Option(0, help="Tokens in a window; 0 is the model's context, at most 256."),
    max_windows: int = typer.Option(128, help="Calibration windows."),
    test_windows: int = typer.Option(96, help="Test windows."),
    out: Path = typer.Option(Path("benchmark.csv"), "--out", help="Where to write the table."),
    device: DEVICE = "auto",
    seed: SEED = 0,
    field: FIELD = "text",
) -> None:
    """Prune your own model by every method and compare: the first 60% of the text calibrates, the last 30% tests."""
    from llmbrain.cli.common import open_model, read_texts
    from llmbrain.cli.main_job import split_texts
    from llmbrain.pruning.benchmark import compare_methods

    try:
        shares = [float(ratio) for ratio in parts(ratios)]
    except ValueError:
        raise InputError(f"--ratios={' '.join(ratios)} must be numbers") from None
    chosen = parts(methods) or None
    before, test = split_texts(read_texts(text, field), 0.3)
    calibration, _ = split_texts(before, 1 / 7)
    loaded, tokenizer = open_model(model, device)
    networks = None
    if chosen is None or "networks" in chosen:
        networks = _find_networks(loaded, tokenizer, calibration, components=components, seed=seed, device=device)
    table = compare_methods(
        loaded, tokenizer, calibration, test, ratios=shares, methods=chosen, networks=networks, draws=draws,
        window=window or None, max_windows=max_windows, test_windows=test_windows, random_state=seed,
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(out, index=False)
    print_table(table)
    say(f"table: {out}")
