"""The vendor's own converter and runtime on marked MindIR files; skipped where the package is not at hand."""

from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

import msqkd
from msqkd.deploy.converter_run import compare_ms, convert, find_converter
from msqkd.deploy.vendor_runtime import HOME_VARIABLE, first_error, is_vendor_python, run_ms, vendor_python

PYTHON = vendor_python()
needs_vendor = pytest.mark.skipif(PYTHON is None, reason=f"{HOME_VARIABLE} names no environment with mindspore-lite")


class Bottlenecks(nn.Cell):
    """Pointwise convolutions in a row, a gate in float, a product with a number and a flattened cube."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 8, 3, 2, has_bias=True), nn.ReLU()
        self.wide, self.narrow = nn.Conv2d(8, 12, 1, has_bias=True), nn.Conv2d(12, 8, 1, has_bias=True)
        self.gate, self.silu, self.head = nn.Conv2d(8, 8, 1), nn.SiLU(), nn.Dense(512, 5)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.silu(self.narrow(self.wide(self.relu(self.stem(x)))))
        x = x * ops.sigmoid(self.gate(x)) * 0.3
        return self.head(self.relu(x + self.stem_of(x)).reshape(-1, 512))

    def stem_of(self, x):  # type: ignore[no-untyped-def]
        return ops.cat((x[:, 4:], x[:, :4]), 1)


@needs_vendor
def test_the_vendors_file_computes_what_ours_computes(tmp_path: Path) -> None:
    assert PYTHON is not None
    ms.set_seed(1)
    net = Bottlenecks()
    net.set_train(False)
    x = np.random.default_rng(0).normal(size=(4, 3, 16, 16)).astype(np.float32)
    config = msqkd.QuantConfig(msqkd.WeightQuantizer(per_channel=True), act_observer="minmax")
    cell = msqkd.quantize(msqkd.create_ptq_network(net, config, [x]))
    marked = Path(msqkd.export(cell, (3, 16, 16), str(tmp_path / "net"), "MINDIR"))
    ours = Path(msqkd.export(cell, (3, 16, 16), str(tmp_path / "net"), "MS"))
    theirs = convert(find_converter(PYTHON.parent.parent), marked, tmp_path / "theirs", tmp_path)
    fed = [np.ascontiguousarray(x.transpose(0, 2, 3, 1))[:, None]]
    for one, other in zip(run_ms(PYTHON, ours, fed), run_ms(PYTHON, theirs, fed)):
        np.testing.assert_array_equal(one, other)
    found = compare_ms(ours, theirs, [fed[0][:, 0]])
    assert sorted(layer.op for layer in found.theirs if not layer.int8) == ["Activation", "Activation"]


def test_an_environment_is_told_from_a_folder(tmp_path: Path) -> None:
    assert vendor_python(tmp_path) is None
    python = tmp_path / "x86" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("")
    assert vendor_python(tmp_path) is None, "the package is not there"
    (tmp_path / "x86" / "lib" / "python3.7" / "site-packages" / "mindspore_lite").mkdir(parents=True)
    assert vendor_python(tmp_path) == python
    assert is_vendor_python(python)
    assert find_converter(tmp_path) == python


def test_the_line_of_a_log_that_tells_of_an_error() -> None:
    assert first_error("started\n[ERROR] LITE: no kernel\n[ERROR] later\n") == "[ERROR] LITE: no kernel"
    assert first_error("started\nended\n") == "ended"
    assert first_error("") == "it was silent"
