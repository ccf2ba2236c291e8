"""The demo brain: a small trained model that ships with llmbrain, its stimuli with events, and its scores."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmbrain._validation import InputError, check_option, check_range, check_whole
from llmbrain.datasets.abilities import ABILITIES, Example, draw_example
from llmbrain.datasets.scoring import score_examples

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from llmbrain.scanning import Stimulus

DESIGNS = ("mixed", "block", "event")
# Calibration text comes from the training side of the split, held-out text from lines that training never saw.
SIDES = {"calibration": "train", "heldout": "heldout"}


def demo_folder(experts: int = 0) -> Path:
    """The folder with the demo brain's files: inside the installed package, or `data/demo` of a source tree.

    With `experts`, of the mixture of so many experts a layer (``data/demo_experts``).
    """
    here, name = Path(__file__).resolve(), "demo_experts" if experts else "demo"
    places = (here.parent / f"{name}_files", here.parents[2] / "data" / name)
    for folder in places:
        if (folder / "model.safetensors").is_file():
            return folder
    again = f" --experts {experts}" if experts else ""
    raise FileNotFoundError(
        f"the demo brain is neither in {places[0]} nor in {places[1]}: reinstall llmbrain, or train it anew with "
        f"`python data/build_demo.py{again}`"
    )


def load_demo(experts: int = 0) -> Demo:
    """Load the demo brain: a Llama of 4 layers x 512 neurons that knows eight abilities.

    Parameters
    ----------
    experts : {0, 8}
        8: the mixture of experts instead, a Mixtral of 4 layers x 8 experts x 128 neurons, two of which a token visits.

    Returns
    -------
    Demo
        Model (float32, CPU, evaluation mode), tokenizer, stimuli and scores. Nothing is downloaded.

    Raises
    ------
    FileNotFoundError
        If the files are missing from the installation.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llmbrain.hooks.text import evaluation_mode

    folder = demo_folder(check_option("experts", experts, (0, 8)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", local_files_only=True)
    return Demo(evaluation_mode(model), AutoTokenizer.from_pretrained(folder, local_files_only=True))


@dataclass
class Demo:
    """A model whose functions are known, with what is needed to examine it.

    Attributes
    ----------
    model : LlamaForCausalLM, or MixtralForCausalLM
        4 layers x 512 neurons, or x 8 experts x 128 neurons; context of 256 tokens.
    tokenizer : PreTrainedTokenizerFast
        One token per character; ``tokenizer(text)`` puts ``<s>`` before the text, as Llama's tokenizer does.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast

    @property
    def abilities(self) -> tuple[str, ...]:
        """Names of the abilities; they are also the conditions (`trial_type`) of the stimuli."""
        return ABILITIES

    def texts(
        self,
        split: str = "calibration",
        abilities: Sequence[str] | str | None = None,
        *,
        n: int = 32,
        n_tokens: int = 256,
        design: str = "mixed",
        weights: Mapping[str, float] | None = None,
        block_lines: int = 8,
        seed: int = 0,
    ) -> list[Stimulus]:
        """Make stimuli: texts of whole lines, with their events.

        Parameters
        ----------
        split : {"calibration", "heldout"}
            Lines from the training side of the split, or lines that training never saw.
        abilities : sequence of str or str, optional
            Which abilities occur; default all.
        n : int
            Number of texts (runs).
        n_tokens : int
            Largest length of a text in tokens, ``<s>`` included; a text ends with its last whole line. The model's
            context is 256: longer texts are scanned in blocks.
        design : {"mixed", "block", "event"}
            ``"mixed"``: the abilities take turns line by line in random order, one event a line. ``"block"``: blocks of
            `block_lines` lines of one ability, one event a block. ``"event"``: lines as in ``"mixed"``, but an event
            covers the answer only (its newline included) and prompts are baseline.
        weights : mapping of str to float, optional
            Relative frequency (in lines or blocks) of each ability, drawn independently. Default: every ability comes
            once before any comes again.
        block_lines : int
            Lines in a block.
        seed : int
            Same arguments, same texts.

        Returns
        -------
        list of Stimulus
            Each with `.name` and `.events`: onset and duration in tokens (``<s>`` is token 0), trial_type.

        Raises
        ------
        InputError
            For an unknown split, design or ability, weights that do not fit, or an `n_tokens` too short for a line.
        """
        from llmbrain.scanning import Stimulus

        check_option("split", split, SIDES)
        check_option("design", design, DESIGNS)
        names = self._names(abilities)
        for parameter, value in (("n", n), ("n_tokens", n_tokens), ("block_lines", block_lines)):
            check_whole(parameter, value, 1)
        if weights is not None:
            for name, weight in weights.items():
                check_option("weights: ability", name, names)
                check_range(f"weights[{name!r}]", weight, 0)
            if sum(weights.values()) <= 0:
                raise InputError(f"weights={dict(weights)!r} must have at least one ability above 0")
        n_lines = block_lines if design == "block" else 1
        stimuli = []
        for run in range(n):
            rng = random.Random(f"{split}-{design}-{seed}-{run}")
            segments, used = [], 1  # <s>
            for ability in _turns(names, weights, rng):
                lines = [draw_example(ability, SIDES[split], rng) for _ in range(n_lines)]
                length = sum(len(line.text) for line in lines)  # one token a character
                if used + length > n_tokens:
                    break
                segments += _segments(lines, design)
                used += length
            if not segments:
                raise InputError(f"n_tokens={n_tokens} is too short: {n_lines} line(s) of {ability} take {length + 1}")
            name = f"{split}-{design}-seed{seed}-run{run + 1:02d}"
            stimuli.append(Stimulus.from_segments(segments, self.tokenizer, name))
        return stimuli

    def examples(
        self, split: str = "heldout", abilities: Sequence[str] | str | None = None, *, n: int = 200, seed: int = 0
    ) -> list[Example]:
        """Draw `n` single lines of each ability (prompt and answer apart), as the scores use them."""
        check_option("split", split, SIDES)
        check_whole("n", n, 1)
        lines = []
        for name in self._names(abilities):
            rng = random.Random(f"score-{split}-{seed}-{name}")
            lines += [draw_example(name, SIDES[split], rng) for _ in range(n)]
        return lines

    def scores(
        self, model: PreTrainedModel | None = None, *, n: int = 200, seed: int = 0, split: str = "heldout"
    ) -> pd.DataFrame:
        """Exact-answer accuracy and answer loss of each ability, from the same lines.

        Parameters
        ----------
        model : PreTrainedModel, optional
            Any causal model over the demo tokenizer (pruned, lesioned, on any device). Default: the demo model.
        n : int
            Lines per ability, drawn with replacement.
        seed : int
            Which lines; the same seed compares models on the same lines.
        split : {"heldout", "calibration"}
            Side of the split.

        Returns
        -------
        DataFrame, index ability
            ``accuracy`` (share of lines whose greedy answer is exactly right, newline included) and ``loss`` (nats per
            answer token, averaged within a line, then over lines).
        """
        import pandas as pd

        lines = self.examples(split, n=n, seed=seed)
        correct, loss = score_examples(self.model if model is None else model, self.tokenizer, lines)
        table = pd.DataFrame({"ability": [line.ability for line in lines], "accuracy": correct, "loss": loss})
        return table.groupby("ability", sort=False).mean()

    def ability_accuracy(
        self, model: PreTrainedModel | None = None, *, n: int = 200, seed: int = 0, split: str = "heldout"
    ) -> dict[str, float]:
        """Exact-answer accuracy of each ability; see `scores`."""
        accuracy = self.scores(model, n=n, seed=seed, split=split)["accuracy"]
        return {str(ability): float(share) for ability, share in accuracy.items()}

    def ability_loss(
        self, model: PreTrainedModel | None = None, *, n: int = 200, seed: int = 0, split: str = "heldout"
    ) -> dict[str, float]:
        """Mean loss on the answer of each ability, in nats per token; see `scores`."""
        loss = self.scores(model, n=n, seed=seed, split=split)["loss"]
        return {str(ability): float(nats) for ability, nats in loss.items()}

    def _names(self, abilities: Sequence[str] | str | None) -> list[str]:
        """The abilities asked for, checked."""
        names = [abilities] if isinstance(abilities, str) else list(ABILITIES if abilities is None else abilities)
        if not names:
            raise InputError(f"abilities={abilities!r} is empty: name at least one of {', '.join(ABILITIES)}")
        return [check_option("abilities", name, ABILITIES) for name in names]


def _turns(names: list[str], weights: Mapping[str, float] | None, rng: random.Random) -> Iterator[str]:
    """Whose turn it is, without end: shuffled rounds, or independent draws by weight."""
    while True:
        if weights is None:
            yield from rng.sample(names, len(names))
        else:
            yield rng.choices(list(weights), list(weights.values()))[0]


def _segments(lines: list[Example], design: str) -> list[tuple[str, str | None]]:
    """Cut lines into pieces of text with the condition that each belongs to."""
    ability = lines[0].ability
    if design == "event":
        return [piece for line in lines for piece in ((line.prompt, None), (f"{line.answer}\n", ability))]
    return [("".join(line.text for line in lines), ability)]
