from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any, Callable, Optional

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

from msqkd.api import plan_network
from msqkd.data import ArraySplit
from msqkd.distill.losses import CrossEntropy
from msqkd.errors import CheckpointError, DataError, TrainingError
from msqkd.graph.capture import capture
from msqkd.graph.cell import Hooks, to_cell
from msqkd.graph.half import half_precision
from msqkd.progress import Reporter
from msqkd.quant.config import QuantConfig
from msqkd.quant.qat import quantize_cell
from msqkd.recipe import TrainSection
from msqkd.train import loop
from msqkd.train.ema import AveragingOptimizer
from msqkd.train.loop import Training, fit, non_finite_place, steps_per_epoch
from msqkd.train.metric import Metric
from msqkd.train.optimizer import learning_rates, make_optimizer
from msqkd.train.state import History, save_state
from msqkd.train.step import LossScale, TrainStep, WithLoss

pytestmark = pytest.mark.usefixtures("graph_mode")


class Net(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.fc = nn.Dense(4, 2)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.fc(ops.mean(self.relu(self.bn(self.conv(x))), (2, 3)))


class Watched(ArraySplit):
    """A split that does something when a batch is asked for: `before(number of the batch)`."""

    before: Callable[[int], None] = staticmethod(lambda number: None)
    change: Callable[[int, np.ndarray], np.ndarray] = staticmethod(lambda number, images: images)
    served = 0

    def batch(self, indices: np.ndarray, rng: Optional[np.random.Generator] = None) -> tuple[np.ndarray, np.ndarray]:
        if rng is None:
            return super().batch(indices)
        self.served += 1
        self.before(self.served - 1)
        images, labels = super().batch(indices, rng)
        images = images + rng.normal(0, 0.01, images.shape).astype(
            np.float32
        )  # an augmentation, to be repeated exactly
        return self.change(self.served - 1, images), labels


RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(26, 1, 6, 6)).astype(np.float32)
LABELS = (IMAGES.mean((1, 2, 3)) > 0).astype(np.int32)
PER_EPOCH = 4  # batches of 6: two samples are left out each epoch
SETTINGS = TrainSection(epoch_size=3, batch_size=6, lr=0.05, log_interval=5, max_bad_steps=3)


def split() -> Watched:
    return Watched(IMAGES, LABELS, ("no", "yes"), name="toy train")


def training(folder: Path, data: Watched, settings: TrainSection = SETTINGS, delay: Optional[int] = 5) -> Training:
    """A quantised training, or a float one with `delay` None."""
    ms.set_seed(7)
    net = Net()
    if delay is None:
        graph = capture(net, (1, 6, 6))
        network: Any = to_cell(graph, half_precision(graph, settings.amp_level, Hooks()))
    else:
        graph, plan = plan_network(net, (1, 6, 6), QuantConfig(act_quant_delay=delay))
        network = quantize_cell(graph, plan, "live", amp_level=settings.amp_level)
    step = TrainStep(
        WithLoss(network, CrossEntropy()), make_optimizer(network, settings, PER_EPOCH),
        accumulate=settings.accumulate, loss_scale=LossScale.of(settings.loss_scale),
    )  # fmt: skip
    return Training("toy", "key", network, step, settings, data, split(), 3, folder / "toy.state.npz", 10)


def run(made: Training) -> History:
    return fit(made, Reporter(quiet=True))


def everything(made: Training) -> dict[str, np.ndarray]:
    return {p.name: p.asnumpy().copy() for p in made.step.get_parameters()}


def told(history: History) -> dict[str, Any]:
    """What a history says, without times."""
    return {key: value for key, value in history.to_dict().items() if key not in ("seconds", "data_share")}


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


@pytest.fixture(scope="module")
def whole(whole_folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The end of a training without interruption, whose states are in `whole_folder`."""
    ms.set_context(mode=ms.GRAPH_MODE)
    made = training(whole_folder, split())
    history = run(made)
    return everything(made), told(history)


def test_history_of_a_training(whole: tuple[dict[str, np.ndarray], dict[str, Any]]) -> None:
    _, history = whole
    assert [number for number, _ in history["loss"]] == [5, 10, 12]
    assert [number for number, _ in history["accuracy"]] == [1, 2, 3]
    assert history["skipped_steps"] == 0
    assert set(history) == {
        "loss", "learning_rate", "accuracy", "skipped_steps", "overflow_steps", "start_of_activation_quantisation",
        "first_loss", "best_epoch",
    }  # fmt: skip
    assert history["loss"][-1][1] < history["loss"][0][1]


# In the first epoch while observing, at the boundary of the delay, at one of an epoch, and in the last step.
@pytest.mark.parametrize("stops", [[5], [11], [2, 4, 7]])
def test_an_interrupted_training_ends_equal_to_the_bit(
    tmp_path: Path, stops: list[int], whole: tuple[dict[str, np.ndarray], dict[str, Any]]
) -> None:
    done = 0
    for stop in stops:

        def interrupt(number: int, at: int = stop - done) -> None:
            if number == at:
                raise KeyboardInterrupt

        data = split()
        data.before = interrupt  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            run(training(tmp_path, data))
        done = stop
    made = training(tmp_path, split())
    history = run(made)
    expected, expected_history = whole
    found = everything(made)
    assert found.keys() == expected.keys()
    for name, data in found.items():
        np.testing.assert_array_equal(data, expected[name], err_msg=name)
    assert told(history) == expected_history


def test_a_training_in_float16_goes_on_with_its_loss_scale(tmp_path: Path) -> None:
    """In two parts a step, with AdamW: everything a step has of its own comes back."""
    settings = TrainSection(epoch_size=2, batch_size=3, accumulate=2, amp_level="O2", opt="adamw", lr=0.05)
    (tmp_path / "whole").mkdir()
    whole = training(tmp_path / "whole", split(), settings, delay=None)
    step: Any = whole.step
    step.loss_scale.set_data(ms.Tensor(np.float32(2.0**20)))  # the first steps overflow
    expected_history = run(whole)
    assert 0 < expected_history.overflow_steps < 2 * PER_EPOCH
    assert expected_history.skipped_steps == 0

    def interrupt(number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt

    data = split()
    data.before = interrupt  # type: ignore[method-assign]
    stopped: Any = training(tmp_path, data, settings, delay=None)
    stopped.step.loss_scale.set_data(ms.Tensor(np.float32(2.0**20)))
    with pytest.raises(KeyboardInterrupt):
        run(stopped)
    again: Any = training(tmp_path, split(), settings, delay=None)
    history = run(again)
    assert told(history) == told(expected_history)
    own = {p.name: p.asnumpy() for p in step.state_parameters()}
    assert {"train_step.loss_scale", "train_step.overflows", "beta1_power"} <= set(own)
    for parameter in again.step.state_parameters():
        np.testing.assert_array_equal(parameter.asnumpy(), own[parameter.name], err_msg=parameter.name)
    for name, value in everything(again).items():
        if not name.startswith("gathered"):
            np.testing.assert_array_equal(value, everything(whole)[name], err_msg=name)


def test_ctrl_c_in_the_middle_of_a_step_ends_at_its_end(
    tmp_path: Path, whole: tuple[dict[str, np.ndarray], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.getsignal(signal.SIGINT)
    made = training(tmp_path, split())
    real = nn.TrainOneStepCell.__call__

    def pressed(self: Any, *inputs: Any) -> Any:
        loss = real(self, *inputs)  # the weights are updated, the step is not yet counted
        if self.steps_done == 2:
            signal.raise_signal(signal.SIGINT)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(nn.TrainOneStepCell, "__call__", pressed)
        with pytest.raises(KeyboardInterrupt):
            run(made)
    assert made.step.steps_done == 3
    assert signal.getsignal(signal.SIGINT) is before
    again = training(tmp_path, split())
    assert told(run(again)) == whole[1]
    for name, data in everything(again).items():
        np.testing.assert_array_equal(data, whole[0][name], err_msg=name)


def test_a_kill_between_the_last_step_and_its_evaluation_loses_no_accuracy(
    tmp_path: Path, whole: tuple[dict[str, np.ndarray], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> float:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_SAVE_SECONDS", -1.0)  # every step
        patch.setattr(loop, "measured", killed)
        with pytest.raises(Killed):
            run(training(tmp_path, split()))
    assert told(run(training(tmp_path, split()))) == whole[1]


@pytest.mark.usefixtures("whole")
def test_a_finished_training_is_not_run_again(tmp_path: Path, whole_folder: Path) -> None:
    shutil.copytree(whole_folder, tmp_path, dirs_exist_ok=True)
    data = split()
    made = training(tmp_path, data)
    run(made)
    assert data.served == 0
    assert made.step.steps_done == 3 * PER_EPOCH


@pytest.mark.parametrize(("ema", "higher", "found", "best"), [
    (None, True, [50.0, 70.0, 60.0], 2), (0.9, True, [50.0, 70.0, 70.0], 2), (None, False, [9.0, 0.5, 0.7], 2),
    (None, True, [90.0, 70.0, 80.0], 3),  # the first epoch ends before everything is quantised
])  # fmt: skip
def test_the_best_epoch_is_what_a_training_ends_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: Optional[float], higher: bool, found: list[float], best: int
) -> None:
    """Interrupted in the last epoch, so that the best one is remembered on disk."""
    settings = SETTINGS.model_copy(update={"keep_best": True, "ema": ema})
    held: dict[int, dict[str, np.ndarray]] = {}

    def made(data: Watched) -> Training:
        new = training(tmp_path, data, settings, delay=None if ema is None else 5)
        if ema is not None:
            new.step.optimizer = AveragingOptimizer(new.step.optimizer, new.network, ema)
        new.settled = 5
        new.metric = Metric(name="error", higher_is_better=higher, function=lambda outputs, labels: 0.0)
        return new

    def scripted(network: Any, *_: Any, **__: Any) -> float:
        epoch = len(held) + 1
        held[epoch] = {p.name: p.asnumpy().copy() for p in network.get_parameters()}
        return found[epoch - 1]

    monkeypatch.setattr(loop, "measured", scripted)

    def interrupt(number: int) -> None:
        if number == 2 * PER_EPOCH + 1:
            raise KeyboardInterrupt

    data = split()
    data.before = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(made(data))
    last = made(split())
    history = run(last)
    assert history.best_epoch == best
    assert [value for _, value in history.accuracy] == found
    for parameter in last.network.get_parameters():
        np.testing.assert_array_equal(parameter.asnumpy(), held[best][parameter.name], err_msg=parameter.name)


def test_a_damaged_best_epoch_is_said(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"keep_best": True})
    run(training(tmp_path, split(), settings, delay=None))
    file = tmp_path / "toy.state.best.npz"
    spoil(file, "flip")
    with pytest.raises(CheckpointError, match=r"toy\.state\.best\.npz is damaged: its checksum differs; remove it"):
        run(training(tmp_path, split(), settings, delay=None))


def test_a_batch_with_nan_is_skipped(tmp_path: Path) -> None:
    data = split()
    data.change = lambda number, images: images * (np.nan if number in (2, 7) else 1)  # type: ignore[method-assign]
    made = training(tmp_path, data)
    history = run(made)
    assert history.skipped_steps == 2
    assert made.step.steps_done == 3 * PER_EPOCH
    assert all(np.isfinite(value).all() for value in everything(made).values())
    assert np.isfinite(history.loss).all()
    assert int(made.step.optimizer.global_step.asnumpy()[0]) == 3 * PER_EPOCH, (
        "a skipped step has its learning rate too"
    )


def test_a_line_of_the_log_that_falls_on_a_skipped_step_is_written(tmp_path: Path) -> None:
    data = split()
    data.change = lambda number, images: images * (np.nan if number in (4, 11) else 1)  # type: ignore[method-assign]
    history = run(training(tmp_path, data, delay=None))
    assert [step for step, _ in history.loss] == [5, 10, 12]
    rates = learning_rates(SETTINGS, PER_EPOCH)
    assert history.learning_rate == [(step, rates[step - 1]) for step in (5, 10, 12)]


def test_a_state_whose_optimizer_fell_behind_goes_on_at_the_rate_of_its_step(tmp_path: Path) -> None:
    held = training(tmp_path, split(), delay=None)
    held.step.steps_done = 6
    held.step.optimizer.global_step.set_data(ms.Tensor(np.array([2], np.int32)))
    save_state(held.step, held.network, History(accuracy=[(0, 50.0), (1, 50.0)]), "key", held.state_file)
    made = training(tmp_path, split(), delay=None)
    run(made)
    assert made.step.steps_done == 3 * PER_EPOCH
    assert int(made.step.optimizer.global_step.asnumpy()[0]) == 3 * PER_EPOCH


def test_nan_batches_in_a_row_are_an_error_that_names_the_input(tmp_path: Path) -> None:
    data = split()
    data.change = lambda number, images: images * (np.nan if number >= 2 else 1)  # type: ignore[method-assign]
    with pytest.raises(TrainingError) as caught:
        run(training(tmp_path, data))
    text = str(caught.value)
    assert "the loss is nan at step 4 after 3 skipped steps in a row; it first arises in the input batch" in text
    assert "\n" not in text


def test_an_exploding_training_names_the_parameter(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"lr": 1e30, "scheduler": "constant"})
    made = training(tmp_path, split(), settings, delay=None)
    with pytest.raises(
        TrainingError, match=r"at step \d+ after 3 skipped steps in a row; it first arises in (parameter|layer) '"
    ):
        run(made)


def test_the_layer_where_a_value_overflows_is_named(tmp_path: Path) -> None:
    made = training(tmp_path, split(), delay=None)
    by_name = {p.name: p for p in made.network.get_parameters()}
    by_name["fc.weight"].set_data(ms.Tensor(np.full((2, 4), 3e38, np.float32)))
    assert non_finite_place(made.network, IMAGES[:6]) == "layer 'fc' (Dense)"
    by_name["conv.weight"].set_data(ms.Tensor(np.full((4, 1, 3, 3), np.nan, np.float32)))
    assert non_finite_place(made.network, IMAGES[:6]) == "parameter 'conv.weight'"
    assert non_finite_place(made.network, IMAGES[:6] * np.inf) == "the input batch"


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e38])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_that_is_not_finite_changes_no_weight(tmp_path: Path, bad: float, clip: Optional[float]) -> None:
    """A ReLU makes 0 of NaN: the loss looks sound, the gradients are not."""
    made = training(tmp_path, split(), delay=None)
    made.step.clip_grad = clip
    names = [p.name for p in made.network.trainable_params()]
    before = everything(made)
    made.step.set_train()
    loss = made.step(ms.Tensor(IMAGES[:6] * np.float32(bad)), ms.Tensor(LABELS[:6]))
    assert np.isnan(loss.asnumpy())
    after = everything(made)
    for name in names:
        np.testing.assert_array_equal(after[name], before[name])
    assert made.step.steps_done == 1


def test_too_few_samples_for_a_batch(tmp_path: Path) -> None:
    assert steps_per_epoch(split(), 6) == PER_EPOCH
    with pytest.raises(
        DataError, match="toy train has 26 samples, fewer than one batch of 27; choose a smaller batch_size or acc"
    ):
        run(training(tmp_path, split(), SETTINGS.model_copy(update={"batch_size": 27})))


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training stopped in its second epoch."""

    def interrupt(number: int) -> None:
        if number == 5:
            raise KeyboardInterrupt

    ms.set_context(mode=ms.GRAPH_MODE)
    folder, data = tmp_path_factory.mktemp("stopped"), split()
    data.before = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(training(folder, data))
    return folder


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """A copy of the folder of the stopped training."""
    return Path(shutil.copytree(stopped_once, tmp_path, dirs_exist_ok=True))


def spoil(file: Path, damage: str) -> None:
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    file.write_bytes({"flip": content, "cut": content[:-100], "empty": b"", "text": b"nonsense" * 10}[damage])


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_the_state_before_a_damaged_one_is_used(
    stopped: Path,
    damage: str,
    whole: tuple[dict[str, np.ndarray], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(Reporter, "warn", lambda self, text: warned.append(text))
    spoil(stopped / "toy.state.npz", damage)
    made = training(stopped, split())
    history = run(made)
    assert len(warned) == 1
    assert "toy.state.npz is damaged: the training goes on from the state before it, toy.state.1.npz" in warned[0]
    assert told(history) == whole[1]
    for name, data in everything(made).items():
        np.testing.assert_array_equal(data, whole[0][name], err_msg=name)


def test_as_many_states_are_kept_as_asked(tmp_path: Path) -> None:
    for keep, kept in ((1, {"toy.state.npz"}), (3, {"toy.state.npz", "toy.state.1.npz", "toy.state.2.npz"})):
        folder = tmp_path / str(keep)
        folder.mkdir()
        run(training(folder, split(), SETTINGS.model_copy(update={"keep": keep}), delay=None))
        assert {child.name for child in folder.iterdir()} == kept


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text"])
def test_a_damaged_state_is_told(stopped: Path, damage: str) -> None:
    for file in stopped.iterdir():
        spoil(file, damage)
    with pytest.raises(
        CheckpointError, match=r"toy.state.1.npz (is damaged|cannot be read).*remove it to start this training over"
    ):
        run(training(stopped, split()))


def test_the_state_of_another_training_is_refused(stopped: Path) -> None:
    made = training(stopped, split())
    made.key = "another"
    with pytest.raises(CheckpointError, match="belongs to another training"):
        run(made)


def test_the_state_of_another_network_is_refused(stopped: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lacks '|belongs to another"):
        run(training(stopped, split(), SETTINGS.model_copy(update={"opt": "adam", "momentum": None})))


def test_a_state_is_one_file(stopped: Path) -> None:
    assert {child.name for child in stopped.iterdir()} == {"toy.state.npz", "toy.state.1.npz"}
