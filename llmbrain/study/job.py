"""The main job: scan, functional networks, a smaller model, a page that shows what happened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmbrain._files import plain, write_json
from llmbrain._progress import Say, speaker
from llmbrain._validation import InputError, check_option, check_range
from llmbrain.anatomy.families import anatomy
from llmbrain.decomposition import GroupICA
from llmbrain.evaluation import perplexity, throughput
from llmbrain.hooks.sites import check_sites
from llmbrain.hooks.text import input_device
from llmbrain.networks import FunctionalNetworks
from llmbrain.pruning.criteria import CRITERIA
from llmbrain.pruning.prune import COMPENSATIONS
from llmbrain.reporting import report
from llmbrain.scanning import scan
from llmbrain.scanning.manifest import model_id
from llmbrain.stats import PUBLISHED_Z
from llmbrain.study.folder import Study, claim, provenance
from llmbrain.study.smaller import Evidence, cut
from llmbrain.study.texts import limit_tokens, split_texts

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

Extras = Callable[[Study, "nn.Module"], dict[str, Any]]


def run(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    out: str | Path,
    n_components: int | float | str = 20,
    ratio: float = 0.3,
    method: str = "networks",
    compensate: str | None = "least-squares",
    site: str = "neuron",
    threshold: float = PUBLISHED_Z,
    random_state: int = 0,
    n_tokens: int | None = 32768,
    max_windows: int | None = None,
    name: str | None = None,
    overwrite: bool = False,
    progress: bool | Say = True,
    extras: Extras | None = None,
) -> Study:
    """Scan a model on texts, find its networks, prune it, and write a page that shows what happened.

    The perplexities are those of all the text, as `llmbrain.perplexity` counts it, and of its last fifth
    (``held_out``), which neither the networks nor the pruning have seen. The same call goes on where it was stopped.

    Parameters
    ----------
    model, tokenizer
        A transformers model on its device, and its tokenizer. Not changed.
    texts : sequence of str
        What the model reads; a `Stimulus` brings its events.
    out : path
        Folder of the study: ``scan/``, ``networks/``, ``pruned/``, ``report.html``, ``summary.json``.
    n_components : int, float or str
        As for `GroupICA`: a number of networks, a share of variance below 1, or ``"auto"``.
    ratio, method
        Share of the MLP neurons to remove, and by which criterion; see `plan_pruning`.
    compensate : {"least-squares", "bias", None}
        See `prune`.
    site : str
        What is recorded; see `scan`.
    threshold : float
        |z| above which a neuron belongs to a network.
    n_tokens : int, optional
        How much of the text is scanned; None is all.
    max_windows : int, optional
        How much of the text the perplexities use; None is all.
    name : str, optional
        What the model is called; default where it was loaded from.
    overwrite : bool
        Write over another study in `out`.
    progress : bool or callable
        Say what begins, on stderr or to a function of a line.
    extras : callable, optional
        Called with the study so far and the dense model; what it returns goes into the summary, and what is in its
        ``report`` into the report.

    Returns
    -------
    Study

    Raises
    ------
    InputError
        If the input cannot be used, or `out` holds another study.
    """
    check_range("ratio", ratio, 0, 1, open_low=True, open_high=True)
    check_option("method", method, CRITERIA)
    check_option("compensate", compensate, COMPENSATIONS)
    check_sites(site)
    if isinstance(texts, str):
        texts = [texts]
    if not texts or not any(text.strip() for text in texts):
        raise InputError("texts are empty: there is nothing to read")
    name, out, tell = name or model_id(model), Path(out), speaker(progress)
    settings = {
        "components": n_components, "ratio": ratio, "method": method, "compensate": compensate, "site": site,
        "threshold": threshold, "seed": random_state, "n_tokens": n_tokens, "max_windows": max_windows,
    }  # fmt: skip
    record = provenance(name, texts, **settings, device=str(input_device(model)))
    with claim(out, {"model": name, "texts": record["texts"]["sha256"], **settings}, overwrite=overwrite):
        study = Study(out)

        tell("1/5 the model as it is: perplexity, size, speed")
        calibration, held_out = split_texts(texts)
        scanned = limit_tokens(calibration or texts, tokenizer, n_tokens)
        dense = measure(model, tokenizer, texts, max_windows)

        tell("2/5 scan: every neuron at every token")
        sites = [site, *CRITERIA[method]().sites(anatomy(model))]
        study.scans = scan(model, tokenizer, scanned, out=out / "scan", site=sites)

        tell("3/5 functional networks: group ICA")
        study.ica = GroupICA(n_components, random_state=random_state, device=str(input_device(model))).fit(study.scans)
        study.networks = FunctionalNetworks.from_ica(study.ica, threshold=threshold)
        study.networks.save(out / "networks", overwrite=True)

        tell(f"4/5 pruning: {ratio:.0%} of the MLP neurons, method {method}, compensation {compensate}")
        small, study.plan = cut(
            model, tokenizer, evidence=Evidence(study.networks, study.scans, scanned), out=out / "pruned", ratio=ratio,
            method=method, compensate=compensate, random_state=random_state, report=False, overwrite=True,
        )  # fmt: skip
        study.plan.save(out / "plan.json")
        study.pruned = small, tokenizer
        summary: dict[str, Any] = {
            "dense": dense,
            "pruned": measure(small, tokenizer, texts, max_windows),
            "networks": {
                "n_components": len(study.networks), "n_key_neurons": int(study.networks.masks.any(axis=0).sum())
            },
            "held_out": _held_out(model, small, tokenizer, held_out, max_windows),
            "provenance": record,
        }  # fmt: skip
        found = extras(study, model) if extras else {}
        in_report = found.pop("report", {})
        study.summary = {**summary, **found}

        tell("5/5 report")
        report(study, **in_report).save(out / "report.html")
        write_json(out / "summary.json", study.summary, default=plain)
        return study


def measure(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_windows: int | None
) -> dict[str, float]:
    """Perplexity, size and speed of a model, as the summary keeps them."""
    return {
        "perplexity": perplexity(model, tokenizer, texts, max_windows=max_windows),
        "parameters": sum(p.numel() for p in model.parameters()),
        "mlp_neurons": sum(anatomy(model).widths),
        "tokens_per_second": throughput(model),
    }


def _held_out(
    model: nn.Module, small: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str],
    max_windows: int | None,
) -> dict[str, Any]:  # fmt: skip
    """Perplexity on the part that nothing was fitted to, or why there is none."""
    try:
        return {
            "dense_perplexity": perplexity(model, tokenizer, texts, max_windows=max_windows),
            "pruned_perplexity": perplexity(small, tokenizer, texts, max_windows=max_windows),
            "characters": sum(map(len, texts)),
        }
    except InputError as error:  # a short text has no window to hold out: the rest of the run stands
        return {"not_measured": str(error)}
