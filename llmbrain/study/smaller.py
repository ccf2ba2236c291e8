"""Making models smaller, from texts or a study to files: `plan`, `cut` (``llmbrain prune``) and `benchmark`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmbrain._files import read_json, write_figure, write_json, write_table
from llmbrain._progress import Say, speaker
from llmbrain._validation import InputError, check_whole
from llmbrain.anatomy.experts import has_experts
from llmbrain.anatomy.families import anatomy
from llmbrain.checkpoints import load_model, save_pruned
from llmbrain.checkpoints.gguf_writing import check_folder_path, check_gguf_path, odd_widths
from llmbrain.checkpoints.loading import PROVENANCE
from llmbrain.checkpoints.shapes import RECORD
from llmbrain.distributed import Parcel, alone, ranks
from llmbrain.evaluation.perplexity import predicts_next_token
from llmbrain.hooks.text import as_windows, listed_texts, window_length
from llmbrain.networks import FunctionalNetworks
from llmbrain.page.text import short_name
from llmbrain.plotting import plot_widths
from llmbrain.pruning import PruningPlan, plan_pruning, prune, prune_offloaded
from llmbrain.pruning.allocate.blocks import check_drop
from llmbrain.pruning.allocate.search import PASSES
from llmbrain.pruning.benchmark import REPEATED, WINDOW, compare_methods, refuse_mixture, rows_of
from llmbrain.pruning.calibrate.windows import mixed_windows, signals_of_windows, write_windows
from llmbrain.pruning.criteria import CRITERIA
from llmbrain.pruning.offload import check_by_part
from llmbrain.pruning.repair.propagation import check_propagation
from llmbrain.reporting import write_report
from llmbrain.scanning import Scan
from llmbrain.scanning.manifest import model_id
from llmbrain.study.again import MADE, check_plan_place, made_before, made_from, making
from llmbrain.study.cost import (
    PIECE,
    Cost,
    measured_batch,
    own_windows,
    plan_passes,
    repair_passes,
    step_cost,
    together,
)  # fmt: skip
from llmbrain.study.experts import check_neuron_method
from llmbrain.study.fits import (
    check_alike,
    check_bias,
    check_carried,
    check_cut,
    check_drop_fits,
    check_one_width,
    check_saving,
    gguf_of,
    has_place_for_bias,
    is_of_one_width,
)
from llmbrain.study.folder import Study
from llmbrain.study.forecasting import forecast_of
from llmbrain.study.networks import FOUND_TOKENS, find_networks
from llmbrain.study.settings import OWN_WINDOWS
from llmbrain.study.texts import limit_tokens, split_texts

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

RATIO = 0.3  # of the neurons, where neither a ratio nor conditions to forget are given
TEXT_WINDOWS = 128  # windows of the text that are mixed with the model's own


@dataclass
class Evidence:
    """What a plan is made from."""

    networks: FunctionalNetworks | None = None
    scans: Sequence[Scan] | None = None
    texts: Sequence[str] | None = None
    windows: Tensor | None = None  # instead of the texts, where the model wrote some
    own: int = 0  # of the windows, those that it wrote

    @property
    def calibration(self) -> dict[str, Any]:
        """What calibrates, as `plan_pruning` and `prune` take it."""
        if self.windows is None:
            return {"calibration": self.texts}
        return {"calibration": self.windows, "max_windows": len(self.windows)}


def evidence_of(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str] | None = None,
    *,
    study: Study | str | Path | None = None,
    method: str = "networks",
    allocation: object = None,
    self_text: int | None = None,
    random_state: int | None = 0,
    progress: bool | Say = True,
) -> Evidence:
    """Texts, scans and networks: those of the study, or found now where the method uses networks.

    Parameters
    ----------
    texts : sequence of str, optional
        Default: those of the study's scans.
    study : Study or path, optional
    method, allocation : str
        Networks are looked for only for ``"networks"``, as one or the other.
    self_text : int, optional
        Windows of calibration text that the model writes itself, beside the text; None as in `own_windows`.
    random_state : int, Generator or None
        What is drawn starts from it; None draws anew.
    progress : bool or callable
        Say what is done, on stderr or to a function of a line.
    """
    if method:  # a plan that was made before says itself what goes
        check_neuron_method(model, method)
    if self_text is not None:
        check_whole("self_text", self_text, 0, OWN_WINDOWS)
    study = None if study is None else Study.of(study)
    scans = None if study is None else study.scans
    networks = study.networks if study is not None and study.has("networks") else None
    texts = listed_texts(texts) if texts is not None else [run.text for run in scans or () if run.text]
    windows, filled = None, None
    if texts and (self_text or (self_text is None and may_write(model, tokenizer))):
        filled = as_windows(model, tokenizer, texts, None, TEXT_WINDOWS)
        self_text = own_windows(self_text, len(anatomy(model).layers), len(filled))
    if self_text:
        speaker(progress)(f"the model writes {self_text} windows of calibration text")
        count = self_text

        def write() -> Parcel:
            written = _written(model, tokenizer, count, random_state)
            return Parcel({"windows": mixed_windows(filled, written, random_state=random_state)})

        with ranks().job("text", windows=count) as team:
            windows = team.found_by(0, "text", write).tensors["windows"]
    needed = allocation == "networks" or (method in CRITERIA and "networks" in CRITERIA[method].needs)
    if needed and networks is None and (scans or texts or windows is not None):
        found = scans
        if not scans and not texts and windows is not None:
            first = windows[: max(1, FOUND_TOKENS // windows.shape[1])]
            found = signals_of_windows(model, anatomy(model), first, ("neuron",))
        networks = find_networks(model, tokenizer, texts, scans=found, random_state=random_state, progress=progress)
    return Evidence(networks, scans, texts or None, windows, self_text or 0)


def _beside(self_text: int | None, options: Mapping[str, Any]) -> int | None:
    """No text of the model's own, where none was asked for, beside text with conditions."""
    functions = bool(options.get("keep") or options.get("forget"))
    return 0 if self_text is None and functions else self_text


def may_write(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether a model is asked for calibration text without the user's asking: not where it is slow or unlike."""
    if has_experts(model) or getattr(model, "hf_device_map", None):  # weights come from elsewhere for every token
        return False
    return predicts_next_token(model) and hasattr(model, "generate") and tokenizer is not None


def _written(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase | None, n_windows: int, random_state: int | None
) -> Tensor:
    """Windows that the model writes, long ones in several pieces: these are written sooner and keep their sense."""
    length = window_length(model)
    pieces = length // PIECE if length % PIECE == 0 else 1
    many = n_windows * pieces
    return write_windows(model, tokenizer, many, length // pieces, random_state=random_state).reshape(-1, length)


def plan(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str] | None = None,
    *,
    study: Study | str | Path | None = None,
    evidence: Evidence | None = None,
    out: str | Path | None = None,
    self_text: int | None = None,
    format: str = "per-layer",
    random_state: int | None = 0,
    progress: bool | Say = True,
    **options: Any,
) -> PruningPlan:
    """Say what a cut would remove, with networks found where the method needs them; nothing is cut.

    Parameters
    ----------
    texts, study, self_text, random_state
        As for `evidence_of`; `evidence` instead of them, where it is at hand.
    out : path, optional
        Where to write the plan; a figure of the widths goes beside it.
    format : str
        What it will be saved as: ``"uniform"`` needs one width everywhere.
    **options
        As for `plan_pruning`: ``ratio`` (default 0.3, with `forget` as many as it takes), ``method``, ``allocation``,
        ``multiple_of``, ``protect``, ``head_ratio``, ``drop``, ``keep``, ``forget``, ...
    progress : bool or callable
        Say what is done, on stderr or to a function of a line.
    """
    if out is not None:
        check_plan_place(out)
    method = options.setdefault("method", "networks")
    self_text = _beside(self_text, options)
    if evidence is None:
        _check_cut(model, format, None, options)
        evidence = evidence_of(
            model, tokenizer, texts, study=study, method=method, allocation=options.get("allocation"),
            self_text=self_text, random_state=random_state, progress=progress,
        )  # fmt: skip
    functions = bool(options.get("keep") or options.get("forget"))
    if options.get("ratio") is None and not options.get("forget"):
        options["ratio"] = RATIO
    check_drop_fits(model, check_drop(options.get("drop")), method, format)
    check_alike(model, format, options.get("allocation"), options.get("protect"))
    if is_of_one_width(model, format) and not (method in CRITERIA and CRITERIA[method].blocks):
        _one_width(model, options, format)
    if functions and evidence.scans is None:
        raise InputError("keep and forget need a study (--study): a scan whose texts have conditions")
    if functions and evidence.windows is not None:
        raise InputError("self_text has no conditions: leave it away with keep and forget")
    speaker(progress)(f"    plan: what {method} would remove")
    made = plan_pruning(
        model, evidence.networks, evidence.scans, tokenizer=tokenizer, random_state=random_state,
        **({} if functions else evidence.calibration), **options,
    )  # fmt: skip
    if format == "gguf" and (odd := odd_widths(made.widths_read)):
        warnings.warn(odd, UserWarning, stacklevel=2)
    if out is not None and ranks().leads:
        made.save(out)
        write_figure(Path(out).with_suffix(".png"), plot_widths(made), dpi=130)
    return made


def _check_cut(model: nn.Module, format: str, compensate: str | None, options: Mapping[str, Any]) -> None:
    """Refuse, before text is written and networks are found, what a plan or a format would refuse later."""
    names = ("allocation", "protect", "multiple_of", "head_ratio", "forget")
    ratio = options.get("ratio")
    check_cut(
        model, format=format, method=options.get("method", "networks"), compensate=compensate,
        ratio=RATIO if ratio is None else ratio, **{name: options[name] for name in names if name in options},
    )  # fmt: skip


def _one_width(model: nn.Module, options: dict[str, Any], format: str) -> None:
    """Options that give every layer the same width, the ratio as nearly as that allows."""
    check_one_width(format, options.get("allocation"), options.get("protect"), options.get("forget"))
    body = anatomy(model)
    widths, multiple = body.widths, options.get("multiple_of", 1)
    if options.get("allocation") in (None, "", "uniform") and len(set(widths)) == 1:  # exactly, not up to one neuron
        kept = max(1, round((1 - options["ratio"]) * widths[0] / multiple)) * multiple
        options |= {"allocation": [kept] * len(widths), "ratio": 1 - kept / widths[0]}
    if options.get("head_ratio"):
        groups = min(layer.out.units if layer.out else 1 for layer in body.layers)
        options["head_ratio"] = min(round(options["head_ratio"] * groups), groups - 1) / groups


def cut(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    texts: Sequence[str] | None = None,
    *,
    out: str | Path,
    study: Study | str | Path | None = None,
    plan: PruningPlan | None = None,
    evidence: Evidence | None = None,
    compensate: str | None = "least-squares",
    format: str = "per-layer",
    self_text: int | None = None,
    gguf_type: str = "f16",
    like: str | Path | None = None,
    report: bool = True,
    random_state: int | None = 0,
    overwrite: bool = False,
    offload: bool = False,
    relearning: bool = True,
    indices: bool = True,
    propagation: float | None = None,
    progress: bool | Say = True,
    **options: Any,
) -> tuple[nn.Module, PruningPlan | None]:
    """Plan a cut (or take `plan`), cut, repair, and save the smaller model with a report.

    Parameters
    ----------
    out : path
        Folder of the smaller model; with ``format="gguf"`` a file.
    compensate : {"least-squares", "bias", None}
    format, gguf_type, like : str
        As for `save_pruned`; `like` is the GGUF that the model was loaded from, if it was.
    report : bool
        Write ``report.html`` beside the model.
    relearning, indices, propagation
        See `llmbrain.prune` (`relearning`, `record_indices`, `propagation`).
    **options
        Others as for `plan`.
    random_state : int, Generator or None
        What is drawn starts from it; None draws anew.
    overwrite : bool
    offload : bool
        Cut block by block, from the files of a model to those of the smaller one: see `llmbrain.prune_offloaded`.
    progress : bool or callable
        Say what is done, on stderr or to a function of a line.

    Returns
    -------
    (model, plan)
        With `offload` the model is opened with ``offload=True``. The plan is None where the same call made the model
        before, without `indices`: nobody knows it any more.

    Raises
    ------
    InputError
        If `out` holds another model already and `overwrite` is not set, before anything is done. One that the same call
        made is given back.
    """
    if offload:
        if not indices:
            raise InputError("indices=False: a model that is cut block by block names what went; load it whole")
        if ranks().size > 1:
            raise InputError("offload=True: a model is cut from file to file by one process")
        check_by_part(model, format, plan, bool(options.get("keep") or options.get("forget")))
    check_propagation(propagation, compensate, functions=bool(options.get("keep") or options.get("forget")))
    if format == "gguf":
        check_gguf_path(out)
    else:
        check_folder_path(out, format)
    made = "" if evidence is not None else made_from(
        "prune", model, texts, None if study is None else Study.of(study).folder, plan=plan and plan.to_dict(),
        compensate=compensate, format=format, self_text=self_text, gguf_type=gguf_type, like=like and str(like),
        random_state=random_state, **({} if relearning and indices else {"record": [relearning, indices]}),
        **({} if propagation is None else {"propagation": propagation}), **options,
    )  # fmt: skip
    with making(out, overwrite, made) as is_there:
        if is_there:
            speaker(progress)("the smaller model: done before")
            return made_before(out, tokenizer, plan, offload)
        if evidence is None:
            check_saving(model, tokenizer, format, gguf_type, like)
            if propagation and not offload:
                check_carried(model, propagation)
            method = "" if plan is not None else options.get("method", "networks")
            if plan is None:
                _check_cut(model, format, compensate, options)
            self_text = 0 if offload and self_text is None else _beside(self_text, options)
            evidence = evidence_of(
                model, tokenizer, texts, study=study, method=method, self_text=self_text, random_state=random_state,
                allocation=None if plan is not None else options.get("allocation"), progress=progress,
            )  # fmt: skip
        if plan is None:
            asked = {"format": format, "random_state": random_state, "progress": progress, **options}
            plan = _plan(model, tokenizer, evidence=evidence, **asked)
        speaker(progress)(f"    cut, and repair by {compensate}" if compensate else "    cut, without repair")
        calibration = {"calibration": evidence.scans} if plan.details.get("functions") else evidence.calibration
        heads = plan.kept_heads is not None or bool(plan.dropped["attention"])
        check_bias(model, format, compensate, heads=heads)
        intercept = has_place_for_bias(model, format, heads=heads)
        how: dict[str, Any] = {"tokenizer": tokenizer, "compensate": compensate, "intercept": intercept,
                               "propagation": propagation, **calibration}  # fmt: skip
        note = {MADE: made} if made else {}
        foretold = None  # of a model on disk it would take as long as the cut
        if report and not offload:
            foretold = forecast_of(model, plan, evidence.networks, evidence.scans, compensate)

        def page(path: Path, smaller: nn.Module) -> None:
            """The report, with what was foretold beside what it is."""
            found = foretold if foretold is None else foretold.measure(model, smaller)
            forgetting = getattr(smaller, RECORD, [{}])[-1].get("forgetting")
            shown: dict[str, Any] = {"plan": plan, "networks": evidence.networks, "forecast": found}
            write_report(path, title=f"{short_name(model_id(model))}, pruned", forgetting=forgetting, **shown)

        def beside(folder: Path, smaller: nn.Module | None = None) -> None:
            """What is of one set with the model."""
            write_json(folder / PROVENANCE, read_json(folder / PROVENANCE) | note)
            if report:
                page(folder / "report.html", smaller or load_model(folder, offload=True)[0])

        if offload:
            prune_offloaded(model, plan, out, format=format, overwrite=overwrite, beside=beside, **how)
            return load_model(out, offload=True)[0], plan
        small = prune(model, plan, relearning=relearning, record_indices=indices, **how)
        if not ranks().leads:  # rank 0 saves
            return small, plan
        own: dict[str, Any] = {"beside": lambda folder: beside(folder, small)}
        if format == "gguf":
            own = {"gguf_type": gguf_type, "like": like or gguf_of(model), "note": note}
        with alone():
            if format == "gguf" and report:  # first: the model says that all of it is done
                page(Path(out).with_suffix(".html"), small)
            save_pruned(small, tokenizer, out, format=format, overwrite=overwrite, **own)
        return small, plan


_plan = plan  # the name that `cut` uses for its argument


def _halves(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """What a benchmark calibrates on, and what it tests on: the first 60% and the last 30%."""
    before, test = split_texts(texts, 0.3)
    return split_texts(before, 1 / 7)[0], test


def benchmark_cost(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *,
    methods: Sequence[str] | None = None, ratios: Sequence[float] = (0.2, 0.3, 0.5), draws: int = 1,
    window: int | None = None, max_windows: int = 128, test_windows: int | None = 96,
) -> Cost:  # fmt: skip
    """What `benchmark` with the same arguments will take; one batch is read."""
    refuse_mixture(model)
    calibration, test = _halves(texts)
    length = window_length(model, window) if window else min(window_length(model), WINDOW)
    rate, most = measured_batch(model, tokenizer, texts, length), max_windows * length
    calibration = limit_tokens(calibration, tokenizer, max(most, FOUND_TOKENS))
    costs, cells, layers = [], 1, len(anatomy(model).layers)
    wanted = rows_of(methods)
    for method in dict.fromkeys(row[0] for row in wanted):
        own = [row for row in wanted if row[0] == method]
        times = [draws if row in REPEATED else 1 for row in own]
        shared = plan_passes(method, "uniform", PASSES, n_layers=layers)  # what all ratios share is done once
        spread = [plan_passes(method, allocation, PASSES, n_layers=layers) - shared for _, allocation, _ in own]
        repair = [repair_passes(compensate, layers) for *_, compensate in own]
        passes = shared * max(times) + len(ratios) * sum(n * (a + b) for n, a, b in zip(times, spread, repair))
        n = len(ratios) * sum(times)
        name = f"{method}, {n} models"
        costs.append(
            step_cost(
                model, tokenizer, calibration, passes=passes, name=name, method=method, n_tokens=most, per_token=rate
            )
        )
        cells += n
    tested = step_cost(model, tokenizer, test, n_tokens=test_windows and test_windows * length, passes=cells,
                       name="perplexities", per_token=rate)  # fmt: skip
    found = []
    if any("networks" in row for row in wanted):
        found.append(step_cost(model, tokenizer, calibration, n_tokens=FOUND_TOKENS, passes=2.0, name="networks",
                               per_token=rate))  # fmt: skip
    return together([*found, *costs, tested])


def benchmark(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    methods: Sequence[str] | None = None,
    n_components: int | None = None,
    out: str | Path | None = None,
    random_state: int | None = 0,
    device: str = "auto",
    progress: bool | Say = True,
    **options: Any,
) -> pd.DataFrame:
    """Prune by every method and compare: the first 60% of the text calibrates, the last 30% tests.

    Parameters
    ----------
    methods : sequence of str, optional
        Default all but those that drop whole blocks (``shortgpt``, ``2ssp``).
    n_components : int, optional
        Networks to find for the method that uses them; default up to 64.
    out : path, optional
        Where to write the table (.csv).
    **options
        As for `llmbrain.pruning.benchmark.compare_methods`: ``ratios``, ``draws``, ``window``, ``max_windows``, ...
    random_state : int, Generator or None
        What is drawn starts from it; None draws anew.
    device : str
        ``"auto"`` is CUDA where there is one.
    progress : bool or callable
        Say what is done, on stderr or to a function of a line.
    """
    calibration, test = _halves(texts)
    networks = None
    if any("networks" in CRITERIA[method].needs for method in methods or CRITERIA if method in CRITERIA):
        networks = find_networks(
            model, tokenizer, calibration, n_components=n_components, random_state=random_state, device=device,
            progress=progress,
        )  # fmt: skip
    table = compare_methods(
        model, tokenizer, calibration, test, methods=methods, networks=networks, random_state=random_state,
        progress=speaker(progress), **options,
    )  # fmt: skip
    if out is not None:
        write_table(Path(out), table)
    return table
