"""``llmbrain run``: the main job on any model and text."""

from __future__ import annotations

from typing import Any

import typer

from llmbrain.cli.common import (
    COMPENSATE,
    COMPONENTS,
    DEVICE,
    FIELD,
    METHOD,
    MODEL,
    OUT,
    OVERWRITE,
    RATIO,
    SEED,
    TEXT,
    open_model,
    parse_components,
    print_table,
    say,
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("run")(run)


def run(
    model: MODEL,
    text: TEXT,
    out: OUT,
    components: COMPONENTS = "20",
    ratio: RATIO = 0.3,
    method: METHOD = "networks",
    compensate: COMPENSATE = "least-squares",
    site: str = typer.Option("neuron", help="What is recorded: neuron, gate, up, mlp_out, block_out or head."),
    device: DEVICE = "auto",
    seed: SEED = 0,
    n_tokens: int = typer.Option(32768, help="Tokens to scan; 0 is all of the text."),
    max_windows: int = typer.Option(0, help="Windows that the perplexities use; 0 is all of the text."),
    field: FIELD = "text",
    overwrite: OVERWRITE = False,
) -> None:
    """Scan a model on a text, find its networks, prune it, and write a page that shows what happened."""
    from llmbrain.study import job, load_texts

    texts = load_texts(text, field)
    study = job.run(
        *open_model(model, device), texts, out=out, name=model, n_components=parse_components(components), ratio=ratio,
        method=method, compensate=None if compensate == "none" else compensate, site=site, random_state=seed,
        n_tokens=n_tokens or None, max_windows=max_windows or None, overwrite=overwrite,
    )  # fmt: skip
    show_summary(study.summary)
    say(f"report: {out / 'report.html'}")


def show_summary(summary: dict[str, Any]) -> None:
    """Print the dense and the pruned model side by side."""
    import pandas as pd

    rows = [
        {"": name, **{k: f"{v:,.4g}" if isinstance(v, float) else f"{v:,}" for k, v in summary[name].items()}}
        for name in ("dense", "pruned")
    ]
    print_table(pd.DataFrame(rows))
    held_out = summary["held_out"]
    if "dense_perplexity" in held_out:
        say(
            f"held-out text ({held_out['characters']:,} characters): perplexity {held_out['dense_perplexity']:.4g} "
            f"dense, {held_out['pruned_perplexity']:.4g} pruned"
        )
