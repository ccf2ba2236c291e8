"""Sphinx: pages of this folder, the API from docstrings, the tutorials executed. Needs no network."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pages  # noqa: E402

import llmbrain  # noqa: E402

project = "llmbrain"
author = "The llmbrain developers"
copyright = "The llmbrain developers"
version = release = llmbrain.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # MathJax lies beside the pages: they are read without a network
    "numpydoc",
    "myst_parser",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "_ext", "_templates", "images", "auto_examples/*.ipynb", "auto_examples/*.py"]
templates_path = ["_templates"]
default_role = "py:obj"
# Bars of absolute values, which docstrings write as people do, are no substitutions.
rst_prolog = "\n".join(f".. |{x}| replace:: \\|{x}\\|" for x in ("r", "t", "z"))

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header", "config.cache"]

autosummary_generate = True
autodoc_typehints = "none"  # the docstrings say types in words
autodoc_member_order = "bysource"
numpydoc_show_class_members = False

sphinx_gallery_conf = {
    "examples_dirs": "../tutorials",
    "gallery_dirs": "auto_examples",
    "filename_pattern": r"plot_",
    "within_subsection_order": "FileNameSortKey",
    "image_scrapers": ("figures",),
    "reset_modules": (),
    "abort_on_example_error": False,
    "download_all_examples": False,
    "remove_config_comments": True,
    "min_reported_time": 1,
}

html_theme = "pydata_sphinx_theme"
html_title = "llmbrain"
html_show_sourcelink = False
html_theme_options = {
    "logo": {"text": "llmbrain"},
    "navbar_align": "left",
    "header_links_before_dropdown": 7,
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_sidebars = {page: [] for page in ("index", "install", "methods")}  # pages that have no others below them
html_context = {"default_mode": "auto"}


def setup(app: Any) -> None:
    """Write the pages that are made from the code before Sphinx looks for sources."""
    pages.write_all(HERE / "api" / "generated")
    app.connect("autodoc-process-docstring", pages.escape_learned)
