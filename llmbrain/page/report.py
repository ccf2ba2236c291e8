"""`Report`: sections of HTML, and one self-contained file of them."""

from __future__ import annotations

import html
import io
import json
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from llmbrain._files import write_text
from llmbrain._validation import InputError
from llmbrain.page.text import number, token_label, visible

SCRIPTS = ("source.js", "colour.js", "maps.js", "player.js", "app.js")
_PACKAGE = "llmbrain.page"


@cache
def environment(*packages: str) -> jinja2.Environment:
    """Templates of this room, and those in ``templates/`` of `packages`; everything is escaped unless it is Markup."""
    loaders = [jinja2.PackageLoader(package) for package in (*packages, _PACKAGE)]
    env = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    env.filters.update(number=number, visible=visible, token_label=token_label)
    return env


def asset(name: str) -> str:
    """Text of a file in ``static/``."""
    return (files(_PACKAGE) / "static" / name).read_text(encoding="utf-8")


def json_in_html(value: Any) -> Markup:
    """JSON that may stand inside a script element: no text in it can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


@dataclass
class Section:
    """One part of a report.

    Attributes
    ----------
    title : str
    body : str
        Text (escaped) or Markup.
    id : str
        Anchor; made from the title where empty.
    part : str
        Heading of the group in the navigation; ``"network"`` sections are pages of their own.
    """

    title: str
    body: str | Markup = ""
    id: str = ""
    part: str = ""

    def __post_init__(self) -> None:
        self.id = self.id or re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-") or "section"


@dataclass
class Report:
    """A report: add sections, save one file, or show it in a notebook.

    Examples
    --------
    >>> report = Report("My model").add(Section("Result", "3 < 4"))
    >>> "3 &lt; 4" in report.html()
    True
    """

    title: str
    sections: list[Section] = field(default_factory=list)
    subtitle: str = ""
    viewer: dict[str, Any] | None = None
    blobs: dict[str, str] = field(default_factory=dict)

    def add(self, section: Section | str, body: object = None) -> Report:
        """Add a section: a `Section`, or a title and a body (text, DataFrame, matplotlib Figure, or Markup)."""
        if isinstance(section, str):
            section = Section(section, render(body))
        if not isinstance(section, Section):
            raise InputError(f"section={type(section).__name__} must be a Section, or a title with a body")
        taken = {other.id for other in self.sections}
        stem, n = section.id, 2
        while section.id in taken:
            section.id, n = f"{stem}-{n}", n + 1
        self.sections.append(section)
        return self

    def html(self) -> str:
        """The whole page as text; every style, script, picture and number is in it."""
        return environment().get_template("report.html.j2").render(
            report=self,
            style=Markup(asset("style.css")),
            script=Markup("\n".join(asset(name) for name in SCRIPTS)),
            data=None if self.viewer is None else json_in_html(self.viewer),
        )  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page, whole or not at all; returns its path."""
        return write_text(path, self.html(), errors="replace")

    def _repr_html_(self) -> str:
        # a frame of its own, so that the styles of a notebook and of the page leave each other alone
        page = html.escape(self.html(), quote=True)
        return (
            f'<iframe srcdoc="{page}" title="{html.escape(self.title, quote=True)}" '
            'sandbox="allow-scripts" style="width:100%;height:720px;border:0"></iframe>'
        )


def render(body: object) -> Markup | str:
    """HTML of what a section may hold: text, DataFrame, Figure, a list of them, or an object with ``_repr_html_``."""
    if body is None:
        return ""
    if isinstance(body, (Markup, str)):
        return body
    if isinstance(body, (pd.DataFrame, pd.Series)):
        return table(body.to_frame() if isinstance(body, pd.Series) else body)
    if hasattr(body, "savefig"):
        return figure(body)
    if isinstance(body, Sequence):
        return Markup("").join(Markup(render(item)) if isinstance(item, Markup) else render(item) for item in body)
    return str(body)


def table(frame: pd.DataFrame, caption: str = "", *, index: bool | None = None, digits: int = 3) -> Markup:
    """A DataFrame as an HTML table that scrolls by itself on a narrow page."""
    if index is None:
        index = not isinstance(frame.index, pd.RangeIndex)
    flat = frame.reset_index() if index else frame
    columns = [" · ".join(map(str, c)) if isinstance(c, tuple) else str(c) for c in flat.columns]
    numeric = [pd.api.types.is_numeric_dtype(dtype) for dtype in flat.dtypes]
    rows = [[number(value, digits) for value in row] for row in flat.itertuples(index=False, name=None)]
    template = environment().get_template("table.html.j2")
    return Markup(template.render(columns=columns, rows=rows, numeric=numeric, caption=caption, row_header=index))


_INK = re.compile(r"#22313f", re.IGNORECASE)


def figure(fig: Any, caption: str = "", label: str = "") -> Markup:
    """A matplotlib figure as inline SVG whose ink follows the page's own colour, so that it reads in the dark too."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llmbrain"}):
        fig.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = _INK.sub("currentColor", text)
    own = f"f{zlib.crc32(text.encode()):08x}-"  # ids of two figures in one page must differ
    text = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{own}", text)
    name = html.escape(label or caption or "figure", quote=True)
    least = min(fig.get_figwidth(), 6.5) * 80  # narrower than this its labels cannot be read: it scrolls instead
    text = text.replace("<svg", f'<svg role="img" aria-label="{name}" style="min-width:{least:.0f}px"', 1)
    template = environment().get_template("figure.html.j2")
    width = max(fig.get_figwidth() * 96, 320)
    return Markup(template.render(svg=Markup(text), caption=caption, width=round(width)))
