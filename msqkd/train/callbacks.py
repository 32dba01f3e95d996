"""Callbacks for `mindspore.train.Model`."""

from __future__ import annotations

from typing import Any

from mindspore.train import Callback

from msqkd.errors import TrainingError
from msqkd.quant.qat import advance


class ActQuantDelay(Callback):
    """Begin to quantise activations when their delay is over, in a training by `Model.train`.

    `TrainStep` and `DistillTrainOneStepCell` count steps themselves and need no callback.

    Raises:
        TrainingError: the training sinks its dataset (no step is seen from Python); use ``dataset_sink_mode=False``.
    """

    def on_train_begin(self, run_context: Any) -> None:
        """Refuse a sunk dataset."""
        if run_context.original_args().get("dataset_sink_mode"):
            raise TrainingError(
                "ActQuantDelay cannot count the steps of a sunk dataset; train with dataset_sink_mode=False"
            )

    def on_train_step_begin(self, run_context: Any) -> None:
        """Bring every quantiser to its phase."""
        params = run_context.original_args()
        advance(params.train_network, params.cur_step_num - 1)
