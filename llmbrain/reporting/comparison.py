"""The report of a comparison with brains: findings first, then every table and figure, methods, warnings, origin."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from llmbrain.page.report import Report, Section, figure, render, table
from llmbrain.reporting.contents import Contents
from llmbrain.reporting.methods import REFERENCES as COMMON
from llmbrain.reporting.sections import fill, provenance_section, warnings_section

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from llmbrain.comparison.result import Comparison
    from llmbrain.plotting.what import Masker

SHOWN_PAIRS, SHOWN_REGIONS = 30, 80  # rows and columns that a page can be read with; the files hold all
REFERENCES = {
    "group-ica": COMMON["group-ica"],
    "fdr": COMMON["fdr"],
    "spm": (
        "Friston KJ, Fletcher P, Josephs O, Holmes A, Rugg MD, Turner R (1998). Event-related fMRI: characterizing "
        "differential responses. NeuroImage 7(1): 30-40."
    ),
    "glover": (
        "Glover GH (1999). Deconvolution of impulse response in event-related BOLD fMRI. NeuroImage 9(4): 416-429."
    ),
    "max": (
        "Nichols TE, Holmes AP (2002). Nonparametric permutation tests for functional neuroimaging: a primer with "
        "examples. Human Brain Mapping 15(1): 1-25."
    ),
    "plus-one": (
        "Phipson B, Smyth GK (2010). Permutation P-values should never be zero: calculating exact P-values when "
        "permutations are randomly drawn. Statistical Applications in Genetics and Molecular Biology 9(1): 39."
    ),
    "phase": (
        "Prichard D, Theiler J (1994). Generating surrogate data for time series with several simultaneously measured "
        "variables. Physical Review Letters 73(7): 951-954."
    ),
    "isc": (
        "Nastase SA, Gazzola V, Hasson U, Keysers C (2019). Measuring shared responses across subjects using "
        "intersubject correlation. Social Cognitive and Affective Neuroscience 14(6): 667-685."
    ),
    "banded": (
        "Dupré la Tour T, Eickenberg M, Nunez-Elizalde AO, Gallant JL (2022). Feature-space selection with banded "
        "ridge regression. NeuroImage 264: 119728."
    ),
    "freedman": (
        "Freedman D, Lane D (1983). A nonstochastic interpretation of reported significance levels. Journal of "
        "Business & Economic Statistics 1(4): 292-298."
    ),
    "cka": (
        "Kornblith S, Norouzi M, Lee H, Hinton G (2019). Similarity of neural network representations revisited. "
        "ICML, PMLR 97: 3519-3529."
    ),
}


def comparison_figures(result: Comparison, masker: Masker | None = None) -> dict[str, tuple[Figure, str]]:
    """Figures of a `Comparison`, by name, each with its caption.

    Parameters
    ----------
    result : Comparison
    masker : fitted nilearn masker, optional
        Of the fMRI; makes brain maps.
    """
    from llmbrain import plotting

    coupling, alpha = result.coupling, result.coupling.alpha
    strongest = np.abs(np.nan_to_num(coupling.r))
    shown = np.sort(np.argsort(-strongest.max(axis=0), kind="stable")[:SHOWN_REGIONS])
    part = "" if len(shown) == len(coupling.regions) else f" The {len(shown)} regions that couple most."
    test = (
        f"{coupling.null} null, {coupling.n_permutations} draws, p at most {alpha:g} corrected ({coupling.correction})"
    )
    figures = {
        "coupling": (
            plotting.plot_coupling(
                coupling.r[:, shown], significant=coupling.significant[:, shown], rows=coupling.networks,
                columns=[coupling.regions[i] for i in shown],
            ),
            f"Correlation of each network with each region beyond the controls. Stars: {test}.{part}",
        ),
        "controls": (
            plotting.plot_coupling(
                result.controls.r[:, shown], significant=result.controls.significant[:, shown],
                rows=result.controls.networks, columns=[coupling.regions[i] for i in shown],
            ),
            f"The same of the controls themselves.{part}",
        ),
        "lags": (_lags(result.controls, coupling, result.report["settings"]["tr"]), "Correlation when the brain is "
                 "read earlier (left) or later (right): word rate with the regions it follows most, then the strongest "
                 "pairs of networks. Shaded: what the largest of all pairs stays below in 95% of the null draws, at "
                 "lag 0. A word rate that peaks away from 0 says that the times are wrong."),
    }  # fmt: skip
    if coupling.ceilings is not None:
        figures["ceilings"] = (
            plotting.plot_ceilings(coupling.ceilings.iloc[shown], r=strongest.max(axis=0)[shown]),
            f"How much of each region other listeners predict, and how much a network does.{part}",
        )
    if masker is not None:
        best = strongest.argmax(axis=0)
        largest = np.take_along_axis(coupling.r, best[None], axis=0)[0]
        k = int(strongest.max(axis=1).argmax())
        rate = result.controls.r[result.controls.networks.index("word rate")] if "word rate" in (
            result.controls.networks) else result.controls.r[0]  # fmt: skip
        for name, values, caption in (
            ("brain-best", largest, "Largest correlation of any network in each region, beyond the controls."),
            ("brain-network", coupling.r[k], f"Correlation of {coupling.networks[k]}, which couples most."),
            ("brain-word-rate", rate, "Control: correlation of the word rate."),
        ):
            figures[name] = plotting.plot_brain_map(values, masker), caption
    return figures


def _lags(controls: Any, coupling: Any, tr: float) -> Any:
    """Lag profiles of the word rate and of the strongest pairs."""
    from llmbrain import plotting

    series, names = [], []
    for source, rows, count in ((controls, [0], 2), (coupling, range(len(coupling.networks)), 3)):
        size = np.abs(np.nan_to_num(source.r[list(rows)]))
        for i in np.argsort(-size, axis=None, kind="stable")[:count]:
            k, r = np.unravel_index(i, size.shape)
            series.append(source.lag_r[:, k, r])
            names.append(f"{source.networks[k]}, {source.regions[r]}")
    return plotting.plot_lag_profile(
        coupling.lags, np.stack(series, axis=1), names=names, threshold=coupling.threshold, tr=tr
    )


def comparison_report(
    result: Comparison,
    *,
    title: str = "Comparison with brains",
    masker: Masker | None = None,
    figures: dict[str, tuple[Figure, str]] | None = None,
    warnings: Sequence[str | Warning] = (),
    provenance: Mapping[str, object] | None = None,
) -> Report:
    """One self-contained page of a `Comparison`.

    Parameters
    ----------
    result : Comparison
    masker : fitted nilearn masker, optional
    figures : dict, optional
        From `comparison_figures`, where they were made before.
    warnings : sequence of str or warnings
        What was said on the way, after `result.report["cautions"]`.
    provenance : mapping, optional

    Returns
    -------
    Report
    """
    drawn = comparison_figures(result, masker) if figures is None else figures
    facts, tables = result.report, result.tables
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    report = Report(title, subtitle=f"{facts['model']} · {made}")
    cautions = [*facts["cautions"], *(str(getattr(w, "message", w)) for w in warnings)]
    report.add(_summary(result, len(cautions)))
    pairs = [figure(*drawn[name]) for name in ("coupling", "lags")]
    report.add(_section("Coupling", pairs, [
        _top(tables["coupling"], "Network and region, beyond the controls, strongest first"),
        table(tables["matches"].head(SHOWN_PAIRS), "One network a region (Hungarian matching)"),
    ]))  # fmt: skip
    maps = [figure(*drawn[name]) for name in drawn if name.startswith("brain-")]
    where = table(tables["regions"].head(SHOWN_REGIONS), "Centers of the regions") if "regions" in tables else None
    if maps or where is not None:
        report.add(_section("Brain maps", maps, [] if where is None else [where]))
    report.add(_section("Controls", [figure(*drawn["controls"])], [
        _top(tables["controls"], "Controls with the regions (a working pipeline shows the word rate here)"),
        _top(tables["mirrored"], "The word rate of the story mirrored in time: should couple with nothing"),
    ]))  # fmt: skip
    if "ceilings" in tables:
        numbers = table(tables["ceilings"].head(SHOWN_REGIONS), "Noise ceilings")
        report.add(_section("Noise ceilings", [figure(*drawn["ceilings"])], [numbers]))
    captions = {
        "encoding": "Held-out prediction: controls and networks; gain is what the networks add",
        "encoding_beyond_untrained": "The same with the networks of the untrained copy as a band of its own",
        "coupling_beyond_untrained": "Coupling with the untrained copy's networks among the controls",
        "similarity": "Similarity of the two spaces (debiased CKA)",
        "summary": "Trained and untrained weights side by side",
    }
    more = [_top(tables[name], caption) for name, caption in captions.items() if name in tables]
    report.add(_section("Encoding, similarity, untrained copy", [], more))
    paragraphs, references = _methods(result)
    report.add(Section("Methods", fill("methods.html.j2", paragraphs=paragraphs, references=references), id="methods"))
    held = Contents(title, warnings=cautions, provenance=provenance)
    return report.add(warnings_section(held)).add(provenance_section(held))


def _section(title: str, figures: list[Any], tables: list[Any]) -> Section:
    body = Markup('<div class="side">{}</div>').format(render(figures)) if figures else Markup("")
    return Section(title, body + Markup(render(tables)))


def _top(frame: pd.DataFrame, caption: str) -> Markup:
    cut = f" (the first {SHOWN_PAIRS} of {len(frame):,}; all are in the file)" if len(frame) > SHOWN_PAIRS else ""
    return table(frame.head(SHOWN_PAIRS), caption + cut)


def _summary(result: Any, n_warnings: int) -> Section:
    facts, coupling = result.report, result.coupling
    n_pairs = int(coupling.significant.sum())
    cards = [
        {"label": "Pairs beyond the controls", "value": f"{n_pairs} of {coupling.r.size:,}",
         "detail": f"|r| beyond {coupling.threshold:.3f}", "hint": f"{coupling.n_permutations} null draws, corrected"},
        {"label": "Largest |r|", "value": f"{np.nanmax(np.abs(coupling.r)):.3f}",
         "detail": f"corrected p {np.nanmin(coupling.p_corrected):.3f}", "hint": ""},
        {"label": "Brain", "value": f"{facts['n_subjects']} listeners", "detail":
         f"{facts['n_volumes']} volumes, {facts['n_regions']} regions", "hint": f"{len(facts['excluded'])} left out"},
        {"label": "Model", "value": f"{facts['n_networks']} networks", "detail": f"{facts['n_tokens']:,} tokens",
         "hint": f"{facts['words']['used']} of {facts['words']['n_words']} words used"},
    ]  # fmt: skip
    return Section("Summary", fill("comparison.html.j2", cards=cards, lines=result.findings(), warnings=n_warnings))


def _methods(result: Any) -> tuple[list[str], list[str]]:
    facts, coupling, used = result.report, result.coupling, dict.fromkeys(["group-ica"])
    settings = facts["settings"]

    def cite(key: str, short: str) -> str:
        used[key] = None
        return short

    if settings["hrf"] == "glover":
        response = cite("glover", "Glover 1999")
    else:
        response = f"SPM's double gamma, {cite('spm', 'Friston et al. 1998')}"
    cut = "only the mean was removed"
    if settings["high_pass"] is not None:
        cut = f"both sides were high-pass filtered by regression on discrete cosines ({settings['high_pass']:g} s)"
    time = (
        f"The model {facts['model']} read the story ({facts['n_tokens']:,} tokens); time courses of "
        f"{facts['n_networks']} functional networks (group ICA, Calhoun et al. 2001) were averaged over the tokens of "
        f"each word ({settings['aggregate']}), placed at the word's {settings['rule']}, convolved with the "
        f"haemodynamic response ({response}) and sampled at {settings['n_volumes']} volumes (TR {settings['tr']:g} s, "
        f"first volume at {settings['offset']:g} s of the stimulus, {settings['drop']} dropped at the start); {cut}. "
        f"{facts['words']['used']} of {facts['words']['n_words']} words were used."
    )
    null = (
        "circular shifts of all networks together by at least 10 volumes"
        if coupling.null == "circular"
        else f"phase randomisation with the same phases for all networks ({cite('phase', 'Prichard and Theiler 1994')})"
    )
    if coupling.correction == "max":
        correction = f"the largest |r| of all pairs in each draw (family-wise error, {cite('max', 'Nichols 2002')})"
    else:
        correction = f"the false discovery rate ({cite('fdr', 'Benjamini and Hochberg 1995')})"
    tests = (
        f"Correlations with the mean of {facts['n_subjects']} standardised listeners are partial correlations after "
        f"{', '.join(facts['controls'])}. Null distributions came from {null} ({coupling.n_permutations} draws), "
        f"p = (b + 1) / (n + 1) ({cite('plus-one', 'Phipson and Smyth 2010')}), corrected by {correction}. What the "
        "controls leave of the series was moved, with the part that they take filled in under an AR(1) model, and "
        "cleaned of the controls again. No parametric p-value was used, since the series are autocorrelated."
    )
    paragraphs = [time, tests]
    if settings.get("isc") is not None:
        paragraphs.append(
            f"Regions were those whose leave-one-out intersubject correlation reached {settings['isc']:g} in one half "
            "of the listeners; they were compared in the other half."
        )
    if coupling.ceilings is not None:
        paragraphs.append(
            f"Noise ceilings are leave-one-out intersubject correlations ({cite('isc', 'Nastase et al. 2019')}) and "
            "the square root of the Spearman-Brown corrected split-half reliability of the group mean. P-values over "
            "subjects come from sign flips of Fisher z."
        )
    if result.encoding is not None:
        paragraphs.append(
            f"Encoding models are banded ridge regressions ({cite('banded', 'Dupré la Tour et al. 2022')}) of delayed "
            "controls and networks on contiguous blocks, with gaps of at least 16 s around each held-out block; the "
            "gain of a band is the held-out r lost without its share, tested by moving what the other bands do not "
            f"explain ({cite('freedman', 'Freedman and Lane 1983')}), {len(result.encoding.null_max)} draws. Intervals "
            "of the gain are bootstraps over listeners."
        )
    paragraphs.append(
        f"Similarity is debiased linear CKA ({cite('cka', 'Kornblith et al. 2019')}) without pairs of volumes nearer "
        "than 10 s."
    )
    return paragraphs, [REFERENCES[key] for key in used]
