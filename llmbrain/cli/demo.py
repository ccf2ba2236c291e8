"""``llmbrain demo``: the main job on the embedded model, told in the words of both fields."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from llmbrain.cli.common import COMPONENTS, DEVICE, SEED, print_table, say

if TYPE_CHECKING:
    import pandas as pd

    from llmbrain.datasets import Demo

N_TEXTS, N_TOKENS = 64, 256  # calibration: 64 runs of one context each
N_LINES = 32  # held-out lines of each ability that lesions are scored on
N_TESTED = 200  # and pruned models
SILENT = 0.05  # nats: lesions below this in every ability are counted, not listed
SHOWN = 0.3  # nats: networks above this are drawn
THRESHOLD = 3.0  # |z|: about 2% of the neurons in each network


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("demo")(demo)


def demo(
    out: Path = typer.Option(Path("demo-out"), "--out", help="Folder to write."),
    components: COMPONENTS = "32",
    n_random: int = typer.Option(20, help="Random control lesions per network."),
    device: DEVICE = "auto",
    seed: SEED = 0,
    overwrite: bool = typer.Option(True, help="Write over an earlier demo in --out."),
) -> None:
    """Meet a model whose functions are known: scan it, find its networks, lesion them, prune it."""
    from llmbrain._validation import resolve_device
    from llmbrain.cli.common import parse_components
    from llmbrain.cli.main_job import main_job
    from llmbrain.cli.run import show_summary
    from llmbrain.datasets import load_demo

    brain = load_demo()
    model = brain.model.to(resolve_device(device))
    texts = brain.texts("calibration", n=N_TEXTS, n_tokens=N_TOKENS, seed=seed)
    say(
        f"The subject: a Llama with {sum(p.numel() for p in model.parameters()):,} parameters that has learned "
        f"{len(brain.abilities)} abilities ({', '.join(brain.abilities)}).\n"
        "In this field's words: each neuron of its MLPs is a voxel, each layer a slice, each token a volume (TR), each "
        "text a run.\nIn the other's: the scan is the input of every down projection, a 4D NIfTI; networks come from "
        "group ICA, as in fMRI.\n"
    )
    summary = main_job(
        model, brain.tokenizer, texts, out, model_id="the demo brain", components=parse_components(components),
        ratio=0.3, threshold=THRESHOLD, device=device, seed=seed, overwrite=overwrite,
        extras=_extras(brain, out, n_random, seed),
    )  # fmt: skip
    show_summary(summary)
    say(f"\nreport: {out / 'report.html'}")


def _extras(brain: Demo, out: Path, n_random: int, seed: int) -> Callable[..., dict[str, Any]]:
    """What the demo adds to the main job: which network does what, and what pruning costs each ability."""

    def extras(*, model: Any, pruned: Any, networks: Any, scans: Any) -> dict[str, Any]:
        say(
            f"    lesions: each network set to zero in turn, beside {n_random} random sets of as many neurons in the "
            "same layers"
        )
        lesions = lesion_effects(brain, networks, n_random=n_random, seed=seed)
        lesions.save(out / "lesions")
        draw_lesions(lesions, networks, out / "networks.png")
        show_lesions(lesions)
        say("    pruning at 50% too, and what both cost each ability")
        abilities = ability_costs(brain, pruned, networks, scans, seed)
        print_table(abilities.reset_index(), "exact answers on held-out lines, by share of neurons removed")
        return {
            "abilities": abilities.to_dict(),
            "double_dissociations": len(dissociated(lesions)),
            "report": {"lesions": marked(lesions), "abilities": abilities},
        }

    return extras


def lesion_effects(brain: Demo, networks: Any, *, n_random: int, seed: int) -> Any:
    """Loss added on each ability's held-out answers by each network's lesion, with its controls.

    Returns
    -------
    LesionTable
    """
    from llmbrain.intervention import TokenEvaluation, lesion_table

    evaluations = {}
    for ability in brain.abilities:
        lines = brain.examples("heldout", ability, n=N_LINES, seed=seed)
        evaluations[ability] = TokenEvaluation.from_answers(
            brain.tokenizer, [line.prompt for line in lines], [f"{line.answer}\n" for line in lines], score="loss"
        )
    return lesion_table(brain.model, networks, evaluations, n_random=n_random, n_matched=0, random_state=seed)


def show_lesions(lesions: Any) -> None:
    """Print network x ability, and how many pairs dissociate doubly."""
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


def marked(lesions: Any) -> pd.DataFrame:
    """The table with its clear cells marked: beyond every random set, an interval above 0, and not minute."""
    frame = lesions.frame
    return frame.assign(significant=(frame["p_random"] <= 0.05) & (frame["harm_low"] > 0) & (frame["harm"] > SILENT))


def dissociated(lesions: Any) -> pd.DataFrame:
    """The clearest double dissociation of each pair of abilities."""
    pairs = lesions.double_dissociations(corrected=False)
    key = pairs[["evaluation_a", "evaluation_b"]].apply(lambda row: " ".join(sorted(row)), axis=1)
    return pairs.loc[~key.duplicated()] if len(pairs) else pairs


def draw_lesions(lesions: Any, networks: Any, path: Path) -> None:
    """Draw the networks whose lesions hurt most: where they lie, and what is lost without them."""
    from matplotlib.figure import Figure

    from llmbrain.plotting import plot_glass_model, plot_lesion_table

    effect = lesions.matrix("effect")
    chosen = [k for k, name in enumerate(networks.names) if name in effect.index[effect.max(axis=1) > SHOWN]]
    if not chosen:
        chosen = [0]
    few = networks.subset(chosen)
    figure = Figure(figsize=(11, 1.2 + 0.55 * len(few)), layout="constrained", facecolor="white")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1, 1.1))
    left, right = halves
    plot_glass_model(few, columns=3, figure=left)
    frame = marked(lesions)
    frame = frame[frame["network"].isin(few.names)]
    plot_lesion_table(frame, vmax=1.5, label="loss added (nats a token)", figure=right)
    figure.savefig(path, dpi=130)


def ability_costs(brain: Demo, pruned: Any, networks: Any, scans: Any, seed: int) -> pd.DataFrame:
    """Accuracy of each ability: dense, 30% and 50% of the neurons removed, and 50% at random as the control."""
    import pandas as pd

    from llmbrain.pruning import plan_pruning, prune

    texts = [scan.text for scan in scans]
    models = {"dense": brain.model, "30%": pruned}
    for name, method in (("50%", "networks"), ("50% random", "random")):
        plan = plan_pruning(
            brain.model, networks, scans, ratio=0.5, method=method, random_state=seed, tokenizer=brain.tokenizer,
            calibration=texts,
        )  # fmt: skip
        models[name] = prune(
            brain.model, plan, tokenizer=brain.tokenizer, calibration=texts, compensate="least-squares"
        )
    scores = {name: brain.ability_accuracy(model, n=N_TESTED, seed=seed) for name, model in models.items()}
    return pd.DataFrame(scores).rename_axis("ability")
