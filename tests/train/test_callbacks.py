from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mindspore as ms
import mindspore.dataset as ds
import numpy as np
import pytest
from mindspore import nn, ops
from mindspore.train import LossMonitor, Model, ModelCheckpoint, TimeMonitor

import msqkd
from msqkd.errors import CheckpointError, TrainingError
from msqkd.quant.fake_quant import OBSERVE, QUANTIZE
from msqkd.quant.qat import QuantCell

pytestmark = pytest.mark.usefixtures("graph_mode")

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(24, 1, 6, 6)).astype(np.float32)
LABELS = (IMAGES.mean((1, 2, 3)) > 0).astype(np.int32)
DELAY = 5  # steps, of 3 an epoch


class Net(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.fc = nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Dense(2, 2)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.fc(ops.mean(self.relu(self.conv(x)), (2, 3)))


def data() -> Any:
    return ds.NumpySlicesDataset((IMAGES, LABELS), shuffle=False).batch(8)


def made(file: Path) -> tuple[QuantCell, Model, msqkd.ActQuantDelay, msqkd.SaveQuantized]:
    ms.set_seed(3)
    cell = msqkd.prepare_qat(Net(), (1, 6, 6), msqkd.QuantConfig(act_quant_delay=DELAY))
    rates = np.linspace(0.1, 0.01, 9).tolist()
    model = Model(cell, nn.CrossEntropyLoss(), nn.Momentum(cell.trainable_params(), rates, 0.9))
    delay = msqkd.ActQuantDelay()
    return cell, model, delay, msqkd.SaveQuantized(file, delay)


def everything(model: Model) -> dict[str, np.ndarray]:
    return {p.name: p.asnumpy().copy() for p in model.train_network.get_parameters()}


def phases(cell: QuantCell) -> set[str]:
    return {quantizer.phase_of_quant for quantizer in cell.quantizers.values()}


def test_a_training_by_model_goes_on_from_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, whole, delay, _ = made(tmp_path / "unused")
    monitors = [LossMonitor(3), TimeMonitor(), ModelCheckpoint("net", str(tmp_path / "ckpt"))]
    whole.train(3, data(), callbacks=[delay, *monitors], dataset_sink_mode=True)  # on CPU nothing is sunk
    assert "loss is" in capsys.readouterr().out
    assert list((tmp_path / "ckpt").glob("*.ckpt"))

    file = tmp_path / "qat.state"
    cell, model, delay, save = made(file)
    assert not save.load(model.train_network)
    model.train(1, data(), callbacks=[delay, save], dataset_sink_mode=False)
    assert phases(cell) == {OBSERVE}
    assert (delay.steps_done, save.steps_done) == (3, 3)

    cell, model, delay, save = made(file)
    assert save.load(model.train_network)
    model.train(2, data(), callbacks=[delay, save], dataset_sink_mode=False)
    assert phases(cell) == {QUANTIZE}
    evaluated, other, _, reader = made(file)
    assert reader.load(other.train_network)
    assert phases(evaluated) == {QUANTIZE}
    assert (delay.steps_done, save.steps_done) == (9, 9)
    expected = everything(whole)
    for name, value in everything(model).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    assert [child.name for child in tmp_path.iterdir() if child.name.startswith((".", "qat"))] == ["qat.state"]

    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"qat.state (is damaged|cannot be read)"):
        save.load(model.train_network)


def test_a_step_of_msqkd_runs_in_model_and_counts_itself(tmp_path: Path) -> None:
    """With a teacher, whose parameters have the names of the student's and are not saved."""

    def steps() -> tuple[QuantCell, msqkd.DistillTrainOneStepCell, Model, msqkd.SaveQuantized]:
        cell, teacher = made(tmp_path)[0], Net()
        optimizer = nn.Momentum(cell.trainable_params(), 0.05, 0.9)
        step = msqkd.DistillTrainOneStepCell(cell, teacher, msqkd.DistillLoss(), optimizer, accumulate=2)
        return cell, step, Model(step), msqkd.SaveQuantized(tmp_path / "step.state", every_steps=2)

    cell, step, model, save = steps()
    model.train(2, data(), callbacks=[save], dataset_sink_mode=False)
    assert (step.steps_done, phases(cell)) == (6, {QUANTIZE})
    again, loaded, model, save = steps()
    assert save.load(model.train_network)
    assert loaded.steps_done == 6
    for one, other in zip(cell.get_parameters(), again.get_parameters()):
        np.testing.assert_array_equal(one.asnumpy(), other.asnumpy(), err_msg=one.name)
    answers = [each.set_train(False)(ms.Tensor(IMAGES)).asnumpy() for each in (cell, again)]
    np.testing.assert_array_equal(*answers)
    assert not np.array_equal(cell.conv_weight.asnumpy(), made(tmp_path)[0].conv_weight.asnumpy())


def sunk(cell: QuantCell, size: int, epochs: int, delay: msqkd.ActQuantDelay) -> list[set[str]]:
    """What `Model` tells its callbacks on a device that sinks: one call for `size` steps."""
    arguments = SimpleNamespace(train_network=cell, cur_step_num=0, cur_epoch_num=0, epoch_num=epochs)
    context: Any = SimpleNamespace(original_args=lambda: arguments)
    delay.on_train_begin(context)
    found = []
    for arguments.cur_epoch_num in range(1, epochs + 1):
        arguments.cur_step_num += size
        for quantizer in cell.group_quantizers().values():
            quantizer.set_range(0.0, 1.0)
        delay.on_train_step_begin(context)
        found.append(phases(cell))
    return found


def test_a_sunk_dataset_is_quantised_from_the_next_sink_on(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cell, _, delay, _ = made(tmp_path)
    assert sunk(cell, 4, 3, delay) == [{OBSERVE}, {OBSERVE}, {QUANTIZE}]
    said = " ".join(capsys.readouterr().err.split())
    assert "act_quant_delay is 5 steps, but the dataset is sunk 4 steps at a time" in said
    assert "quantised from step 8 on" in said
    cell, _, delay, _ = made(tmp_path)
    assert sunk(cell, 5, 2, delay) == [{OBSERVE}, {QUANTIZE}]
    assert not capsys.readouterr().err
    cell, _, delay, _ = made(tmp_path)
    with pytest.raises(TrainingError, match="within the last 9 steps, which are one sink: activations would never be"):
        sunk(cell, 9, 1, delay)
