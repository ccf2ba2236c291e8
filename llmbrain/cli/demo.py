"""``llmbrain demo``: the main job on the embedded model, told in the words of both fields."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from llmbrain.cli.common import COMPONENTS, DEVICE, SEED, parse_components, path_of, print_table, say
from llmbrain.cli.lists import ListCommand

if TYPE_CHECKING:
    from llmbrain.study import Study


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("demo", cls=ListCommand)(demo)


def demo(
    out: Path = typer.Option(Path("demo-out"), "--out", parser=path_of, metavar="PATH", help="Folder to write."),
    components: COMPONENTS = "32",
    n_random: int = typer.Option(20, help="Random control lesions per network.", min=0),
    device: DEVICE = "auto",
    seed: SEED = 0,
    overwrite: bool = typer.Option(True, help="Write over an earlier demo in --out."),
) -> None:
    """Meet a model whose functions are known: scan it, find its networks, lesion them, prune it."""
    from llmbrain.cli.run import show_summary
    from llmbrain.study import demo as run_demo

    study = run_demo(
        out, n_components=parse_components(components), n_random=n_random, device=device, random_state=seed,
        overwrite=overwrite,
    )  # fmt: skip
    show_lesions(study)
    show_summary(study.summary)
    say(f"\nreport: {out / 'report.html'}")


def show_lesions(study: Study) -> None:
    """Print network x ability, and how many pairs dissociate doubly; then what pruning costs each ability."""
    import pandas as pd

    from llmbrain.study.demonstration import SILENT, dissociated

    lesions = study.lesions
    effect = lesions.matrix("effect")
    silent = effect.max(axis=1) < SILENT
    effect.insert(0, "neurons", lesions.frame.groupby("network", sort=False)["size"].first())
    print_table(effect[~silent].reset_index(), "loss added (nats a token) when a network is lesioned", digits=2)
    say(f"    {int(silent.sum())} more networks add less than {SILENT} to every ability")
    random = lesions.frame.groupby("network", sort=False)["random_effect"].max().max()
    say(f"    random sets of the same size and layers add at most {random:.3f} on average")
    pairs = dissociated(lesions)
    say(f"    {len(pairs)} pairs of abilities dissociate doubly, beyond every random set; the clearest:")
    for _, row in pairs.head(3).iterrows():
        say(
            f"      {row['network_a']} adds {row['aa']:.2f} to {row['evaluation_a']} and {row['ab']:.2f} to "
            f"{row['evaluation_b']}; {row['network_b']} adds {row['ba']:.2f} and {row['bb']:.2f}"
        )
    abilities = pd.DataFrame(study.summary["abilities"]).rename_axis("ability")
    print_table(abilities.reset_index(), "exact answers on held-out lines, by share of neurons removed")
