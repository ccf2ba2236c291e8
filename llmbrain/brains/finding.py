"""Where in a running text the words of a transcript stand, in scripts with and without spaces."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import lru_cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray

# Letters of a gap that are compared one by one; a longer gap is a passage that one side does not have.
_LONGEST_GAP = 4_000_000
APOSTROPHES = "'’‘`´ʼ"
JOINERS = "\u200c\u200d\u00ad\u2060"  # inside a word, and no letters
# Scripts that put no space between words: every letter stands for itself.
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "BOPOMOFO", "YI ", "TAI ",
             "NEW TAI", "HALFWIDTH KATAKANA", "JAVANESE", "BALINESE")  # fmt: skip
# Marks that writers leave out or put in as they like: accents of Latin, Greek, Cyrillic; points of Hebrew and Arabic.
# All other marks (vowel signs of Indic and Thai scripts) are letters.
_OPTIONAL = ((0x0300, 0x036F), (0x0483, 0x0489), (0x0591, 0x05C7), (0x0610, 0x061A), (0x064B, 0x065F), (0x0670, 0x0670),
             (0x06D6, 0x06ED), (0x1AB0, 0x1AFF), (0x1DC0, 0x1DFF), (0x20D0, 0x20FF), (0xFE00, 0xFE2F))  # fmt: skip


@lru_cache(maxsize=65536)
def kind_of(char: str) -> str:
    """What a character is to a word: "letter", "alone" (a letter of a script without spaces), "mark", "joiner", ""."""
    if char in JOINERS:
        return "joiner"
    category = unicodedata.category(char)
    if category.startswith("M"):
        return "mark"
    if not char.isalnum() or char in APOSTROPHES:
        return ""
    return "alone" if unicodedata.name(char, "").startswith(_UNSPACED) else "letter"


@lru_cache(maxsize=65536)
def _plain(char: str) -> str:
    """Letters and digits of one character, without case, accents and optional marks."""
    kept = []
    for c in unicodedata.normalize("NFKD", char):
        if c.isalnum() and c not in APOSTROPHES:
            kept.append(c.casefold())
        elif unicodedata.category(c).startswith("M") and not any(a <= ord(c) <= b for a, b in _OPTIONAL):
            kept.append(c)
    return "".join(kept)


def _letters(text: str) -> list[tuple[str, int]]:
    """Letters and digits of a text, without case and accents, each with its place."""
    return [(c, i) for i, char in enumerate(text) if char not in JOINERS for c in _plain(char)]


def _units(text: str) -> list[tuple[int, int]]:
    """Words of a text with their marks; in scripts without spaces, single letters with theirs."""
    found: list[tuple[int, int]] = []
    start, alone = -1, False
    for i, char in enumerate(text):
        kind = kind_of(char)
        inside = start >= 0
        if kind in ("mark", "joiner") and inside:
            continue
        # an apostrophe between two letters belongs to the word
        if char in APOSTROPHES and inside and not alone and i + 1 < len(text) and kind_of(text[i + 1]) == "letter":
            continue
        if kind == "letter" and inside and not alone:
            continue
        if inside:
            found.append((start, i))
            start = -1
        if kind in ("letter", "alone"):
            start, alone = i, kind == "alone"
    if start >= 0:
        found.append((start, len(text)))
    return [(a, b - (len(text[a:b]) - len(text[a:b].rstrip(JOINERS)))) for a, b in found]


def find_words(text: str, words: Sequence[str] | pd.Series) -> NDArray[np.int64]:
    """Where in a text the words of a transcript stand.

    Both sides are reduced to letters and digits without case, accents or quotes (vowel signs stay); whole words are
    aligned first (single letters in scripts without spaces), and what is left between them letter by letter, so that
    ``she'll`` is found by ``she`` and ``ll``, and a misspelt word by most of its letters.

    Returns
    -------
    int array ``(n_words, 2)``
        First character and the one after the last; ``(-1, -1)`` for a word that is not there.
    """
    places = _units(text)
    text_units = ["".join(c for c, _ in _letters(text[a:b])) for a, b in places]
    units: list[str] = []
    owners: list[int] = []
    for i, word in enumerate(map(str, words)):
        for a, b in _units(word):
            units.append("".join(c for c, _ in _letters(word[a:b])))
            owners.append(i)
    owner = np.array(owners, dtype=np.int64)
    n_units = np.bincount(owner, minlength=len(words)) if len(owner) else np.zeros(len(words), dtype=np.int64)
    first = np.full(len(words), np.iinfo(np.int64).max)
    last, hits = np.full(len(words), -1, dtype=np.int64), np.zeros(len(words), dtype=np.int64)
    spans = np.full((len(words), 2), -1, dtype=np.int64)
    gaps = []
    for kind, a0, a1, b0, b1 in SequenceMatcher(None, text_units, units, autojunk=False).get_opcodes():
        if kind == "equal":
            for (start, stop), word in zip(places[a0:a1], owner[b0:b1]):
                first[word], last[word] = min(first[word], start), max(last[word], stop)
                hits[word] += 1
        elif kind == "replace":
            gaps.append((places[a0][0], places[a1 - 1][1], b0, b1))
    length = np.array([len(_letters(str(word))) for word in words], dtype=np.int64)
    whole = (hits > 0) & (hits * 2 >= n_units) & (last - first <= 4 * length + 2)
    spans[whole] = np.column_stack([first, last])[whole]
    for start, stop, b0, b1 in gaps:
        missed = [i for i in dict.fromkeys(owner[b0:b1].tolist()) if not whole[i]]
        _match_letters(text, start, stop, [(i, str(words[i])) for i in missed], spans)
    return spans


def _match_letters(text: str, start: int, stop: int, words: list[tuple[int, str]], spans: NDArray[np.int64]) -> None:
    """Align the letters of `words` with those of ``text[start:stop]``; writes into `spans`."""
    here = _letters(text[start:stop])
    wanted = [(c, i) for i, word in words for c, _ in _letters(word)]
    if len(here) * len(wanted) > _LONGEST_GAP or not wanted:
        return
    matcher = SequenceMatcher(None, [c for c, _ in here], [c for c, _ in wanted], autojunk=False)
    hits: dict[int, list[int]] = {}
    for a, b, size in matcher.get_matching_blocks():
        for i in range(size):
            hits.setdefault(wanted[b + i][1], []).append(start + here[a + i][1])
    length = Counter(i for _, i in wanted)
    for word, places in hits.items():
        # letters scattered over a long passage are not the word
        if 2 * len(places) >= length[word] and places[-1] + 1 - places[0] <= 2 * length[word] + 2:
            end = places[-1] + 1
            while end < stop and kind_of(text[end]) == "mark":
                end += 1
            spans[word] = places[0], end


def join_words(words: Sequence[str] | pd.Series) -> str:
    """Words as running text: with spaces, but between two letters of a script that has none."""
    parts: list[str] = []
    for word in map(str, words):
        before = next((c for c in reversed(parts[-1]) if kind_of(c) in ("letter", "alone")), "") if parts else ""
        joined = before and word and kind_of(before) == "alone" == kind_of(word[0])
        parts += [word] if joined or not parts else [" ", word]
    return "".join(parts)
