"""A model, its texts, and how a row is measured."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import llmbrain as lb
from llmbrain.anatomy.families import anatomy
from llmbrain.anatomy.units import NEURONS, Units
from llmbrain.evaluation.perplexity import next_token_losses
from llmbrain.hooks.text import as_windows, evaluating
from llmbrain.pruning.calibrate.windows import mixed_windows, signals_of_windows, write_windows
from llmbrain.pruning.criteria.base import Material, register
from llmbrain.pruning.criteria.published import Published
from llmbrain.pruning.planner import Planner
from llmbrain.stats.nulls import phase_randomize
from real_parts.rows import Row, Task, written_beside

WINDOW = 512
K = 32
SCANNED = 8192  # tokens from which networks are found
AT_ONCE = 4  # windows in a forward pass of a test on a GPU; one by one is faster on a CPU
MASSIVE = 1000.0  # times the median size of a layer's neurons
TUNED = 256  # windows that LoRA trains on


def wikitext(path: Path) -> str:
    """WikiText-2's word-level form as ordinary text; without `<unk>`, which a real tokenizer reads as easy text."""
    text = re.sub(r" ?<unk>", "", path.read_text(encoding="utf-8"))
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([,.;:!?)\]'])", r"\1", text)
    return re.sub(r"([(\[]) ", r"\1", text)


@register("published, known", "scans", standardize=False, allocation="global")
class Known(Published):
    """The published rule with scores that were found before."""

    known: list[np.ndarray[Any, Any]]

    def prepare(self, material: Material, units: Units) -> None:
        """As they were found."""
        self._scores[NEURONS] = self.known


class Tests:
    """Windows of every test text with the bytes that they are, and PIQA."""

    def __init__(self, data: Path, model: Any, tokenizer: Any, tokens: int) -> None:
        stories = json.loads((data / "corpora/tinystories-1000.json").read_text(encoding="utf-8"))
        plays = (data / "corpora/tinyshakespeare.txt").read_text(encoding="utf-8")
        texts = {
            "WikiText-2": wikitext(data / "corpora/wikitext2-test.tokens"),
            "TinyStories": stories[700:],
            "tinyshakespeare": plays[len(plays) // 2 :],
        }
        n = tokens // WINDOW
        self.windows = {name: as_windows(model, tokenizer, text, WINDOW, n) for name, text in texts.items()}
        for name, windows in self.windows.items():
            if len(windows) < n:
                raise SystemExit(f"{name} fills {len(windows)} windows, {n} are needed")
        self.n_bytes = {
            name: sum(len(tokenizer.decode(row[1:]).encode()) for row in windows)
            for name, windows in self.windows.items()
        }
        self.questions = _questions(data / "corpora", tokenizer)

    def scores(self, model: Any, device: torch.device) -> dict[str, dict[str, float]]:
        """Perplexity a token with the standard error of its mean loss over windows, and bits a byte."""
        found = {}
        for name, windows in self.windows.items():
            losses: list[float] = []
            with evaluating(model):
                for ids in windows.split(1 if device.type == "cpu" else AT_ONCE):
                    losses += next_token_losses(model, ids).mean(dim=1).tolist()
            values = np.array(losses)
            found[name] = {
                "perplexity": math.exp(values.mean()), "se_nats": float(values.std(ddof=1) / math.sqrt(len(values))),
                "bits_a_byte": float(values.sum() * (WINDOW - 1) / math.log(2) / self.n_bytes[name]),
            }  # fmt: skip
        return found

    def piqa(self, model: Any, device: torch.device) -> dict[str, float]:
        """Shares of PIQA's 1,838 questions that are answered rightly, counted as lm-evaluation-harness does."""
        items = [(q, a, *ids) for q, pair in enumerate(self.questions) for a, ids in enumerate(pair["answers"])]
        items.sort(key=lambda item: len(item[2]))
        sums = np.zeros((len(self.questions), 2))
        with evaluating(model):
            while items:
                longest = len(items[-1][2])
                part, items = items[-max(1, 4096 // longest) :], items[: -max(1, 4096 // longest)]
                ids = torch.zeros(len(part), longest, dtype=torch.long)
                for i, item in enumerate(part):  # padded on the right: what is padded is seen by nothing
                    ids[i, : len(item[2])] = torch.tensor(item[2])
                states = model.base_model(input_ids=ids.to(device)).last_hidden_state
                where = [(i, t) for i, item in enumerate(part) for t in range(item[3] - 1, len(item[2]) - 1)]
                row, at = (torch.tensor(x, device=device) for x in zip(*where))
                logits = model.get_output_embeddings()(states[row, at]).float()
                target = torch.tensor([part[i][2][t + 1] for i, t in where], device=device)
                values = -F.cross_entropy(logits, target, reduction="none").double().cpu().numpy()
                for (i, _), value in zip(where, values):
                    sums[part[i][0], part[i][1]] += value
        right = np.array([pair["label"] for pair in self.questions])
        lengths = np.array([pair["lengths"] for pair in self.questions])
        return {"acc": float((sums.argmax(1) == right).mean()),
                "acc_norm": float(((sums / lengths).argmax(1) == right).mean())}  # fmt: skip


def _questions(folder: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """PIQA, tokenized: the tokens of question and answer, and how many are the question's."""
    if not (folder / "piqa-valid.jsonl").is_file():
        return []
    labels = [int(x) for x in (folder / "piqa-valid-labels.lst").read_text().split()]
    lines = (folder / "piqa-valid.jsonl").read_text(encoding="utf-8").splitlines()
    found = []
    for line, label in zip(lines, labels):
        entry = json.loads(line)
        before = f"Question: {entry['goal']}\nAnswer:"
        n = len(tokenizer(before, add_special_tokens=False).input_ids)
        answers = [entry["sol1"], entry["sol2"]]
        ids = [tokenizer(f"{before} {answer}", add_special_tokens=False).input_ids for answer in answers]
        found.append({"answers": [(x, n) for x in ids], "label": label, "lengths": [len(a) for a in answers]})
    return found


class Bench:
    """Measures rows; what rows share lies in a folder, by kind, calibration tokens and draw.

    Parameters
    ----------
    made : Path
        The folder.
    """

    def __init__(self, data: Path, path: Path, test_tokens: int, made: Path) -> None:
        self.model, self.tokenizer = lb.load_model(path)
        self.device = torch.device("cpu")
        self.text = wikitext(data / "corpora/wikitext2-valid.tokens")
        self.tests = Tests(data, self.model, self.tokenizer, test_tokens)
        self.every = as_windows(self.model, self.tokenizer, self.text, WINDOW, None)
        self.made = made

    def to(self, device: str) -> None:
        """Go on on this device."""
        self.device = torch.device(device)
        self.model.to(self.device)

    # -- what rows share ----------------------------------------------------------------------------------------------

    def shared(self, kind: str, tokens: int, draw: int) -> Any:
        """What was found before, or is found now."""
        name = re.sub(r"\W+", "-", f"{kind} {tokens} {draw}")
        file = self.made / f"{name}.pt"
        if not file.is_file():
            found = {"own": self._own, "published": self._published}.get(kind, self._networks)(kind, tokens, draw)
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(found, part := file.with_name(f"{name}.{os.getpid()}"))
            part.replace(file)
        return torch.load(file, weights_only=True)

    def _own(self, kind: str, tokens: int, draw: int) -> torch.Tensor:
        return write_windows(self.model, self.tokenizer, tokens // WINDOW, WINDOW, random_state=draw)

    def _published(self, kind: str, tokens: int, draw: int) -> list[torch.Tensor]:
        planner = Planner(self.model, "published", self.calibration(tokens, draw), random_state=draw)
        return [torch.as_tensor(scores) for scores in planner.scorer.dense_scores()]

    def _networks(self, kind: str, tokens: int, draw: int) -> torch.Tensor:
        """Maps of a group ICA of a part of the calibration windows, or of their phase-randomized signals."""
        windows = self.calibration(tokens, draw)[: SCANNED // WINDOW]
        runs: list[Any] = signals_of_windows(self.model, anatomy(self.model), windows, ("neuron",))
        if "null" in kind:
            rng = np.random.default_rng(draw)
            runs = [phase_randomize(run.data(), rng, shared=False) for run in runs]
        ica = lb.GroupICA(K, random_state=0, device=str(self.device), progress=False).fit(runs)
        return torch.as_tensor(ica.components_)

    def calibration(self, tokens: int, draw: int, own: str = "") -> torch.Tensor:
        """Windows to calibrate on; another draw takes others."""
        n = tokens // WINDOW
        text = self.every[n * draw : n * (draw + 1)]
        if len(text) < n:
            raise SystemExit(f"the text fills {len(self.every)} windows, {n * (draw + 1)} are needed")
        if not own:
            return text
        written = self.shared("own", written_beside(own, tokens), draw)
        parts = {"half": (text[: n // 2], written[: n - n // 2]), "beside": (text, written[: -(-n // 2)]),
                 "as much": (text, written), "twice": (text, written), "only": (text[:0], written)}[own]  # fmt: skip
        return mixed_windows(*parts, random_state=draw)

    # -- rows ---------------------------------------------------------------------------------------------------------

    def dense(self) -> dict[str, Any]:
        """Scores of the whole model."""
        return {**self.tests.scores(self.model, self.device), "PIQA": self.tests.piqa(self.model, self.device)}

    def planner(self, row: Row, tokens: int, draw: int) -> Planner:
        """What makes the plans of a row, at any ratio."""
        method = row.method
        if method == "published":
            Known.known = [scores.numpy() for scores in self.shared("published", tokens, draw)]
            method = "published, known"
        networks = None
        if row.networks:
            space = lb.NeuronSpace(anatomy(self.model).widths)
            maps = self.shared(f"networks {row.networks}", tokens, draw).numpy()
            networks = lb.FunctionalNetworks(maps, space)
        windows = self.calibration(tokens, draw, row.own)
        return Planner(self.model, method, windows, networks=networks, token_balance=row.balance, random_state=draw)

    def plan(self, row: Row, planner: Planner, ratio: float, tokens: int, draw: int) -> Any:
        """One plan."""
        if row.widths_of:
            other = Row(row.widths_of, row.widths_of)
            widths = self.plan(other, self.planner(other, tokens, draw), ratio, tokens, draw).widths
            return planner.plan(ratio, allocation=list(widths))
        n = len(anatomy(self.model).layers)
        protect = None if row.method == "published" else [0, 1, 2, n - 2, n - 1] if row.ends else []
        plan = planner.plan(ratio, allocation=row.allocation, protect=protect)
        return self._spared(plan, row.spare, draw) if row.spare else plan

    def _spared(self, plan: Any, spare: str, draw: int) -> Any:
        """The plan without its neurons of massive activation, or without as many others of the same layers."""
        rng, kept = np.random.default_rng(draw), list(plan.kept)
        for i, loud in enumerate(self._massive()):
            gone = np.setdiff1d(np.arange(plan.widths_before[i]), kept[i])
            back = np.intersect1d(gone, loud)
            if spare == "others":
                back = rng.choice(np.setdiff1d(gone, loud), len(back), replace=False)
            kept[i] = np.union1d(kept[i], back)
        return replace(plan, kept=tuple(kept))

    def _massive(self) -> list[np.ndarray[Any, Any]]:
        """Neurons of each layer that reach `MASSIVE` times its median size somewhere in four windows."""
        body = anatomy(self.model)
        runs = signals_of_windows(self.model, body, self.every[:4], ("neuron",))
        size = np.abs(np.concatenate([run.data() for run in runs]))
        layers = np.split(size, np.cumsum(body.widths)[:-1], axis=1)
        return [np.flatnonzero(layer.max(0) > MASSIVE * np.median(layer)) for layer in layers]

    def rows(self, task: Task, piqa: Callable[[Task, float], bool]) -> Iterator[dict[str, Any]]:
        """Rows of a task, as they are done."""
        row = task.row
        began = time.perf_counter()
        planner = None if row.method == "nothing" else self.planner(row, task.tokens, task.draw)
        windows = self.calibration(task.tokens, task.draw, row.own)
        for ratio in task.ratios:
            small, widths = copy.deepcopy(self.model), anatomy(self.model).widths
            if planner is not None:
                plan = self.plan(row, planner, ratio, task.tokens, task.draw)
                text = {"calibration": windows, "max_windows": len(windows)} if row.compensate else {}
                small = lb.prune(self.model, plan, tokenizer=self.tokenizer, compensate=row.compensate,
                                 propagation=row.propagation, verify=self.device.type == "cpu", **text)  # fmt: skip
                widths = plan.widths
            if row.tune:
                some = self.every[-TUNED:]
                small = lb.recover(small, self.tokenizer, some, steps=row.tune, random_state=0, inplace=True)[0]
            planned = time.perf_counter() - began
            scores: dict[str, Any] = self.tests.scores(small, self.device)
            if piqa(task, ratio) and self.tests.questions:
                scores["PIQA"] = self.tests.piqa(small, self.device)
            del small
            yield {
                "label": row.label, "ratio": ratio, "draw": task.draw, "tokens": task.tokens, "scores": scores,
                "seconds": round(planned, 1), "widths": [int(w) for w in widths],
            }  # fmt: skip
            began = time.perf_counter()
