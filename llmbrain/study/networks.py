"""Functional networks of a study: found in its scan (`llmbrain decompose`), and described (`llmbrain networks`)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from llmbrain._files import refuse_other, write_figure, write_table
from llmbrain._progress import Say, speaker
from llmbrain._validation import InputError, check_count, check_option, check_whole, seed_of
from llmbrain.anatomy.experts import has_experts
from llmbrain.decomposition import ULCMOD, GroupICA, ica_stability, read_ica
from llmbrain.decomposition.solvers import SOLVERS
from llmbrain.distributed import alone, ranks
from llmbrain.imaging import write_melodic
from llmbrain.networks import FunctionalNetworks, compare_thresholds, connectivity, describe, localizer
from llmbrain.plotting import plot_connectivity, plot_layer_profile
from llmbrain.reporting import write_report
from llmbrain.scanning import Scan, live_scans, scan
from llmbrain.scanning.store import origin_of, read_manifest
from llmbrain.stats import PUBLISHED_Z
from llmbrain.study.folder import Study, claim
from llmbrain.study.texts import limit_tokens, long_texts

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

FOUND = 64  # networks that are found where no number is given; fewer in small models and texts
NEURONS_EACH, TOKENS_EACH = 10, 50  # that there are for each
FOUND_TOKENS = 32768  # how much text is scanned for them
KEPT = 2**30  # bytes of it that are kept in memory
METHODS = (*SOLVERS, "ulcmod")


def find_networks(
    model: nn.Module | None,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str] | None,
    *,
    scans: Sequence[Scan] | None = None,
    n_components: int | None = None,
    run_length: int | None = 2048,
    random_state: int | None = 0,
    device: str = "auto",
    progress: bool | Say = True,
) -> FunctionalNetworks:
    """Networks of scans, or of the first of the texts, which the model reads now.

    A scan of at most `KEPT` bytes is kept in memory; of a longer one nothing is, and the model reads each run again
    when group ICA asks for it.

    Parameters
    ----------
    model, tokenizer, texts
        What reads, and what is read: the first 32,768 tokens. Not needed with `scans`.
    scans : sequence of Scan, optional
        What was scanned before, as it is.
    n_components : int, optional
        Default: up to 64, with at least 10 neurons and 50 tokens for each.
    run_length : int, optional
        Longer texts are cut into runs of at most so many tokens; None never cuts.
    random_state : int, Generator or None
        What is drawn starts from it; None draws anew.
    device : str
        ``"auto"`` is CUDA where there is one.
    progress : bool or callable
        Say what is done, on stderr or to a function of a line.
    """
    if n_components is not None:
        check_whole("n_components", n_components, 1)
    runs = scans or _scanned(model, tokenizer, texts or [], run_length)  # type: ignore[arg-type]
    most = min(runs[0].n_neurons // NEURONS_EACH, sum(run.n_tokens for run in runs) // TOKENS_EACH)
    n_components = n_components or max(2, min(FOUND, most))
    speaker(progress)(f"finding {n_components} networks in the calibration text")
    return FunctionalNetworks.from_ica(GroupICA(n_components, random_state=random_state, device=device).fit(runs))


def _scanned(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], run_length: int | None
) -> list[Scan]:
    """Scans that are kept, or where that is too much the model itself, to be asked again."""
    texts = long_texts(limit_tokens(texts, tokenizer, FOUND_TOKENS), tokenizer)
    if not has_experts(model):
        live = live_scans(model, tokenizer, texts, run_length=run_length)
        if sum(run.n_tokens * run.n_neurons for run in live) * next(model.parameters()).element_size() > KEPT:
            return live
    return scan(model, tokenizer, texts, run_length=run_length)


def decompose(
    study: Study | str | Path,
    n_components: int | float | str = 20,
    *,
    method: str = "fastica",
    n_runs: int | None = None,
    stability: int = 0,
    threshold: float = PUBLISHED_Z,
    out: str | Path | None = None,
    convention: str = "bids",
    device: str = "auto",
    random_state: int | None = 0,
    overwrite: bool = False,
    progress: bool | Say = True,
) -> dict[str, Any]:
    """Group ICA of a study's scan: networks, their files, and a report. The same call goes on where it was stopped.

    In a process group the runs are shared out; rank 0 writes, and alone looks how stable the networks are.

    Parameters
    ----------
    study : Study or path
        A scan store works too.
    n_components, device, random_state
        As for `GroupICA`.
    method : str
        As for `GroupICA`; or ``"ulcmod"``: the modules of `ULCMOD`, of which `n_components` is a whole number, which
        say themselves which neurons are theirs, so that there is no `threshold`.
    n_runs : int, optional
        Use the first so many.
    stability : int
        How often the ICA is repeated to say how stable each network is; 0 is not at all. Of methods that have random
        starts to compare (``"fastica"``, ``"picard"``).
    threshold : float
        |z| above which a neuron belongs to a network.
    out : path, optional
        Default: ``networks/`` in the study.
    convention : {"bids", "fsl"}
        ``"fsl"`` writes MELODIC's names beside ours.
    overwrite : bool
        Write over networks that were found with other settings.
    progress : bool or callable
        Say what is done, on stderr or to a function of a line.

    Returns
    -------
    dict
        ``ica``, ``networks``, ``stability`` (where asked for) and ``folder``.
    """
    tell = speaker(progress)
    check_option("convention", convention, ("bids", "fsl"))
    check_option("method", method, METHODS)
    check_count("stability", stability, 0)
    if stability and (method not in SOLVERS or SOLVERS[method].from_start is None):
        raise InputError(f"stability={stability} compares random starts, which method={method!r} does not have")
    if method == "ulcmod":
        check_whole("n_components", n_components, 1)
        if threshold != PUBLISHED_Z:
            raise InputError(
                f"threshold={threshold!r}: modules of method='ulcmod' say themselves which neurons are theirs"
            )
        if ranks().size > 1:
            raise InputError("method='ulcmod' is one process: run it without torchrun")
    if n_runs is not None:
        check_whole("n_runs", n_runs, 1)
    study = study if isinstance(study, Study) else Study(study)
    store = study.place("scans")
    scans = study.scans[:n_runs]
    target = Path(out) if out is not None else study.folder / "networks"
    digest = origin_of(read_manifest(store))["scan"]
    if random_state is not None:
        random_state = seed_of(random_state)  # a generator has no lasting name
    settings = {
        "components": n_components, "method": method, "runs": len(scans), "seed": random_state, "scan": digest
    }  # fmt: skip
    team = ranks()
    alike = {k: v for k, v in settings.items() if k != "seed"} | {"threshold": threshold, "stability": stability}
    with team.job("decompose", **alike), claim(target, settings, overwrite=overwrite) if team.leads else nullcontext():
        if team.told("decompose", lambda: (target / "ica" / "ica.json").is_file() and not overwrite):
            tell("group ICA: done before")
            ica = read_ica(target / "ica")
        else:
            ica = _fitted(scans, n_components, method, random_state, device, tell, bool(progress))
            if team.leads:
                ica.save(target / "ica", overwrite=True)
        tell(starts_of(ica))
        networks = FunctionalNetworks.from_ica(ica, threshold=threshold)
        if not team.leads:  # rank 0 does the rest
            return {"ica": ica, "networks": networks, "folder": target}
        with alone():
            networks.save(target, overwrite=True)
            if convention == "fsl":
                write_melodic(ica, target)
            made: dict[str, Any] = {"ica": ica, "networks": networks}
            if stability:
                tell(f"stability: the same {stability} times")
                made["stability"] = ica_stability(
                    scans,
                    n_components=ica.n_components_,
                    n_starts=stability,
                    random_state=random_state,
                    device=device,
                    method=method,
                )
            write_report(target / "report.html", title=f"Networks of {study.folder}", scans=scans, **made)
        return {**made, "folder": target}


def _fitted(
    scans: Sequence[Scan], n_components: int | float | str, method: str, random_state: int | None, device: str,
    tell: Say, bars: bool,
) -> GroupICA | ULCMOD:  # fmt: skip
    if method == "ulcmod":
        tell(f"ULCMOD: {n_components} modules of {len(scans)} runs")
        return ULCMOD(int(n_components), random_state=random_state).fit(scans)
    tell(f"group ICA: {n_components} components of {len(scans)} runs")
    ica = GroupICA(n_components, method=method, random_state=random_state, device=device, progress=bars)
    return ica.fit(scans)


def starts_of(ica: GroupICA | ULCMOD) -> str:
    """How many starts (of every window) failed, and how many steps they took."""
    if isinstance(ica, ULCMOD):
        moving = "" if ica.converged_ else ", and some still move"
        return f"ULCMOD: {ica.n_iter_} rounds of moves{moving}"
    starts = ica.convergence_
    if not starts:
        return f"ICA: {ica.n_iter_} iterations"
    failed, steps = sum(not start["converged"] for start in starts), [int(start["n_iter"]) for start in starts]
    took = f"{min(steps)} to {max(steps)}" if min(steps) < max(steps) else f"{steps[0]}"
    return f"ICA: {failed} of {len(starts)} starts did not converge; {took} iterations"


def describe_networks(
    study: Study | str | Path,
    out: str | Path | None = None,
    *,
    n_permutations: int = 200,
    random_state: int | None = 0,
    progress: bool | Say = True,
) -> dict[str, pd.DataFrame]:
    """Layers, tokens, conditions, thresholds side by side and connectivity of networks, as tables and figures.

    Parameters
    ----------
    study : Study or path
        A folder of networks works too, without tokens and conditions.
    out : path, optional
        Default: where the networks are.
    n_permutations : int
        Draws of every null (conditions, connectivity); 0 for none.
    random_state : int, Generator or None
        What is drawn starts from it; None draws anew.
    progress : bool or callable
        Say what is done, on stderr or to a function of a line.

    Returns
    -------
    dict of DataFrame
        ``networks``, ``thresholds`` and, with time courses, ``connectivity``; written as ``table-*.tsv``, figures
        beside them as ``figure-*.png``.
    """
    check_count("n_permutations", n_permutations, 0)
    study = study if isinstance(study, Study) else Study(study)
    group = study.networks
    target = Path(out) if out is not None else study.place("networks")
    refuse_other(target, "networks", "a study", "an ICA", "a scan")
    scans: list[Scan] | None = None
    found = None
    try:
        scans = study.scans
    except InputError as error:
        speaker(progress)(f"without tokens and conditions: {error}")
    if scans is not None and any(len(run.events) for run in scans):
        found = localizer(scans, networks=group, n_permutations=n_permutations, random_state=random_state)
    tables = {
        "networks": describe(group, scans, localizer=found).reset_index(), "thresholds": compare_thresholds(group)
    }  # fmt: skip
    figures = {}
    if group.space is not None:
        figures["layer_profile"] = plot_layer_profile(group)
    if group.time_courses and len(group) > 1:
        links = connectivity(group, n_permutations=n_permutations, random_state=random_state)
        tables["connectivity"] = links.to_frame()
        figures["connectivity"] = plot_connectivity(links.matrix, names=links.names)
    for name, frame in tables.items():
        write_table(target / f"table-{name}.tsv", frame)
    for name, figure in figures.items():
        write_figure(target / f"figure-{name}.png", figure, dpi=150)
    return tables
