"""Figures of llmbrain for sphinx-gallery: they belong to no window manager, so a cell's new variables are looked at."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst


def scrape(block: Any, block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """Save every figure that a variable of the example holds and that was not shown before."""
    names = block_vars["example_globals"]
    shown = names.setdefault("__shown_figures__", [])
    paths = []
    for figure in [value for value in names.values() if isinstance(value, Figure)]:
        if any(figure is other for other in shown):
            continue
        shown.append(figure)
        path = next(block_vars["image_path_iterator"])
        figure.savefig(path, dpi=120, bbox_inches="tight")
        paths.append(path)
    return figure_rst(paths, gallery_conf["src_dir"])


def _get_sg_image_scraper() -> Any:
    return scrape
