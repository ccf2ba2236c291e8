"""What networks are and what happens without them: ``networks`` and ``lesion``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llmbrain._validation import InputError
from llmbrain.cli.common import DEVICE, FIELD, MODEL, SEED, print_table, say
from llmbrain.cli.lists import ListCommand

TEXTS = Annotated[list[Path], typer.Option("--text", help="One evaluation a file (.txt, .json, .jsonl).")]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    for command in (networks, lesion):
        app.command(command.__name__, cls=ListCommand)(command)


def networks(
    study: Annotated[Path, typer.Argument(help="Folder that `llmbrain run` wrote, or a folder of networks.")],
    out: Path | None = typer.Option(None, help="Folder to write; default: where the networks are."),
    permutations: int = typer.Option(200, help="Draws of every null (conditions, connectivity); 0 for none."),
    seed: SEED = 0,
) -> None:
    """Describe networks: layers, tokens, conditions, thresholds side by side, connectivity; tables and figures."""
    from llmbrain.cli.steps import scan_folder
    from llmbrain.networks import FunctionalNetworks, compare_thresholds, connectivity, describe, localizer
    from llmbrain.plotting import plot_connectivity, plot_layer_profile
    from llmbrain.scanning import load_scans

    folder = study / "networks" if (study / "networks" / "networks.json").is_file() else study
    group = FunctionalNetworks.load(folder)
    target = out or folder
    target.mkdir(parents=True, exist_ok=True)
    scans: list[Any] | None = None
    found = None
    try:
        scans = load_scans(scan_folder(study))
    except InputError as error:
        say(f"without tokens and conditions: {error}")
    if scans is not None and any(len(scan.events) for scan in scans):
        found = localizer(scans, networks=group, n_permutations=permutations, random_state=seed)
    table = describe(group, scans, localizer=found)
    tables = {"networks": table.reset_index(), "thresholds": compare_thresholds(group)}
    figures = {}
    if group.space is not None:
        figures["layer_profile"] = plot_layer_profile(group)
    if group.time_courses and len(group) > 1:
        links = connectivity(group, n_permutations=permutations, random_state=seed)
        tables["connectivity"] = links.to_frame()
        figures["connectivity"] = plot_connectivity(links.matrix, names=links.names)
    for name, frame in tables.items():
        frame.to_csv(target / f"table-{name}.tsv", sep="\t", index=False)
    for name, figure in figures.items():
        figure.savefig(target / f"figure-{name}.png", dpi=150)
    print_table(tables["networks"])
    say(f"tables and figures: {target}")


def lesion(
    model: MODEL,
    text: TEXTS,
    networks: Annotated[Path, typer.Option("--networks", help="Folder of networks, or one that `llmbrain run` wrote.")],
    out: Path | None = typer.Option(None, help="Folder for the table; an interrupted run goes on from it."),
    n_random: int = typer.Option(20, help="Random control sets a network, and as many as active as the network."),
    value: str = typer.Option("zero", help="What lesioned neurons hold: zero or mean."),
    window: int = typer.Option(0, help="Tokens of context; 0 is the model's own."),
    max_windows: int = typer.Option(32, help="Windows of each text; 0 is all."),
    device: DEVICE = "auto",
    field: FIELD = "text",
    seed: SEED = 0,
) -> None:
    """Lesion every network and measure every text, beside random and equally active neurons."""
    from llmbrain.cli.common import open_model, read_texts
    from llmbrain.intervention import lesion_table
    from llmbrain.networks import FunctionalNetworks

    names = [path.stem for path in text]
    if len(set(names)) < len(names):
        raise InputError(f"--text: two files have the same name ({', '.join(names)}), which names the evaluation")
    texts = {name: read_texts(path, field) for name, path in zip(names, text)}
    folder = networks / "networks" if (networks / "networks" / "networks.json").is_file() else networks
    group = FunctionalNetworks.load(folder)
    loaded, tokenizer = open_model(model, device)
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
    if out is not None:
        table.save(out)
        say(f"table and every control draw: {out}")
