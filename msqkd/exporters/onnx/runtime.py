"""ONNX files in onnxruntime: loaded for answers, and looked into for the kernels that compute them."""

from __future__ import annotations

import platform
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np

from msqkd.errors import ExportError, MissingDependencyError
from msqkd.exporters.onnx.writer import onnx_package
from msqkd.files import PathLike
from msqkd.platform import cpu_flags

ALL = "all"
LEVELS = {
    "disable": "ORT_DISABLE_ALL", "basic": "ORT_ENABLE_BASIC", "extended": "ORT_ENABLE_EXTENDED",
    ALL: "ORT_ENABLE_ALL",
}  # fmt: skip
"""Levels of optimization, by the names used here; files are compared at ``all``, onnxruntime's default."""

_ERRORS_ONLY = 3
_EXACT_PRODUCTS = {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"}


def onnxruntime_package() -> Any:
    """The package `onnxruntime`.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            "ONNX files are run with the package onnxruntime, which is not installed; pip install 'msqkd[onnx]'"
        ) from error
    return onnxruntime


def session_settings(flags: set[str]) -> dict[str, str]:
    """The settings of a session on a CPU with these feature flags.

    The int8 products of x86 without VNNI add pairs in int16, which saturates. onnxruntime can do without them (weights
    as uint8, exact but slower); asked to, it does so on every x86, which is why it is asked only where it is needed.
    """
    settings = {"session.force_spinning_stop": "1"}  # the threads of one session must not slow another down
    if flags.isdisjoint(_EXACT_PRODUCTS) and platform.machine() in ("x86_64", "AMD64"):
        settings["session.x64quantprecision"] = "1"
    return settings


def open_session(
    file: PathLike,
    threads: Optional[int] = None,
    optimized: Optional[Path] = None,
    profile: Optional[Path] = None,
    level: str = ALL,
) -> Any:
    """An onnxruntime session on the CPU, with exact int8 arithmetic.

    Args:
        file: the ONNX file.
        threads: threads of one operation; onnxruntime's choice when not given.
        optimized: where to write the model as it is executed.
        profile: where to write, at the end, how long every operation took; the beginning of a file name.
        level: how far onnxruntime rewrites the model, one of `LEVELS`; what users get is ``all``.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        ExportError: it cannot load the file.
    """
    runtime = onnxruntime_package()
    options = runtime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.graph_optimization_level = getattr(runtime.GraphOptimizationLevel, LEVELS[level])
    for name, value in session_settings(cpu_flags()).items():
        options.add_session_config_entry(name, value)
    if threads is not None:
        options.intra_op_num_threads = threads
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    try:
        return runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's classes have no base of their own
        raise ExportError(f"onnxruntime cannot load {file}: {str(error).splitlines()[0]}") from error


def load_onnx(file: PathLike, threads: Optional[int] = None, level: str = ALL) -> Callable[..., Any]:
    """An ONNX file as a function of its inputs (arrays or Tensors), which gives an array, or a tuple of several.

    `level` is as in `open_session`. Raises as that does.
    """
    session = open_session(file, threads, level=level)
    names = [item.name for item in session.get_inputs()]

    def run(*inputs: Any) -> Any:
        arrays = [np.asarray(x.asnumpy() if hasattr(x, "asnumpy") else x) for x in inputs]
        results = session.run(None, dict(zip(names, arrays)))
        return results[0] if len(results) == 1 else tuple(results)

    return run


def executed_kernels(file: PathLike) -> dict[str, int]:
    """How often onnxruntime executes which kernel on this machine, most frequent first.

    int8 kernels are ``QLinear...``, ``QGemm``, ``MatMulInteger...`` and those that only move values; where
    DequantizeLinear stands before a float kernel, that one runs in float.

    Raises as `open_session` does.
    """
    onnx = onnx_package()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "optimized.onnx"
        open_session(file, optimized=place)
        model = onnx.load(str(place))
    return dict(Counter(node.op_type for node in model.graph.node).most_common())
