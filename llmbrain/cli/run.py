"""``llmbrain run``: the main job on any model and text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmbrain._progress import seconds_of
from llmbrain._validation import InputError
from llmbrain.cli.common import (
    ALLOCATION,
    BALANCE,
    COMPENSATE,
    COMPONENTS,
    DEVICE,
    DEVICE_MAP,
    DROP,
    DRY_RUN,
    DTYPE,
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
    MULTIPLE,
    OUT,
    OVERWRITE,
    PASSES,
    PROPAGATION,
    PROTECT,
    RUN_LENGTH,
    SEED,
    SELF_TEXT,
    SHARE,
    TEXT,
    is_given,
    open_model,
    parse_components,
    parse_layers,
    print_table,
    say,
)
from llmbrain.cli.lists import ListCommand, parts
from llmbrain.cli.pruning import show_forecast, show_forgetting
from llmbrain.stats import PUBLISHED_Z


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("run", cls=ListCommand)(run)


def read_defaults(context: typer.Context, path: Path | None) -> Path | None:
    """Options of a TOML file become the defaults of this call."""
    if path is not None:
        from llmbrain.study.settings import read_config

        found = read_config(path)
        context.default_map = {name: _typed(name, value) for name, value in found.items()}
    return path


LISTS = ("protect", "drop", "keep", "forget")
SWITCHES = ("last", "indices")


def _typed(name: str, value: Any) -> Any:
    """An entry of a file as it would have been typed; what would be taken for something else is refused."""
    if isinstance(value, bool) != (name in SWITCHES) and (isinstance(value, bool) or name in SWITCHES):
        wanted = "true or false" if name in SWITCHES else "no truth value"
        raise InputError(f"config: {name.replace('_', '-')}={value!r} must be {wanted}")
    if name in LISTS:
        values = [str(x) for x in value] if isinstance(value, list) else [str(value)]
        return values or (["none"] if name == "protect" else [])  # [] protects none, and is not the default
    return str(value) if name == "components" else value


CONFIG = Annotated[
    Path | None,
    typer.Option(
        "--config", callback=read_defaults, is_eager=True,
        help="TOML file of these options; those typed here go first. Every study holds the one that repeats it.",
    ),
]  # fmt: skip
BUDGET = Annotated[
    str, typer.Option("--budget", help="Time that the job may take (10m, 1h30m): gives up what does not fit.")
]


def run(
    context: typer.Context,
    model: MODEL,
    text: TEXT,
    out: OUT,
    components: COMPONENTS = "20",
    ratio: SHARE = None,
    method: METHOD = "networks",
    compensate: COMPENSATE = "least-squares",
    propagation: PROPAGATION = None,
    site: str = typer.Option("neuron", help="What is recorded: neuron, gate, up, mlp_out, block_out or head."),
    device: DEVICE = "auto",
    device_map: DEVICE_MAP = "",
    model_dtype: str = typer.Option("", help="What the model computes in: float32, bfloat16, float16."),
    seed: SEED = 0,
    n_tokens: int = typer.Option(32768, help="Tokens to scan and calibrate on; 0 is all of the text.", min=0),
    run_length: RUN_LENGTH = 2048,
    eval_tokens: int = typer.Option(32768, help="Tokens that the perplexities are measured on; 0 is all.", min=0),
    max_windows: int = typer.Option(0, help="The same in windows; 0 is as --eval-tokens says.", min=0),
    threshold: float = typer.Option(PUBLISHED_Z, help="|z| above which a neuron belongs to a network.", min=0),
    dtype: DTYPE = "",
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
    indices: INDICES = True,
    format: FORMAT = "per-layer",
    gguf_type: GGUF_TYPE = "f16",
    like: LIKE = None,
    field: FIELD = "text",
    budget: BUDGET = "",
    config: CONFIG = None,
    dry_run: DRY_RUN = False,
    overwrite: OVERWRITE = False,
) -> None:
    """Scan a model on a text, find its networks, prune it, and write a page that shows what happened."""
    from llmbrain.study import Settings, forecast, job, load_texts

    options: dict[str, Any] = {
        "n_components": parse_components(components), "ratio": ratio, "method": method,
        "compensate": None if compensate == "none" else compensate, "site": site, "random_state": seed,
        "n_tokens": n_tokens or None, "run_length": run_length or None, "eval_tokens": eval_tokens or None,
        "max_windows": max_windows or None, "threshold": threshold, "dtype": dtype or None,
        "allocation": allocation or None, "multiple_of": multiple_of, "protect": parse_layers(protect),
        "head_ratio": head_ratio, "drop": parts(drop), "passes": passes, "token_balance": token_balance,
        "self_text": self_text, "propagation": propagation,
        "keep": parts(keep), "forget": parts(forget), "last": last, "indices": indices, "format": format,
        "expert_ratio": expert_ratio,
        "gguf_type": gguf_type, "like": None if like is None else str(like.resolve()),
    }  # fmt: skip
    names = {"n_components": "components", "random_state": "seed"}
    limit = seconds_of(budget) if budget else None  # or it says so before the model is read
    typed = {k: v for k, v in options.items() if is_given(context, names.get(k, k))}  # a budget leaves these alone
    asked: dict[str, Any] = {"settings": Settings(**options), "budget": limit, **typed}
    texts = load_texts(text, field)
    loaded, tokenizer = open_model(model, device, dtype=model_dtype, device_map=device_map)
    if dry_run:
        for line in forecast(loaded, tokenizer, texts, **asked).lines():
            typer.echo(line)
        return
    name = _absolute(model)
    given = {"device": device if device != "auto" else "", "device-map": _absolute(device_map),
             "model-dtype": model_dtype}  # fmt: skip
    source = {"model": name, "text": _absolute(text), "field": field, **{k: v for k, v in given.items() if v}}
    study = job.run(loaded, tokenizer, texts, out=out, name=name, source=source, overwrite=overwrite, **asked)
    show_summary(study.summary)
    if foretold := study.summary.get("forecast_by_function"):
        show_forecast(foretold, compensate, study.summary["forecast_on"])
    show_forgetting((study.summary.get("forgetting") or {}).get("relearning"))
    say(f"report: {out / 'report.html'}")


def _absolute(place: str | Path) -> str:
    """A file or folder by its whole path, so that it is found from everywhere; anything else as it is."""
    return str(Path(place).resolve()) if str(place) and Path(place).exists() else str(place)


def show_summary(summary: dict[str, Any]) -> None:
    """Print the dense and the pruned model side by side."""
    import pandas as pd

    rows = [
        {"": name, **{k: "-" if v is None else f"{v:,.4g}" if isinstance(v, float) else f"{v:,}"
                      for k, v in summary[name].items()}}
        for name in ("dense", "pruned")
    ]  # fmt: skip
    print_table(pd.DataFrame(rows))
    held_out = summary["held_out"]
    if "dense_perplexity" in held_out:
        dense, pruned = (
            f"{held_out[f'{name}_perplexity']:.4g}"
            + (f" +- {held_out[f'{name}_perplexity_se']:.2g}" if held_out[f"{name}_perplexity_se"] is not None else "")
            for name in ("dense", "pruned")
        )
        say(f"held-out text ({held_out['tokens']:,} tokens): perplexity {dense} dense, {pruned} pruned")
