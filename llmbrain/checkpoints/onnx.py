"""ONNX out: a cut model as a graph for ONNX Runtime, checked there before it is put in place."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmbrain._files import refuse_other, still_free, transaction, write_json
from llmbrain._validation import InputError, soft_import
from llmbrain.anatomy.families import context_length
from llmbrain.checkpoints.gguf_writing import check_folder_path
from llmbrain.checkpoints.loading import PROVENANCE
from llmbrain.checkpoints.shapes import RECORD, text_config
from llmbrain.hooks.experts import implemented_by
from llmbrain.hooks.text import evaluating

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

FILE = "model.onnx"
GRAPH = "an ONNX graph"  # what is put into a folder, as `llmbrain._files.contents` calls it
TOLERANCE = 1e-4  # largest difference from the model, relative to its largest logit where that is above 1
EXTRA = "onnx"


def export_onnx(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    path: str | Path,
    *,
    overwrite: bool = False,
    verify: bool = True,
    note: Mapping[str, Any] | None = None,
) -> Path:
    """Write a causal language model, pruned or not, as an ONNX graph.

    The graph takes ``input_ids`` and ``attention_mask`` (int64, batch x tokens, both of any size) and gives ``logits``
    (batch x tokens x vocabulary); it keeps no cache. Made by transformers' own exporter.

    Parameters
    ----------
    model : transformers model
        With a language model's head; layers may differ in neurons, heads and biases.
    tokenizer : tokenizer or None
        Saved beside the graph.
    path : str or Path
        Folder: ``model.onnx``, its weights in ``model.onnx.data``, config and tokenizer.
    overwrite : bool
        Replace a graph that is there.
    verify : bool
        Run the graph in ONNX Runtime on other texts, of another length, and compare.
    note : dict, optional
        Entries of ``pruning.json``, beside what was cut: JSON values.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    FileExistsError
        If the folder holds a graph already.
    InputError
        If the folder holds a study, a model or the like; if the exporter cannot write this model, or ONNX Runtime
        computes something else (then nothing is written).
    """
    from transformers import PreTrainedModel

    for package in ("onnx", "onnxscript", "onnxruntime"):
        soft_import(package, EXTRA, "ONNX export")
    exporters = soft_import("transformers.exporters", EXTRA, "ONNX export")
    path = check_folder_path(path, "onnx")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file, not a folder")
    if (path / FILE).exists() and not overwrite:
        raise FileExistsError(f"{path} holds {FILE} already: give another folder, or overwrite=True")
    refuse_other(path, GRAPH)
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise InputError(f"model {type(model).__name__} has no language model's head: ONNX export gives logits")
    if getattr(model.config, "is_encoder_decoder", False):
        raise InputError(f"model {type(model).__name__} is an encoder-decoder: ONNX export takes decoders")
    _check_positions(model.config)
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()):
        name = str(model.dtype).removeprefix("torch.")
        raise InputError(f"model computes in {name}, which ONNX Runtime does in part only: export model.float()")
    # Which experts a token calls is known only when it is read: a graph holds them as products for every place.
    with evaluating(model), implemented_by(model, "batched_mm"):
        try:
            exported = exporters.OnnxExporter().export(
                model, _inputs(model, (2, 8), 0), config=exporters.OnnxConfig(dynamic=True)
            )
        except Exception as error:  # the exporter raises what the tracer met, of any kind
            line = next((x.strip() for x in str(error).splitlines() if x.strip()), type(error).__name__)
            line = re.sub(r"\x1b\[\d+m", "", line)  # colors
            raise InputError(f"{type(model).__name__} cannot be exported to ONNX: {line[:300]}") from error
        free = partial(still_free, what=GRAPH, mark="" if overwrite else FILE)
        with transaction(path, replaces=[FILE, f"{FILE}.data"], free=free) as prepared:
            exporters.OnnxExporter.save_program(exported.program, prepared / FILE)
            model.config.save_pretrained(prepared)
            if tokenizer is not None:
                tokenizer.save_pretrained(prepared)
            record = {"format": "onnx", "class": type(model).__name__, "cuts": getattr(model, RECORD, [])}
            write_json(prepared / PROVENANCE, record | dict(note or {}))
            if verify:
                _check(model, prepared / FILE)
    return path


def run_onnx(file: str | Path, inputs: dict[str, Tensor]) -> NDArray[np.float32]:
    """Logits of a graph in ONNX Runtime on the CPU, float32 ``(batch, tokens, vocabulary)``."""
    runtime = soft_import("onnxruntime", EXTRA, "running ONNX")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    wanted = {entry.name for entry in session.get_inputs()}
    fed = {name: value.numpy() for name, value in inputs.items() if name in wanted}
    return np.asarray(session.run(["logits"], fed)[0], dtype=np.float32)


def _check_positions(config: Any) -> None:
    """Refuse rotary positions that turn otherwise in longer texts: a graph keeps those of the text it was traced with.

    Raises
    ------
    InputError
        If a text within the context can be that long.
    """
    text = text_config(config)
    rope = dict(getattr(text, "rope_parameters", None) or {})
    for rule in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        kind, longest = rule.get("rope_type"), getattr(text, "max_position_embeddings", None) or 0
        before = rule.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
        if kind == "dynamic" or (kind == "longrope" and (before is None or before < longest)):
            raise InputError(
                f"rotary positions of type {kind!r} change with the length of a text, which an ONNX graph does not: "
                f"for texts of at most {before or longest} tokens save the model with plain rotary positions first"
            )


def _inputs(model: nn.Module, shape: tuple[int, int], seed: int) -> dict[str, Tensor]:
    rows = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    longest = context_length(model)
    batch, tokens = shape[0], min(shape[1], longest or shape[1])
    ids = torch.randint(rows, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}  # type: ignore[dict-item]


def _check(model: nn.Module, file: Path) -> None:
    """The graph on other tokens, of another number, beside the model itself."""
    inputs = _inputs(model, (1, 13), 1)
    with torch.no_grad():
        wanted = model(**inputs).logits.float().numpy()
    ids = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    try:
        found = run_onnx(file, ids)
    except Exception as error:  # ONNX Runtime's errors are its own classes
        raise InputError(f"ONNX Runtime {importlib.metadata.version('onnxruntime')} cannot run it: {error}") from error
    apart = float(np.abs(found - wanted).max())
    if not apart < TOLERANCE * max(1.0, float(np.abs(wanted).max())):
        raise InputError(f"ONNX Runtime computes logits that differ by {apart:.1e} from the model: nothing was written")
