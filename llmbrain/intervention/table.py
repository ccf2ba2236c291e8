"""The lesion table: what happens without each network, beside what happens without as many other neurons."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from llmbrain._files import (
    DamagedError,
    clear_damage,
    owner,
    read_json,
    reading,
    refuse_other,
    settle,
    transaction,
    write_json,
    write_table,
    write_tensors,
)  # fmt: skip
from llmbrain._progress import bar
from llmbrain._validation import InputError, check_count, check_option, check_range, seed_of
from llmbrain.anatomy.experts import has_experts
from llmbrain.anatomy.families import Anatomy, anatomy
from llmbrain.anatomy.space import NeuronSpace
from llmbrain.distributed import Parcel, ranks
from llmbrain.intervention.controls import matched_masks, random_masks
from llmbrain.intervention.evaluations import (
    TokenEvaluation,
    activation_levels,
    as_evaluations,
    levels_of_runs,
    score_conditions,
)
from llmbrain.intervention.mixture_table import MixtureSets
from llmbrain.intervention.targets import Heads, spans_heads, unit_mask, unit_space
from llmbrain.networks import FunctionalNetworks, Network
from llmbrain.scanning.inputs import Runs
from llmbrain.scanning.manifest import warn_of_other_model, weights_sum
from llmbrain.stats.bootstrap import bootstrap_mean
from llmbrain.stats.tails import benjamini_hochberg

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

Items = dict[str, NDArray[np.float64]]  # evaluation -> (n_conditions, n_items)


@dataclass(frozen=True)
class LesionTable:
    """Network x evaluation.

    Attributes
    ----------
    frame : DataFrame
        One row a network and evaluation; see `lesion_table` for the columns.
    draws : DataFrame
        Effect of every control draw: network, evaluation, control ("random" or "matched"), draw, effect.
    provenance : dict
        Settings that made it.
    """

    frame: pd.DataFrame
    draws: pd.DataFrame
    provenance: dict[str, Any]

    def matrix(self, column: str = "effect") -> pd.DataFrame:
        """One column of the table as network (rows) x evaluation (columns)."""
        check_option("column", column, self.frame.columns)
        networks, evaluations = (list(dict.fromkeys(self.frame[c])) for c in ("network", "evaluation"))
        wide = self.frame.pivot(index="network", columns="evaluation", values=column)
        return wide.loc[networks, evaluations]

    def double_dissociations(self, alpha: float = 0.05, *, corrected: bool = True) -> pd.DataFrame:
        """Pairs of networks and evaluations where each network is the one whose loss harms its own evaluation.

        Network a harms evaluation i more than network b does, and b harms j more than a does; in both the confidence
        intervals do not touch, and the harm exceeds both kinds of control, where they were drawn.

        Parameters
        ----------
        alpha : float
        corrected : bool
            Hold ``q <= alpha`` (FDR over the table) against the controls; else ``p <= alpha``, cell by cell. With 20
            draws only the latter can be met (see `lesion_table`), and a warning says so.

        Returns
        -------
        DataFrame
            network_a, evaluation_a, network_b, evaluation_b, and the harms aa, ab, bb, ba (network, evaluation), the
            clearest first.
        """
        import pandas as pd

        harm, low, high = (self.matrix(c).to_numpy() for c in ("harm", "harm_low", "harm_high"))
        real = low > 0
        for control in ("random", "matched"):
            values = self.matrix(f"{'q' if corrected else 'p'}_{control}").to_numpy()
            real &= np.isnan(values) | (values <= alpha)
            if corrected and np.isfinite(values).any() and np.nanmin(values) > alpha:
                n = self.provenance[f"n_{control}"]
                warnings.warn(
                    f"no cell has q_{control} <= {alpha}: {n} draws give p >= {1 / (n + 1):.3g} before FDR over "
                    f"{np.isfinite(values).sum()} cells; draw more, or pass corrected=False",
                    UserWarning,
                    stacklevel=2,
                )
        names, evaluations = self.matrix().index, self.matrix().columns
        rows = []
        for a, i in np.argwhere(real):
            for b, j in np.argwhere(real):
                apart = low[a, i] > high[b, i] and low[b, j] > high[a, j]
                if a < b and i != j and apart:
                    pair = (harm[a, i], harm[a, j], harm[b, j], harm[b, i])
                    rows.append((names[a], evaluations[i], names[b], evaluations[j], *pair))
        columns = ["network_a", "evaluation_a", "network_b", "evaluation_b", "aa", "ab", "bb", "ba"]
        frame = pd.DataFrame(rows, columns=columns)
        harms = {column: frame[column].to_numpy(dtype=np.float64) for column in columns[4:]}
        clear = np.minimum(harms["aa"] - harms["ba"], harms["bb"] - harms["ab"])
        return frame.iloc[np.argsort(-clear, kind="stable")].reset_index(drop=True)

    def save(self, folder: str | Path) -> Path:
        """Write ``lesion_table.tsv``, ``lesion_draws.tsv`` and ``lesion_table_provenance.json`` into a folder."""
        with transaction(folder) as new:
            write_table(new / "lesion_table.tsv", self.frame)
            write_table(new / "lesion_draws.tsv", self.draws)
            write_json(new / "lesion_table_provenance.json", self.provenance, indent=2)
        return Path(folder)

    @classmethod
    def load(cls, folder: str | Path) -> LesionTable:
        """Read what `save` wrote.

        Raises
        ------
        FileNotFoundError
            If the folder holds no table of lesions.
        DamagedError
            If a file does not match its checksum.
        """
        import pandas as pd

        with reading(folder, anew="measure the lesions again", required=True) as files:
            tables = []
            for name in ("lesion_table.tsv", "lesion_draws.tsv"):
                with clear_damage(files.path(name), "a table of lesions"):
                    tables.append(pd.read_csv(files.path(name), sep="\t"))
            return cls(tables[0], tables[1], files.json("lesion_table_provenance.json"))


def lesion_table(
    model: nn.Module,
    networks: FunctionalNetworks | Sequence[Network] | Mapping[str, Any],
    evaluations: Mapping[str, Any],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    n_random: int = 20,
    n_matched: int | None = None,
    value: str = "zero",
    reference: Any = None,
    window: int | None = None,
    max_windows: int | None = None,
    n_bootstrap: int = 2000,
    level: float = 0.95,
    random_state: int | None = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> LesionTable:
    """Lesion each network, measure, and hold it against two controls of the same number of neurons in every layer.

    In a process group networks are shared out; rank 0 writes, all get the table.

    Parameters
    ----------
    model : causal language model
        Stays loaded and unchanged; a network and its controls share forward passes.
    networks : FunctionalNetworks, list of Network, or dict of name -> anything that `lesion` takes
        `Heads` too: their controls are other heads of the same layers. Of a mixture of experts also `Experts`, against
        as many random experts of the same layers, and (matched) as many that are called about as often.
    evaluations : dict of name -> texts, token ids ``(n, length)``, `TokenEvaluation` or callable
        Texts and token ids are scored by their mean loss in windows (`window`, `max_windows`; texts need `tokenizer`).
        A callable takes the model and gives a number, or one number an item; more counts as better unless it has an
        attribute ``higher_is_better = False``.
    n_random : int
        Control sets of random neurons. The smallest p is ``1 / (n_random + 1)``, and FDR is over the whole table: a
        table of m rows needs ``n_random`` of some ``m / 0.05`` before its single strongest row can reach q < .05.
    n_matched : int, optional
        Control sets of neurons that are as active as the network's (default `n_random`); they need to know the
        activations: from `reference`, else from the tokens of the evaluations.
    value : {"zero", "mean"}
        What lesioned neurons hold; "mean" is over `reference`, else over the tokens of the evaluations.
        Heads hold zero.
    reference : scans or arrays ``(n_tokens, n_neurons)``, optional
        Not with heads: a scan of neurons does not hold them. Of a mixture of experts scans, or token ids.
    n_bootstrap, level : int, float
        Confidence intervals: percentile bootstrap over items (windows, examples), lesion and baseline paired.
    random_state : int or None
        Seed of the controls and of the intervals; None draws one (``provenance`` says which).
    out : path, optional
        Folder that finished networks are kept in; the same call goes on where it was stopped.
    progress : bool
        Show a bar (only on a terminal).
    window : int, optional
        Tokens in a window of text; default what the model can read at once.
    max_windows : int, optional
        Windows that are read; default all.

    Returns
    -------
    LesionTable
        Columns of ``frame``: network, evaluation, size; baseline, lesioned; effect = lesioned - baseline with
        effect_low, effect_high; harm (the effect, positive where worse) with harm_low, harm_high; for each control
        (random, matched): its mean effect ``*_effect``, ``z_*`` = (effect - mean) / SD over draws,
        ``p_* = (b + 1) / (n + 1)`` with b the draws whose ``|effect|`` is at least the network's, and ``q_*``
        (Benjamini-Hochberg over the table). nan where a control or interval does not exist: one item only, no draw, or
        a layer with fewer neurons outside the network than inside (no matched set).

    Raises
    ------
    InputError
        If a network lies in another space, an evaluation has no data, or `out` holds another table.
    """
    check_option("value", value, ("zero", "mean"))
    check_count("n_random", n_random, 0)
    mixture = MixtureSets(model, _named(networks)) if has_experts(model) else None
    check_count("n_bootstrap", n_bootstrap, 1)
    check_range("level", level, 0, 1, open_low=True, open_high=True)
    masks, space = _named_masks(networks, anatomy(model)) if mixture is None else (mixture.masks, mixture.space)
    heads = mixture is None and space.n_layers > len(anatomy(model).layers)
    warn_of_other_model(networks, model)
    if heads and (value == "mean" or reference is not None):
        said = f"value={value!r} with reference={None if reference is None else type(reference).__name__}"
        raise InputError(f"{said}: heads take value='zero' and no reference")
    ready = as_evaluations(model, evaluations, tokenizer, window=window, max_windows=max_windows)
    if n_matched is None:  # experts that are called as often are known only where tokens are read
        reads = mixture is None or reference is not None
        n_matched = n_random if reads or any(isinstance(e, TokenEvaluation) for e in ready.values()) else 0
    check_count("n_matched", n_matched, 0)
    team = ranks()
    writes = out is not None and team.leads
    asked = {"n_random": n_random, "n_matched": n_matched, "value": value}
    facts = {} if team.size == 1 else {
        "networks": _digest(masks, {}), "evaluations": _digest({}, ready), "weights": weights_sum(model), **asked,
        "level": level, "bootstrap": n_bootstrap, "reference": None if reference is None else Runs(reference).facts(),
    }  # fmt: skip
    with team.job("lesions", **facts), owner(out) if writes and out is not None else nullcontext():
        levels, held, fill = None, None, None
        if n_matched or value == "mean":
            held = mixture.held(ready, reference, means=value == "mean") if mixture is not None else None
            levels = held.levels if held is not None else _levels_for(model, ready, reference, space, heads)
            if value == "mean":
                fill = levels[0] if held is None else held.means
        nothing = np.zeros((1, space.n_neurons), dtype=bool)
        baseline, _, _ = _unpacked(
            team.found_by(0, "lesions", lambda: _packed((_score(model, nothing, ready, None, mixture, None), 0, 0))),
            ready,
        )
        seed = int(team.told("lesions", lambda: seed_of(random_state)))
        given = None if random_state is None else seed  # None goes on with another seed: each network has its own draws
        settings = {**asked, "random_state": given}
        store = _Store(Path(out), masks, ready, settings, baseline) if writes and out is not None else None
        stored = {k: kept for k in range(len(masks)) if store is not None and (kept := store.read(k)) is not None}
        known = team.told("lesions", lambda: sorted(stored))
        todo = [k for k in range(len(masks)) if k not in known]
        found = {
            k: _unpacked(team.found_by(0, "lesions", lambda k=k: _packed(stored[k])), ready)  # type: ignore[misc]
            for k in known
        }
        every = list(masks.items())

        def measured(number: int) -> Parcel:
            k = todo[number]
            (name, mask), rng = every[k], np.random.default_rng([seed, k])
            if mixture is not None and name in mixture.experts:
                controls = mixture.random(name, n_random, rng), mixture.called_alike(name, n_matched, rng, held)
            else:
                controls = _controls(mask, space, levels, n_random, n_matched, rng)
            sets = np.concatenate([mask[None], *controls])
            return _packed((_score(model, sets, ready, fill, mixture, name), len(controls[0]), len(controls[1])))

        parcels = bar(team.each(len(todo), "lesions", measured), total=len(todo), desc="lesions", show=progress)
        for k, parcel in zip(todo, parcels):
            found[k] = _unpacked(parcel, ready)
            if store is not None:
                store.write(k, *found[k])
    results = [found[k] for k in range(len(masks))]
    if mixture is not None:
        mixture.say_silent({name: items for name, (items, _, _) in zip(masks, results)}, baseline)
    frame, draws = _frames(masks, ready, baseline, results, n_bootstrap, level, seed)
    read = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    items = {name: int(v.shape[1]) for name, v in baseline.items()}
    facts = {"model": read, "level": level, "n_bootstrap": n_bootstrap, "items": items}
    provenance = {**settings, "random_state": seed, **facts}
    return LesionTable(frame, draws, provenance)


def _score(
    model: nn.Module, sets: NDArray[np.bool_], ready: Mapping[str, Any], fill: NDArray[Any] | None,
    mixture: MixtureSets | None, name: str | None,
) -> Items:  # fmt: skip
    """Scores of each set, lesioned; ``(n_sets, n_items)`` an evaluation."""
    if mixture is None:
        return score_conditions(model, ~sets, ready, fill=fill)
    return mixture.score(sets, ready, whole=name in mixture.experts, fill=fill)


def _named(networks: Any) -> Mapping[str, Any]:
    """Networks by name."""
    if isinstance(networks, (FunctionalNetworks, Network)):
        networks = list(networks) if isinstance(networks, FunctionalNetworks) else [networks]
    if not isinstance(networks, Mapping):
        if not all(isinstance(n, Network) for n in networks):
            raise InputError("networks must be FunctionalNetworks, a list of Network, or a dict of name -> neurons")
        names = [n.name for n in networks]
        networks = {
            name if names.count(name) == 1 else f"{i}:{name}": n for i, (name, n) in enumerate(zip(names, networks))
        }
    if not networks:
        raise InputError("networks is empty: there is nothing to lesion")
    return networks


def _named_masks(networks: Any, body: Anatomy) -> tuple[dict[str, NDArray[np.bool_]], NeuronSpace]:
    """Masks of all networks, and the space they lie in: the neurons, with the heads behind them where there are any."""
    networks = _named(networks)
    masks = {str(name): unit_mask(what, body, f"networks[{name!r}]") for name, what in networks.items()}
    space = unit_space(body)
    if not any(isinstance(what, Heads) or spans_heads(what, body) for what in networks.values()):
        space = NeuronSpace(body.widths)
        masks = {name: mask[: space.n_neurons] for name, mask in masks.items()}
    empty = [name for name, mask in masks.items() if not mask.any()]
    if empty:
        warnings.warn(f"networks {empty} hold no neuron: their effect is zero", UserWarning, stacklevel=3)
    return masks, space


def _levels_for(
    model: nn.Module, evaluations: Mapping[str, Any], reference: Any, space: NeuronSpace, heads: bool
) -> NDArray[np.float64]:
    if reference is not None:
        return levels_of_runs(reference, space)
    tokens = [e for e in evaluations.values() if isinstance(e, TokenEvaluation)]
    if not tokens:
        raise InputError(
            "activation-matched controls and value='mean' need to know the activations: pass reference= scans, or "
            "n_matched=0 and value='zero'"
        )
    return activation_levels(model, tokens, heads=heads)


def _controls(
    mask: NDArray[np.bool_],
    space: NeuronSpace,
    levels: NDArray[np.float64] | None,
    n_random: int,
    n_matched: int,
    rng: np.random.Generator,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    nothing = np.zeros((0, space.n_neurons), dtype=bool)
    if not mask.any():
        return nothing, nothing
    random = random_masks(mask, space, n_random, rng)
    matched = matched_masks(mask, space, levels[1:], n_matched, rng) if n_matched and levels is not None else None
    return random, nothing if matched is None else matched


def _frames(
    masks: Mapping[str, NDArray[np.bool_]],
    evaluations: Mapping[str, Any],
    baseline: Items,
    results: Sequence[tuple[Items, int, int]],
    n_bootstrap: int,
    level: float,
    random_state: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    import pandas as pd

    rows, draws = [], []
    for (name, mask), (items, n_random, _) in zip(masks.items(), results):
        for evaluation, scores in items.items():
            change = scores - baseline[evaluation]
            effects = change.mean(axis=1)
            rng = np.random.default_rng(random_state)  # the same items in every row: rows can be compared
            low, high = bootstrap_mean(change[0], n_bootstrap, level, rng)
            worse = -1 if getattr(evaluations[evaluation], "higher_is_better", True) else 1
            row = {
                "network": name, "evaluation": evaluation, "size": int(mask.sum()),
                "baseline": baseline[evaluation].mean(), "lesioned": scores[0].mean(),
                "effect": effects[0], "effect_low": low, "effect_high": high,
                "harm": worse * effects[0], "harm_low": min(worse * low, worse * high),
                "harm_high": max(worse * low, worse * high),
            }  # fmt: skip
            controls = {"random": effects[1 : 1 + n_random], "matched": effects[1 + n_random :]}
            for control, values in controls.items():
                row |= _against(effects[0], values, control)
                draws += [(name, evaluation, control, i, v) for i, v in enumerate(values)]
            rows.append(row)
    frame = pd.DataFrame(rows)
    for control in ("random", "matched"):
        frame[f"q_{control}"] = benjamini_hochberg(frame[f"p_{control}"])
    return frame, pd.DataFrame(draws, columns=["network", "evaluation", "control", "draw", "effect"])


def _against(effect: float, null: NDArray[np.float64], control: str) -> dict[str, float]:
    if not len(null):
        return {f"{control}_effect": np.nan, f"z_{control}": np.nan, f"p_{control}": np.nan}
    sd = null.std(ddof=1) if len(null) > 1 else 0.0
    # An equal effect must count as reached, also where its last bit differs between passes.
    reached = (np.abs(null) >= np.abs(effect) * (1 - 1e-6)).sum()
    return {
        f"{control}_effect": float(null.mean()),
        f"z_{control}": float((effect - null.mean()) / sd) if sd > 0 else np.nan,
        f"p_{control}": float((reached + 1) / (len(null) + 1)),
    }


def _packed(kept: tuple[Items, int, int]) -> Parcel:
    """What was measured of a network, for other ranks."""
    items, *counts = kept
    return Parcel({f"{i}": torch.from_numpy(values) for i, values in enumerate(items.values())}, counts)


def _unpacked(parcel: Parcel, evaluations: Mapping[str, Any]) -> tuple[Items, int, int]:
    items = {name: parcel.tensors[f"{i}"].numpy() for i, name in enumerate(evaluations)}
    n_random, n_matched = parcel.record
    return items, int(n_random), int(n_matched)


def _digest(masks: Mapping[str, NDArray[np.bool_]], evaluations: Mapping[str, Any], **settings: Any) -> str:
    """What makes a table the same: settings, networks, what is read and scored."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, mask in masks.items():
        digest.update(name.encode() + np.packbits(mask).tobytes())
    for name, evaluation in evaluations.items():
        digest.update(name.encode())
        if isinstance(evaluation, TokenEvaluation):
            digest.update(evaluation.ids.numpy().tobytes() + evaluation.scored.numpy().tobytes())
            digest.update(evaluation.score.encode())
    return digest.hexdigest()


class _Store:
    """Finished networks of a table, one file each, in a folder that knows which table it belongs to."""

    def __init__(
        self, folder: Path, masks: Mapping[str, NDArray[np.bool_]], evaluations: Mapping[str, Any],
        settings: Mapping[str, Any], baseline: Items,
    ) -> None:  # fmt: skip
        self.folder, self.evaluations = folder, list(evaluations)
        means = {k: float(v.mean()) for k, v in baseline.items()}
        record = {"table": _digest(masks, evaluations, **settings), "baseline": means}
        path = folder / "lesions.json"
        settle(folder)
        refuse_other(folder, "lesions")
        if not path.exists():
            with transaction(folder) as new:  # from now on what is written here joins its checksums
                write_json(new / path.name, record, seal=True, indent=2)
            return
        before = read_json(path, anew=f"remove {folder}, and measure the lesions again")
        found = before.get("baseline")
        known: dict[str, Any] = found if isinstance(found, dict) else {}
        near = [isinstance(n := known.get(k), float) and np.isclose(n, v, rtol=1e-5) for k, v in means.items()]
        if before.get("table") != record["table"] or not all(near):
            raise InputError(f"out={str(folder)!r} holds another lesion table (other model, networks or settings)")

    def _path(self, k: int) -> Path:
        return self.folder / f"network-{k:04d}.safetensors"

    def read(self, k: int) -> tuple[Items, int, int] | None:
        """What was measured of network `k`, or None; what is damaged is measured again, and that is said."""
        path = self._path(k)
        if not path.exists():
            return None
        try:
            with reading(self.folder) as files, clear_damage(path, "what was measured of a network"):
                tensors = files.tensors(path.name)
                n_random, n_matched = (int(n) for n in tensors.pop("controls"))
                return {name: tensors[f"{i}"] for i, name in enumerate(self.evaluations)}, n_random, n_matched
        except DamagedError as error:
            warnings.warn(f"{error}: it is measured again", UserWarning, stacklevel=3)
            return None

    def write(self, k: int, items: Items, n_random: int, n_matched: int) -> None:
        """Keep what was measured; whole or not at all."""
        tensors = {f"{i}": items[name] for i, name in enumerate(self.evaluations)}
        write_tensors(self._path(k), {**tensors, "controls": np.array([n_random, n_matched])})
