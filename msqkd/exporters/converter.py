"""What MindSpore Lite's `converter_lite` is told: calibration files, the configuration file, the command line.

The converter's own post-training quantisation is the vendor's way to an NPU, and the baseline for a CPU. The options
are those of MindSpore Lite 2.7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Optional

import numpy as np

from msqkd.errors import ExportError, did_you_mean
from msqkd.files import PathLike, write_bytes

LAYOUTS = ("NCHW", "NHWC")
QUANT_TYPES = ("FULL_QUANT", "WEIGHT_QUANT", "DYNAMIC_QUANT")
ACTIVATION_METHODS = ("MAX_MIN", "KL", "REMOVAL_OUTLIER")
TARGET_DEVICES = ("KIRIN", "NVGPU", "DSP", "ASCEND")
_MOST_SAMPLES = 65535
_SEPARATORS = ",:\n\r"


def write_calibration_bins(samples: Any, folder: PathLike, layout: str) -> list[Path]:
    """Write one file a sample, ``00000.bin`` and on: its float32 values without a header, little-endian.

    Args:
        samples: what the network takes, array or sequence of arrays of shape (N, ...); pictures are (N, C, H, W).
        folder: where to; it must hold no other ``.bin`` file, because the converter reads them all.
        layout: of pictures in the file. ``NHWC`` where the converted model runs on a CPU: the converter checks the size
            alone, and files in NCHW give wrong ranges without a message. ``NCHW`` with
            ``--optimize=ascend_oriented``, which keeps the inputs of the MindIR. Samples that are no pictures are
            written as they are.

    Returns:
        The files, in the order of the samples.

    Raises:
        ExportError: no samples, too many, values that are not finite, an unknown layout, or a folder that cannot be
            used.
    """
    _one_of("layout", layout, LAYOUTS)
    data = np.asarray(samples, np.float32)
    if data.ndim < 2 or not 1 <= len(data) <= _MOST_SAMPLES:
        raise ExportError(
            f"the calibration samples have shape {data.shape}; allowed is (N, ...) with N from 1 to {_MOST_SAMPLES}"
        )
    if not np.isfinite(data).all():
        raise ExportError(f"{int((~np.isfinite(data)).sum())} of {data.size} calibration values are not finite")
    if data.ndim == 4 and layout == "NHWC":
        data = data.transpose(0, 2, 3, 1)
    files = [Path(folder) / f"{number:05d}.bin" for number in range(len(data))]
    others = sorted(set(Path(folder).glob("*.bin")).difference(files))
    if others:
        raise ExportError(f"{folder} holds '{others[0].name}' from elsewhere, which would be read too; empty it first")
    try:
        for file, sample in zip(files, data):
            write_bytes(file, np.ascontiguousarray(sample, "<f4").tobytes())
    except OSError as error:
        raise ExportError(f"cannot write into {folder}: {error.strerror}") from error
    return files


def ptq_config(
    quant_type: str = "FULL_QUANT",
    *,
    calibration: Optional[Mapping[str, PathLike]] = None,
    calibrate_size: Optional[int] = None,
    bit_num: int = 8,
    min_quant_weight_size: Optional[int] = None,
    min_quant_weight_channel: Optional[int] = None,
    skip_quant_node: Sequence[str] = (),
    debug_info_save_path: Optional[PathLike] = None,
    activation_quant_method: Optional[str] = None,
    bias_correction: Optional[bool] = None,
    per_channel: Optional[bool] = None,
    target_device: Optional[str] = None,
    smooth_alpha: Optional[float] = None,
    init_scale: Optional[float] = None,
    auto_tune: Optional[bool] = None,
    export_precision_mode: Optional[str] = None,
) -> str:
    """The text of a configuration file (INI) for ``--configFile``; what is None is left to the converter.

    Args:
        quant_type: ``FULL_QUANT`` (weights and activations, by calibration), ``WEIGHT_QUANT`` (weights alone) or
            ``DYNAMIC_QUANT`` (activations while the model runs).
        calibration: for FULL_QUANT: name of each input of the network to the folder of its files.
        calibrate_size: for FULL_QUANT: how many of the files are used, 1–65535.
        bit_num: width, 1–8; for WEIGHT_QUANT up to 16, or 0: a width a layer.
        min_quant_weight_size, min_quant_weight_channel: smaller weights stay float, 0–65535.
        skip_quant_node: names of nodes that stay float.
        debug_info_save_path: folder for the converter's own comparison of float and int8.
        activation_quant_method: for FULL_QUANT: ``MAX_MIN``, ``KL`` or ``REMOVAL_OUTLIER``.
        bias_correction: for FULL_QUANT: make up for the mean error of the weights in the bias.
        per_channel: for FULL_QUANT: one weight scale an output channel.
        target_device: for FULL_QUANT: ``KIRIN``, ``NVGPU``, ``DSP`` or ``ASCEND``; None for a CPU.
        smooth_alpha: for FULL_QUANT: share (0–1) of the activations' outliers that is moved into the weights.
        init_scale: for WEIGHT_QUANT with `bit_num` 0: scale the search begins with, above 0 and below 1.
        auto_tune: for WEIGHT_QUANT with `bit_num` 0: search for that scale.
        export_precision_mode: ``QUANT``, or ``FLOAT32`` for a float model with quantised weights.

    The sections for pictures (mean, size, cropping) are left out: `write_calibration_bins` writes samples as the
    network takes them.

    Raises:
        ExportError: an option has a value that is not allowed, or does not go with the others.
    """
    given = {name: value for name, value in locals().items() if value is not None and value != ()}
    _one_of("quant_type", quant_type, QUANT_TYPES)
    _check_together(given)
    if calibration is not None:
        given["calibrate_path"] = _calibrate_path(given.pop("calibration"))
        given["input_type"] = "BIN"
    lines: list[str] = []
    section = ""
    for name, option in _OPTIONS.items():
        if name not in given:
            continue
        if option.section != section:
            section = option.section
            lines += ["", f"[{section}]"] if lines else [f"[{section}]"]
        lines.append(f"{name}={option.text(name, given[name])}")
    return "\n".join(lines) + "\n"


def command(
    model: PathLike,
    output: PathLike,
    config: Optional[PathLike] = None,
    *,
    ascend: bool = False,
    input_shapes: Optional[Mapping[str, Sequence[int]]] = None,
    converter: PathLike = "converter_lite",
) -> list[str]:
    """The converter's command line, a list as `subprocess.run` takes it.

    Args:
        model: the MindIR.
        output: the converted model, without its suffix.
        config: the configuration file; None where nothing is quantised.
        ascend: convert for an NPU (``--optimize=ascend_oriented``).
        input_shapes: sizes of inputs that the MindIR leaves open, by name, batch first.
        converter: the program.

    Raises:
        ExportError: a size is not positive.
    """
    words = [str(converter), "--fmk=MINDIR", f"--modelFile={model}", f"--outputFile={output}"]
    if config is not None:
        words.append(f"--configFile={config}")
    if ascend:
        words.append("--optimize=ascend_oriented")
    if input_shapes:
        for name, shape in input_shapes.items():
            if not shape or min(shape) < 1:
                raise ExportError(f"input '{name}' has shape {tuple(shape)}; allowed are sizes of at least 1")
        texts = (f"{name}:{','.join(map(str, shape))}" for name, shape in input_shapes.items())
        words.append(f"--inputShape={';'.join(texts)}")
    return words


@dataclass(frozen=True)
class _Option:
    """An option of the configuration file: its section, and how its value is checked and written."""

    section: str
    text: Callable[[str, Any], str]


def _one_of(name: str, value: Any, allowed: Sequence[str]) -> str:
    if value not in allowed:
        raise ExportError(f"{name} is '{value}'; allowed: {', '.join(allowed)}{did_you_mean(str(value), allowed)}")
    return str(value)


def _choice(*allowed: str) -> Callable[[str, Any], str]:
    return lambda name, value: _one_of(name, value, allowed)


def _whole(low: int, high: int) -> Callable[[str, Any], str]:
    def text(name: str, value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
            raise ExportError(f"{name} is {value!r}; allowed is a whole number from {low} to {high}")
        return str(value)

    return text


def _share(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ExportError(f"{name} is {value!r}; allowed is a number above 0 and below 1")
    return repr(float(value))


def _flag(name: str, value: Any) -> str:
    if not isinstance(value, bool):
        raise ExportError(f"{name} is {value!r}; allowed: True, False")
    return str(value).lower()


def _path(name: str, value: Any) -> str:
    return _plain(name, str(value), "\n\r")


def _names(name: str, value: Any) -> str:
    if isinstance(value, str):
        raise ExportError(f"{name} is the text '{value}'; allowed is a list of names")
    return ",".join(_plain(name, item, ",\n\r") for item in value)


def _plain(name: str, value: str, forbidden: str) -> str:
    found = next((mark for mark in forbidden if mark in value), None)
    if found is not None or not value.strip():
        why = f"contains {found!r}, which the converter takes for a separator" if found else "is empty"
        raise ExportError(f"{name}: {value!r} {why}")
    return value


_OPTIONS = {
    "quant_type": _Option("common_quant_param", _choice(*QUANT_TYPES)),
    "bit_num": _Option("common_quant_param", _whole(0, 16)),
    "min_quant_weight_size": _Option("common_quant_param", _whole(0, 65535)),
    "min_quant_weight_channel": _Option("common_quant_param", _whole(0, 65535)),
    "skip_quant_node": _Option("common_quant_param", _names),
    "debug_info_save_path": _Option("common_quant_param", _path),
    "init_scale": _Option("mixed_bit_weight_quant_param", _share),
    "auto_tune": _Option("mixed_bit_weight_quant_param", _flag),
    "activation_quant_method": _Option("full_quant_param", _choice(*ACTIVATION_METHODS)),
    "bias_correction": _Option("full_quant_param", _flag),
    "per_channel": _Option("full_quant_param", _flag),
    "target_device": _Option("full_quant_param", _choice(*TARGET_DEVICES)),
    "smooth_alpha": _Option("full_quant_param", _share),
    "calibrate_path": _Option("data_preprocess_param", _path),
    "calibrate_size": _Option("data_preprocess_param", _whole(1, _MOST_SAMPLES)),
    "input_type": _Option("data_preprocess_param", _choice("BIN")),
    "export_precision_mode": _Option("transform_quant_param", _choice("QUANT", "FLOAT32")),
}
_NEEDED = ("calibration", "calibrate_size")


def _check_together(given: Mapping[str, Any]) -> None:
    """Options that the converter would ignore, and those it would miss."""
    kind, bits = given["quant_type"], given["bit_num"]
    full = [name for name, option in _OPTIONS.items() if option.section == "full_quant_param"]
    mixed = [name for name, option in _OPTIONS.items() if option.section == "mixed_bit_weight_quant_param"]
    for name in given:
        if name in (*full, *_NEEDED) and kind != "FULL_QUANT":
            raise ExportError(f"{name} goes with quant_type FULL_QUANT only, found {kind}")
        if name in mixed and (kind, bits) != ("WEIGHT_QUANT", 0):
            raise ExportError(f"{name} goes with quant_type WEIGHT_QUANT and bit_num 0 only, found {kind} and {bits}")
    missing = [name for name in _NEEDED if name not in given]
    if kind == "FULL_QUANT" and missing:
        raise ExportError(f"quant_type FULL_QUANT needs {missing[0]}")
    if kind != "WEIGHT_QUANT":
        _whole(1, 8)("bit_num", bits)


def _calibrate_path(folders: Mapping[str, PathLike]) -> str:
    """``name:folder``, one an input."""
    if not folders:
        raise ExportError("calibration names no input of the network")
    pairs = ((_plain("input", name, _SEPARATORS), folder) for name, folder in folders.items())
    return ",".join(f"{name}:{_plain('calibration', str(folder), _SEPARATORS)}" for name, folder in pairs)
