"""Tasks of the lm-evaluation-harness, on a model in memory or in a folder."""

from __future__ import annotations

import copy
import difflib
import logging
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from llmbrain._validation import InputError, check_range, check_whole, soft_import
from llmbrain.evaluation.perplexity import predicts_next_token
from llmbrain.evaluation.trust import refuse_code
from llmbrain.hooks.text import evaluating

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

FEWSHOT_SEED = 1234  # the harness's own default: the same examples are shown to every model
BOOTSTRAPS = 1000  # for the standard errors that have no closed form


def evaluate(
    model: nn.Module | str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    tasks: str | Path | Mapping[str, Any] | Sequence[str | Path | Mapping[str, Any]],
    *,
    batch_size: int = 8,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | Sequence[str | Path] | None = None,
    trust_tasks: bool = False,
) -> pd.DataFrame:
    """Run tasks of the lm-evaluation-harness [1]_ on a model: dense or pruned, layers of different widths too.

    A task whose data are local files reaches for no network. Model, tokenizer and the generators of random numbers
    are left as they were.

    Parameters
    ----------
    model : causal language model of transformers, or the folder of one
        A folder may be one that `save_pruned` wrote. A model is measured where it is, on its own device.
    tokenizer : its tokenizer
        None with a folder: the one that lies there.
    tasks : str, Path, dict, or a list of these
        Name of a task, group or tag of the harness or of `include_path`; path of a task's YAML file; folder of YAML
        files (every task in it is run); or the task's configuration itself.
    batch_size : int
        Sequences in one forward pass; it changes the speed and not the result.
    limit : int or float, optional
        Use the first so many documents of each task, or below 1 this share of them.
    num_fewshot : int, optional
        Solved examples before each question; default what the task says. A task that says 0 keeps 0.
    include_path : folder or list of folders, optional
        Where more tasks lie, to be called by name.
    trust_tasks : bool
        Run code that task files carry (``!function``, templates that do more than name a field); else they are refused.
        Tasks of the harness itself are trusted.

    Returns
    -------
    DataFrame
        A row a task and metric: ``task``, ``metric``, ``value``, ``stderr`` (nan where the harness knows none).
        A metric of a filtered answer is named ``metric,filter``.

    Raises
    ------
    InputError
        If a task is not known or cannot be loaded, the model predicts no next token, or lm_eval is not installed.

    References
    ----------
    .. [1] Gao et al., The Language Model Evaluation Harness, https://doi.org/10.5281/zenodo.12608602.
    """
    import pandas as pd

    from llmbrain.checkpoints import load_model

    check_whole("batch_size", batch_size, 1)
    if limit is not None:
        check_range("limit", limit, 0, open_low=True)
    if num_fewshot is not None:
        check_whole("num_fewshot", num_fewshot, 0)
    specs = [tasks] if isinstance(tasks, (str, Path, Mapping)) else list(tasks)
    if not specs:
        raise InputError("tasks=[] names no task")
    soft_import("lm_eval", "harness", "evaluate")
    if isinstance(model, (str, Path)):
        model, own = load_model(model)
        tokenizer = tokenizer or own
    if tokenizer is None:
        raise InputError("tokenizer=None: tasks are texts, give the model's tokenizer (or the folder of both)")
    _refuse_encoders(model)

    from lm_eval import evaluator

    with _undisturbed(), evaluating(model, cache=True):
        loaded = _load_tasks(specs, include_path, trust_tasks)
        _set_fewshot(loaded["tasks"].values(), num_fewshot)
        found = evaluator.evaluate(
            lm=_as_harness_model(model, tokenizer, batch_size),
            task_dict=loaded,
            limit=limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=False,
        )
    rows = [(task, *row) for task, metrics in found["results"].items() for row in _rows(metrics)]
    return pd.DataFrame(rows, columns=["task", "metric", "value", "stderr"])


def _refuse_encoders(model: nn.Module) -> None:
    if not predicts_next_token(model):
        raise InputError(f"model {type(model).__name__} predicts no next token: tasks need a causal language model")


def _as_harness_model(model: Any, tokenizer: Any, batch_size: int) -> Any:
    """The harness's view of a model: it may set a padding token, so it gets a copy of the tokenizer."""
    from lm_eval.models.huggingface import HFLM

    model.tie_weights = lambda *args, **kwargs: None  # it would tie weights anew, which pruning may have parted
    try:
        return HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=int(batch_size))
    finally:
        del model.tie_weights


def _load_tasks(specs: Sequence[Any], include_path: Any, trust_tasks: bool) -> Any:
    """Task objects by name. The harness's own index, thousands of files, is read only for a name found nowhere else."""
    from lm_eval.tasks import TaskManager

    paths = [include_path] if isinstance(include_path, (str, Path)) else list(include_path or [])
    for path in paths:
        if not Path(path).is_dir():
            raise InputError(f"include_path={str(path)!r} is not a folder")
    if not trust_tasks:
        own = [Path(spec) for spec in specs if not isinstance(spec, Mapping) and Path(spec).exists()]
        refuse_code([*map(Path, paths), *own])
    manager = TaskManager(include_path=paths, include_defaults=False)
    wanted: list[Any] = []
    for spec in specs:
        if isinstance(spec, Mapping):
            wanted.append(dict(spec))
        elif Path(spec).is_dir() and not _names_a_task(spec, manager, paths):
            names = TaskManager(include_path=[spec], include_defaults=False).all_subtasks
            if not names:
                raise InputError(f"tasks={str(spec)!r}: the folder holds no YAML file of a task")
            wanted += names
            paths.append(spec)
        else:
            wanted.append(str(spec))
    manager = TaskManager(include_path=paths, include_defaults=False)
    named = [w for w in wanted if isinstance(w, str) and w not in manager.all_tasks and not Path(w).is_file()]
    if named:
        manager = TaskManager(include_path=paths)
    for name in named:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
            raise InputError(f"tasks={name!r} is neither a task of the harness nor a YAML file or folder{hint}")
    try:
        return manager.load(wanted)
    except (OSError, KeyError, TypeError, ValueError) as error:
        names = [w if isinstance(w, str) else w.get("task", "dict") for w in wanted]
        raise InputError(f"tasks={names} cannot be loaded: {type(error).__name__}: {error}") from error


def _names_a_task(spec: str | Path, manager: Any, paths: Sequence[str | Path]) -> bool:
    """Whether a word without a separator is a task's name: that goes before a folder of the same name."""
    from lm_eval.tasks import TaskManager

    if not isinstance(spec, str) or {"/", os.sep} & set(spec):
        return False
    return spec in manager.all_tasks or spec in TaskManager(include_path=list(paths)).all_tasks


def _set_fewshot(tasks: Any, num_fewshot: int | None) -> None:
    """As the harness's command line does: a task that says 0 keeps 0, the examples come from one seed."""
    for task in tasks:
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own != 0:
            task.set_config(key="num_fewshot", value=int(num_fewshot))
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _rows(metrics: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Metric, value and standard error from keys such as ``acc,none`` and ``acc_stderr,none``."""
    for key, value in metrics.items():
        name, comma, kind = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = metrics.get(f"{name}_stderr,{kind}")
        known = isinstance(error, (int, float))
        yield name if kind == "none" else key, float(value), float(error) if known else math.nan  # type: ignore[arg-type]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep to ourselves what the harness does at large.

    It draws from the global generators, warns of what is meant to be so here, and counts loads of data on a server.
    """
    import datasets

    logger = logging.getLogger("lm_eval")
    counted, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, False
    level, python, numpy = logger.level, random.getstate(), np.random.get_state()  # noqa: NPY002
    logger.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        logger.setLevel(level)
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counted
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
