"""What networks are and what happens without them: ``networks`` and ``lesion``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmbrain._validation import InputError
from llmbrain.cli.common import (
    DEVICE,
    DEVICE_MAP,
    FIELD,
    MODEL,
    MODEL_DTYPE,
    SEED,
    open_model,
    path_of,
    print_table,
    say,
)
from llmbrain.cli.lists import ListCommand

TEXTS = Annotated[list[Path], typer.Option("--text", help="One evaluation a file (.txt, .json, .jsonl).")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (networks, lesion):
        app.command(command.__name__, cls=ListCommand)(command)


def networks(
    study: Annotated[Path, typer.Argument(help="Folder that `llmbrain run` wrote, or a folder of networks.")],
    out: Path | None = typer.Option(
        None, "--out", parser=path_of, metavar="PATH", help="Folder to write; default: where the networks are."
    ),
    permutations: int = typer.Option(200, help="Draws of every null (conditions, connectivity); 0 for none.", min=0),
    seed: SEED = 0,
) -> None:
    """Describe networks: layers, tokens, conditions, thresholds side by side, connectivity; tables and figures."""
    from llmbrain.study import Study
    from llmbrain.study.networks import describe_networks

    tables = describe_networks(study, out, n_permutations=permutations, random_state=seed)
    print_table(tables["networks"])
    say(f"tables and figures: {out or Study(study).place('networks')}")


def lesion(
    model: MODEL,
    text: TEXTS,
    networks: Annotated[Path, typer.Option("--networks", help="Folder of networks, or one that `llmbrain run` wrote.")],
    out: Path | None = typer.Option(
        None, "--out", parser=path_of, metavar="PATH", help="Folder for the table; an interrupted run goes on from it."
    ),
    n_random: int = typer.Option(
        20, help="Random control sets a network, and as many as active as the network.", min=0
    ),
    value: str = typer.Option("zero", help="What lesioned neurons hold: zero or mean."),
    window: int = typer.Option(0, help="Tokens of context; 0 is the model's own.", min=0),
    max_windows: int = typer.Option(32, help="Windows of each text; 0 is all.", min=0),
    device: DEVICE = "auto",
    device_map: DEVICE_MAP = "",
    dtype: MODEL_DTYPE = "",
    field: FIELD = "text",
    seed: SEED = 0,
) -> None:
    """Lesion every network and measure every text, beside random and equally active neurons."""
    from llmbrain.distributed import ranks
    from llmbrain.intervention import lesion_table
    from llmbrain.study import Study, load_texts

    names = [path.stem for path in text]
    if len(set(names)) < len(names):
        raise InputError(f"--text: two files have the same name ({', '.join(names)}), which names the evaluation")
    texts = {name: load_texts(path, field) for name, path in zip(names, text)}
    group = Study(networks).networks
    loaded, tokenizer = open_model(model, device, dtype=dtype, device_map=device_map)
    say(f"lesions of {len(group)} networks, {len(texts)} texts, {2 * n_random} control sets each")
    table = lesion_table(
        loaded,
        group,
        texts,
        tokenizer=tokenizer,
        n_random=n_random,
        value=value,
        window=window or None,
        max_windows=max_windows or None,
        random_state=seed,
        out=out,
    )
    columns = ["network", "evaluation", "size", "effect", "effect_low", "effect_high", "random_effect", "p_random"]
    print_table(table.frame[[*columns, "matched_effect", "p_matched", "q_matched"]], "loss added, nats a token")
    if out is not None and ranks().leads:
        table.save(out)
        say(f"table and every control draw: {out}")
