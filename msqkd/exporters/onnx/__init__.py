"""ONNX for onnxruntime (x86 and ARM servers): int8 models with QuantizeLinear and DequantizeLinear, float ones, and
what runs them."""

from msqkd.exporters.onnx.qdq import export_onnx, export_onnx_float
from msqkd.exporters.onnx.runtime import executed_kernels, load_onnx

__all__ = ["executed_kernels", "export_onnx", "export_onnx_float", "load_onnx"]
