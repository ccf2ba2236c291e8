"""A model and people who heard the same story, compared into a folder: what ``llmbrain compare`` does."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from llmbrain._files import write_figure, write_image
from llmbrain._progress import Say, speaker
from llmbrain.brains import FMRI, load_fmri, load_words
from llmbrain.brains.finding import join_words
from llmbrain.brains.series import check_tr
from llmbrain.brains.tables import load_controls
from llmbrain.checkpoints import load_model
from llmbrain.comparison import Comparison
from llmbrain.comparison import compare as compare_brains
from llmbrain.comparison.sources import KEPT, expected_volumes
from llmbrain.datasets.demo import demo_folder
from llmbrain.hooks.text import window_length
from llmbrain.reporting import comparison_figures, comparison_report
from llmbrain.scanning import Scan
from llmbrain.study.cost import BATCH, FIXED, Cost, Part, Subject, measured_batch, memory_of, told
from llmbrain.study.folder import Study, claim, provenance
from llmbrain.study.sample import count_tokens

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from llmbrain.decomposition import GroupICA
    from llmbrain.networks import FunctionalNetworks

    Source: TypeAlias = Study | Scan | Sequence[Scan] | tuple[nn.Module, PreTrainedTokenizerBase] | str | Path


def compare(
    scan_or_model: Source,
    fmri: FMRI | str | Path,
    words: pd.DataFrame | str | Path,
    *,
    out: str | Path | None = None,
    tr: float | None = None,
    offset: float = 0.0,
    networks: FunctionalNetworks | GroupICA | Study | str | Path | None = None,
    controls: Mapping[str, Any] | Sequence[str] | None = None,
    reading: Mapping[str, Any] | None = None,
    device: str = "auto",
    overwrite: bool = False,
    progress: bool | Say = True,
    **options: Any,
) -> Comparison:
    """Compare networks of a model with fMRI of people who heard the same words.

    Parameters
    ----------
    scan_or_model : Study, Scan, list of Scan, (model, tokenizer), or path of a model, a scan or a study
        "demo" is the demo brain.
    fmri : FMRI or path
        A file or a folder of subjects; see `load_fmri`.
    words : DataFrame or path
        See `load_words`.
    out : path, optional
        Folder for tables, figures and a report.
    tr, offset : float
        Seconds a volume (a NIfTI may say it itself); stimulus time of the first volume.
    networks : FunctionalNetworks, GroupICA, Study, or path of networks or a study, optional
        Default: found in this story.
    controls : mapping of name to array ``(n_volumes,)``, or list of files, optional
        Series at the volumes; of files (``name=FILE`` too) see `llmbrain.brains.tables.load_controls`.
    reading : mapping, optional
        How files are read: options of `load_fmri` (``atlas``, ``pattern``, ``rois``, ...), and ``columns`` and
        ``tier`` of `load_words`.
    device : str
        Where a model that is given as a path goes.
    overwrite : bool
        Write over another comparison in `out`.
    **options
        As for `llmbrain.comparison.compare`: ``text``, ``n_components``, ``rule``, ``hrf``, ``null``, ...
    progress : bool or callable
        Say what is done, on stderr or to a function of a line.

    Returns
    -------
    Comparison

    Raises
    ------
    InputError
        If the input cannot be used, or `out` holds another comparison.
    """
    tell, reading = speaker(progress), dict(reading or {})
    asked = {"tr": tr, "offset": offset, "networks": networks, "controls": controls, **reading, **options}
    settings = {"fmri": _plain(fmri), "words": _plain(words), **{k: _plain(v) for k, v in asked.items()}}
    if tr is not None:
        check_tr(tr)
    with _noted() as said, ExitStack() as held:
        columns, tier = reading.pop("columns", None), reading.pop("tier", None)
        table = load_words(words, columns=columns, tier=tier) if isinstance(words, (str, os.PathLike)) else words
        brain = fmri
        if not isinstance(brain, FMRI):
            brain = load_fmri(brain, tr=tr, expected=expected_volumes(table, tr, offset), **reading)
        check_tr(brain.tr)
        if controls is not None and not isinstance(controls, Mapping):
            controls = load_controls(controls, brain.n_volumes)
        source, name = _opened(scan_or_model)
        if isinstance(networks, Study) or (isinstance(networks, (str, os.PathLike)) and Path(networks).is_dir()):
            networks = (networks if isinstance(networks, Study) else Study(networks)).networks
        if out is not None:
            held.enter_context(claim(out, {"model": name, **settings}, overwrite=overwrite))
        if isinstance(source, (str, os.PathLike)):
            source = load_model(os.fspath(source), device=device)
        if isinstance(source, tuple) and len(source) == 2 and not isinstance(source[0], Scan):
            how = {k: options[k] for k in ("n_components", "untrained", "run_length") if k in options}
            told(compare_cost(*source, table, options.get("text"), given=networks is not None, **how), tell)
        result = compare_brains(
            source, brain, table, tr=tr, offset=offset, networks=networks, controls=controls, progress=tell, **options
        )
        if out is None:
            return result
        result.report["model"], folder = name, Path(out)
        result.save(folder)
        tell("figures and report")
        masker = brain.masker if result.brain is None else result.brain.masker
        figures = comparison_figures(result, masker)
        for key, (figure, _) in figures.items():
            write_figure(folder / f"figure-{key}.png", figure, dpi=150)
        if masker is not None:
            filled = np.nan_to_num(result.coupling.r).astype(np.float32)
            write_image(folder / "coupling.nii.gz", masker.inverse_transform(filled))
    text = options.get("text") or " ".join(table["word"])
    people = Path(fmri).name if isinstance(fmri, (str, os.PathLike)) else f"{len(brain.subjects)} people"
    page = comparison_report(
        result, title=f"llmbrain compare: {Path(name).name} and {people}", figures=figures,
        warnings=[line for line in said if not _repeats(line)], provenance=provenance(name, [text], **settings),
    )  # fmt: skip
    page.save(folder / "report.html")
    return result


def compare_cost(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, words: pd.DataFrame, text: str | None = None, *,
    n_components: int | float | str = 20, given: bool = False, untrained: bool = False, run_length: int | None = 2048,
) -> Cost:  # fmt: skip
    """What the model's side of `compare` will take; one batch is read.

    Parameters
    ----------
    given : bool
        Whether networks are given, and need not be found.
    """
    subject, story = Subject.of(model), join_words(words["word"]) if text is None else text
    n, times = count_tokens(tokenizer, [story]), 2 if untrained else 1
    length = min(run_length or n, n)
    window = max(2, min(512, window_length(model), n))
    k = n_components if isinstance(n_components, int) else 32
    ica = 0.0 if given else subject.ica_work(n, length, k)
    kept = n * subject.n_neurons * 4
    often = (
        1.0 if kept <= KEPT else 2.0 if given else 4.0 + n / (2 * length)
    ) * times  # what is not kept is read again
    memory = memory_of(subject, BATCH, length, 0, copies=times) + kept + min(kept, KEPT)
    parts = (Part("the story", often, n), Part("networks", 0.0, n, ica * times))
    return Cost(parts, 0, memory, subject.token_work(window), FIXED, measured_batch(model, tokenizer, [story], window))


def compare_dry(
    source: str | Path, words: str | Path, *, columns: Mapping[str, str | int] | None = None, tier: str | None = None,
    text: str | None = None, networks: Any = None, device: str = "auto", **options: Any,
) -> Cost | None:  # fmt: skip
    """`compare_cost` of a model and words that are files; None where the story was scanned before."""
    table = load_words(words, columns=columns, tier=tier)
    opened, _ = _opened(source)
    if not isinstance(opened, str):
        return None
    model, tokenizer = load_model(opened, device=device)
    return compare_cost(model, tokenizer, table, text, given=networks is not None, **options)


def _opened(source: Source) -> tuple[Any, str]:
    """Scans where it is a study, else what it is; and what it is called."""
    if source == "demo" and not Path(source).exists():
        return os.fspath(demo_folder()), "demo"
    if isinstance(source, (str, os.PathLike)):
        is_study = Path(source).is_dir() and Study(source).has("scans")
        return (Study(source).scans if is_study else source), os.fspath(source)
    if isinstance(source, Study):
        return source.scans, str(source.folder)
    first = source[0] if isinstance(source, (list, tuple)) and source else source
    config = getattr(first, "config", None)
    return source, str(getattr(first, "model_id", None) or getattr(config, "_name_or_path", None) or "model")


def _plain(value: Any) -> Any:
    """What a setting is recorded as: paths as text, objects by their kind."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value if value is None or isinstance(value, (str, int, float, bool)) else type(value).__name__


@contextmanager
def _noted() -> Iterator[list[str]]:
    """Warnings are said as they come, and kept for the report."""
    said: list[str] = []
    with warnings.catch_warnings():
        before = warnings.showwarning

        def note(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, (UserWarning, RuntimeWarning)):
                said.append(" ".join(str(message).split()))
            before(message, category, *place, **more)

        warnings.showwarning = note
        yield said


def _repeats(line: str) -> bool:
    """Whether the comparison's own cautions say it too."""
    return "is left out: " in line or "series are constant and become NaN" in line
