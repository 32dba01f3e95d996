"""The calls of the Python API, where they could surprise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

import msqkd
from msqkd.errors import ExportError, PlanError
from msqkd.quant.algorithms.base import Method
from msqkd.quant.algorithms.bias_correction import BiasCorrection
from msqkd.quant.algorithms.equalize import Equalize
from msqkd.quant.fake_quant import QUANTIZE
from msqkd.quant.qat import QuantCell

pytestmark = pytest.mark.usefixtures("pynative_mode")
SHAPE = (1, 8, 8)


class Net(nn.Cell):
    def __init__(self, joined: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2, self.relu = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU()
        self.joined = joined
        self.fc = nn.Dense(8 if joined else 4, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.relu(self.conv1(x))
        y = self.relu(self.conv2(x))
        if self.joined:
            y = ops.concat((x, y), 1)
        return self.fc(ops.mean(y, (2, 3)))


def batches(count: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((4, *SHAPE)) * (10 if i == 0 else 1)).astype(np.float32) for i in range(count)]


def trained(learned: str) -> QuantCell:
    """A student after a few steps on samples of which one is far outside."""
    ms.set_seed(3)
    weight = msqkd.WeightQuantizer("int4", per_channel=True, learned=learned)
    config = msqkd.QuantConfig(weight, act_quant_dtype="int4", act_quant_delay=1, act_learned=learned)
    student = msqkd.prepare_qat(Net(), SHAPE, config)
    step = msqkd.TrainStep(msqkd.WithLoss(student, nn.CrossEntropyLoss()), nn.SGD(student.trainable_params(), 0.01))
    step.set_train()
    for batch in [*batches(), *batches()]:
        step(ms.Tensor(batch), ms.Tensor(np.int32([0, 1, 2, 0])))
    return student.set_train(False)


def test_calibrating_a_trained_network_keeps_its_trained_scales() -> None:
    student = trained("lsq")
    before = student.sync()[1]
    calibrated = msqkd.quantize(msqkd.create_ptq_network(student, calib_dataset=batches()))
    after = calibrated.sync()[1]
    assert student.scales()["groups"], "no activation was trained"
    for name, group in before.groups.items():
        np.testing.assert_array_equal(after.groups[name].qparams().scale, group.qparams().scale, err_msg=name)
        assert after.groups[name].qparams().zero_point == group.qparams().zero_point
    for name, scale in student.scales()["weights"].items():
        np.testing.assert_array_equal(after.weights[name].scale, scale)
    x = ms.Tensor(batches()[1])
    np.testing.assert_allclose(calibrated(x).asnumpy(), student(x).asnumpy(), rtol=1e-3, atol=1e-3)


def test_calibrating_a_trained_network_uses_the_observer_of_a_recipe() -> None:
    """Percentile 99.99, of all batches alike; the moving average of the training would see the last ones most."""
    values = np.random.default_rng(0).uniform(-1, 1, (4, 100, *SHAPE)).astype(np.float32)
    values[0, 0, 0, 0, 0] = 100.0
    student = trained("none")
    ranges = msqkd.quantize(msqkd.create_ptq_network(student, calib_dataset=list(values))).ranges()
    assert ranges["x"] == pytest.approx((-1.0, 1.0), abs=0.01), "one of 25600 values is outside"


def test_a_generator_loses_no_batch() -> None:
    def generated() -> Iterator[np.ndarray]:
        yield from batches()

    net = Net()
    config = msqkd.QuantConfig(act_observer="minmax")
    listed = msqkd.quantize(msqkd.create_ptq_network(net, config, batches())).ranges()
    assert msqkd.quantize(msqkd.create_ptq_network(net, config, generated())).ranges() == listed


def test_with_calibrated_ranges_and_no_delay_it_quantises_at_once() -> None:
    net = Net()
    cell = msqkd.prepare_qat(net, SHAPE, msqkd.QuantConfig(), calib_dataset=batches())
    assert {q.phase_of_quant for q in cell.quantizers.values()} == {QUANTIZE}


def test_a_net_that_was_trained_before_keeps_its_cell_paths() -> None:
    net = Net()
    step = nn.TrainOneStepCell(
        nn.WithLossCell(net, nn.CrossEntropyLoss()), nn.Momentum(net.trainable_params(), 0.01, 0.9)
    )
    step.set_train()
    step(ms.Tensor(batches(1)[0]), ms.Tensor(np.zeros(4, np.int32)))
    graph, _ = msqkd.plan_network(net, SHAPE, rules=[msqkd.Rule("path", "conv1", {"weight.per_channel": True})])
    assert [node.name for node in graph.nodes if node.op in ("Conv2D", "Dense")] == ["conv1", "conv2", "fc"]


@pytest.mark.parametrize("file_format", ["MINDIR", "MINDIR_PORTABLE"])
def test_a_net_with_a_concat_is_exported(file_format: str, tmp_path: Path) -> None:
    from msqkd.exporters.verify import load_lite, load_portable

    cell = msqkd.quantize(msqkd.create_ptq_network(Net(joined=True), None, batches()))
    file = Path(msqkd.export(cell, SHAPE, str(tmp_path / "net"), file_format))
    loaded = (load_lite if file_format == "MINDIR" else load_portable)(file)
    x = ms.Tensor(batches(1)[0])
    np.testing.assert_allclose(loaded(x).asnumpy(), cell(x).asnumpy(), atol=0.05)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_clipped_by_mse_are_exported_as_they_were_trained(bits: int, tmp_path: Path) -> None:
    from msqkd.exporters.verify import load_portable

    config = msqkd.QuantConfig(msqkd.WeightQuantizer(bits, per_channel=True, observer="mse"))
    cell = msqkd.prepare_qat(Net(), SHAPE, config, calib_dataset=batches())
    rng = np.random.default_rng(1)
    for parameter in cell.trainable_params():  # as training would, so that other clip ratios would be best
        parameter.set_data(ms.Tensor((parameter.asnumpy() + rng.standard_normal(parameter.shape)).astype(np.float32)))
    file = msqkd.export(cell, SHAPE, str(tmp_path / "net"), "MINDIR_PORTABLE")
    x = ms.Tensor(batches(1)[0])
    assert np.abs(load_portable(Path(file))(x).asnumpy() - cell(x).asnumpy()).max() <= 1e-4


def test_a_method_repairs_channels_out_of_balance() -> None:
    net, x = Net(), ms.Tensor(batches()[1])
    scale = np.array([256, 1, 1, 1], np.float32)
    net.conv1.weight.set_data(ms.Tensor(net.conv1.weight.asnumpy() * scale.reshape(-1, 1, 1, 1)))
    net.conv2.weight.set_data(ms.Tensor(net.conv2.weight.asnumpy() / scale.reshape(1, -1, 1, 1)))
    exact = net(x).asnumpy()

    def error(*methods: Method) -> float:
        cell = msqkd.quantize(msqkd.create_ptq_network(net, None, iter(batches()), methods=methods))
        return float(np.square(cell(x).asnumpy() - exact).mean())

    assert error(Equalize(), BiasCorrection()) < 0.1 * error()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: msqkd.export(Net(), SHAPE, "x"), "export takes a quantised network, found a Net"),
        (lambda: msqkd.prepare_qat(Net(), SHAPE, batchnorm="froze"), "did you mean 'freeze'"),
        (
            lambda: msqkd.create_ptq_network(
                msqkd.prepare_qat(Net(), SHAPE, calib_dataset=batches()), methods=[BiasCorrection()]
            ),
            "already has its quantisation plan; leave out config, rules, preset and methods",
        ),
        (lambda: msqkd.QuantConfig(weight_quantizer=8), "allowed: a WeightQuantizer"),  # type: ignore[arg-type]
        (
            lambda: msqkd.plan_network(Net(), SHAPE, rules=[msqkd.Rule("path", "fc", {"bits": 4})]),
            "setting 'bits' is unknown; allowed: .*weight.quant_dtype",
        ),
    ],
)
def test_a_wrong_call_is_one_sentence(call: Any, sentence: str) -> None:
    with pytest.raises((PlanError, ExportError), match=sentence):
        call()


def test_the_delay_goes_on_with_another_training() -> None:
    import mindspore.dataset as ds

    cell = msqkd.prepare_qat(Net(), SHAPE, msqkd.QuantConfig(act_quant_delay=3))
    images = np.concatenate(batches(4))
    data = ds.NumpySlicesDataset((images, np.zeros(len(images), np.int32)), shuffle=False).batch(4)
    model = ms.train.Model(cell, nn.CrossEntropyLoss(), nn.Momentum(cell.trainable_params(), 0.01, 0.9))
    callback = msqkd.ActQuantDelay()
    for _ in range(2):
        model.train(1, data, callbacks=[callback], dataset_sink_mode=False)
        assert {q.phase_of_quant for q in cell.quantizers.values()} == {QUANTIZE}


@pytest.mark.parametrize("preset", [None, "cnn"])
def test_calibration_without_settings_sees_every_batch_alike(preset: Optional[str]) -> None:
    rng = np.random.default_rng(0)
    tops = (1.0, 2.0, 8.0)
    data = [rng.uniform(-top, top, (8, 4)).astype(np.float32) for top in tops]
    _, plan = msqkd.quantize(msqkd.create_ptq_network(nn.Dense(4, 4), calib_dataset=data, preset=preset)).sync()
    low, high = plan.group_of("x").range or (0.0, 0.0)
    assert min(-low, high) > 7, "a moving average would have stayed with the first batch"


class Half(nn.Cell):
    """A network of float16 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, dtype=ms.float16)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return ops.relu(self.conv(x))


@pytest.mark.parametrize("make", [msqkd.prepare_qat, msqkd.plan_network, msqkd.create_ptq_network])
def test_an_input_of_float16_is_refused_in_one_sentence(make: Any) -> None:
    example = ms.Tensor(np.zeros((2, 2, 6, 6), np.float16))
    with pytest.raises(PlanError, match="Half: its input 'x' is float16; allowed: float32, integers and") as caught:
        make(Half(), example_input=example)
    assert "parameter.set_dtype(mindspore.float32)" in str(caught.value)
