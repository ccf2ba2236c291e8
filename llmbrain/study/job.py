"""The main job: scan, functional networks, a smaller model, a page that shows what happened."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmbrain._files import plain, read_json, write_json, write_text
from llmbrain._progress import Say, seconds_of, span, speaker, watched
from llmbrain._validation import InputError
from llmbrain.anatomy.experts import has_experts, widths_of
from llmbrain.anatomy.families import anatomy
from llmbrain.checkpoints.shapes import RECORD
from llmbrain.decomposition import GroupICA
from llmbrain.distributed import ranks
from llmbrain.evaluation import throughput
from llmbrain.evaluation.perplexity import check_causal, window_losses
from llmbrain.hooks.text import input_device, listed_texts, window_length
from llmbrain.networks import FunctionalNetworks
from llmbrain.pruning import PruningPlan
from llmbrain.pruning.criteria import CRITERIA, criterion
from llmbrain.pruning.criteria.base import protection
from llmbrain.pruning.experts import ExpertPlan
from llmbrain.pruning.forecast import Forecast as Predicted
from llmbrain.reporting import report
from llmbrain.scanning import scan
from llmbrain.scanning.manifest import model_id
from llmbrain.study.budget import fit, given_up
from llmbrain.study.cost import BATCH, Cost, Subject, measured_batch, run_cost, told
from llmbrain.study.experts import check_method, cut_fewer
from llmbrain.study.fits import check_asked
from llmbrain.study.folder import PRUNED_GGUF, Study, claim, provenance
from llmbrain.study.forecasting import forecast_of, forecast_table, no_forecast, unseen_scans
from llmbrain.study.sample import Array, Sample, count_tokens
from llmbrain.study.settings import Settings
from llmbrain.study.smaller import cut, evidence_of, may_write
from llmbrain.study.smaller import plan as make_plan
from llmbrain.study.texts import limit_tokens, long_texts, split_texts

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn
    from transformers import PreTrainedTokenizerBase

Extras = Callable[[Study, "nn.Module"], dict[str, Any]]
SPEED = {"n_tokens": 512, "repeats": 3}  # of the measurements of speed
READ = 512  # tokens of the texts of the batch that is measured
# settings that older studies, which may go on, do not have
NEWER = (("last", False), ("indices", True), ("propagation", None))
TOKENS_A_NEURON = 0.3  # that calibration needs at the very least


@dataclass(frozen=True)
class Forecast:
    """What a job will do and take.

    Attributes
    ----------
    settings : Settings
        With a budget, those that fit it.
    cost : Cost
    gave_up : list of str
        What the budget left no time for.
    """

    settings: Settings
    cost: Cost
    gave_up: list[str]

    def lines(self) -> list[str]:
        """What a user is told before anything runs."""
        return [*self.cost.lines(), *(f"given up for the budget: {line}" for line in self.gave_up)]


@dataclass(frozen=True)
class _Subject:
    """A model, what it reads, and sizes that costs follow from."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    texts: Sequence[str]
    sizes: Subject
    n_total: int
    n_calibration: int
    window: int
    per_token: float

    @classmethod
    def of(cls, model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> _Subject:
        texts = listed_texts(texts)
        if not texts or not any(text.strip() for text in texts):
            raise InputError("texts are empty: there is nothing to read")
        check_causal(model)
        calibration, _ = split_texts(texts, tokenizer=tokenizer)
        n_total = count_tokens(tokenizer, texts)
        n_calibration = count_tokens(tokenizer, calibration) if calibration else n_total
        Sample.of_texts(model, tokenizer, texts, n_calibration=n_calibration, tokens=BATCH)  # or it says what is short
        window = min(READ, window_length(model), n_total)
        rate = measured_batch(model, tokenizer, texts, window)
        return cls(model, tokenizer, texts, Subject.of(model), n_total, n_calibration, window, rate)

    def check(self, how: Settings) -> None:
        """Refuse what could not be done at its time."""
        tokens = min(how.n_tokens or self.n_calibration, self.n_calibration)
        check_asked(self.model, self.tokenizer, how, self.texts, tokens)

    def sample(self, how: Settings, *, wanted: bool) -> Sample:
        """Windows that perplexities are measured on; `wanted`: a text must have as many as were asked for."""
        return Sample.of_texts(
            self.model, self.tokenizer, self.texts, n_calibration=self.n_calibration, tokens=how.eval_tokens,
            max_windows=how.max_windows, wanted=wanted and how.is_sample_asked,
        )  # fmt: skip

    def cost(self, how: Settings, todo: Sequence[str] = ("evaluate", "scan", "networks", "prune")) -> Cost:
        """What these settings take."""
        tokens = min(how.n_tokens or self.n_calibration, self.n_calibration)
        sample = self.n_total if how.eval_tokens is None else min(how.eval_tokens, self.n_total)
        return run_cost(self.sizes, how, n_tokens=tokens, eval_tokens=sample, window=self.window,
                        per_token=self.per_token, todo=todo, writes=may_write(self.model, self.tokenizer),
                        read=self.texts)  # fmt: skip

    def fit(self, how: Settings, seconds: float, pinned: Sequence[str], **more: Any) -> tuple[Settings, list[str]]:
        """Settings that take no longer."""
        how = self.within(how)
        least = int(TOKENS_A_NEURON * max(self.sizes.widths))
        cost: Callable[[Settings], Cost] = lambda s: self.cost(s, **more)  # noqa: E731
        return fit(seconds, how, cost, pinned=pinned, least=least, ends=self.spared(how),
                   window=window_length(self.model))  # fmt: skip

    def within(self, how: Settings) -> Settings:
        """Settings that ask for no more text than there is."""
        return replace(how, n_tokens=min(how.n_tokens or self.n_calibration, self.n_calibration),
                       eval_tokens=min(how.eval_tokens or self.n_total, self.n_total))  # fmt: skip

    def spared(self, how: Settings) -> tuple[int, ...]:
        """Layers that the method protects by itself, where the format has a place for several widths."""
        if how.ratio is None or how.format in ("uniform", "gguf") or has_experts(self.model):
            return ()
        return protection(criterion(how.method)(), self.sizes.widths, how.ratio, [])


def forecast(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, settings: Settings | None = None,
    budget: float | str | None = None, **options: Any,
) -> Forecast:  # fmt: skip
    """What `run` with the same arguments would do and take; one batch is read, nothing is written.

    Parameters
    ----------
    As for `run`.
    """
    how = Settings.of(settings, **options)
    check_method(model, how)
    subject = _Subject.of(model, tokenizer, texts)
    subject.check(how)
    gave_up: list[str] = []
    if budget is not None:
        how, gave_up = subject.fit(how, seconds_of(budget), list(options))
    subject.sample(how, wanted=budget is None)
    return Forecast(how, subject.cost(how), gave_up)


def run(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    out: str | Path,
    settings: Settings | None = None,
    budget: float | str | None = None,
    name: str | None = None,
    source: dict[str, str] | None = None,
    overwrite: bool = False,
    progress: bool | Say = True,
    extras: Extras | None = None,
    **options: Any,
) -> Study:
    """Scan a model on texts, find its networks, prune it, and write a page that shows what happened.

    Both perplexities are measured on the same windows, each read once: a sample of the text, and its part from the last
    fifth (``held_out``), which neither the networks nor the pruning have seen; with standard errors over windows. The
    same call goes on where it was stopped.

    Parameters
    ----------
    model, tokenizer
        A transformers model on its device, and its tokenizer. Not changed.
    texts : sequence of str
        What the model reads; a `Stimulus` brings its events.
    out : path
        Folder of the study: ``scan/``, ``networks/``, ``pruned/``, ``report.html``, ``summary.json``, ``config.toml``
        (the settings that repeat it), ``log.txt``.
    settings : Settings, optional
        How; see `llmbrain.study.Settings`.
    budget : float or str, optional
        Seconds, or such as ``"10m"``: what does not fit is given up, and said; settings that are given as options stay.
    name : str, optional
        What the model is called; default where it was loaded from.
    source : dict, optional
        Entries ``model`` and ``text`` for ``config.toml``.
    overwrite : bool
        Write over another study in `out`.
    progress : bool or callable
        Say what it costs and what begins, on stderr or to a function of a line.
    extras : callable, optional
        Called with the study so far and the dense model; what it returns goes into the summary, and what is in its
        ``report`` into the report.
    **options
        Single settings, such as ``ratio=0.5, method="flap"``.

    Returns
    -------
    Study

    Raises
    ------
    InputError
        If the input cannot be used, or `out` holds another study.
    """
    began = time.monotonic()
    if ranks().size > 1:
        raise InputError("run is one process: scan, decompose, plan and prune are shared by ranks")
    asked = Settings.of(settings, **options)
    check_method(model, asked)
    limit = None if budget is None else seconds_of(budget)
    name, out, tell = name or model_id(model), Path(out), speaker(progress)
    subject = _Subject.of(model, tokenizer, texts)
    subject.check(asked)
    record = provenance(name, subject.texts, **asked.to_dict(), device=str(input_device(model)))
    mark = {"model": name, "texts": record["texts"]["sha256"], **asked.to_dict(), "budget": limit}
    mark = {k: v for k, v in mark.items() if (k, v) not in NEWER}
    gave_up: list[str] = []
    how = _same_as_before(out, mark) or asked
    if limit is not None and how is asked:
        how, gave_up = subject.fit(asked, limit, list(options))
    elif limit is not None:
        gave_up = given_up(subject.within(asked), how)
    sample = subject.sample(how, wanted=limit is None)
    with claim(out, mark, overwrite=overwrite), watched(out / "log.txt"):
        told(subject.cost(how), tell)
        for line in gave_up:
            tell(f"given up for the budget: {line}")
        write_text(out / "config.toml", how.to_toml(**(source or {})))
        study = Study(out)
        kept, sampled = len(sample.windows), sample.windows.shape[1]
        tell(
            f"1/5 the model as it is: perplexity of {kept} windows of {sampled} tokens ({sample.share:.0%} of the text)"
        )
        before = window_losses(model, sample.windows)
        dense = _measured(model, sample, before)

        tell("2/5 scan: every neuron at every token")
        calibration, _ = split_texts(subject.texts, tokenizer=tokenizer)
        scanned = long_texts(limit_tokens(calibration or subject.texts, tokenizer, how.n_tokens), tokenizer)
        beside = () if has_experts(model) else CRITERIA[how.method]().sites(anatomy(model))
        sites = [how.site, *beside]
        longest = min(how.run_length or BATCH, BATCH)
        study.scans = scan(
            model, tokenizer, scanned, out=out / "scan", site=sites, run_length=how.run_length, dtype=how.dtype,
            batch_size=max(1, BATCH // longest) if how.run_length else 1,
        )  # fmt: skip

        tell("3/5 functional networks: group ICA")
        study.ica = GroupICA(
            how.n_components, random_state=how.random_state, device=str(input_device(model))
        ).fit(study.scans)  # fmt: skip
        study.networks = FunctionalNetworks.from_ica(study.ica, threshold=how.threshold)
        study.networks.save(out / "networks", overwrite=True)

        if limit is not None:  # what is left may be less than was thought
            left = limit - (time.monotonic() - began)
            fixed = [*options, "eval_tokens", "n_tokens"]
            try:
                how, more = subject.fit(how, max(left, 1.0), fixed, todo=("prune",))
            except InputError:
                tell(f"the budget has only {span(left)} left: it will not be kept")
                how, more = _cheapest(how, options), ["search of the widths", "own text"]
            for line in more:
                tell(f"given up for the budget: {line}")
            gave_up += more
            write_text(out / "config.toml", how.to_toml(**(source or {})))
        share = "what is to be forgotten" if how.ratio is None else f"{how.ratio:.0%} of the MLP neurons"
        share = share if how.expert_ratio is None else f"{how.expert_ratio:.0%} of the routed experts"
        tell(f"4/5 pruning: {share}, method {how.method}, compensation {how.compensate}")
        unseen = split_texts(subject.texts, tokenizer=tokenizer)[1] if sample.held_out.any() else []
        small, study.plan, predicted, own = _smaller(model, tokenizer, scanned, unseen, study, how, tell)
        if how.indices:
            study.plan.save(out / "plan.json")
        study.pruned = small, tokenizer
        tell("    perplexity of the smaller model, and its speed")
        after = window_losses(small, sample.windows)
        summary: dict[str, Any] = {
            "dense": dense,
            "pruned": _measured(small, sample, after),
            "networks": {
                "n_components": len(study.networks), "n_key_neurons": int(study.networks.masks.any(axis=0).sum())
            },
            "held_out": _held_out(sample, before, after),
            "cut": _done(small, own),
            "sample": {"windows": kept, "window": sampled, "share_of_text": sample.share},
            "seconds": round(time.monotonic() - began, 1),
            "gave_up": gave_up,
            "provenance": record,
        }  # fmt: skip
        if predicted is not None:
            tell("    forecast of the loss, beside what was lost")
            predicted = predicted.measure(model, small)
            summary["forecast_on"] = "calibration" if predicted.fitted else "held_out"
            summary["forecast"] = _records(predicted.agreement())
            summary["forecast_by_function"] = _records(forecast_table(predicted))
        found = extras(study, model) if extras else {}
        forgetting = getattr(small, RECORD, [{}])[-1].get("forgetting")
        if forgetting:
            summary["forgetting"] = forgetting
        in_report = {"forecast": predicted, "forgetting": forgetting, **found.pop("report", {})}
        study.summary = {**summary, **found}

        tell("5/5 report")
        report(study, **in_report).save(out / "report.html")
        write_json(out / "summary.json", study.summary, default=plain)
    return study


def _smaller(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], unseen: Sequence[str], study: Study,
    how: Settings, tell: Say,
) -> tuple[nn.Module, PruningPlan | ExpertPlan, Predicted | None, int]:  # fmt: skip
    """The smaller model, saved, its plan, what that was going to cost, where a forecast can say it, and how many
    windows of its calibration text the model wrote itself."""
    out = study.folder / (PRUNED_GGUF if how.format == "gguf" else "pruned")
    if how.expert_ratio is not None:
        made = cut_fewer(
            model, tokenizer, texts, out=out, study=study, compensate=how.compensate, format=how.format,
            gguf_type=how.gguf_type, like=how.like, overwrite=True, expert_ratio=how.expert_ratio, method=how.method,
            allocation=how.allocation, random_state=how.random_state,
        )  # fmt: skip
        return *made, None, 0
    evidence = evidence_of(
        model, tokenizer, texts, study=study, method=how.method, self_text=how.own_text,
        random_state=how.random_state, progress=tell,
    )  # fmt: skip
    more: dict[str, Any] = {"last": True} if how.last else {}
    plan = make_plan(
        model, tokenizer, evidence=evidence, format=how.format,
        ratio=how.ratio, method=how.method, allocation=how.allocation, multiple_of=how.multiple_of,
        protect=how.protect, head_ratio=how.head_ratio, drop=how.drop or (), passes=how.passes,
        token_balance=how.token_balance, keep=how.keep, forget=how.forget, random_state=how.random_state, progress=tell,
        **more,
    )  # fmt: skip
    why_not, predicted = no_forecast(model, plan, evidence.scans, how.compensate), None
    if why_not is None:
        other = unseen_scans(model, tokenizer, unseen, study.scans, how.run_length)
        predicted = forecast_of(model, plan, evidence.networks, evidence.scans, how.compensate, unseen=other)
    for line in _foretold(predicted, why_not):
        tell(f"    {line}")
    small, _ = cut(
        model, tokenizer, evidence=evidence, plan=plan, out=out, compensate=how.compensate, format=how.format,
        gguf_type=how.gguf_type, like=how.like, random_state=how.random_state, report=False, overwrite=True,
        indices=how.indices, propagation=how.propagation, progress=tell,
    )  # fmt: skip
    return small, plan, predicted, evidence.own


def _foretold(predicted: Predicted | None, why_not: str | None) -> list[str]:
    """What a cut is going to cost, in few lines: on average, and where most."""
    if predicted is None:
        return [f"no forecast: {why_not}"]
    rows = forecast_table(predicted)
    what, every = rows.columns[0], rows.iloc[-1]
    most = rows.iloc[:-1].sort_values("predicted", ascending=False, kind="stable").head(3)
    parts = ", ".join(f"{name} {value:.3g}" for name, value in zip(most[what], most["predicted"]))
    where = "" if predicted.fitted else " on the held-out text"
    most_in = f"; the most in {parts}" if len(rows) > 2 else ""
    return [f"forecast: {every['predicted']:.3g} nats a token more{where}{most_in}"]


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON values."""
    values = table.astype(object)
    rows = values.where(values.notna(), None).to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]


def _same_as_before(out: Path, mark: dict[str, Any]) -> Settings | None:
    """Settings that the same call chose when it began; None where there was none."""
    there = (out / "study.json", out / "config.toml")
    if mark["budget"] is None or not all(path.is_file() for path in there):
        return None
    same = read_json(there[0]) == {k: list(v) if isinstance(v, tuple) else v for k, v in mark.items()}
    return Settings.from_toml(there[1]) if same else None


def _cheapest(how: Settings, options: dict[str, Any]) -> Settings:
    """Without a search, and without text of the model's own, where none was asked for."""
    how = how if "self_text" in options else replace(how, self_text=0)
    return how if "allocation" in options or "passes" in options else replace(how, allocation="uniform")


def _measured(model: nn.Module, sample: Sample, losses: Array) -> dict[str, float | None]:
    """Perplexity, size and speed of a model, as the summary keeps them."""
    perplexity, error = sample.perplexity(losses)
    return {
        "perplexity": perplexity,
        "perplexity_se": None if math.isnan(error) else error,
        "parameters": sum(p.numel() for p in model.parameters()),
        "mlp_neurons": sum(widths_of(model)),
        "tokens_per_second": throughput(model, **SPEED),
    }


def _done(small: nn.Module, own: int) -> dict[str, Any]:
    """How the smaller model was repaired, and on how many windows, some of its own."""
    record: dict[str, Any] = getattr(small, RECORD, [{}])[-1]
    shape = (record.get("calibration") or {}).get("shape")
    text = None if shape is None else {"windows": shape[0], "window": shape[1], "own_windows": own}
    return {"compensate": record.get("compensate"), "propagation": record.get("propagation"), "calibration": text}


def _held_out(sample: Sample, before: Array, after: Array) -> dict[str, Any]:
    """Perplexities of the part that nothing was fitted to, and what was lost there; or why there is none."""
    n = int(sample.held_out.sum())
    window = sample.windows.shape[1]
    if not n:
        return {"not_measured": f"the held-out part is shorter than one window of {window} tokens"}
    found: dict[str, Any] = {"windows": n, "tokens": n * window}
    for name, losses in (("dense", before), ("pruned", after)):
        found[f"{name}_perplexity"], found[f"{name}_perplexity_se"] = sample.perplexity(losses, held_out=True)
    found["loss_added"], found["loss_added_se"] = sample.estimate(after - before, held_out=True)
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in found.items()}
