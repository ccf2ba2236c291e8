"""The paired phantom: a model and a brain of which it is known what they share."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.signal import lfilter

from llmbrain._validation import check_range, check_whole
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.brains.alignment import word_regressor
from llmbrain.brains.fmri import FMRI
from llmbrain.brains.series import standardize
from llmbrain.scanning import Scan
from llmbrain.scanning.scans import ArraySignals

Array = NDArray[np.float64]
WORDS_PER_SECOND = 3.0


@dataclass(frozen=True)
class PairedPhantom:
    """A scan of a model and fMRI of people who "heard" the same words.

    Attributes
    ----------
    scan : Scan
        One token a word; ``time_courses @ maps + noise``.
    time_courses : array ``(n_tokens, n_networks)``
    words : DataFrame
        ``word``, ``onset``, ``offset`` in seconds; the first volume is at 0.
    fmri : FMRI
        Region i < `n_pairs` follows network i.
    tr : float
    pairs : list of (network, region, sign)
        What is coupled.
    """

    scan: Scan
    time_courses: Array
    words: pd.DataFrame
    fmri: FMRI
    tr: float
    pairs: list[tuple[int, int, int]]


def ar_noise(rng: np.random.Generator, shape: tuple[int, ...], ar: float) -> Array:
    """Gaussian AR(1) series along the second last axis, unit variance from the first volume on."""
    white = rng.normal(size=shape)
    white[..., 0, :] /= np.sqrt(1 - ar**2)
    return lfilter([np.sqrt(1 - ar**2)], [1, -ar], white, axis=-2)


def make_paired_phantom(
    *,
    n_networks: int = 8,
    n_regions: int = 6,
    n_pairs: int = 0,
    snr: float = 1.0,
    n_subjects: int = 1,
    n_volumes: int = 360,
    tr: float = 2.0,
    ar: float = 0.9,
    timing_error: float = 0.0,
    n_neurons: int = 240,
    random_state: int | None = 0,
) -> PairedPhantom:
    """Make a model and a brain that share `n_pairs` time courses, through the HRF.

    Parameters
    ----------
    n_pairs : int
        Region i is network i after the HRF, with alternating sign, plus noise; 0: nothing is shared.
    snr : float
        SD of the shared part over SD of the noise, in one subject.
    ar : float
        Autocorrelation of the noise from volume to volume, and of the networks over the time of one volume.
    timing_error : float
        Seconds by which the brain is later than the words say.
    random_state : int, Generator or None
        What is drawn starts from it; None draws anew.
    """
    check_whole("n_pairs", n_pairs, 0, min(n_networks, n_regions))
    check_range("ar", ar, 0, 1, open_high=True)
    rng = np.random.default_rng(random_state)
    duration = n_volumes * tr
    gaps = rng.gamma(4.0, 1 / (4 * WORDS_PER_SECOND), size=int(duration * WORDS_PER_SECOND))
    offsets = np.cumsum(gaps)
    offsets = offsets[offsets < duration]
    n_words = len(offsets)
    names = ["".join(rng.choice(list("bdfgklmnprst"), 2)) + rng.choice(list("aeiou")) + str(i) for i in range(n_words)]
    words = pd.DataFrame({"word": names, "onset": np.concatenate([[0.0], offsets[:-1]]), "offset": offsets})

    courses = ar_noise(rng, (n_words, n_networks), ar ** (1 / (tr * WORDS_PER_SECOND)))
    maps = rng.normal(size=(n_networks, n_neurons)) * (rng.random((n_networks, n_neurons)) < 0.1)
    data = courses @ maps + 0.5 * rng.normal(size=(n_words, n_neurons))
    ends = np.cumsum([len(name) + 1 for name in names])
    spans = np.column_stack([np.concatenate([[0], ends[:-1]]), ends - 1])
    scan = Scan(
        {"neuron": ArraySignals(data.astype(np.float32), NeuronSpace([n_neurons]))},
        text=" ".join(names), tokens=names, offsets=spans, model_id="paired phantom",
    )  # fmt: skip

    response = standardize(word_regressor(words, tr, n_volumes, values=courses, offset=-timing_error))
    brain = ar_noise(rng, (n_subjects, n_volumes, n_regions), ar)
    pairs = [(i, i, -1 if i % 2 else 1) for i in range(n_pairs)]
    for network, region, sign in pairs:
        brain[:, :, region] += sign * snr * response[:, network]
    fmri = FMRI(brain, [f"sub-{i:02d}" for i in range(n_subjects)], [f"region{i}" for i in range(n_regions)], tr=tr)
    return PairedPhantom(scan, courses, words, fmri, tr, pairs)
