"""The main job: scan, functional networks, a smaller model, a page that shows what happened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmbrain._validation import InputError, check_option, check_range
from llmbrain.cli.common import claim, provenance, say, write_json
from llmbrain.stats import PUBLISHED_Z

HELD_OUT = 0.2  # share of the text, from its end, that networks and pruning never see


def split_texts(texts: Sequence[str], held_out: float = HELD_OUT) -> tuple[list[str], list[str]]:
    """Cut the last part off, by characters, between texts or, within one, at a line end or a space.

    Parameters
    ----------
    texts : sequence of str
    held_out : float
        Share of all characters to hold out.

    Returns
    -------
    calibration, held_out : lists of str
        Together they are the texts; either may be empty only where the text is too short to be cut.
    """
    cut = round(sum(map(len, texts)) * (1 - held_out))
    calibration: list[str] = []
    rest: list[str] = []
    for text in texts:
        if cut >= len(text):
            calibration.append(text)
        elif cut <= 0 or (len(texts) > 4 and calibration):  # where texts are many, none is cut
            rest.append(text)
        else:
            at = max(text.rfind("\n", 0, cut), text.rfind(" ", 0, cut)) + 1 or cut
            calibration.append(text[:at])
            rest.append(text[at:])
        cut -= len(text)
    return calibration, [text for text in rest if text.strip()]


def limit_tokens(texts: Sequence[str], tokenizer: Any, n_tokens: int | None) -> list[str]:
    """The first texts that hold about `n_tokens` tokens together; the last one is cut where it must be."""
    if n_tokens is None:
        return list(texts)
    kept: list[str] = []
    for text in texts:
        length = len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
        if length > n_tokens:
            text = text[: max(1, len(text) * n_tokens // length)]
        kept.append(text)
        n_tokens -= length
        if n_tokens <= 0:
            break
    return kept


def measure(model: Any, tokenizer: Any, texts: Sequence[str], max_windows: int | None) -> dict[str, float]:
    """Perplexity, size and speed of a model, as the summary keeps them."""
    from llmbrain.anatomy.families import anatomy
    from llmbrain.evaluation import perplexity, throughput

    return {
        "perplexity": perplexity(model, tokenizer, texts, max_windows=max_windows),
        "parameters": sum(p.numel() for p in model.parameters()),
        "mlp_neurons": sum(anatomy(model).widths),
        "tokens_per_second": throughput(model),
    }


def main_job(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    out: Path,
    *,
    model_id: str,
    components: int | float | str = 20,
    ratio: float = 0.3,
    method: str = "networks",
    compensate: str | None = "least-squares",
    site: str = "neuron",
    threshold: float = PUBLISHED_Z,
    device: str = "auto",
    seed: int = 0,
    n_tokens: int | None = 32768,
    max_windows: int | None = None,
    overwrite: bool = False,
    extras: Callable[..., dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Run the whole chain and write `out`.

    The perplexities are those of all the text, as `llmbrain.perplexity` counts it, and of its last fifth
    (``held_out``), which neither the networks nor the pruning have seen.

    Parameters
    ----------
    model, tokenizer
        A transformers model on its device, and its tokenizer.
    texts : sequence of str
        What the model reads; a `Stimulus` brings its events.
    out : Path
        Folder: ``scan/``, ``networks/``, ``pruned/``, ``report.html``, ``summary.json``.
    threshold : float
        |z| above which a neuron belongs to a network.
    n_tokens : int or None
        How much of the text is scanned; None is all.
    max_windows : int or None
        How much of the text the perplexities use; None is all.
    extras : callable, optional
        Called with the model, the pruned model and the networks; what it returns goes into report and summary.

    Returns
    -------
    dict
        What ``summary.json`` holds.
    """
    from llmbrain.decomposition import GroupICA
    from llmbrain.hooks.sites import check_sites
    from llmbrain.networks import FunctionalNetworks
    from llmbrain.pruning.criteria import CRITERIA
    from llmbrain.pruning.prune import COMPENSATIONS
    from llmbrain.scanning import scan

    check_range("ratio", ratio, 0, 1, open_low=True, open_high=True)
    check_option("method", method, CRITERIA)
    check_option("compensate", compensate, COMPENSATIONS)
    check_sites(site)
    if not texts or not any(text.strip() for text in texts):
        raise InputError("texts are empty: there is nothing to read")
    settings = {
        "components": components, "ratio": ratio, "method": method, "compensate": compensate, "site": site,
        "threshold": threshold, "seed": seed, "n_tokens": n_tokens, "max_windows": max_windows,
    }  # fmt: skip
    record = provenance(model_id, texts, **settings, device=str(model.device))
    claim(out, {"model": model_id, "texts": record["texts"]["sha256"], **settings}, overwrite=overwrite)

    say("1/5 the model as it is: perplexity, size, speed")
    calibration, held_out = split_texts(texts)
    scanned = limit_tokens(calibration or texts, tokenizer, n_tokens)
    dense = measure(model, tokenizer, texts, max_windows)

    say("2/5 scan: every neuron at every token")
    wanted = [site, *(("gate", "up") if method == "published" and _gated(model) else ())]
    scans = scan(model, tokenizer, scanned, out=out / "scan", site=wanted if len(wanted) > 1 else site)

    say("3/5 functional networks: group ICA")
    ica = GroupICA(components, random_state=seed, device=device).fit(scans)
    networks = FunctionalNetworks.from_ica(ica, threshold=threshold)
    networks.save(out / "networks", overwrite=True)

    say(f"4/5 pruning: {ratio:.0%} of the MLP neurons, method {method}, compensation {compensate}")
    plan, small = _prune(model, tokenizer, networks, scans, scanned, ratio, method, compensate, seed, out)
    pruned = measure(small, tokenizer, texts, max_windows)
    summary = {
        "dense": dense,
        "pruned": pruned,
        "networks": {"n_components": len(networks), "n_key_neurons": int(networks.masks.any(axis=0).sum())},
        "held_out": _held_out(model, small, tokenizer, held_out, max_windows),
        "provenance": record,
    }
    found = extras(model=model, pruned=small, networks=networks, scans=scans) if extras else {}
    summary.update({k: v for k, v in found.items() if k != "report"})

    say("5/5 report")
    from llmbrain.reporting import write_report

    write_report(
        out / "report.html", title=f"llmbrain: {model_id}", scans=scans, ica=ica, networks=networks, plan=plan,
        dense=dense, pruned=pruned, provenance=record, **found.get("report", {}),
    )  # fmt: skip
    write_json(out / "summary.json", summary)
    return summary


def _gated(model: Any) -> bool:
    from llmbrain.anatomy.families import anatomy

    return all(layer.gated for layer in anatomy(model).layers)


def _prune(
    model: Any, tokenizer: Any, networks: Any, scans: Any, calibration: Sequence[str], ratio: float, method: str,
    compensate: str | None, seed: int, out: Path,
) -> tuple[Any, Any]:  # fmt: skip
    from llmbrain.checkpoints import save_pruned
    from llmbrain.pruning import plan_pruning, prune

    plan = plan_pruning(
        model, networks, scans, ratio=ratio, method=method, random_state=seed, tokenizer=tokenizer,
        calibration=calibration,
    )  # fmt: skip
    small = prune(model, plan, tokenizer=tokenizer, calibration=calibration, compensate=compensate)
    plan.save(out / "plan.json")
    save_pruned(small, tokenizer, out / "pruned", overwrite=True)
    return plan, small


def _held_out(model: Any, small: Any, tokenizer: Any, texts: Sequence[str], max_windows: int | None) -> dict[str, Any]:
    """Perplexity on the part that nothing was fitted to, or why there is none."""
    from llmbrain.evaluation import perplexity

    try:
        return {
            "dense_perplexity": perplexity(model, tokenizer, texts, max_windows=max_windows),
            "pruned_perplexity": perplexity(small, tokenizer, texts, max_windows=max_windows),
            "characters": sum(map(len, texts)),
        }
    except InputError as error:  # a short text has no window to hold out: the rest of the run stands
        return {"not_measured": str(error)}
