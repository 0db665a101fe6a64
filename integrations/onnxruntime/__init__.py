"""ONNX Runtime: a packed model as a file that runs with onnxruntime alone."""

from hq_plugin.integrations.onnxruntime.export import Exported, ExportedLayer, export

__all__ = ["Exported", "ExportedLayer", "export"]
