"""Mistakes that are known and not yet mended: class -> column -> whose they are. A mended one must go from here."""

from __future__ import annotations

KNOWN: dict[str, dict[str, str]] = {}
