"""The main job on the embedded model: which network does what, and what pruning costs each ability."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from llmbrain._files import write_figure
from llmbrain._progress import Say, speaker
from llmbrain._validation import resolve_device, seed_of
from llmbrain.datasets import Demo, load_demo
from llmbrain.intervention import TokenEvaluation, lesion_table
from llmbrain.intervention.table import LesionTable
from llmbrain.networks import FunctionalNetworks
from llmbrain.pruning import plan_pruning, prune
from llmbrain.study.folder import Study
from llmbrain.study.job import run

if TYPE_CHECKING:
    from torch import nn

N_TEXTS, N_TOKENS = 64, 256  # calibration: 64 runs of one context each
N_LINES = 32  # held-out lines of each ability that lesions are scored on
N_TESTED = 200  # and pruned models
SILENT = 0.05  # nats: lesions below this in every ability are counted, not listed
SHOWN = 0.3  # nats: networks above this are drawn
THRESHOLD = 3.0  # |z|: about 2% of the neurons in each network


def demo(
    out: str | Path = "demo-out",
    *,
    n_components: int | float | str = 32,
    n_random: int = 20,
    device: str = "auto",
    random_state: int | None = 0,
    overwrite: bool = True,
    progress: bool | Say = True,
) -> Study:
    """The main job on the embedded model, whose functions are known, with the lesions of its networks.

    Parameters
    ----------
    out : path
        Folder of the study; ``lesions/`` and ``networks.png`` beside what `run` writes.
    n_random : int
        Random control lesions a network.
    device : str
        ``"auto"`` is CUDA where there is one.
    random_state : int, Generator or None
        What is drawn starts from it; None draws anew.
    overwrite : bool
        Write over what is there.
    progress : bool or callable
        Say what is done, on stderr or to a function of a line.

    Returns
    -------
    Study
        ``.lesions`` are scored on held-out lines of each ability; ``.summary["abilities"]`` has the share of exact
        answers, dense and pruned.
    """
    tell, out, random_state = speaker(progress), Path(out), seed_of(random_state)
    brain = load_demo()
    model = brain.model.to(resolve_device(device))
    tell(
        f"The subject: a Llama with {sum(p.numel() for p in model.parameters()):,} parameters that has learned "
        f"{len(brain.abilities)} abilities ({', '.join(brain.abilities)}).\n"
        "In this field's words: each neuron of its MLPs is a voxel, each layer a slice, each token a volume (TR), each "
        "text a run.\nIn the other's: the scan is the input of every down projection, a 4D NIfTI; networks come from "
        "group ICA, as in fMRI.\n"
    )

    def extras(study: Study, model: nn.Module) -> dict[str, Any]:
        tell(
            f"    lesions: each network set to zero in turn, beside {n_random} random sets of as many neurons in the "
            "same layers"
        )
        study.lesions = lesion_effects(brain, study.networks, n_random=n_random, seed=random_state)
        study.lesions.save(out / "lesions")
        draw_lesions(study.lesions, study.networks, out / "networks.png")
        tell("    pruning at 50% too, and what both cost each ability")
        abilities = ability_costs(brain, study, random_state)
        return {
            "abilities": abilities.to_dict(),
            "double_dissociations": len(dissociated(study.lesions)),
            "report": {"lesions": marked(study.lesions), "abilities": abilities},
        }

    return run(
        model, brain.tokenizer, brain.texts("calibration", n=N_TEXTS, n_tokens=N_TOKENS, seed=random_state), out=out,
        name="the demo brain", n_components=n_components, threshold=THRESHOLD, random_state=random_state,
        overwrite=overwrite, progress=progress, extras=extras,
    )  # fmt: skip


def lesion_effects(brain: Demo, networks: FunctionalNetworks, *, n_random: int, seed: int) -> LesionTable:
    """Loss added on each ability's held-out answers by each network's lesion, with its controls."""
    evaluations = {}
    for ability in brain.abilities:
        lines = brain.examples("heldout", ability, n=N_LINES, seed=seed)
        evaluations[ability] = TokenEvaluation.from_answers(
            brain.tokenizer, [line.prompt for line in lines], [f"{line.answer}\n" for line in lines], score="loss"
        )
    return lesion_table(brain.model, networks, evaluations, n_random=n_random, n_matched=0, random_state=seed)


def marked(lesions: LesionTable) -> pd.DataFrame:
    """The table with its clear cells marked: beyond every random set, an interval above 0, and not minute."""
    frame = lesions.frame
    return frame.assign(significant=(frame["p_random"] <= 0.05) & (frame["harm_low"] > 0) & (frame["harm"] > SILENT))


def dissociated(lesions: LesionTable) -> pd.DataFrame:
    """The clearest double dissociation of each pair of abilities."""
    pairs = lesions.double_dissociations(corrected=False)
    key = pairs[["evaluation_a", "evaluation_b"]].apply(lambda row: " ".join(sorted(row)), axis=1)
    return pairs.loc[~key.duplicated()] if len(pairs) else pairs


def draw_lesions(lesions: LesionTable, networks: FunctionalNetworks, path: Path) -> None:
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
    write_figure(path, figure, dpi=130)


def ability_costs(brain: Demo, study: Study, seed: int) -> pd.DataFrame:
    """Accuracy of each ability: dense, 30% and 50% of the neurons removed, and 50% at random as the control."""
    reading: Mapping[str, Any] = {"tokenizer": brain.tokenizer, "calibration": [scan.text for scan in study.scans]}
    models = {"dense": brain.model, "30%": study.model}
    for name, method in (("50%", "networks"), ("50% random", "random")):
        plan = plan_pruning(
            brain.model, study.networks, study.scans, ratio=0.5, method=method, random_state=seed, **reading
        )
        models[name] = prune(brain.model, plan, compensate="least-squares", **reading)
    scores = {name: brain.ability_accuracy(model, n=N_TESTED, seed=seed) for name, model in models.items()}
    return pd.DataFrame(scores).rename_axis("ability")
