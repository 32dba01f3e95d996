"""Networks by name."""

from msqkd.models.registry import MODELS, SOURCES, ModelEntry, build_model, default_input_shape

__all__ = ["MODELS", "SOURCES", "ModelEntry", "build_model", "default_input_shape"]
