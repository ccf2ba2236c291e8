"""Texts for localizers: functions that have names, each beside a control of the same words or the same meaning.

All text is made here from a seed. Items alternate in blocks, so that a run holds both sides and each block is long
enough for what a model carries over from the one before to fade.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from llmbrain._validation import check_option, check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmbrain.scanning import Stimulus

Pair = tuple[str, str]  # an item of the condition, and one of its control

NAMES = ("Anna", "Peter", "Maria", "Thomas", "Laura", "David", "Sarah", "Michael", "Emma", "Daniel", "Julia", "Robert")
ROLES = ("the nurse", "the teacher", "the farmer", "the doctor", "the baker", "the driver", "the student",
         "the singer", "the judge", "the painter", "the guard", "the pilot")  # fmt: skip
THINGS = ("book", "letter", "key", "lamp", "coat", "box", "ticket", "bottle", "chair", "map", "clock", "ring")
PLACES = ("garden", "kitchen", "station", "office", "market", "library", "church", "harbour", "school", "forest")
STATES = ("open", "empty", "warm", "quiet", "clean", "dark", "ready", "full", "safe", "dry")
ITEMS = ("total", "count", "price", "length", "score", "index", "width", "speed", "level", "value")
ONES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
        "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen")  # fmt: skip
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# English, and the same in French: articles are in the noun.
NOUNS_2 = (("the dog", "le chien"), ("the cat", "le chat"), ("the child", "l'enfant"), ("the man", "l'homme"),
           ("the woman", "la femme"), ("the girl", "la fille"), ("the boy", "le garçon"),
           ("the king", "le roi"))  # fmt: skip
VERBS_2 = (("sees", "voit"), ("eats", "mange"), ("takes", "prend"), ("finds", "trouve"), ("wants", "veut"),
           ("buys", "achète"))  # fmt: skip
THINGS_2 = (("the bread", "le pain"), ("the apple", "la pomme"), ("the house", "la maison"), ("the book", "le livre"),
            ("the water", "l'eau"), ("the flower", "la fleur"), ("the door", "la porte"))  # fmt: skip
WHEN_2 = (("today", "aujourd'hui"), ("every day", "chaque jour"), ("in the morning", "le matin"),
          ("in the evening", "le soir"), ("in the city", "dans la ville"))  # fmt: skip


def _number(n: int) -> str:
    if n < 20:
        return ONES[n]
    return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")


def _code(rng: random.Random) -> Pair:
    """A small function, and a sentence that says the same."""
    a, b = rng.sample(ITEMS, 2)
    n = rng.randint(2, 30)
    kind = rng.randrange(3)
    if kind == 0:
        return (f"def add_{a}({b}):\n    {a} = {b} + {n}\n    return {a}\n\n",
                f"To get the {a}, take the {b}, add {n} to it, and give back the {a}.\n\n")  # fmt: skip
    if kind == 1:
        return (f"for {a} in range({n}):\n    if {a} > {b}:\n        print({a})\n\n",
                f"For each {a} up to {n}, if the {a} is more than the {b}, show the {a}.\n\n")  # fmt: skip
    return (f"{a} = [{b} * {n} for {b} in {a}s]\nassert len({a}) == {n}\n\n",
            f"The {a} is a list of each {b} times {n}; the length of the {a} must be {n}.\n\n")  # fmt: skip


def _arithmetic(rng: random.Random) -> Pair:
    """A sum in digits with its result, and the same numbers in words with nothing to compute."""
    a, b = rng.randint(2, 49), rng.randint(2, 49)
    shown = rng.sample((a, b, rng.randint(2, 99)), 3)
    return f"{a} + {b} = {a + b}\n", f"{_number(shown[0])} and {_number(shown[1])}, {_number(shown[2])}\n"


def _people(rng: random.Random) -> tuple[str, str, str, str]:
    i, j = rng.sample(range(len(NAMES)), 2)
    return NAMES[i], NAMES[j], ROLES[i], ROLES[j]


def _names(rng: random.Random) -> Pair:
    """Who gave what to whom: with names, and with roles."""
    a, b, c, d = _people(rng)
    thing, place = rng.choice(THINGS), rng.choice(PLACES)
    tail = f" the {thing} in the {place}.\n"
    return f"Then {a} gave {b}{tail}", f"Then {c} gave {d}{tail}"


def _quotation(rng: random.Random) -> Pair:
    """Direct speech, and the same reported."""
    a, b, _, _ = _people(rng)
    place, state = rng.choice(PLACES), rng.choice(STATES)
    return f'{a} said to {b}, "The {place} is {state}."\n', f"{a} said to {b} that the {place} was {state}.\n"


def _negation(rng: random.Random) -> Pair:
    """A sentence with not, and with an adverb in its place."""
    place, state, thing = rng.choice(PLACES), rng.choice(STATES), rng.choice(THINGS)
    other = rng.choice(("now", "also", "still"))
    return (f"The {place} is not {state}, and the {thing} is not there.\n",
            f"The {place} is {other} {state}, and the {thing} is {other} there.\n")  # fmt: skip


def _language(rng: random.Random) -> Pair:
    """A sentence in French, and its English."""
    parts = [rng.choice(pool) for pool in (NOUNS_2, VERBS_2, THINGS_2, WHEN_2)]
    english, french = (" ".join(part[i] for part in parts) for i in (0, 1))
    return f"{french[0].upper()}{french[1:]}.\n", f"{english[0].upper()}{english[1:]}.\n"


_MAKERS: dict[str, Callable[[random.Random], Pair]] = {
    "code": _code,
    "arithmetic": _arithmetic,
    "names": _names,
    "quotation": _quotation,
    "negation": _negation,
    "language": _language,
}
CONTRASTS = tuple(_MAKERS)


def control_of(contrast: str) -> str:
    """Name of a contrast's control condition.

    Parameters
    ----------
    contrast : str
        One of `CONTRASTS`.
    """
    return f"{check_option('contrast', contrast, CONTRASTS)} control"


def contrast_texts(
    contrast: str, tokenizer: PreTrainedTokenizerBase, *, n: int = 8, blocks: int = 4, items: int = 4, seed: int = 0
) -> list[Stimulus]:
    """Texts that hold a condition and its control in blocks, as a localizer needs them.

    Parameters
    ----------
    contrast : str
        One of `CONTRASTS`.
    tokenizer : transformers tokenizer
    n : int
        Texts (runs).
    blocks : int
        Blocks of each side in a text, in random order.
    items : int
        Lines (of code: snippets) in a block.
    seed : int
        Same arguments, same texts.

    Returns
    -------
    list of Stimulus
        Conditions (`trial_type`) are the contrast's name and `control_of` it; the two sides of a text are made of the
        same pairs.

    Examples
    --------
    >>> localizer(scans, {"code": {"code": 1, "code control": -1}})  # doctest: +SKIP
    """
    from llmbrain.scanning import Stimulus

    maker = _MAKERS[check_option("contrast", contrast, CONTRASTS)]
    for name, value in (("n", n), ("blocks", blocks), ("items", items)):
        check_whole(name, value, 1)
    texts = []
    for run in range(n):
        rng = random.Random(f"{contrast}-{seed}-{run}")
        segments = []
        for _ in range(blocks):
            pairs = [maker(rng) for _ in range(items)]
            segments += [("".join(p[0] for p in pairs), contrast), ("".join(p[1] for p in pairs), control_of(contrast))]
        rng.shuffle(segments)
        texts.append(Stimulus.from_segments(segments, tokenizer, f"{contrast}-seed{seed}-run{run + 1:02d}"))
    return texts


def contrast_lines(contrast: str, *, n: int = 100, seed: int = 0) -> list[Pair]:
    """Single items and their controls, to score a model on: other seeds, other items.

    Parameters
    ----------
    contrast : str
        One of `CONTRASTS`.
    n : int
        Pairs.
    seed : int
        Same arguments, same pairs.
    """
    maker, rng = _MAKERS[check_option("contrast", contrast, CONTRASTS)], random.Random(f"lines-{contrast}-{seed}")
    check_whole("n", n, 1)
    return [maker(rng) for _ in range(n)]
