"""Task files that carry code: found before the harness reads them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from llmbrain._files import clear_damage
from llmbrain._validation import InputError, soft_import

# What a template needs that runs nothing: a field of the document, perhaps of a field, a text, or a list of them.
_NAME = r"[A-Za-z]\w*"
_FIELD_ = rf"{_NAME}(?:\.{_NAME}|\[(?:\d+|{_NAME}|'{_NAME}'|\"{_NAME}\")\])*"
_ATOM = rf"(?:{_FIELD_}(?:\s*\|\s*(?:trim|lower|upper))*|\d+|'[^'{{}}\\]*'|\"[^\"{{}}\\]*\")"
_FIELD = re.compile(rf"\{{\{{\s*(?:{_ATOM}|\[\s*{_ATOM}(?:\s*,\s*{_ATOM})*\s*\])\s*\}}\}}")
_KEYS = ("class", "custom_dataset", "process_docs", "process_results")
_LONGEST = 1 << 20  # bytes of a task file


def refuse_code(paths: Iterable[Path]) -> None:
    """Refuse task files with code of their own: ``!function``, templates that do more than name a field, scripts.

    Parameters
    ----------
    paths : paths
        YAML files, or folders of them; what they include is looked at too.

    Raises
    ------
    InputError
        Names the file and what is in it.
    """
    seen: set[Path] = set()
    for path in paths:
        for file in sorted((*path.rglob("*.yaml"), *path.rglob("*.yml"))) if path.is_dir() else [path]:
            _look(file, seen)


def _look(file: Path, seen: set[Path]) -> None:
    yaml = soft_import("yaml", "harness", "evaluate")
    file = file.resolve()
    if file in seen or not file.is_file():
        return
    seen.add(file)
    if file.stat().st_size > _LONGEST:
        raise InputError(f"tasks: {file} is too large for a task file")
    with clear_damage(file, "a YAML file of a task"):
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    for key, value in _scalars(node):
        code = _code_in(key, value)
        if code:
            raise InputError(
                f"tasks: {file} carries code ({code}), which would run here: read it, then pass trust_tasks=True "
                "(--trust-tasks)"
            )
        if key == "include":
            _look(file.parent / value.value, seen)


def _scalars(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a YAML tree with the key it stands under, and every key; anchors once a key."""
    stack, seen = [(key, node)], set()
    while stack:
        key, node = stack.pop()
        if node is None or (key, id(node)) in seen:
            continue
        seen.add((key, id(node)))
        if isinstance(node.value, str) or not _is_plain(node):
            yield key, node
            continue
        for item in node.value:
            if isinstance(item, tuple):
                stack += [("", item[0]), (str(item[0].value), item[1])]
            else:
                stack.append((key, item))


def _is_plain(node: Any) -> bool:
    return node.tag.startswith("tag:yaml.org,2002:") and not node.tag.startswith("tag:yaml.org,2002:python")


@cache
def _metrics() -> frozenset[str]:
    """Names of the metrics that the harness has itself."""
    registry = soft_import("lm_eval.api.registry", "harness", "evaluate")
    soft_import("lm_eval.api.metrics", "harness", "evaluate")
    return frozenset(registry.metric_registry)


def _code_in(key: str, node: Any) -> str:
    """What of a value would run, or nothing."""
    if not _is_plain(node):
        return f"{key}: {node.tag} {node.value}"[:80]
    text = node.value
    if key in _KEYS:
        return f"{key}: {text}"[:80]
    if key in ("trust_remote_code", "unsafe_code") and text.lower() in ("true", "yes", "on", "1"):
        return f"{key}: {text}"
    if key == "hf_evaluate" and text.lower() in ("true", "yes", "on", "1"):
        return f"{key}: {text}"
    if key == "metric" and text not in _metrics():  # the package evaluate would look for a script of that name
        return f"{key}: {text}, which the harness does not know"[:80]
    if key == "dataset_path" and text.endswith(".py"):
        return f"{key}: {text}"
    rest = _FIELD.sub("", text)
    if "{{" in rest or "{%" in rest:
        return f"{key}: {' '.join(text.split())}"[:80]
    return ""
