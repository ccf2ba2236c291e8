"""Stimuli for real language models: eight kinds of text, made here or in the public domain, with events.

What a functional localizer shows people in the scanner, for a model: prose, dialogue, code, arithmetic, lists, names,
other languages, and repeated text. Nothing is downloaded. Prose and other languages are old books, of which some
passages are held out; everything else is generated from a seed, of which each side has its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch

from llmbrain._validation import InputError, check_option, check_whole
from llmbrain.datasets.passages import LANGUAGES, PROSE

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from llmbrain.scanning import Stimulus

Source: TypeAlias = "Callable[[str, random.Random], list[Iterator[str]]]"  # side -> pieces of text, taken in turn

SIDES = ("calibration", "heldout")
HELD_OUT_ONE_IN = 3  # passages
REPEATED = 12  # words of a text that is said again and again

FIRST = (
    "Maria", "James", "Aisha", "Peter", "Elena", "Samuel", "Ingrid", "Carlos", "Hannah", "Omar", "Lucy", "Viktor",
    "Priya", "George", "Sofia", "Martin", "Chen", "Robert", "Fatima", "David", "Olga", "Thomas", "Amara", "Henry",
    "Yuki", "Daniel", "Clara", "Ahmed", "Rosa", "William",
)  # fmt: skip
LAST = (
    "Lopez", "Smith", "Keller", "Johnson", "Petrov", "Okafor", "Tanaka", "Brown", "Rossi", "Andersen", "Khan",
    "Miller", "Dubois", "Silva", "Novak", "Wilson", "Schmidt", "Garcia", "Cohen", "Murphy", "Ivanov", "Baker",
    "Nguyen", "Evans", "Costa", "Larsen", "Patel", "Turner", "Fischer", "Reed",
)  # fmt: skip
TOWNS = (
    "Boston", "Lyon", "Kyoto", "Dublin", "Lima", "Oslo", "Cairo", "Leeds", "Madrid", "Chicago", "Vienna", "Nairobi",
    "Toronto", "Lisbon",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
EVENTS = ("market", "concert", "match", "lecture", "party", "exhibition", "picnic", "rehearsal", "meeting", "fair")
CHORES = ("finish the report", "fix the bicycle", "visit my aunt", "clean the kitchen", "feed the horses", "pack a bag",
          "call the plumber", "take the dog out", "return the books", "buy some bread")  # fmt: skip
THINGS = (
    "lantern", "river", "basket", "window", "violin", "garden", "hammer", "pillow", "ticket", "mirror", "bridge",
    "candle", "ladder", "pepper", "blanket", "saddle", "harbor", "button", "kettle", "ribbon", "orchard", "pencil",
    "tunnel", "feather", "marble", "anchor", "cellar", "pocket", "trumpet", "curtain",
)  # fmt: skip
GOODS = ("apples", "brown rice", "olive oil", "onions", "black tea", "wholemeal bread", "butter", "tomatoes", "cheese",
         "eggs", "dried beans", "lemons", "honey", "carrots", "milk", "paper towels", "soap", "candles")  # fmt: skip
TASKS = ("Wash the windows", "Write to the landlord", "Pay the water bill", "Book the train", "Repair the gate",
         "Sort the photographs", "Water the plants", "Order new chairs", "Check the smoke alarm", "Sweep the yard",
         "Plan the menu", "Print the tickets", "Charge the batteries", "Label the boxes")  # fmt: skip
TITLES = ("Things to buy", "To do this week", "Packing list", "Agenda", "For the kitchen", "Before we leave")
FIELDS = ("price", "weight", "score", "length", "count", "total", "speed", "width", "age", "rate", "value", "size")


def _words(passages: Sequence[str]) -> Source:
    """Words of passages, a source each; after its last word a passage begins again."""

    def words(text: str) -> Iterator[str]:
        while True:
            yield from (f"{word} " for word in text.split())

    def sources(side: str, rng: random.Random) -> list[Iterator[str]]:
        held = [i % HELD_OUT_ONE_IN == HELD_OUT_ONE_IN - 1 for i in range(len(passages))]
        chosen = [text for text, out in zip(passages, held) if out == (side == "heldout")]
        return [words(text) for text in rng.sample(chosen, len(chosen))]

    return sources


def _made(generate: Callable[[random.Random], Iterator[str]], n: int = 1) -> Source:
    """Generated text from `n` sources."""
    return lambda side, rng: [generate(random.Random(rng.random())) for _ in range(n)]


def _dialogue(rng: random.Random) -> Iterator[str]:
    while True:
        a, b = rng.sample(FIRST, 2)
        day, event, chore, other = rng.choice(DAYS), rng.choice(EVENTS), *rng.sample(CHORES, 2)
        thing, hour = rng.choice(THINGS), rng.randint(2, 11)
        talk = [
            (f"Are you coming to the {event} on {day}?", f"I would love to, but I have to {chore} first."),
            ("How long will that take?", f"Not long. I could be there at {hour}, if you wait for me."),
            (f"Have you seen my {thing} anywhere?", f"You left it at the {event}, don't you remember?"),
            ("What did she say when you told her?", "Nothing at all. She just looked at me and laughed!"),
            (f"Could you {other} for me?", f"Again? I did that on {day}. It's your turn, {a}."),
            ("I'm sorry I'm so late.", f"Don't worry about it, {a}. We haven't started yet."),
            (f"Why don't we ask {rng.choice(FIRST)}?", "That's a good idea. Do you have the number?"),
            (f"You never told me about the {thing}!", "Didn't I? Well, it's a long story."),
        ]
        for question, answer in rng.sample(talk, 3):
            style = rng.randrange(3)
            if style == 0:
                yield f"{a}: {question}\n{b}: {answer}\n"
            elif style == 1:
                yield f'"{question}" asked {a}.\n"{answer}" said {b}.\n'
            else:
                yield f'"{question}"\n"{answer}"\n'


def _code(rng: random.Random) -> Iterator[str]:
    while True:
        a, b = rng.sample(FIELDS, 2)
        n, m, thing = rng.randint(2, 64), rng.randint(2, 9), rng.choice(THINGS)
        yield rng.choice((
            f"def mean_{a}(items):\n    total = 0\n    for item in items:\n        total += item.{a}\n"
            f"    return total / len(items)\n\n",
            f"class {thing.title()}:\n    def __init__(self, {a}, {b}={n}):\n        self.{a} = {a}\n"
            f"        self.{b} = {b}\n\n",
            f"for (int i = 0; i < {n}; i++) {{\n    if ({a}[i] > {b}) {{\n        {b} = {a}[i];\n    }}\n}}\n\n",
            f"SELECT {a}, {b} FROM {thing}s\nWHERE {a} > {n}\nORDER BY {b} DESC LIMIT {m};\n\n",
            f"def read_{thing}s(path):\n    with open(path) as file:\n        rows = [x.split(',') for x in file]\n"
            f"    return {{row[0]: float(row[{m}]) for row in rows if len(row) > {m}}}\n\n",
            f"const {a} = {thing}s\n  .filter((x) => x.{b} !== null)\n  .map((x) => x.{a} * {n});\n"
            f"console.log({a}.length);\n\n",
            f"try:\n    {a} = int(args[{m}])\nexcept (IndexError, ValueError):\n    {a} = {n}\nassert {a} >= 0\n\n",
            f"if __name__ == '__main__':\n    {thing} = make_{thing}({a}={n}, {b}=None)\n    print({thing}.{a})\n\n",
        ))  # fmt: skip


def _arithmetic(rng: random.Random) -> Iterator[str]:
    while True:
        a, b = rng.randint(2, 99), rng.randint(2, 99)
        c, d = rng.randint(2, 12), rng.randint(2, 12)
        yield rng.choice((f"{a} + {b} = {a + b}\n", f"{a + b} - {b} = {a}\n", f"{c} * {d} = {c * d}\n",
                          f"{c * d} / {d} = {c}\n"))  # fmt: skip


def _lists(rng: random.Random) -> Iterator[str]:
    while True:
        kind = rng.randrange(3)
        yield f"{rng.choice(TITLES)}:\n"
        for i, (good, task) in enumerate(zip(rng.sample(GOODS, rng.randint(4, 7)), rng.sample(TASKS, 7))):
            if kind == 0:
                yield f"- {rng.randint(2, 9)} {rng.choice(('kg of', 'bags of', 'boxes of'))} {good}\n"
            else:
                yield f"{f'{i + 1}.' if kind == 1 else '[ ]'} {task}\n"
        yield "\n"


def _names(rng: random.Random) -> Iterator[str]:
    while True:
        who = f"{rng.choice(FIRST)} {rng.choice(('', '', f'{rng.choice(LAST)[0]}. '))}{rng.choice(LAST)}"
        yield f"{who} {rng.choice(('of', 'from', 'in'))} {rng.choice(TOWNS)}, " if rng.random() < 0.3 else f"{who}, "


def _repetition(rng: random.Random) -> Iterator[str]:
    words = rng.sample(THINGS, REPEATED)
    while True:
        yield " ".join(words) + ".\n"


SOURCES: Mapping[str, Source] = {
    "prose": _words(PROSE), "dialogue": _made(_dialogue), "code": _made(_code), "arithmetic": _made(_arithmetic),
    "lists": _made(_lists), "names": _made(_names), "languages": _words(LANGUAGES),
    "repetition": _made(_repetition, 997),
}  # fmt: skip
CONDITIONS = tuple(SOURCES)
"""Names of the kinds of text; they are also the conditions (`trial_type`) of the stimuli."""


def condition_texts(
    tokenizer: PreTrainedTokenizerBase, condition: str, n: int = 8, *, n_tokens: int = 64, split: str = "calibration",
    seed: int = 0,
) -> list[str]:  # fmt: skip
    """`n` pieces of one kind of text, of about `n_tokens` tokens each, none the same as another.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast
        Counts the tokens.
    condition : str
        One of `CONDITIONS`.
    n, n_tokens : int
        How many pieces, and tokens of each.
    split : {"calibration", "heldout"}
        Other passages, other draws.
    seed : int
        Same arguments, same texts.

    Raises
    ------
    InputError
        For a condition or split that is not known, or a tokenizer without character offsets. Old books have an end: for
        more than about 20 pieces of 64 tokens (6 held out) the passages come again.
    """
    from llmbrain.hooks.text import encode

    check_option("condition", condition, CONDITIONS)
    check_option("split", split, SIDES)
    check_whole("n", n, 1)
    check_whole("n_tokens", n_tokens, 16)
    sources, texts = SOURCES[condition](split, random.Random(f"{condition}-{split}-{seed}")), []
    for i in range(n):
        source = sources[i % len(sources)]
        text = next(source)
        while True:
            _, spans, _ = encode(tokenizer, [text.rstrip()])[0]
            if spans is None:
                raise InputError(f"tokenizer={type(tokenizer).__name__} knows no character offsets: use a fast one")
            own = spans[spans[:, 1] > spans[:, 0]]
            if len(own) >= n_tokens:
                break
            for _ in range(max(1, (n_tokens - len(own)) // 24)):
                text += next(source)
        texts.append(text[: int(own[n_tokens - 1, 1])])
    return texts


def condition_runs(
    tokenizer: PreTrainedTokenizerBase, n: int = 16, *, conditions: Sequence[str] | None = None, n_tokens: int = 64,
    split: str = "calibration", seed: int = 0,
) -> list[Stimulus]:  # fmt: skip
    """A block design: runs in which every condition has one block, in an order drawn for each run.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast
        The one the runs will be scanned with.
    n : int
        Number of runs.
    conditions : sequence of str, optional
        Of `CONDITIONS`; default all.
    n_tokens : int
        Tokens of a block.
    split, seed
        As for `condition_texts`.

    Returns
    -------
    list of Stimulus
        Each with its events: onset and duration in tokens, trial_type.

    Raises
    ------
    InputError
        As `condition_texts`.
    """
    from llmbrain.scanning import Stimulus

    names = [check_option("conditions", name, CONDITIONS) for name in conditions or CONDITIONS]
    pieces = {k: condition_texts(tokenizer, k, n, n_tokens=n_tokens, split=split, seed=seed) for k in names}
    runs = []
    for i in range(n):
        order = random.Random(f"order-{split}-{seed}-{i}").sample(names, len(names))
        segments: list[tuple[str, str | None]] = [(f"{pieces[name][i].strip()}\n\n", name) for name in order]
        runs.append(Stimulus.from_segments(segments, tokenizer, f"{split}-seed{seed}-run{i + 1:02d}"))
    return runs


def condition_rows(
    tokenizer: PreTrainedTokenizerBase, condition: str, n: int = 8, *, n_tokens: int = 64, skip: int = 8,
    split: str = "heldout", seed: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Pieces of one kind of text as rows of tokens, and which of them count: what `TokenEvaluation` takes.

    Parameters
    ----------
    tokenizer, condition, n, n_tokens, split, seed
        As for `condition_texts`.
    skip : int
        Tokens at the start of each row that only give context. Of repeated text all of the first copy.

    Returns
    -------
    ids : int64 tensor ``(n, length)``
    scored : bool tensor ``(n, length)``

    Raises
    ------
    InputError
        As `condition_texts`.
    """
    from llmbrain.hooks.text import without_end

    check_whole("skip", skip, 1, n_tokens - 1)
    texts = condition_texts(tokenizer, condition, n, n_tokens=n_tokens, split=split, seed=seed)
    rows = [without_end(tokenizer, text) for text in texts]
    ids = torch.zeros(n, max(map(len, rows)), dtype=torch.long)
    scored = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        first = skip
        if condition == "repetition":
            first = max(skip, len(without_end(tokenizer, texts[i].split("\n")[0])))
        ids[i, : len(row)] = torch.tensor(row)
        scored[i, min(first, len(row) - 1) : len(row)] = True
    return ids, scored
