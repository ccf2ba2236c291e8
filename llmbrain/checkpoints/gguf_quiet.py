"""transformers' bars and reports of loading a GGUF file, silenced: what is wrong is said in one line, by us."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llmbrain._progress import bar


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block transformers' bars of loading are off, or our own, which are for terminals only.

    So are its reports of what does not fit: they are looked at by who asked for them.
    """
    from transformers import modeling_gguf_pytorch_utils as reading
    from transformers.utils import logging

    shown, theirs = logging.is_progress_bar_enabled(), getattr(reading, "tqdm", None)
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(max(verbosity, logging.ERROR))
    if theirs is not None:  # it is tqdm's own, which nothing turns off
        reading.tqdm = bar
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if theirs is not None:
            reading.tqdm = theirs
        if shown:
            logging.enable_progress_bar()
