"""Alice: 27 people listening to a story, for those who have a network. Nothing of it ships with llmbrain."""

from __future__ import annotations

import hashlib
import os
import urllib.request
import warnings
from pathlib import Path
from typing import Any

from llmbrain._files import write_bytes
from llmbrain._validation import InputError
from llmbrain.datasets.alice_sums import SHA256

REGIONS = ("LATL", "RATL", "LPTL", "LIPL", "LPreM", "LIFG")
TR = 2.0
OFFSET = 20.0  # stimulus time of the first volume: the sound begins with 20 s of silence
_TIMECOURSES = (
    "https://raw.githubusercontent.com/daandouwe/Thesis/ec54039b6ac5ad7bf8c81b91768108e5be5c1ce0/"
    "brain-data/syntax-in-rnng/"
)
_ANNOTATIONS = (
    "https://raw.githubusercontent.com/OpenNeuroDatasets/ds002322/5642f45d9c1997f9fe825f698b6f20fa94e6df29/code/"
)


def fetch_alice(folder: str | Path | None = None, *, download: bool = True) -> dict[str, Any]:
    """Fetch the listeners' time courses, the timed words and the authors' predictors.

    Chapter 1 of Alice in Wonderland, heard in 12 minutes; six language regions; TR 2 s; sample k lies at audio time
    ``20 + 2 k`` s. CC BY 4.0 (annotations CC0). Please cite Brennan et al. 2016 (Brain & Language 157-158) and, for the
    annotations, Bhattasali et al. 2020 (LREC).

    Parameters
    ----------
    folder : path, optional
        Where the files are or shall be; default ``~/.cache/llmbrain/alice`` (or below ``$LLMBRAIN_CACHE``).
    download : bool
        False: only use what is there.

    Returns
    -------
    dict
        ``fmri`` (folder of one text file a subject, 10 mm regions), ``words`` (TextGrid), ``annotations`` (table with
        frequencies), ``word_rate``, ``sound_power`` (authors' regressors), ``regions``, ``tr``, ``offset``.

    Raises
    ------
    InputError
        If a file differs from its checksum.
    FileNotFoundError
        If a file is missing and `download` is False.
    """
    cache = Path(os.environ.get("LLMBRAIN_CACHE", Path.home() / ".cache" / "llmbrain"))
    root = Path(folder) if folder is not None else cache / "alice"
    missing = [name for name in SHA256 if not (root / name).is_file()]
    if missing and not download:
        raise FileNotFoundError(f"{len(missing)} files of Alice are missing in {root} (first: {missing[0]})")
    if missing:
        warnings.warn(f"downloading {len(missing)} small files of Alice to {root}", stacklevel=2)
    for name in missing:
        _download(name, root / name, SHA256[name])
    for name, expected in SHA256.items():
        if _sha256((root / name).read_bytes()) != expected:
            raise InputError(f"{root / name} is not the published file (SHA-256 differs): remove it and fetch again")
    data = root / "alice_data_shared"
    return {
        "fmri": data / "10mm", "words": next((root / "alice_stim_shared").glob("*.TextGrid")),
        "annotations": root / "ds002322_annotations.tsv", "word_rate": data / "s18-rate.txt",
        "sound_power": data / "s18-sndpwr.txt", "regions": list(REGIONS), "tr": TR, "offset": OFFSET,
    }  # fmt: skip


def _url(name: str) -> str:
    return _ANNOTATIONS + "annotations.tsv" if name == "ds002322_annotations.tsv" else _TIMECOURSES + name


def _download(name: str, target: Path, expected: str) -> None:
    with urllib.request.urlopen(_url(name), timeout=60) as answer:  # https address fixed above
        content = answer.read()
    if _sha256(content) != expected:
        raise InputError(f"{_url(name)} is not the published file (SHA-256 differs): nothing was written")
    write_bytes(target, content)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
