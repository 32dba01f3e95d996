"""Callbacks for `mindspore.train.Model`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

from mindspore import nn
from mindspore.train import Callback

from msqkd.errors import TrainingError
from msqkd.files import PathLike
from msqkd.progress import Reporter
from msqkd.quant.qat import QuantCell, advance
from msqkd.train.decay import check_step_sizes
from msqkd.train.state import of_state, read_archive, restore, write_archive
from msqkd.train.step import TrainStep


class _Counting(Callback):
    """Knows how many steps were done before the ones that begin, over several calls of `Model.train`."""

    def __init__(self) -> None:
        super().__init__()
        self.steps_done = 0
        self._number = 0  # what Model calls the last step of this call

    def on_train_begin(self, run_context: Any) -> None:
        """A call of `Model.train` counts from its own start."""
        self._number = run_context.original_args().cur_step_num

    def _begun(self, run_context: Any) -> int:
        """How many steps begin together: a sunk dataset is one call for many."""
        number = run_context.original_args().cur_step_num
        count, self._number = number - self._number, number
        return int(count)


class ActQuantDelay(_Counting):
    """Begin to quantise activations when their delay is over, in a training by `Model.train`.

    It counts the steps it has seen: give the same callback to a training that goes on with another `Model.train`.
    `TrainStep` and `DistillTrainOneStepCell` count steps themselves and need no callback.

    Where the dataset is sunk (``dataset_sink_mode=True`` on an Ascend; a CPU never sinks), Python sees no step between
    two sinks: quantisation begins with the first sink that starts after the delay, which is said. Choose `sink_size` so
    that a delay is a multiple of it.

    Attributes:
        steps_done: how many steps have begun.

    Raises:
        TrainingError: a delay ends within the last sink, so that what it delays would never be quantised; or the
            optimizer decays step sizes that are trained (`msqkd.decay_groups` leaves them out).
    """

    def on_train_begin(self, run_context: Any) -> None:
        """Look at the optimizer."""
        super().on_train_begin(run_context)
        network = run_context.original_args().train_network
        check_step_sizes(network, getattr(network, "optimizer", None))

    def on_train_step_begin(self, run_context: Any) -> None:
        """Bring every quantiser to its phase."""
        arguments = run_context.original_args()
        count = self._begun(run_context)
        advance(arguments.train_network, self.steps_done)
        inside = [d for d in _delays(arguments.train_network) if self.steps_done < d < self.steps_done + count]
        self.steps_done += count
        if not inside:
            return
        if arguments.cur_epoch_num >= arguments.epoch_num:
            raise TrainingError(
                f"act_quant_delay is {inside[-1]} steps, within the last {count} steps, which are one sink: "
                "activations would never be quantised; choose a sink_size that divides it, or dataset_sink_mode=False"
            )
        Reporter().warn(
            f"act_quant_delay is {inside[0]} steps, but the dataset is sunk {count} steps at a time: activations are "
            f"quantised from step {self.steps_done} on"
        )


class SaveQuantized(_Counting):
    """Save, at the end of every epoch, all that a training by `Model.train` needs to go on.

    One file holds every parameter that changes (weights, ranges, the optimiser's moments, the loss scale), the number
    of steps done, and a checksum; it is replaced whole, so that a kill leaves the old or the new one.

    Args:
        path: the file.
        delay: the callback that begins the quantisation; `load` sets its count too.
        every_steps: save also when so many steps have passed since the last time; None saves after epochs alone.

    Attributes:
        steps_done: how many steps are in the file.
    """

    def __init__(
        self, path: PathLike, delay: Optional[ActQuantDelay] = None, every_steps: Optional[int] = None
    ) -> None:
        super().__init__()
        self.path, self.delay, self.every_steps = Path(path), delay, every_steps
        self._done = 0

    def load(self, train_network: nn.Cell) -> bool:
        """Bring `train_network` (``model.train_network``) to where the file left it; False where there is no file.

        Raises:
            CheckpointError: the file is damaged, or belongs to another training.
        """
        if not self.path.exists():
            return False
        arrays, meta = read_archive(self.path)
        restore(_changing(train_network), arrays, "", self.path)
        self.steps_done = self._done = int(meta["steps"])
        if self.delay is not None:
            self.delay.steps_done = self._done
        if isinstance(train_network, TrainStep):
            train_network.go_on(self._done)
        elif self._done:
            advance(train_network, self._done - 1)
        return True

    def on_train_step_end(self, run_context: Any) -> None:
        """Count, and save where it is time."""
        self._done += self._begun(run_context)
        if self.every_steps is not None and self._done - self.steps_done >= self.every_steps:
            self._save(run_context)

    def on_train_epoch_end(self, run_context: Any) -> None:
        """Save."""
        self._save(run_context)

    def _save(self, run_context: Any) -> None:
        network = run_context.original_args().train_network
        arrays = {parameter.name: parameter.asnumpy() for parameter in of_state(_changing(network))}
        self.steps_done = self._done
        write_archive(arrays, {"steps": self._done}, self.path)


def _changing(train_network: nn.Cell) -> list[Any]:
    """What a training changes; a teacher, whose parameters have the student's names, is not part of it."""
    if not isinstance(train_network, TrainStep):
        return list(train_network.get_parameters())
    found = [*train_network.quantized_part().get_parameters(), *train_network.state_parameters()]
    return list({id(parameter): parameter for parameter in found}.values())


def _delays(cell: nn.Cell) -> list[int]:
    parts = [part for _, part in cell.cells_and_names() if isinstance(part, QuantCell)]
    return sorted({quantizer.group.delay for part in parts for quantizer in part.quantizers.values()})
