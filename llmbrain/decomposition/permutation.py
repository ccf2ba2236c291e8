"""Stage 3 of dual regression: permutation tests over runs, with family-wise error from the maximum statistic."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llmbrain._validation import InputError, check_count, check_option
from llmbrain.decomposition.arrangements import Arrangements, labels_of, members, reorderings, sign_flips
from llmbrain.decomposition.designs import ExchangeabilityWarning, Model, as_matrix, check_assumptions

Array = NDArray[np.float64]
STATISTICS = ("pooled", "welch")

# Two arrangements that are equal on paper (a flip of all signs) may differ in the last digits.
_TIE = 1e-9
# Numbers in one block of permuted statistics; bounds memory.
_BLOCK = 2**23


@dataclass(frozen=True)
class PermutationTest:
    """What `permutation_test` returns.

    Attributes
    ----------
    t : array ``(n_networks, n_neurons)``
        The statistic of the data as they are: t (Student's, or Welch's with ``statistic="welch"``), or F.
    p : array, same shape
        Uncorrected, ``(b + 1) / (n_permutations + 1)`` with b the number of arrangements at least as extreme.
    p_fwe : array, same shape
        Corrected for all neurons of the network (or for all networks too) by the largest statistic of each arrangement.
    null : array ``(n_permutations, n_networks)``
        The largest statistics.
    n_permutations : int
        Arrangements besides the observed one.
    exhaustive : bool
        True when every possible arrangement was used: the p values are exact, and small groups cannot do better than
        ``1 / (n_permutations + 1)``.
    statistic : {"t", "welch", "F"}
    """

    t: Array
    p: Array
    p_fwe: Array
    null: Array
    n_permutations: int
    exhaustive: bool
    statistic: str = "t"


def permutation_test(
    maps: Any,
    *,
    groups: Sequence[object] | None = None,
    pairs: Sequence[object] | None = None,
    subjects: Sequence[object] | None = None,
    blocks: Sequence[object] | None = None,
    design: ArrayLike | str | Path | None = None,
    contrast: ArrayLike | str | Path | None = None,
    covariates: ArrayLike | None = None,
    statistic: str = "pooled",
    variance_groups: Sequence[object] | None = None,
    n_permutations: int = 5000,
    two_sided: bool = True,
    family: str = "network",
    random_state: int | None = 0,
) -> PermutationTest:
    """Test run maps against zero, between two conditions or groups of runs, or any contrast of a design.

    Parameters
    ----------
    maps : DualRegression or array ``(n_runs, n_networks, n_neurons)``
        Stage 2 maps (not z: amplitude counts), one set a run.
    groups : sequence of length n_runs, optional
        Condition or group of each run, two different labels. t is positive where the label that appears first is
        larger. Labels are permuted; without `groups` the mean is tested against zero by sign flips.
    pairs : sequence of length n_runs, optional
        With `groups`: which runs belong together (the same text under two conditions). Differences within a pair are
        tested by sign flips.
    subjects : sequence of length n_runs, optional
        Whose run it is, where subjects have several. Runs of a subject are averaged and subjects are exchanged; where
        every subject has runs of both `groups`, the differences of its means are tested by sign flips.
    blocks : sequence of length n_runs, optional
        Exchangeability blocks, for runs that stay apart: signs flip for a whole block; labels (rows of the design) are
        exchanged within blocks where the effect varies in one, else between whole blocks of one size.
    design : array ``(n_runs, n_regressors)``, DataFrame or path of FSL's ``.mat``, optional
        In place of `groups`; with `contrast`. Hold the mean in it.
    contrast : array ``(n_regressors,)`` or ``(n_rows, n_regressors)``, or path of FSL's ``.con``, optional
        One row is a t test, more are one F test of all together.
    covariates : array ``(n_runs,)`` or ``(n_runs, n_covariates)``, optional
        What is accounted for, without `design`: age, motion. Centered over runs.
    statistic : {"pooled", "welch"}
        One variance for all; or one for each of `variance_groups`, and signs of residuals are flipped where rows would
        be permuted: every run keeps its variance so.
    variance_groups : sequence of length n_runs, optional
        For "welch"; default: `groups`.
    n_permutations : int
        Arrangements to draw; when fewer are possible, all are used.
    two_sided : bool
        Whether large negative t counts too. An F test has no sides.
    family : {"network", "all"}
        Correct for the neurons of one network (as FSL's dual regression does), or for all networks together.
    random_state : int or None

    Returns
    -------
    PermutationTest

    Raises
    ------
    InputError
        If labels do not fit the runs, groups are not two, a design is rank deficient, or fewer than two runs (pairs,
        subjects) are left.

    Warns
    -----
    ExchangeabilityWarning
        Where the data do not look exchangeable: see Notes.

    Notes
    -----
    **What is assumed.** Runs (or subjects, blocks) are independent of each other: several runs of one subject are not,
    and 5 subjects of 4 runs passed as 20 find an effect of nothing in every draw. Sign flips take the errors of a
    neuron to be symmetric about zero; permutations take them to have one distribution, of one variance, in all groups.
    With 5 runs of twice the SD against 20, the pooled t finds something where there is nothing, in most draws
    (`benchmarks/calibration.py`); ``statistic="welch"`` flips signs instead, which takes errors to be symmetric and
    lets variances differ. Each is looked at in what the design leaves, and a warning says where it does not seem to
    hold.

    With nuisance (covariates, other regressors) the residuals are permuted (Freedman & Lane 1983): exact without, near
    exact with it. Blocks and variance groups as in PALM (Winkler et al. 2014, NeuroImage 92:381; 2015, 123:253).
    Neurons of a layer have no neighbours, so that there is no cluster statistic and no TFCE. The +1 is that of Phipson
    & Smyth 2010 (Stat Appl Genet Mol Biol 9:39); the maximum statistic that of Nichols & Holmes 2002 (HBM 15:1).
    """
    check_option("family", family, ("network", "all"))
    check_option("statistic", statistic, STATISTICS)
    check_count("n_permutations", n_permutations, 1)
    data = np.asarray(getattr(maps, "maps", maps))
    if data.ndim != 3:
        raise InputError(f"maps has shape {data.shape}: expected (n_runs, n_networks, n_neurons)")
    if pairs is not None and (subjects is not None or blocks is not None):
        raise InputError("pairs are blocks of two already: leave out subjects and blocks")
    if subjects is not None and blocks is not None:
        raise InputError("subjects are averaged, blocks are not: pass one of them")
    if design is not None and (groups is not None or covariates is not None or pairs is not None):
        raise InputError("design says it all: leave out groups, pairs and covariates, or build the design of them")
    if (design is None) != (contrast is None):
        raise InputError("design and contrast go together: pass both")
    n = len(data)
    people = labels_of("subjects", subjects, n)
    whole = labels_of("blocks", blocks, n)
    spread = labels_of("variance_groups", variance_groups, n)
    if subjects is None and blocks is None and pairs is None:
        _warn_of_names(maps)
    first = None if groups is None else _first_group(groups, n)
    others = None if covariates is None else _rows("covariates", covariates, n)
    matrix = None if design is None else _rows("design", design, n)
    if pairs is not None:
        if others is not None or spread is not None:
            raise InputError("pairs are tested as they are: leave out covariates and variance_groups")
        data, first = _differences(data, first, pairs), None
    if people is not None:
        data, first, others, matrix, spread = _by_subject(data, people, first, others, matrix, spread)
    least = 2 if first is None and matrix is None else 3
    if len(data) < least:
        raise InputError(f"this permutation test needs at least {least} runs (or pairs of runs), got {len(data)}")

    model, by_sign = _model(len(data), first, others, matrix, contrast)
    kinds = _variance_groups(spread, first, statistic)
    blocked = people is not None or whole is not None or pairs is not None
    alike = first.astype(np.int64) if first is not None and kinds is None else None
    check_assumptions(data, model, flips=by_sign or kinds is not None, blocked=blocked, groups=alike)
    rng = np.random.default_rng(random_state)
    if by_sign or kinds is not None:
        arrangements = sign_flips(len(data), whole, n_permutations, rng)
    else:
        effect = model.effect if first is None else first[:, None].astype(np.float64)
        plain = first is not None and others is None
        arrangements = reorderings(effect, whole, n_permutations, rng, labels=plain)
    _warn_of_floor(model.effect, arrangements, two_sided and not model.is_f)

    def statistics(y: Array, orders: NDArray[np.int64], signs: Array) -> Array:
        return model.statistics(y, orders, signs) if kinds is None else model.pivotal(y, orders, signs, kinds)

    sided = two_sided and not model.is_f
    shape = data.shape[1:]
    t, p = np.empty(shape), np.empty(shape)
    null = np.empty((len(arrangements), shape[0]))
    observed = np.arange(len(data))[None], np.ones((1, len(data)))
    for k in range(shape[0]):
        y = model.residuals(data[:, k].astype(np.float64))
        t[k] = statistics(y, *observed)[0]
        p[k], null[:, k] = _against_null(t[k], y, arrangements, statistics, sided)
    reference = null if family == "network" else np.broadcast_to(null.max(axis=1, keepdims=True), null.shape)
    extreme = np.abs(t) if sided else t
    p_fwe = np.array([_share_at_least(e, column) for e, column in zip(extreme, reference.T)])
    name = "F" if model.is_f else "t" if kinds is None else "welch"
    return PermutationTest(t, p, p_fwe, null, len(arrangements), arrangements.exhaustive, name)


def _model(
    n: int, first: NDArray[np.bool_] | None, others: Array | None, matrix: Array | None, contrast: Any
) -> tuple[Model, bool]:
    """The design, and whether signs are flipped (a mean is tested) in place of rows exchanged."""
    if matrix is not None:
        model = Model.of(matrix, contrast)
        if model.contrast.shape[0] > 1 and isinstance(contrast, (str, Path)):
            raise InputError(
                f"contrast={contrast!r} holds several: pass a row of llmbrain.decomposition.read_fsl_matrix"
            )
        # an effect that is the same in all runs does not change when rows are exchanged
        return model, bool(np.ptp(model.effect, axis=0).max() < 1e-9)
    columns = [np.ones(n)] if first is None else [first.astype(np.float64), 1.0 - first]
    if others is not None:
        columns += list((others - others.mean(axis=0)).T)
    weights = np.zeros(len(columns))
    weights[: 1 if first is None else 2] = [1.0] if first is None else [1.0, -1.0]
    return Model.of(np.column_stack(columns), weights), first is None


def _rows(name: str, value: Any, n_runs: int) -> Array:
    matrix = as_matrix(name, value)
    matrix = matrix[:, None] if matrix.ndim == 1 else matrix
    if matrix.ndim != 2 or len(matrix) != n_runs:
        raise InputError(f"{name} has shape {matrix.shape}: a row is needed for each of {n_runs} runs")
    return matrix


def _variance_groups(
    labels: list[Any] | None, first: NDArray[np.bool_] | None, statistic: str
) -> NDArray[np.int64] | None:
    if statistic == "pooled":
        if labels is not None:
            raise InputError("variance_groups have no use with statistic='pooled': pass statistic='welch'")
        return None
    if labels is None:
        if first is None:
            raise InputError("statistic='welch' needs groups= or variance_groups=: whose variances may differ")
        labels = first.tolist()
    sizes = {label: len(runs) for label, runs in members(labels).items()}
    if min(sizes.values()) < 2:
        raise InputError(f"variance_groups: {min(sizes, key=lambda k: sizes[k])!r} has one run, which has no variance")
    names = list(sizes)
    return np.array([names.index(label) for label in labels])


def _by_subject(
    data: NDArray[Any],
    people: list[Any],
    first: NDArray[np.bool_] | None,
    others: Array | None,
    matrix: Array | None,
    spread: list[Any] | None,
) -> tuple[NDArray[Any], NDArray[np.bool_] | None, Array | None, Array | None, list[Any] | None]:
    """One row a subject in place of one a run."""
    runs_of = members(people)

    def constant(name: str, rows: Array | None) -> Array | None:
        if rows is None:
            return None
        for who, runs in runs_of.items():
            if np.ptp(rows[runs], axis=0).any():
                raise InputError(f"{name} differs between runs of subject {who!r}: pass blocks= in place of subjects=")
        return np.array([rows[runs[0]] for runs in runs_of.values()])

    if spread is not None:
        names = list(dict.fromkeys(spread))
        codes = constant("variance_groups", np.array([[names.index(label)] for label in spread], dtype=np.float64))
        assert codes is not None
        spread = [names[int(code)] for code in codes[:, 0]]
    both = [bool(first[runs].any() and not first[runs].all()) for runs in runs_of.values()] if first is not None else []
    if first is not None and any(both):
        if not all(both):
            alone = next(who for who, two in zip(runs_of, both) if not two)
            raise InputError(f"subject {alone!r} has runs of one group only, others have both: leave some out")
        data = np.array([data[runs[first[runs]]].mean(axis=0) - data[runs[~first[runs]]].mean(axis=0)
                         for runs in runs_of.values()])  # fmt: skip
        return data, None, constant("covariates", others), None, spread
    data = np.array([data[runs].mean(axis=0) for runs in runs_of.values()])
    if first is not None:
        first = np.array([first[runs[0]] for runs in runs_of.values()])
    return data, first, constant("covariates", others), constant("design", matrix), spread


def _warn_of_floor(effect: Array, arrangements: Arrangements, sided: bool) -> None:
    """Say it where so few arrangements are possible that nothing can be significant at .05."""
    if not arrangements.exhaustive:
        return
    ties = 0
    if effect.shape[1] == 1:  # arrangements that give the observed statistic, or its opposite
        moved = effect[arrangements.orders, 0] * arrangements.signs
        alike = moved @ effect[:, 0] / float(effect[:, 0] @ effect[:, 0])
        ties = int(((np.abs(alike) if sided else alike) >= 1 - 1e-9).sum())
    floor = (1 + ties) / (len(arrangements) + 1)
    if floor > 0.05:
        warnings.warn(
            f"there are {len(arrangements) + 1} arrangements of these runs (or subjects, blocks) in all: no p is below "
            f"{floor:.3f}, and nothing can be significant at .05. More of them are needed",
            UserWarning,
            stacklevel=3,
        )


def _warn_of_names(maps: Any) -> None:
    """Runs that say whose they are, in BIDS names."""
    found = [re.search(r"(sub-[A-Za-z0-9]+)", str(name)) for name in getattr(maps, "names", [])]
    people = [match[1] for match in found if match]
    if found and len(people) == len(found) and len(set(people)) < len(people):
        warnings.warn(
            f"{len(people)} maps come from {len(set(people))} subjects, by the names of the runs: pass subjects= (or "
            "blocks=), one label a run",
            ExchangeabilityWarning,
            stacklevel=3,
        )


def _first_group(groups: Sequence[Any], n_runs: int) -> NDArray[np.bool_]:
    labels = list(groups)
    distinct = list(dict.fromkeys(labels))
    if len(labels) != n_runs:
        raise InputError(f"groups has {len(labels)} labels for {n_runs} runs: one each is needed")
    if len(distinct) != 2:
        raise InputError(f"groups holds {len(distinct)} different labels {distinct!r}: exactly 2 are needed")
    return np.array([label == distinct[0] for label in labels])


def _differences(data: NDArray[Any], first: NDArray[np.bool_] | None, pairs: Sequence[Any]) -> NDArray[Any]:
    if first is None:
        raise InputError("pairs needs groups as well: which run of a pair is which condition")
    labels = list(pairs)
    if len(labels) != len(data):
        raise InputError(f"pairs has {len(labels)} labels for {len(data)} runs: one each is needed")
    members = {label: [i for i, other in enumerate(labels) if other == label] for label in dict.fromkeys(labels)}
    for label, runs in members.items():
        if len(runs) != 2 or first[runs].sum() != 1:
            raise InputError(f"pairs: {label!r} must name two runs, one of each group; it names runs {runs}")
    return np.array(
        [np.subtract(*(data[i] for i in sorted(runs, key=lambda i: not first[i]))) for runs in members.values()]
    )


def _against_null(
    t: Array, y: Array, arrangements: Arrangements, statistics: Callable[..., Array], two_sided: bool
) -> tuple[Array, Array]:
    extreme = np.abs(t) if two_sided else t
    threshold = _just_below(extreme)
    count, largest = np.zeros(len(t)), []
    step = max(1, _BLOCK // y.shape[1])
    for start in range(0, len(arrangements), step):
        part = slice(start, start + step)
        permuted = statistics(y, arrangements.orders[part], arrangements.signs[part])
        permuted = np.abs(permuted) if two_sided else permuted
        count += (permuted >= threshold).sum(axis=0)
        largest.append(permuted.max(axis=1))
    return (count + 1) / (len(arrangements) + 1), np.concatenate(largest)


def _just_below(values: Array) -> Array:
    """What a tie may fall to by rounding: more where the fit is near perfect, and little is left to divide by."""
    size = np.abs(values)
    return values - size * np.minimum(_TIE + 1e-13 * size**2, 1e-3)


def _share_at_least(values: Array, null: Array) -> Array:
    ordered = np.sort(null)
    above = len(ordered) - np.searchsorted(ordered, _just_below(values), side="left")
    return (above + 1) / (len(ordered) + 1)
