"""Tests over time, for `calibration.py`: coupling, encoding, similarity, connectivity, the localizer."""

from __future__ import annotations

import numpy as np
import pandas as pd
from calibration_cases import register

from llmbrain.anatomy.space import NeuronSpace
from llmbrain.brains import prepare, word_regressor
from llmbrain.brains.series import standardize
from llmbrain.comparison import compare_similarity, couple, encode
from llmbrain.comparison.clock import Clock
from llmbrain.comparison.fingerprints import ModelNetworks, fingerprint
from llmbrain.comparison.sources import mirror
from llmbrain.datasets.fmri_phantom import ar_noise
from llmbrain.networks import FunctionalNetworks
from llmbrain.networks.connectivity import connectivity, dynamics_test, layer_flow
from llmbrain.networks.graphs import graph_measures
from llmbrain.networks.localizer import localizer
from llmbrain.reporting.effects import condition_effects
from llmbrain.scanning import Scan
from llmbrain.stats.nulls import sign_flip_test


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


# -- coupling ----------------------------------------------------------------------------------------------------------


@register("couple", "largest |r| of all pairs of networks and regions", T=(150, 300), AR=(0.6, 0.9),
          pairs=("1 x 1", "4 x 6"), null=("circular", "phase"))  # fmt: skip
def coupling(rng: np.random.Generator, T: int, AR: float, pairs: str, null: str) -> float:
    """Networks and regions that have nothing to do with each other."""
    k, r = map(int, pairs.split(" x "))
    found = couple(ar_noise(rng, (T, k), AR), ar_noise(rng, (T, r), AR), null=null, n_permutations=39, lags=[0],
                   random_state=_seed(rng))  # fmt: skip
    return float(np.nanmin(found.p_corrected))


@register("couple, many", "a parcellation and many networks", T=(300,), AR=(0.6,), pairs=("20 x 300",),
          null=("circular", "phase"))  # fmt: skip
def coupling_many(rng: np.random.Generator, T: int, AR: float, pairs: str, null: str) -> float:
    """The same with thousands of pairs."""
    return coupling(rng, T, AR, pairs, null)


@register("couple, other p", "false discovery rate over pairs; the matching as a whole", T=(300,), AR=(0.6,),
          p=("fdr", "match"))  # fmt: skip
def coupling_others(rng: np.random.Generator, T: int, AR: float, p: str) -> float:
    """The other p-values that it gives."""
    found = couple(ar_noise(rng, (T, 4), AR), ar_noise(rng, (T, 6), AR), null="phase", lags=[0],
                   correction="fdr" if p == "fdr" else "max", n_permutations=999 if p == "fdr" else 39,
                   random_state=_seed(rng))  # fmt: skip
    return found.match_p if p == "match" else float(np.nanmin(found.p_corrected))


@register(
    "couple, high-pass", "after a high-pass of 128 s at TR 2", T=(200,), AR=(0.6, 0.9), null=("circular", "phase")
)
def coupling_filtered(rng: np.random.Generator, T: int, AR: float, null: str) -> float:
    """The same after the filter that `compare` uses."""
    x, y = (prepare(ar_noise(rng, (T, n), AR), 2.0) for n in (4, 6))
    found = couple(x, y, null=null, n_permutations=39, lags=[0], random_state=_seed(rng))
    return float(np.nanmin(found.p_corrected))


@register("couple, nuisance", "regressors that both sides follow, smoother or rougher than the rest", T=(200,),
          AR=(0.6, 0.9), regressors=("2 smooth", "14 smooth", "14 white"))  # fmt: skip
def coupling_nuisance(rng: np.random.Generator, T: int, AR: float, regressors: str) -> float:
    """Both sides hold the nuisance, and nothing else in common."""
    count, kind = regressors.split()
    known = ar_noise(rng, (T, int(count)), 0.95 if kind == "smooth" else 0.0)
    x, y = (ar_noise(rng, (T, n), AR) + known @ rng.normal(size=(int(count), n)) for n in (2, 3))
    found = couple(x, y, nuisance=known, n_permutations=39, lags=[0], random_state=_seed(rng))
    return float(np.nanmin(found.p_corrected))


def _story(rng: np.random.Generator, first: float, last: float) -> pd.DataFrame:
    rows, at = [], first
    while at < last:
        for _ in range(rng.integers(5, 20)):
            rows.append(("word", at, at + rng.uniform(0.15, 0.5)))
            at = rows[-1][2]
        at += rng.gamma(2.0, 0.4)
    return pd.DataFrame(rows, columns=["word", "onset", "offset"])


@register("compare, word rate", "the mirrored story, in regions that answer to its beginning and end; 15 s before, "
          "45 s after it", brain=("noise", "on and off"), window=("stimulus", "all"))  # fmt: skip
def story_window(rng: np.random.Generator, brain: str, window: str) -> float:
    """The control test of `compare` with silence or music at the edges."""
    tr, n = 1.5, 300
    words = _story(rng, 15.0, 400.0)
    clock = Clock.of_story(words, window=window, tr=tr, n_volumes=n, offset=0.0, rule="offset", aggregate="mean",
                           hrf="spm", high_pass=128.0)  # fmt: skip
    y = ar_noise(rng, (n, 5), 0.6)
    if brain != "noise":
        at = np.arange(15.0, words["offset"].max(), 0.25)
        ticks = pd.DataFrame({"word": "x", "onset": at, "offset": at})
        y = y + standardize(word_regressor(ticks, tr, n))
    rate = clock.prepare(clock.rate(mirror(words, "offset")))
    found = couple(rate, clock.prepare(clock.cut(y)), n_permutations=39, lags=[0], random_state=_seed(rng))
    return float(np.nanmin(found.p_corrected))


@register("compare, isc", "regions with the highest ISC of 20, chosen and compared in the same or in other people; the "
          "listeners share a time course that the model does not know", people=("others", "the same"))  # fmt: skip
def chosen_regions(rng: np.random.Generator, people: str) -> float:
    """The choice of regions must not be made with the noise that is tested."""
    from llmbrain.comparison.ceilings import isc_split

    brain = ar_noise(rng, (8, 200, 20), 0.5)
    brain[..., :5] += 0.7 * ar_noise(rng, (200, 5), 0.5)
    keep, rest = isc_split(brain, 0.15)
    tested = brain[rest] if people == "others" else brain
    if not keep.any():
        return 1.0
    found = couple(
        ar_noise(rng, (200, 3), 0.5), tested[..., keep], n_permutations=39, lags=[0], random_state=_seed(rng)
    )
    return float(np.nanmin(found.p_corrected))


@register("sign_flip_test", "largest of all pairs over subjects; of couple, p_subjects", subjects=(6, 12, 30),
          pairs=(1, 24))  # fmt: skip
def subjects(rng: np.random.Generator, subjects: int, pairs: int) -> float:
    """Correlations of subjects around zero."""
    r = np.tanh(rng.normal(0, 0.2, (subjects, pairs)))
    return float(sign_flip_test(r, n_permutations=99, random_state=_seed(rng))[1].min())


# -- encoding and similarity -------------------------------------------------------------------------------------------


@register("encode, r", "smallest corrected p of all targets", T=(200,), AR=(0.6, 0.8), targets=(1, 6))
def encoding(rng: np.random.Generator, T: int, AR: float, targets: int) -> float:
    """Features that say nothing about the brain."""
    found = encode(ar_noise(rng, (T, 5), AR), ar_noise(rng, (T, targets), AR), tr=2.0, n_permutations=19,
                   n_folds=3, random_state=_seed(rng))  # fmt: skip
    return float(np.nanmin(found.p_corrected))


@register("encode, gain", "of networks beyond controls that the brain follows", T=(200,), AR=(0.6,), targets=(2,))
def encoding_gain(rng: np.random.Generator, T: int, AR: float, targets: int) -> float:
    """A brain of the controls and noise."""
    controls = ar_noise(rng, (T, 2), AR)
    brain = ar_noise(rng, (T, targets), AR) + controls @ rng.normal(size=(2, targets))
    found = encode({"controls": controls, "networks": ar_noise(rng, (T, 3), AR)}, brain, tr=2.0, n_permutations=19,
                   n_folds=3, n_iter=5, random_state=_seed(rng))  # fmt: skip
    return float(np.nanmin(found.gain_p_corrected["networks"]))


@register("compare_similarity, nuisance", "regressors that both sides follow", T=(200,), AR=(0.6,),
          regressors=(2, 14))  # fmt: skip
def similarity_nuisance(rng: np.random.Generator, T: int, AR: float, regressors: int) -> float:
    """Both sides hold the nuisance, and nothing else in common."""
    known = ar_noise(rng, (T, regressors), 0.95)
    x, y = (ar_noise(rng, (T, 5), AR) + known @ rng.normal(size=(regressors, 5)) for _ in range(2))
    return compare_similarity(x, y, nuisance=known, n_permutations=39, random_state=_seed(rng)).p


@register("compare_similarity", "of whole sets of series", T=(200,), AR=(0.6, 0.9), measure=("cka",),
          null=("circular", "phase"))  # fmt: skip
def similarity(rng: np.random.Generator, T: int, AR: float, measure: str, null: str) -> float:
    """Two sets that share no time."""
    x, y = (ar_noise(rng, (T, 5), AR) for _ in range(2))
    return compare_similarity(x, y, measure=measure, null=null, n_permutations=39, random_state=_seed(rng)).p


@register("compare_similarity, rsa", "of whole sets of series", T=(100,), AR=(0.6, 0.9), measure=("rsa",),
          null=("circular", "phase"))  # fmt: skip
def similarity_rsa(rng: np.random.Generator, T: int, AR: float, measure: str, null: str) -> float:
    """The same by ranks of distances, which takes long."""
    return similarity(rng, T, AR, measure, null)


def _model(rng: np.random.Generator, shared: np.ndarray, share: float) -> ModelNetworks:
    n = len(shared)
    courses = share * shared @ rng.normal(size=(shared.shape[1], 5)) + ar_noise(rng, (n, 5), 0.3)
    ends = np.arange(1, n + 1)
    return ModelNetworks([courses], [courses], [np.column_stack([ends - 1, ends])], ["x" * n])


@register("fingerprint", "p: two models that are as alike as six references; p_shared: that share no text",
          p=("p", "p_shared"))  # fmt: skip
def models(rng: np.random.Generator, p: str) -> float:
    """Models that follow one text, each in its way; or none."""
    text = ar_noise(rng, (300, 4), 0.3)
    made = [_model(rng, text, 1.0 if p == "p" else 0.0) for _ in range(8 if p == "p" else 2)]
    found = fingerprint(*made[:2], reference=made[2:], n_permutations=39 if p == "p_shared" else 1,
                        random_state=_seed(rng))  # fmt: skip
    return float(getattr(found, p))


# -- networks over time ------------------------------------------------------------------------------------------------


@register("connectivity", "largest |r| of all pairs", T=(200,), AR=(0.0, 0.9), kind=("correlation", "partial"))
def network_pairs(rng: np.random.Generator, T: int, AR: float, kind: str) -> float:
    """Time courses without connections."""
    runs = [ar_noise(rng, (T, 5), AR) for _ in range(2)]
    return float(
        np.nanmin(
            connectivity(runs, kind, n_permutations=19 if kind == "partial" else 39, random_state=_seed(rng)).p_fwe
        )
    )


@register("dynamics_test", "largest change over windows of all pairs", T=(300,), AR=(0.6,), networks=(4,))
def dynamics(rng: np.random.Generator, T: int, AR: float, networks: int) -> float:
    """Connections that stay as they are."""
    run = ar_noise(rng, (T, networks), AR) @ (np.eye(networks) + 0.4)
    return float(dynamics_test([run], n_permutations=39, random_state=_seed(rng)).p_fwe.min())


@register("graph_measures", "clustering of a graph of random links of the same degrees", networks=(14,))
def graphs(rng: np.random.Generator, networks: int) -> float:
    """Links that are strong at random."""
    matrix = rng.normal(size=(networks, networks))
    found = graph_measures(matrix + matrix.T, (0.2,), n_permutations=39, n_seeds=1, random_state=_seed(rng))
    return float(found.set_index("measure").p["clustering"])


@register("layer_flow", "coupling and distance of layers", networks=(8, 20))
def flow(rng: np.random.Generator, networks: int) -> float:
    """Networks that couple wherever they lie."""
    space = NeuronSpace([30] * 5)
    peak = rng.integers(0, 5, networks)
    maps = rng.normal(size=(networks, 150)) + 4 * ((np.arange(150) // 30 == peak[:, None]) & (rng.random(150) < 0.5))
    matrix = np.corrcoef(rng.normal(size=(networks, 60)))
    found = layer_flow(FunctionalNetworks(maps, space, threshold=2.0), matrix, n_permutations=99,
                       random_state=_seed(rng))  # fmt: skip
    return found.p


def _conditions(rng: np.random.Generator, T: int, AR: float, units: int) -> Scan:
    onsets = np.cumsum(rng.integers(6, 14, size=T // 10))
    onsets = onsets[onsets < T - 6]
    kinds = rng.permutation(np.arange(len(onsets)) % 2)
    events = pd.DataFrame({"onset": onsets, "duration": 5, "trial_type": np.array(["a", "b"])[kinds]})
    return Scan.from_array(ar_noise(rng, (T, units), AR).astype(np.float32), NeuronSpace([units]), events=events)


@register("localizer", "largest |t| of 30 neurons in a contrast of two conditions", T=(200,), AR=(0.0, 0.6, 0.9),
          permute=("shift", "labels"))  # fmt: skip
def conditions(rng: np.random.Generator, T: int, AR: float, permute: str) -> float:
    """Neurons that do not care for conditions."""
    found = localizer([_conditions(rng, T, AR, 30)], {"a-b": {"a": 1, "b": -1}}, n_permutations=39, permute=permute,
                      random_state=_seed(rng))  # fmt: skip
    return float(np.nanmin(found.p_fwe))


@register("report, conditions", "conditions in the pages of networks: largest effect of all", T=(300,), AR=(0.0, 0.9))
def page_conditions(rng: np.random.Generator, T: int, AR: float) -> float:
    """Networks that do not care for conditions."""
    scan = _conditions(rng, T, AR, 3)
    return float(condition_effects([ar_noise(rng, (T, 3), AR).astype(np.float32)], [scan]).p.min())
