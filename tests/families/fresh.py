"""Open saved folders in a process of their own, without llmbrain where the format promises that.

``python fresh.py ROOT [with-llmbrain]`` prints one JSON object: folder name -> "ok" or what went wrong.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
import transformers


def open_plain(folder: Path) -> torch.nn.Module:
    """As people do who have never heard of llmbrain."""
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    remote = getattr(config, "auto_map", None)
    names = [n for n in remote if n.startswith("AutoModel")] if remote else [config.architectures[0]]
    options = {"trust_remote_code": True} if remote else {}
    loader = getattr(transformers, names[0])
    model, info = loader.from_pretrained(folder, output_loading_info=True, **options)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise ValueError(f"{kind}: {sorted(info[kind])[:3]}")
    return model.eval()


def main(root: Path, with_llmbrain: bool) -> dict[str, str]:
    """What each folder says, held against what the model in memory said."""
    found = {}
    for wanted_file in sorted(root.glob("*.pt")):
        folder = root / wanted_file.name.removesuffix(".pt")
        per_layer = folder.name.endswith(".per-layer")
        if per_layer != with_llmbrain:
            continue
        try:
            if per_layer:
                from llmbrain import load_pruned

                model, _ = load_pruned(folder)
            else:
                model = open_plain(folder)
            with torch.no_grad():
                out = model(input_ids=torch.load(root / "ids", weights_only=True))
            value = getattr(out, "logits", None)
            value = out[0] if value is None else value
            while not isinstance(value, torch.Tensor):
                value = value[0]
            wanted = torch.load(wanted_file, weights_only=True)
            error = float((value.double() - wanted.double()).abs().max())
            close = error <= 1e-4 * max(1.0, float(wanted.abs().max()))
            found[folder.name] = "ok" if close else f"wrong: loaded: off by {error:.2g}"
        except Exception as error:  # whatever it is, it is a cell of the table
            found[folder.name] = f"error: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    print(json.dumps(main(Path(sys.argv[1]), len(sys.argv) > 2)))
