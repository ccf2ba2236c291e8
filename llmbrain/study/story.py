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
from llmbrain.brains.series import check_tr
from llmbrain.brains.tables import load_controls
from llmbrain.checkpoints import load_model
from llmbrain.comparison import Comparison
from llmbrain.comparison import compare as compare_brains
from llmbrain.comparison.sources import expected_volumes
from llmbrain.datasets.demo import demo_folder
from llmbrain.reporting import comparison_figures, comparison_report
from llmbrain.study.folder import Study, claim, provenance

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from llmbrain.decomposition import GroupICA
    from llmbrain.networks import FunctionalNetworks
    from llmbrain.scanning import Scan

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
