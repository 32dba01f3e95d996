"""The distillation step: the teacher answers in evaluation mode, without a gradient, inside the compiled step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

from mindspore import nn, ops

from msqkd.train.step import TrainStep, count_inputs


class WithDistillLoss(nn.Cell):
    """``loss(student(x), teacher(x), labels)``; only the student is trained.

    Gradients stop at the teacher's answer, and an optimiser holds the student's parameters alone. A batch has
    `inputs` inputs (None: as `WithLoss`), then the labels; several outputs of a network are handed to the loss as a
    tuple.
    """

    def __init__(self, student: nn.Cell, teacher: nn.Cell, loss: nn.Cell, inputs: Optional[int] = None) -> None:
        super().__init__(auto_prefix=False)
        self.student, self.loss = student, loss
        self.inputs = count_inputs(student) if inputs is None else inputs
        self.teacher = teacher
        teacher.set_train(False)

    def set_train(self, mode: bool = True) -> nn.Cell:
        """Set the mode of the student; the teacher stays in evaluation mode."""
        super().set_train(mode)
        self.teacher.set_train(False)
        return self

    def construct(self, *batch):  # type: ignore[no-untyped-def]
        """Inputs and labels to a scalar."""
        inputs = batch[: self.inputs]
        return self.loss(self.student(*inputs), ops.stop_gradient(self.teacher(*inputs)), *batch[self.inputs :])


class DistillTrainOneStepCell(TrainStep):
    """One step of training `student` to answer as `teacher` does.

    Args:
        student: the network trained, float or quantised.
        teacher: the network imitated; put in evaluation mode, its parameters are excluded from training.
        loss: a cell of (student's outputs, teacher's outputs, labels), such as `DistillLoss`; an output by itself where
            a network has one, a tuple where it has several.
        optimizer: over the student's trainable parameters.
        clip_grad: largest global norm of the gradient; None does not clip.
        inputs: how many inputs student and teacher have; what a batch has beyond them are labels. None takes what a
            student of msqkd knows of itself, and 1 for any other.
    """

    def __init__(
        self,
        student: nn.Cell,
        teacher: nn.Cell,
        loss: nn.Cell,
        optimizer: nn.Optimizer,
        clip_grad: Optional[float] = None,
        inputs: Optional[int] = None,
    ) -> None:
        super().__init__(WithDistillLoss(student, teacher, loss, inputs), optimizer, clip_grad)

    def __call__(self, *inputs: Any) -> Any:
        """Run one step on a batch and its labels; returns the loss (scalar Tensor)."""
        with _apart(self.network.teacher):
            return super().__call__(*inputs)

    def set_train(self, mode: bool = True) -> nn.Cell:
        """Set the mode of the student; the teacher stays in evaluation mode."""
        super().set_train(mode)
        self.network.set_train(mode)
        return self

    def quantized_part(self) -> nn.Cell:
        """The student: a quantised teacher keeps its phase and its ranges."""
        return self.network.student


@contextmanager
def _apart(teacher: nn.Cell) -> Iterator[None]:
    """Give the teacher's parameters names of their own for a while.

    Student and teacher usually have the same names. MindSpore's compiler tells parameters apart by name, and renames
    those of both networks for good where two are equal: neither would find its checkpoint again.
    """
    names = [(parameter, parameter.name) for parameter in teacher.get_parameters()]
    try:
        for parameter, name in names:
            parameter.name = f"teacher.{name}"
        yield
    finally:
        for parameter, name in names:
            parameter.name = name
