"""What is in a folder or a file: the answers of ``llmbrain info``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmbrain._validation import InputError
from llmbrain.checkpoints.gguf_reading import is_gguf


def describe_path(path: str | Path) -> dict[str, Any]:
    """Name and contents of what lies at a path.

    Parameters
    ----------
    path : path
        A NIfTI, a scan store, networks, a pruning plan, a model (a folder or a GGUF), or a folder that ``llmbrain run``
        wrote.

    Returns
    -------
    dict
        ``what`` and its main figures.

    Raises
    ------
    InputError
        If nothing is there, or nothing that llmbrain knows.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"path {path} does not exist")
    if path.name.endswith((".nii", ".nii.gz")):
        return _nifti(path)
    if path.is_file() and path.suffix == ".json":
        return _plan(path)
    if path.is_file() and is_gguf(path):
        return _model(path)
    for mark, describe in (
        ("summary.json", _study),
        ("manifest.json", _scan),
        ("networks.json", _networks),
        ("config.json", _model),
    ):
        if (path / mark).is_file():
            return describe(path)
    raise InputError(f"path {path} holds nothing that llmbrain knows (scan, networks, study, model, plan or NIfTI)")


def _nifti(path: Path) -> dict[str, Any]:
    from llmbrain.imaging import read_nifti
    from llmbrain.imaging.grid import open_image, readable

    with readable(str(path)):
        image = open_image(path)
    facts = {"what": f"{type(image).__name__} {image.shape} {image.get_data_dtype()}"}
    try:
        _, space = read_nifti(path)
    except InputError:
        return {**facts, "space": "not one of llmbrain's (no space in its header)"}
    return {**facts, "space": space}


def _plan(path: Path) -> dict[str, Any]:
    from llmbrain.pruning.experts import ExpertPlan, read_plan

    plan = read_plan(path)
    return {"what": "plan of experts" if isinstance(plan, ExpertPlan) else "pruning plan", "summary": plan.summary()}


def _study(path: Path) -> dict[str, Any]:
    from llmbrain._files import read_listed

    summary = read_listed(path / "summary.json", anew="run the job again")
    return {"what": "study of `llmbrain run`", **{k: v for k, v in summary.items() if k != "provenance"}}


def _scan(path: Path) -> dict[str, Any]:
    from llmbrain.scanning import load_scans

    scans = load_scans(path)
    events = {e for s in scans if s.events is not None for e in s.events["trial_type"]}
    return {
        "what": "scan",
        "model": scans[0].model_id,
        "sites": ", ".join(scans[0].sites),
        "space": scans[0].space,
        "runs": len(scans),
        "tokens": sum(s.n_tokens for s in scans),
        "conditions": ", ".join(sorted(events)) or "none",
    }


def _networks(path: Path) -> dict[str, Any]:
    from llmbrain.networks import FunctionalNetworks

    networks = FunctionalNetworks.load(path)
    return {
        "what": f"{len(networks)} functional networks",
        "space": networks.space,
        "cut-off (|z|)": ", ".join(f"{c:.3g}" for c in sorted({*abs(networks.cutoffs).ravel().tolist()})),
        "neurons in each": networks.masks.sum(axis=1).tolist(),
    }


def _model(path: Path) -> dict[str, Any]:
    from llmbrain.anatomy.experts import expert_anatomy, has_experts
    from llmbrain.anatomy.families import anatomy
    from llmbrain.checkpoints import load_model

    model, _ = load_model(path)
    if has_experts(model):
        mixture = expert_anatomy(model)
        routed = dict(mixture.routed)
        return {
            "what": f"model {type(model).__name__}, a mixture of experts",
            "family": mixture.family,
            "parameters": sum(p.numel() for p in model.parameters()),
            "mlp neurons per layer": list(mixture.widths),
            "routed experts per layer": [routed[x.index].count if x.routed else 0 for x in mixture.layers],
            "neurons per routed expert": [routed[x.index].width if x.routed else 0 for x in mixture.layers],
            "experts a token visits": [routed[x.index].top_k if x.routed else 0 for x in mixture.layers],
            "shared or dense neurons per layer": [sum(mlp.width for mlp in x.shared) for x in mixture.layers],
            "dtype": next(model.parameters()).dtype,
        }
    parts = anatomy(model)
    return {
        "what": f"model {type(model).__name__}",
        "family": parts.family,
        "parameters": sum(p.numel() for p in model.parameters()),
        "mlp neurons per layer": list(parts.widths),
        "heads per layer": list(parts.n_heads),
        "dtype": next(model.parameters()).dtype,
    }
