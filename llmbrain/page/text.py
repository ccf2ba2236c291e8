"""Text as it can be shown: tokens of any tokenizer, and whatever strange characters they hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MARKERS = str.maketrans({"▁": " ", "Ġ": " ", "Ċ": "\n", "ĉ": "\t"})


def short_name(name: str) -> str:
    """A model's name for people: of a file or folder the last part of its path, of a hub id all of it."""
    path = Path(name)
    if not (path.is_absolute() or path.exists()):
        return name
    return path.stem if path.suffix == ".gguf" else path.resolve().name or name


def visible(text: str) -> str:
    """Replace what a page cannot show: control characters by their pictures, lone surrogates by the replacement mark.

    Line breaks and tabs stay; escaping for HTML is the template's task.
    """

    def picture(character: str) -> str:
        code = ord(character)
        if code < 0x20 and character not in "\n\t":
            return chr(0x2400 + code)
        if code == 0x7F:
            return "\u2421"
        # C1 controls, surrogates, direction overrides and non-characters would break or fake the page
        hidden = 0x80 <= code < 0xA0 or 0xD800 <= code < 0xE000 or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069
        return "\ufffd" if hidden or code in (0xFFFE, 0xFFFF) else character

    return "".join(map(picture, str(text)))


def shown_tokens(scan: Any) -> list[str]:
    """The text of each token of a scan, so that joining them reads as the text.

    Slices of the text where the scan knows the character offsets (white space before a token goes with it), else the
    tokens with their tokenizer's marks for spaces and bytes undone.
    """
    n = int(scan.n_tokens)
    text, offsets = getattr(scan, "text", None), getattr(scan, "offsets", None)
    if text and offsets is not None and len(offsets) == n:
        pieces = _slices(str(text), np.asarray(offsets))
        if pieces is not None:
            return [visible(piece) for piece in pieces]
    tokens = list(getattr(scan, "tokens", None) or [])
    if len(tokens) != n or not any(tokens):
        return [f" #{i}" for i in range(n)]
    return [visible(_plain(str(token))) for token in tokens]


def _slices(text: str, offsets: NDArray[np.int64]) -> list[str] | None:
    ends = offsets[:, 1]
    real = ends > offsets[:, 0]  # a special token has no characters
    if not real.any() or (np.diff(ends[real]) < 0).any() or ends.max() > len(text):
        return None
    pieces, last = [], int(offsets[real][0, 0])
    for (start, end), has in zip(offsets.tolist(), real):
        pieces.append(text[min(last, start) : end] if has and end > last else "")
        last = max(last, end) if has else last
    return pieces


def _plain(token: str) -> str:
    byte = _BYTE.fullmatch(token)
    if byte:
        return chr(int(byte.group(1), 16))
    return token.translate(_MARKERS)


def context_of(tokens: list[str], position: int, width: int = 40) -> tuple[str, str, str]:
    """Text before, the token, and text after it; at most `width` characters on either side, on one line."""
    before = "".join(tokens[max(0, position - width) : position])[-width:]
    after = "".join(tokens[position + 1 : position + 1 + width])[:width]
    before, token, after = (piece.replace("\n", "↵").replace("\t", "⇥") for piece in (before, tokens[position], after))
    return before, token or "∅", after


def token_label(text: str) -> str:
    """A token by itself: without the space before it, but never empty."""
    return text.replace("\n", "↵").replace("\t", "⇥").strip() or ("␣" if text else "∅")


def number(value: Any, digits: int = 3) -> str:
    """A number as a person reads it: thousands separated, `digits` significant digits, a dash where there is none."""
    if value is None or isinstance(value, str):
        return "–" if value is None else value
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (int, np.integer)):
        return f"{int(value):,}"
    try:
        real = float(value)
    except (TypeError, ValueError):
        return str(value)
    if not np.isfinite(real):
        return "–" if np.isnan(real) else ("∞" if real > 0 else "−∞")
    if real and (abs(real) >= 10 ** (digits + 3) or abs(real) < 10 ** -(digits + 1)):
        return f"{real:.{digits - 1}e}".replace("e+0", "e").replace("e-0", "e−").replace("-", "−")
    decimals = max(0, digits - 1 - (int(np.floor(np.log10(abs(real)))) if real else 0))
    return f"{real:,.{min(decimals, digits + 2)}f}".replace("-", "−")
