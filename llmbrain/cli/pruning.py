"""Making models smaller: ``plan``, ``prune``, ``recover``, ``benchmark``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmbrain._validation import InputError
from llmbrain.cli.common import (
    ALLOCATION,
    BALANCE,
    COMPENSATE,
    DEVICE,
    DEVICE_MAP,
    DROP,
    DRY_RUN,
    EXPERTS,
    FIELD,
    FORGET,
    FORMAT,
    GGUF_TYPE,
    HEADS,
    INDICES,
    KEEP,
    LAST,
    LIKE,
    METHOD,
    MODEL,
    MODEL_DTYPE,
    MULTIPLE,
    OUT,
    OVERWRITE,
    PASSES,
    PROPAGATION,
    PROTECT,
    SEED,
    SELF_TEXT,
    SHARE,
    TEXT,
    is_given,
    one_process,
    open_model,
    parse_layers,
    path_of,
    print_table,
    say,
)
from llmbrain.cli.lists import ListCommand, parts

SHOWN = 12  # rows of a forecast
CALIBRATION = Annotated[
    Path | None, typer.Option("--text", help="Calibration text (.txt, .json, .jsonl); default: that of the study.")
]
STUDY = Annotated[Path | None, typer.Option("--study", help="Folder that `llmbrain run`, `scan` or `decompose` wrote.")]


OFFLOAD = Annotated[
    bool,
    typer.Option("--offload", help="The blocks stay in the checkpoint; one at a time is in memory, and is cut there."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (plan, prune, recover, benchmark):
        app.command(command.__name__, cls=ListCommand)(command)


def plan(
    model: MODEL,
    text: CALIBRATION = None,
    study: STUDY = None,
    out: Path = typer.Option(
        Path("plan.json"),
        "--out",
        parser=path_of,
        metavar="PATH",
        help="Where to write the plan; a figure goes beside it.",
    ),
    ratio: SHARE = None,
    method: METHOD = "networks",
    allocation: ALLOCATION = "",
    multiple_of: MULTIPLE = 1,
    protect: PROTECT = None,
    head_ratio: HEADS = 0.0,
    drop: DROP = None,
    expert_ratio: EXPERTS = None,
    passes: PASSES = 24,
    token_balance: BALANCE = None,
    self_text: SELF_TEXT = None,
    keep: KEEP = None,
    forget: FORGET = None,
    last: LAST = False,
    forecast: bool = typer.Option(True, help="With a study: say what the cut, repaired by least squares, will cost."),
    device: DEVICE = "auto",
    device_map: DEVICE_MAP = "",
    offload: OFFLOAD = False,
    dtype: MODEL_DTYPE = "",
    seed: SEED = 0,
    field: FIELD = "text",
    dry_run: DRY_RUN = False,
) -> None:
    """Say what a cut would remove, layer by layer, and what it will cost; nothing is cut."""
    from llmbrain.pruning.allocate.blocks import check_drop
    from llmbrain.study import load_texts, smaller
    from llmbrain.study.experts import plan_fewer
    from llmbrain.study.plan_cost import plan_cost

    loaded, tokenizer = open_model(model, device, dtype=dtype, device_map=device_map, offload=offload)
    texts = load_texts(text, field) if text else None
    if expert_ratio is not None:
        one_process("plan --expert-ratio")
        if parts(drop) or last:
            raise InputError("--expert-ratio takes no --drop and no --last")
        only = _of_experts(dry_run, ratio, allocation, protect, head_ratio, keep, forget, self_text)
        fewer = plan_fewer(
            loaded, tokenizer, texts, expert_ratio=expert_ratio, method=method, study=study, out=out, random_state=seed,
            **only,
        )  # fmt: skip
        print_table(fewer.to_frame())
        say(fewer.summary())
        say(f"plan: {out}")
        return
    costs = plan_cost(
        loaded, tokenizer, texts, study=study, method=method, allocation=allocation or None, passes=passes,
        head_ratio=head_ratio, drop=check_drop(parts(drop)), self_text=self_text, keep=parts(keep),
        forget=parts(forget), forecast=forecast, ratio=ratio, token_balance=token_balance,
    )  # fmt: skip
    for line in costs.lines() if costs else ():
        say(line)
    if dry_run:
        return
    more: dict[str, Any] = {"last": True} if last else {}
    made = smaller.plan(
        loaded, tokenizer, texts, study=study, out=out, self_text=self_text,
        ratio=ratio, method=method, allocation=allocation or None, multiple_of=multiple_of,
        protect=parse_layers(protect), head_ratio=head_ratio, drop=parts(drop), passes=passes,
        token_balance=token_balance,
        keep=parts(keep) or None, forget=parts(forget) or None, random_state=seed, **more,
    )  # fmt: skip
    print_table(made.to_frame())
    say(made.summary())
    if forecast and study is not None:
        _forecast(loaded, made, study)
    say(f"plan: {out}")


def _forecast(model: Any, plan: Any, study: Path) -> None:
    """Print what a cut is going to cost, or why nobody can say."""
    from llmbrain.study import Study
    from llmbrain.study.forecasting import forecast_of, forecast_table, no_forecast

    held = Study(study)
    scans = held.scans if held.has("scans") else None
    if (why := no_forecast(model, plan, scans, "least-squares")) is not None:
        say(f"no forecast: {why}")
        return
    networks = held.networks if held.has("networks") else None
    if (found := forecast_of(model, plan, networks, scans, "least-squares")) is not None:
        show_forecast(forecast_table(found))


def show_forecast(rows: Any, compensate: str = "least-squares", on: str | None = None) -> None:
    """Print what a cut is going to cost each function, beside what it did cost where that was measured.

    `rows` is the table of `llmbrain.study.forecasting.forecast_table`, or its rows as dicts; `on`: text that was
    ``"held_out"``, or ``"calibration"``, on which less is lost.
    """
    import pandas as pd

    shown = pd.DataFrame(rows)
    if len(shown) > SHOWN + 1:  # texts without conditions may be many
        worst = shown.iloc[:-1].sort_values("predicted", ascending=False, kind="stable").head(SHOWN)
        say(f"forecast: the {SHOWN} of {len(shown) - 1} {shown.columns[0]}s that lose most are shown")
        shown = pd.concat([worst, shown.iloc[-1:]])
    for column in [c for c in ("predicted", "measured") if c in shown]:
        shown[column] = ["-" if pd.isna(x) else f"{x:.3g}" for x in shown[column]]
    beside = ", and what was lost" if "measured" in shown else ""
    beside += {"held_out": ", on held-out text", "calibration": ", on text that it was fitted to"}.get(on or "", "")
    repair = "without repair" if compensate == "none" else f"repaired by {compensate}"
    say(f"forecast: nats a token more, {repair}{beside}")
    print_table(shown, "forecast")


def _of_experts(
    dry_run: bool, ratio: float | None, allocation: str, protect: list[str] | None, head_ratio: float,
    keep: list[str] | None, forget: list[str] | None, self_text: int | None,
) -> dict[str, Any]:  # fmt: skip
    """Options that `plan_pruning` takes with ``expert_ratio`` or refuses; those it can not know of are refused here."""
    if dry_run or self_text:
        raise InputError("--expert-ratio takes no --dry-run and no --self-text")
    return {
        "ratio": ratio, "allocation": allocation or None, "protect": parse_layers(protect), "head_ratio": head_ratio,
        "keep": parts(keep) or None, "forget": parts(forget) or None,
    }  # fmt: skip


OF_PLANS = ("ratio", "method", "allocation", "multiple_of", "protect", "head_ratio", "drop", "passes", "token_balance",
            "keep", "forget", "last")  # fmt: skip


def prune(
    context: typer.Context,
    model: MODEL,
    out: OUT,
    text: CALIBRATION = None,
    study: STUDY = None,
    from_plan: Path | None = typer.Option(None, "--plan", help="Plan that `llmbrain plan` wrote; else one is made."),
    ratio: SHARE = None,
    method: METHOD = "networks",
    allocation: ALLOCATION = "",
    compensate: COMPENSATE = "least-squares",
    propagation: PROPAGATION = None,
    format: FORMAT = "per-layer",
    gguf_type: GGUF_TYPE = "f16",
    like: LIKE = None,
    multiple_of: MULTIPLE = 1,
    protect: PROTECT = None,
    head_ratio: HEADS = 0.0,
    drop: DROP = None,
    expert_ratio: EXPERTS = None,
    passes: PASSES = 24,
    token_balance: BALANCE = None,
    self_text: SELF_TEXT = None,
    keep: KEEP = None,
    forget: FORGET = None,
    last: LAST = False,
    relearning: bool = typer.Option(True, help="With --forget: attack the result by teaching it again."),
    indices: INDICES = True,
    device: DEVICE = "auto",
    device_map: DEVICE_MAP = "",
    offload: OFFLOAD = False,
    dtype: MODEL_DTYPE = "",
    seed: SEED = 0,
    field: FIELD = "text",
    dry_run: DRY_RUN = False,
    overwrite: OVERWRITE = False,
) -> None:
    """Cut neurons out of a model and save the smaller one."""
    from llmbrain.anatomy.offload import is_away
    from llmbrain.pruning.allocate.blocks import check_drop
    from llmbrain.pruning.experts import ExpertPlan, read_plan
    from llmbrain.study import load_texts, smaller
    from llmbrain.study.again import check_free
    from llmbrain.study.experts import cut_fewer
    from llmbrain.study.plan_cost import plan_cost

    if offload or device_map:
        one_process("prune --offload")
    check_free(out, overwrite)
    loaded, tokenizer = open_model(model, device, dtype=dtype, device_map=device_map, offload=offload)
    given = read_plan(from_plan) if from_plan else None
    if given is not None and (typed := [name for name in OF_PLANS if is_given(context, name)]):
        raise InputError(f"--plan and --{typed[0].replace('_', '-')} exclude each other: the plan says what goes")
    texts = load_texts(text, field) if text else None
    if expert_ratio is not None and given is not None:
        raise InputError("--expert-ratio and --plan exclude each other")
    if expert_ratio is not None or isinstance(given, ExpertPlan):
        one_process("prune of experts")
        if offload:
            raise InputError("--offload: experts are not cut block by block yet, load the model whole")
        if parts(drop):
            raise InputError("--expert-ratio takes no --drop")
        if not indices or last:
            raise InputError("--expert-ratio takes no --no-indices and no --last")
        if propagation:
            raise InputError("--expert-ratio takes no --propagation: the repair of experts does not know it")
        only = _of_experts(dry_run, ratio, allocation, protect, head_ratio, keep, forget, self_text)
        small, fewer = cut_fewer(
            loaded, tokenizer, texts, out=out, plan=given if isinstance(given, ExpertPlan) else None,
            compensate=None if compensate == "none" else compensate, format=format, gguf_type=gguf_type, like=like,
            overwrite=overwrite, study=study,
            expert_ratio=expert_ratio, method=method, random_state=seed, **only,
        )  # fmt: skip
        say(fewer.summary())
        say(_repaired(small))
        say(f"saved: {out}")
        return
    away = offload or is_away(loaded)
    costs = plan_cost(
        loaded, tokenizer, texts, study=study, method=method, allocation=allocation or None, passes=passes,
        head_ratio=head_ratio, compensate=None if compensate == "none" else compensate,
        drop=check_drop(parts(drop)), self_text=0 if offload and self_text is None else self_text, keep=parts(keep),
        forget=parts(forget), last=last, relearning=relearning, forecast=not away, measured=True, saves=True,
        plan=given, ratio=ratio, propagation=propagation, token_balance=token_balance,
    )  # fmt: skip
    for line in costs.lines() if costs else ():
        say(line)
    if dry_run:
        return
    more: dict[str, Any] = {"last": True} if last else {}
    small, made = smaller.cut(
        loaded, tokenizer, texts, out=out, study=study, plan=given,
        compensate=None if compensate == "none" else compensate,
        format=format, gguf_type=gguf_type, like=like, self_text=self_text, ratio=ratio, method=method,
        allocation=allocation or None, multiple_of=multiple_of, protect=parse_layers(protect), head_ratio=head_ratio,
        drop=parts(drop), passes=passes, token_balance=token_balance, keep=parts(keep) or None,
        forget=parts(forget) or None, random_state=seed, overwrite=overwrite, offload=away,
        relearning=relearning, indices=indices, propagation=propagation, **more,
    )  # fmt: skip
    if made is not None:
        say(made.summary())
    cuts: Any = small.llmbrain_pruning
    show_forgetting((cuts[-1].get("forgetting") or {}).get("relearning"))
    say(f"saved: {out}")


def show_forgetting(found: dict[str, Any] | None) -> None:
    """Print what the relearning attack on a model that forgets came to."""
    from llmbrain.pruning.forget.relearning import attack_table

    if found:
        rows = attack_table(found)
        if len(rows):
            print_table(rows, "taught again: shares of what the dense model knew")
        else:
            say(f"not taught again: {found.get('left_out', 'no attack')}")


def _repaired(small: Any) -> str:
    """What the repair of experts came to, in one line."""
    errors = small.llmbrain_pruning[-1].get("repair")
    if not errors:
        return "experts are cut without repair"
    return "error of the layers' outputs without and with repair: " + ", ".join(
        f"layer {layer} {before:.3g} -> {after:.3g}" for layer, (before, after) in errors.items()
    )


def recover(
    model: MODEL,
    text: TEXT,
    out: OUT,
    steps: int = typer.Option(100, help="Optimiser steps.", min=1),
    rank: int = typer.Option(8, help="Rank of the updates (LoRA).", min=1),
    device: DEVICE = "auto",
    seed: SEED = 0,
    field: FIELD = "text",
    overwrite: OVERWRITE = False,
) -> None:
    """Train a pruned model for a while with low-rank updates, merge them, save it."""
    from llmbrain.checkpoints import save_pruned
    from llmbrain.checkpoints.gguf_writing import check_folder_path
    from llmbrain.pruning import recover as train
    from llmbrain.study import load_texts
    from llmbrain.study.again import MADE, check_free, made_from, making

    check_free(check_folder_path(out, "per-layer"), overwrite)
    texts = load_texts(text, field)
    loaded, tokenizer = open_model(model, device)
    made = made_from("recover", loaded, texts, steps=steps, rank=rank, random_state=seed)
    with making(out, overwrite, made) as is_there:
        if is_there:
            say(f"done before: {out}")
            return
        better, table = train(loaded, tokenizer, texts, steps=steps, rank=rank, random_state=seed, inplace=True)
        save_pruned(better, tokenizer, out, overwrite=overwrite, note={MADE: made})
    print_table(table)
    say(f"saved: {out}")


def benchmark(
    model: MODEL,
    text: TEXT,
    ratios: list[str] = typer.Option(["0.2", "0.3", "0.5"], help="Shares of the MLP neurons to remove."),
    methods: list[str] = typer.Option([], help="Criteria; default all but shortgpt and 2ssp."),
    components: int = typer.Option(0, help="Networks to find for the method that uses them; 0: up to 64.", min=0),
    draws: int = typer.Option(3, help="Calibration draws of the main rows, for intervals; 1 for none.", min=1),
    window: int = typer.Option(0, help="Tokens in a window; 0 is the model's context, at most 256.", min=0),
    max_windows: int = typer.Option(128, help="Calibration windows.", min=1),
    test_windows: int = typer.Option(96, help="Test windows.", min=1),
    out: Path = typer.Option(
        Path("benchmark.csv"), "--out", parser=path_of, metavar="PATH", help="Where to write the table."
    ),
    device: DEVICE = "auto",
    seed: SEED = 0,
    field: FIELD = "text",
    dry_run: DRY_RUN = False,
) -> None:
    """Prune your own model by every method and compare: the first 60% of the text calibrates, the last 30% tests."""
    from llmbrain.study import load_texts, smaller

    try:
        shares = [float(ratio) for ratio in parts(ratios)]
    except ValueError:
        raise InputError(f"--ratios={' '.join(ratios)} must be numbers") from None
    texts = load_texts(text, field)
    loaded, tokenizer = open_model(model, device)
    options: dict[str, Any] = {
        "methods": parts(methods) or None, "ratios": shares, "draws": draws, "window": window or None,
        "max_windows": max_windows, "test_windows": test_windows,
    }  # fmt: skip
    for line in smaller.benchmark_cost(loaded, tokenizer, texts, **options).lines():
        say(line)
    if dry_run:
        return
    table = smaller.benchmark(
        loaded, tokenizer, texts, n_components=components or None, out=out, random_state=seed, device=device, **options
    )
    print_table(table)
    say(f"table: {out}")
