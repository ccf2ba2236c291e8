"""Models in folders: load any, save and load pruned ones. A mismatch is an error, never a silent re-initialisation."""

from llmbrain.checkpoints.loading import load_model, load_pruned
from llmbrain.checkpoints.onnx import export_onnx
from llmbrain.checkpoints.saving import FORMATS, save_pruned

__all__ = ["FORMATS", "export_onnx", "load_model", "load_pruned", "save_pruned"]
