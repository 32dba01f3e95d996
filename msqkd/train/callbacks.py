"""Callbacks for `mindspore.train.Model`."""

from __future__ import annotations

from typing import Any

from mindspore.train import Callback

from msqkd.errors import TrainingError
from msqkd.quant.qat import advance


class ActQuantDelay(Callback):
    """Begin to quantise activations when their delay is over, in a training by `Model.train`.

    It counts the steps it has seen: give the same callback to a training that goes on with another `Model.train`.
    `TrainStep` and `DistillTrainOneStepCell` count steps themselves and need no callback.

    Raises:
        TrainingError: the training sinks its dataset (no step is seen from Python); use ``dataset_sink_mode=False``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.steps_done = 0

    def on_train_begin(self, run_context: Any) -> None:
        """Refuse a sunk dataset."""
        if run_context.original_args().get("dataset_sink_mode"):
            raise TrainingError(
                "ActQuantDelay cannot count the steps of a sunk dataset; train with dataset_sink_mode=False"
            )

    def on_train_step_begin(self, run_context: Any) -> None:
        """Bring every quantiser to its phase."""
        advance(run_context.original_args().train_network, self.steps_done)
        self.steps_done += 1
