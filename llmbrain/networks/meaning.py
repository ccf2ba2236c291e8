"""What a network is about, in a form a person can read: the tokens that drive it, its conditions, its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llmbrain._validation import InputError, check_whole
from llmbrain.networks.functional import FunctionalNetworks, Network
from llmbrain.networks.localizer import Localizer, responses, time_courses_of

if TYPE_CHECKING:
    import pandas as pd

    from llmbrain.scanning.scans import Scan


def top_tokens(
    network: Network,
    scans: Sequence[Scan],
    n: int = 10,
    *,
    context: int = 8,
    distance: int = 8,
    sign: int = 1,
) -> pd.DataFrame:
    """The tokens at which a network is most active, with their context.

    The first token of a context block (the attention sink) is none of them: ICA was not fitted there either.

    Parameters
    ----------
    network : Network
        As ``networks[k]`` gives it.
    scans : list of Scan
        Their tokens are shown; time courses are those of the network's group if they fit, else by dual regression.
    n : int
        How many.
    context : int
        Tokens shown on either side.
    distance : int
        Two tokens of one run are at least so far apart.
    sign : {1, -1}
        Most active, or most suppressed.

    Returns
    -------
    DataFrame
        run, position (token in the run), value (SD from the mean over all such tokens), token, before, after, condition
        (None where no event is on).
    """
    import pandas as pd

    check_whole("n", n, 1)
    if not isinstance(network, Network):
        raise InputError(f"network of type {type(network).__name__} must be one Network: pass networks[k]")
    courses = time_courses_of(network.group, scans)
    joined = np.concatenate([course[:, network.index] for course in courses])
    counts = np.concatenate([responses(scan) for scan in scans])
    counts = counts if counts.any() else ~counts
    spread = joined[counts].std()
    values = (joined - joined[counts].mean()) / (spread if spread > 0 else 1)
    run_of = np.repeat(np.arange(len(courses)), [len(c) for c in courses])
    start = np.cumsum([0, *(len(c) for c in courses)])
    rows: list[dict[str, Any]] = []
    order = np.argsort(-sign * values, kind="stable")
    for i in order[counts[order]]:
        run = int(run_of[i])
        at = int(i - start[run])
        if any(r["run"] == run and abs(r["position"] - at) < distance for r in rows):
            continue
        tokens = list(scans[run].tokens)
        rows.append(
            {
                "run": run,
                "position": at,
                "value": float(values[i]),
                "token": _text(tokens[at : at + 1]),
                "before": _text(tokens[max(0, at - context) : at]),
                "after": _text(tokens[at + 1 : at + 1 + context]),
                "condition": _condition_at(scans[run], at),
            }
        )
        if len(rows) == n:
            break
    return pd.DataFrame(rows)


def describe(
    networks: FunctionalNetworks | Network,
    scans: Sequence[Scan] | None = None,
    *,
    localizer: Localizer | None = None,
    stability: pd.DataFrame | None = None,
    n_tokens: int = 5,
    alpha: float = 0.05,
) -> pd.DataFrame:
    """One readable row a network: size, layers, condition, tokens, stability.

    Parameters
    ----------
    networks : FunctionalNetworks or Network
        One network makes one row.
    scans : list of Scan, optional
        For the tokens.
    localizer : Localizer, optional
        Over these networks; the contrast with the largest ``|t|`` is named, where ``p_fwe <= alpha``.
    stability : DataFrame, optional
        From `match_networks` or `split_half` with these networks as `a`: the ``|r|`` of each network's partner.

    Returns
    -------
    DataFrame
        Indexed by network name: size, share, layers (text: where 80 % of its neurons are), then, for what was given,
        condition, t, p_fwe, tokens, r.
    """
    import pandas as pd

    some = [networks] if isinstance(networks, Network) else list(networks)
    networks = networks.group if isinstance(networks, Network) else networks
    rows = []
    for network in some:
        k = network.index
        row: dict[str, Any] = {
            "network": network.name,
            "size": network.size,
            "share": network.size / networks.n_neurons,
        }
        if networks.space is not None:
            row["layers"] = _layers(networks.space.layer_of[network.mask], networks.space.n_layers)
        if localizer is not None:
            if localizer.names != networks.names:
                raise InputError("localizer is not over these networks: pass networks= to localizer()")
            best = int(np.argmax(np.abs(localizer.t[:, k])))
            p = float(localizer.p_fwe[best, k])
            sign = "" if localizer.t[best, k] > 0 else "not "
            row["condition"] = sign + localizer.contrasts[best] if p <= alpha else ""
            row |= {"t": float(localizer.t[best, k]), "p_fwe": p}
        if scans is not None:
            found = top_tokens(network, scans, n=4 * n_tokens)["token"]
            row["tokens"] = " ".join(repr(t) for t in list(dict.fromkeys(found))[:n_tokens])
        if stability is not None:
            r = stability.loc[stability["network_a"] == k, "r"]
            row["r"] = float(abs(r.iloc[0])) if len(r) else np.nan
        rows.append(row)
    return pd.DataFrame(rows).set_index("network")


def _text(tokens: Sequence[str]) -> str:
    """Tokens as one text; half a surrogate pair, which no table can hold, becomes a question mark."""
    return "".join(tokens).encode("utf-8", "replace").decode("utf-8")


def _condition_at(scan: Any, token: int) -> str | None:
    events = scan.events
    on = (events["onset"] <= token) & (token < events["onset"] + events["duration"])
    kinds = list(dict.fromkeys(events["trial_type"][on].astype(str)))
    return "+".join(kinds) if kinds else None


def _layers(layers: NDArray[np.int64], n_layers: int) -> str:
    """The fewest consecutive layers that hold 80 % of the neurons, as text."""
    if not len(layers):
        return ""
    counts = np.bincount(layers, minlength=n_layers)
    total = np.concatenate([[0], np.cumsum(counts)])
    for width in range(1, n_layers + 1):
        held = total[width:] - total[:-width]
        if held.max() >= 0.8 * len(layers):
            first = int(held.argmax())
            return str(first) if width == 1 else f"{first}-{first + width - 1}"
    return f"0-{n_layers - 1}"
