"""The abilities of the demo brain: eight small text tasks, each asking for a different computation.

Every example is one line, ``prompt + answer + "\\n"``; the answer follows from the prompt alone and is unique, so that
an exact match is the only right answer. All text is made here from a seed, none comes from elsewhere.

An example belongs to one side of a fixed split, found from a checksum of what defines it (its `key`): one item in eight
is held out and never enters training, whatever the seed. The key ignores what would leak: the order of two summands,
the order of the letters to sort.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from llmbrain._validation import check_option

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOWELS = "aeiou"
CONSONANTS = "".join(letter for letter in LETTERS if letter not in VOWELS)
BRACKETS = {"(": ")", "[": "]", "{": "}"}
NOUNS = (
    "cat", "dog", "cow", "hen", "fox", "owl", "pig", "rat", "bee", "ant", "boy", "girl", "king", "poet", "nurse",
    "cook", "tree", "lamp", "book", "door", "car", "ship", "cup", "hat", "bell", "star", "road", "farm", "pen", "rock",
)  # fmt: skip
PREPOSITIONS = ("near", "by", "behind", "under", "with", "above")
CYCLES = (
    ("mon", "tue", "wed", "thu", "fri", "sat", "sun"),
    ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"),
    ("do", "re", "mi", "fa", "so", "la", "ti"),
    ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    ("red", "orange", "yellow", "green", "blue", "violet"),
    tuple(LETTERS),
)
SPLITS = ("train", "heldout")
HELD_OUT_ONE_IN = 8


@dataclass(frozen=True)
class Example:
    """One line of one ability.

    Attributes
    ----------
    ability : str
        Name of the ability, one of `ABILITIES`.
    prompt, answer : str
        What is given, and the only right continuation up to the end of the line.
    key : str
        What decides the side of the split; examples with the same key are always on the same side.
    """

    ability: str
    prompt: str
    answer: str
    key: str

    @property
    def text(self) -> str:
        """The whole line, newline included."""
        return f"{self.prompt}{self.answer}\n"

    @property
    def split(self) -> str:
        """``"heldout"`` for one key in eight, else ``"train"``."""
        checksum = zlib.crc32(f"{self.ability}:{self.key}".encode())
        return "heldout" if checksum % HELD_OUT_ONE_IN == 0 else "train"


def _word(rng: random.Random, shortest: int, longest: int) -> str:
    """An invented word: consonants and vowels in turn, so that it can be read aloud."""
    pools = [CONSONANTS, VOWELS] if rng.random() < 0.5 else [VOWELS, CONSONANTS]
    return "".join(rng.choice(pools[place % 2]) for place in range(rng.randint(shortest, longest)))


def _addition(rng: random.Random) -> Example:
    """Two numbers below 100; the sum is written ones first, with three digits: ``37+48=580``."""
    first, second = rng.randrange(100), rng.randrange(100)
    answer = f"{first + second:03d}"[::-1]
    low, high = sorted((first, second))
    return Example("addition", f"{first:02d}+{second:02d}=", answer, f"{low}+{high}")


def _reversal(rng: random.Random) -> Example:
    """A word of 3 to 6 letters, backwards: ``rev lomi=imol``."""
    word = _word(rng, 3, 6)
    return Example("reversal", f"rev {word}=", word[::-1], word)


def _sorting(rng: random.Random) -> Example:
    """3 to 5 different letters into the order of the alphabet: ``sort kbt=bkt``."""
    letters = rng.sample(LETTERS, rng.randint(3, 5))
    answer = "".join(sorted(letters))
    return Example("sorting", f"sort {''.join(letters)}=", answer, answer)


def _brackets(rng: random.Random) -> Example:
    """Close what is still open (2 to 4 brackets), innermost first: ``({}[=])``."""
    depth, n_pairs = rng.randint(2, 4), rng.randint(0, 2)
    moves = [1] * (depth + n_pairs) + [-1] * n_pairs
    while True:  # shuffle until no bracket is closed before it was opened and the last move opens or closes freely
        rng.shuffle(moves)
        if all(sum(moves[: end + 1]) > 0 for end in range(len(moves))):
            break
    prefix, stack = "", []
    for move in moves:
        if move > 0:
            stack.append(rng.choice("([{"))
            prefix += stack[-1]
        else:
            prefix += BRACKETS[stack.pop()]
    return Example("brackets", f"{prefix}=", "".join(BRACKETS[opened] for opened in reversed(stack)), prefix)


def _recall(rng: random.Random) -> Example:
    """2 or 3 letters from a to h, each after its digit; then one of the letters again: ``4f 9a 2c ?a9``."""
    names = rng.sample(LETTERS[:8], rng.randint(2, 3))
    values = [str(rng.randrange(10)) for _ in names]
    asked = rng.randrange(len(names))
    prompt = " ".join(value + name for name, value in zip(names, values)) + f" ?{names[asked]}"
    return Example("recall", prompt, values[asked], prompt)


def _agreement(rng: random.Random) -> Example:
    """The verb agrees with the first noun, not with the last one: ``the dogs near the cat are``."""
    nouns = rng.sample(NOUNS, 3 if rng.random() < 0.25 else 2)
    plural = [rng.random() < 0.5 for _ in nouns]
    phrases = [f"the {noun}{'s' if many else ''}" for noun, many in zip(nouns, plural)]
    prompt = phrases[0] + "".join(f" {rng.choice(PREPOSITIONS)} {phrase}" for phrase in phrases[1:])
    return Example("agreement", f"{prompt} ", "are" if plural[0] else "is", f"{phrases[0]} {phrases[1]}")


def _sequence(rng: random.Random) -> Example:
    """Go on with a cycle, forwards or backwards: ``mon tue wed=thu``."""
    cycle = rng.choice(CYCLES)
    step = rng.choice((1, -1))
    start, shown = rng.randrange(len(cycle)), rng.randint(2, 4)
    items = [cycle[(start + step * place) % len(cycle)] for place in range(shown + 1)]
    prompt = " ".join(items[:-1])
    return Example("sequence", f"{prompt}=", items[-1], prompt)


def _shift(rng: random.Random) -> Example:
    """Each letter becomes the next one of the alphabet (z becomes a): ``next zobi=apcj``."""
    word = _word(rng, 3, 5)
    answer = "".join(LETTERS[(LETTERS.index(letter) + 1) % 26] for letter in word)
    return Example("shift", f"next {word}=", answer, word)


_MAKERS: dict[str, Callable[[random.Random], Example]] = {
    "addition": _addition,
    "reversal": _reversal,
    "sorting": _sorting,
    "brackets": _brackets,
    "recall": _recall,
    "agreement": _agreement,
    "sequence": _sequence,
    "shift": _shift,
}
ABILITIES = tuple(_MAKERS)


def draw_example(ability: str, split: str, rng: random.Random) -> Example:
    """Draw one example of `ability` from one side of the split.

    Parameters
    ----------
    ability : str
        One of `ABILITIES`.
    split : {"train", "heldout"}
        Side of the fixed split.
    rng : random.Random
        The source of chance; the same state gives the same example.

    Raises
    ------
    InputError
        If `ability` or `split` is not known.
    """
    maker = _MAKERS[check_option("ability", ability, ABILITIES)]
    check_option("split", split, SPLITS)
    while True:
        example = maker(rng)
        if example.split == split:
            return example


def stream_examples(
    split: str, rng: random.Random, weights: Mapping[str, float] | None = None, *, stay: float = 0.0
) -> Iterator[Example]:
    """Yield examples without end; with probability `stay` the next one has the same ability as the last.

    Parameters
    ----------
    split : {"train", "heldout"}
        Side of the fixed split.
    rng : random.Random
        The source of chance.
    weights : mapping of str to float, optional
        Relative frequency of each ability; abilities left out do not occur. Default: all equal.
    stay : float
        Between 0 (a mixed design) and 1 (one ability only).
    """
    names = list(weights or ABILITIES)
    shares = [weights[name] for name in names] if weights else None
    ability = rng.choices(names, shares)[0]
    while True:
        yield draw_example(ability, split, rng)
        if rng.random() >= stay:
            ability = rng.choices(names, shares)[0]
