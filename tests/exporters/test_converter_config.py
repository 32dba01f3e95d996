from __future__ import annotations

import configparser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msqkd.errors import ExportError
from msqkd.exporters.converter import command, ptq_config, write_calibration_bins

SAMPLES = np.random.default_rng(0).normal(size=(3, 2, 4, 5)).astype(np.float32)
FULL = {"calibration": {"x": "/data/x"}, "calibrate_size": 3}


def sections(text: str) -> dict[str, dict[str, str]]:
    parser = configparser.ConfigParser(strict=True, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return {name: dict(parser[name]) for name in parser.sections()}


def read(file: Path) -> np.ndarray:
    return np.fromfile(file, "<f4")


def test_a_file_a_sample(tmp_path: Path) -> None:
    files = write_calibration_bins(SAMPLES, tmp_path / "bins", "NCHW")
    assert [file.name for file in files] == ["00000.bin", "00001.bin", "00002.bin"]
    assert sorted((tmp_path / "bins").iterdir()) == files
    for file, sample in zip(files, SAMPLES):
        np.testing.assert_array_equal(read(file), sample.ravel())


def test_channels_last_for_a_cpu(tmp_path: Path) -> None:
    files = write_calibration_bins(list(SAMPLES), tmp_path, "NHWC")
    for file, sample in zip(files, SAMPLES):
        np.testing.assert_array_equal(read(file).reshape(4, 5, 2), np.moveaxis(sample, 0, -1))


def test_samples_that_are_no_pictures_have_no_layout(tmp_path: Path) -> None:
    vectors = np.arange(6, dtype=np.float64).reshape(2, 3)
    for layout in ("NCHW", "NHWC"):
        files = write_calibration_bins(vectors, tmp_path, layout)
        assert [read(file).tolist() for file in files] == vectors.tolist()


@pytest.mark.parametrize(
    ("samples", "layout", "text"),
    [
        (SAMPLES, "NHCW", "layout is 'NHCW'; allowed: NCHW, NHWC; did you mean"),
        (SAMPLES[:0], "NCHW", r"have shape \(0, 2, 4, 5\); allowed is \(N, ...\) with N from 1 to 65535"),
        (np.ones(3), "NCHW", r"have shape \(3,\)"),
        (np.float32([[1, np.nan], [np.inf, 1]]), "NCHW", "2 of 4 calibration values are not finite"),
    ],
)
def test_samples_that_cannot_be_written(tmp_path: Path, samples: Any, layout: str, text: str) -> None:
    with pytest.raises(ExportError, match=text):
        write_calibration_bins(samples, tmp_path, layout)
    assert list(tmp_path.iterdir()) == []


def test_files_from_elsewhere_would_be_read_too(tmp_path: Path) -> None:
    write_calibration_bins(SAMPLES, tmp_path, "NCHW")
    write_calibration_bins(SAMPLES, tmp_path, "NCHW")
    with pytest.raises(ExportError, match=r"holds '00002.bin' from elsewhere"):
        write_calibration_bins(SAMPLES[:2], tmp_path, "NCHW")


def test_a_place_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match=r"^cannot write into .*file/bins: "):
        write_calibration_bins(SAMPLES, tmp_path / "file" / "bins", "NCHW")


def test_full_quantisation() -> None:
    text = ptq_config(
        calibration={"image": "/data/image", "size": Path("/data/size")},
        calibrate_size=100,
        activation_quant_method="REMOVAL_OUTLIER",
        bias_correction=False,
        per_channel=True,
        target_device="ASCEND",
        smooth_alpha=0.5,
        skip_quant_node=["conv1", "fc"],
        debug_info_save_path="/tmp/debug",
    )
    assert sections(text) == {
        "common_quant_param": {
            "quant_type": "FULL_QUANT",
            "bit_num": "8",
            "skip_quant_node": "conv1,fc",
            "debug_info_save_path": "/tmp/debug",
        },
        "full_quant_param": {
            "activation_quant_method": "REMOVAL_OUTLIER",
            "bias_correction": "false",
            "per_channel": "true",
            "target_device": "ASCEND",
            "smooth_alpha": "0.5",
        },
        "data_preprocess_param": {
            "calibrate_path": "image:/data/image,size:/data/size",
            "calibrate_size": "100",
            "input_type": "BIN",
        },
    }


def test_what_is_not_asked_for_is_left_to_the_converter() -> None:
    assert set(sections(ptq_config(**FULL))) == {"common_quant_param", "data_preprocess_param"}
    assert sections(ptq_config("DYNAMIC_QUANT")) == {
        "common_quant_param": {"quant_type": "DYNAMIC_QUANT", "bit_num": "8"}
    }


def test_weight_quantisation() -> None:
    text = ptq_config("WEIGHT_QUANT", bit_num=4, min_quant_weight_size=0, min_quant_weight_channel=5)
    assert sections(text) == {
        "common_quant_param": {
            "quant_type": "WEIGHT_QUANT",
            "bit_num": "4",
            "min_quant_weight_size": "0",
            "min_quant_weight_channel": "5",
        }
    }
    mixed = ptq_config("WEIGHT_QUANT", bit_num=0, init_scale=0.02, auto_tune=False, export_precision_mode="FLOAT32")
    assert sections(mixed)["mixed_bit_weight_quant_param"] == {"init_scale": "0.02", "auto_tune": "false"}
    assert sections(mixed)["transform_quant_param"] == {"export_precision_mode": "FLOAT32"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"quant_type": "FULL"}, "quant_type is 'FULL'; allowed: FULL_QUANT, WEIGHT_QUANT, DYNAMIC_QUANT"),
        ({}, "quant_type FULL_QUANT needs calibration$"),
        ({"calibration": {"x": "/d"}}, "quant_type FULL_QUANT needs calibrate_size"),
        ({"calibration": {}, "calibrate_size": 1}, "calibration names no input"),
        ({**FULL, "target_device": "CPU"}, "target_device is 'CPU'; allowed: KIRIN, NVGPU, DSP, ASCEND"),
        ({**FULL, "activation_quant_method": "RemovalOutlier"}, "did you mean 'REMOVAL_OUTLIER'"),
        ({**FULL, "calibrate_size": 0}, "calibrate_size is 0; allowed is a whole number from 1 to 65535"),
        ({**FULL, "calibrate_size": True}, "calibrate_size is True"),
        ({**FULL, "bit_num": 16}, "bit_num is 16; allowed is a whole number from 1 to 8"),
        ({**FULL, "smooth_alpha": 1.5}, "smooth_alpha is 1.5; allowed is a number above 0 and below 1"),
        ({**FULL, "per_channel": 1}, "per_channel is 1; allowed: True, False"),
        ({**FULL, "init_scale": 0.1}, "init_scale goes with quant_type WEIGHT_QUANT and bit_num 0 only"),
        ({**FULL, "skip_quant_node": "conv1"}, "skip_quant_node is the text 'conv1'; allowed is a list"),
        ({**FULL, "skip_quant_node": ["a,b"]}, "'a,b' contains ',', which the converter takes for a separator"),
        ({**FULL, "debug_info_save_path": "a\n[x]"}, r"contains '\\n', which"),
        ({**FULL, "calibration": {"x": "/a:b"}}, "calibration: '/a:b' contains ':'"),
        ({**FULL, "calibration": {"": "/a"}}, "input: '' is empty"),
        ({"quant_type": "WEIGHT_QUANT", "bias_correction": True}, "bias_correction goes with quant_type FULL_QUANT"),
        ({"quant_type": "WEIGHT_QUANT", "calibrate_size": 3}, "calibrate_size goes with quant_type FULL_QUANT"),
        ({"quant_type": "WEIGHT_QUANT", "bit_num": 17}, "bit_num is 17; allowed is a whole number from 0 to 16"),
        (
            {"quant_type": "WEIGHT_QUANT", "bit_num": 8, "auto_tune": True},
            "auto_tune goes with quant_type WEIGHT_QUANT",
        ),
        ({"quant_type": "DYNAMIC_QUANT", "export_precision_mode": "INT8"}, "export_precision_mode is 'INT8'"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ExportError, match=text) as caught:
        ptq_config(**options)
    assert "\n" not in str(caught.value)


def test_command_lines() -> None:
    assert command("x.mindir", "x") == ["converter_lite", "--fmk=MINDIR", "--modelFile=x.mindir", "--outputFile=x"]
    words = command(
        "a b.mindir",
        "out",
        "q.cfg",
        ascend=True,
        input_shapes={"x": (1, 3, 32, 32), "n": (1,)},
        converter=Path("/opt/converter_lite"),
    )
    assert words == [
        "/opt/converter_lite",
        "--fmk=MINDIR",
        "--modelFile=a b.mindir",
        "--outputFile=out",
        "--configFile=q.cfg",
        "--optimize=ascend_oriented",
        "--inputShape=x:1,3,32,32;n:1",
    ]
    with pytest.raises(ExportError, match=r"input 'x' has shape \(-1, 3\); allowed are sizes of at least 1"):
        command("x.mindir", "x", input_shapes={"x": (-1, 3)})
