"""The distillation step: the teacher answers in evaluation mode, without a gradient, inside the compiled step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

from mindspore import nn, ops

from msqkd.train.step import TrainStep


class WithDistillLoss(nn.Cell):
    """``loss(student(x), teacher(x), labels)``; only the student is trained.

    Gradients stop at the teacher's answer, and an optimiser holds the student's parameters alone.
    """

    def __init__(self, student: nn.Cell, teacher: nn.Cell, loss: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.student, self.loss = student, loss
        self.teacher = teacher
        teacher.set_train(False)

    def set_train(self, mode: bool = True) -> nn.Cell:
        """Set the mode of the student; the teacher stays in evaluation mode."""
        super().set_train(mode)
        self.teacher.set_train(False)
        return self

    def construct(self, x, labels):  # type: ignore[no-untyped-def]
        """A batch and its labels to a scalar."""
        return self.loss(self.student(x), ops.stop_gradient(self.teacher(x)), labels)


class DistillTrainOneStepCell(TrainStep):
    """One step of training `student` to answer as `teacher` does.

    Args:
        student: the network trained, float or quantised.
        teacher: the network imitated; put in evaluation mode, its parameters are excluded from training.
        loss: a cell of (student logits, teacher logits, labels), such as `DistillLoss`.
        optimizer: over the student's trainable parameters.
        clip_grad: largest global norm of the gradient; None does not clip.
    """

    def __init__(
        self,
        student: nn.Cell,
        teacher: nn.Cell,
        loss: nn.Cell,
        optimizer: nn.Optimizer,
        clip_grad: Optional[float] = None,
    ) -> None:
        super().__init__(WithDistillLoss(student, teacher, loss), optimizer, clip_grad)

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
