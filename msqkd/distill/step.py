"""The distillation step: the teacher answers in evaluation mode, without a gradient, inside the compiled step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Optional, Union

from mindspore import nn, ops

from msqkd.distill.losses import DistillLoss
from msqkd.errors import PlanError, TrainingError
from msqkd.train.step import LossScale, TrainStep, count_inputs


@dataclass(frozen=True)
class CachedTeachers:
    """In the place of teachers: every batch has their answers behind its labels (`msqkd.distill.cache.TaughtSplit`).

    Attributes:
        several: how many, of a list of teachers; None for one that is not in a list.
        outputs: numbers of the outputs a batch has of each teacher, in this order.
    """

    several: Optional[int] = None
    outputs: tuple[int, ...] = (0,)


Teachers = Union[nn.Cell, Sequence[nn.Cell], CachedTeachers]


class Learners(nn.Cell):
    """What an optimiser trains in a distillation: the student, and the adapters of losses between features."""

    def __init__(self, student: nn.Cell, loss: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.student, self.loss = student, loss


class WithDistillLoss(nn.Cell):
    """``loss(student(x), teacher(x), labels)``; only the student is trained.

    Gradients stop at the teacher's answer, and an optimiser holds the student's parameters alone (and those of the
    loss: `Learners`). A batch has `inputs` inputs (None: as `WithLoss`), then the labels; several outputs of a network
    are handed to the loss as a tuple, and so are the answers of several teachers.
    """

    def __init__(
        self,
        student: nn.Cell,
        teacher: Union[nn.Cell, Sequence[nn.Cell]],
        loss: nn.Cell,
        inputs: Optional[int] = None,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.student, self.loss = student, loss
        self.inputs = count_inputs(student) if inputs is None else inputs
        self.several = not isinstance(teacher, nn.Cell)
        self.teachers = nn.CellList([teacher] if isinstance(teacher, nn.Cell) else list(teacher), auto_prefix=False)
        self.teachers.set_train(False)

    def set_train(self, mode: bool = True) -> nn.Cell:
        """Set the mode of the student; the teachers stay in evaluation mode."""
        super().set_train(mode)
        self.teachers.set_train(False)
        return self

    def construct(self, *batch):  # type: ignore[no-untyped-def]
        """Inputs and labels to a scalar."""
        inputs = batch[: self.inputs]
        answers = ()
        for teacher in self.teachers:
            answers = (*answers, ops.stop_gradient(teacher(*inputs)))
        taught = answers if self.several else answers[0]
        return self.loss(self.student(*inputs), taught, *batch[self.inputs :])


class WithCachedAnswers(nn.Cell):
    """As `WithDistillLoss`, for teachers whose answers come with the batch: float32 (N, rows, ...), behind the labels.

    Raises:
        PlanError: the loss compares layers, which are not in the answers.
    """

    def __init__(self, student: nn.Cell, teachers: CachedTeachers, loss: nn.Cell, inputs: Optional[int] = None) -> None:
        super().__init__(auto_prefix=False)
        if isinstance(loss, DistillLoss) and loss.watched:
            raise PlanError("cached answers of a teacher have no values of its layers; features need the teacher")
        self.student, self.loss = student, loss
        self.inputs = count_inputs(student) if inputs is None else inputs
        self.teachers: tuple[nn.Cell, ...] = ()
        self.several = teachers.several is not None
        known = len(teachers.outputs)
        self.starts = tuple(range(0, known * (teachers.several or 1), known))
        self.cached = known * len(self.starts)
        # Where each output up to the last one used is found; one that is not there is not used either.
        self.places = tuple(
            teachers.outputs.index(number) if number in teachers.outputs else 0
            for number in range(max(teachers.outputs) + 1)
        )

    def construct(self, *batch):  # type: ignore[no-untyped-def]
        """Inputs, labels and answers to a scalar."""
        given = batch[len(batch) - self.cached :]
        answers = ()
        for start in self.starts:
            outputs = ()
            for place in self.places:
                answer = given[start + place]
                outputs = (*outputs, answer.reshape((-1, *answer.shape[2:])))
            answers = (*answers, outputs if len(self.places) > 1 else outputs[0])
        taught = answers if self.several else answers[0]
        labels = batch[self.inputs : len(batch) - self.cached]
        return self.loss(self.student(*batch[: self.inputs]), taught, *labels)


class DistillTrainOneStepCell(TrainStep):
    """One step of training `student` to answer as `teacher` does.

    Args:
        student: the network trained, float or quantised.
        teacher: the network imitated, or a list of them; not trained, and left as it is found: it is in evaluation
            mode during a step only. `CachedTeachers` where their answers come with the batch.
        loss: a cell of (student's outputs, teacher's outputs, labels), such as `DistillLoss`; an output by itself where
            a network has one, a tuple where it has several. With a list of teachers it gets a tuple of their outputs.
        optimizer: over the student's trainable parameters, and those of the loss where it has any
            (``Learners(student, loss).trainable_params()``).
        clip_grad: largest global norm of the gradient; None does not clip.
        inputs: how many inputs student and teacher have; what a batch has beyond them are labels. None takes what a
            student of msqkd knows of itself, and 1 for any other.
        accumulate, loss_scale: as `TrainStep`.
    """

    def __init__(
        self,
        student: nn.Cell,
        teacher: Teachers,
        loss: nn.Cell,
        optimizer: nn.Optimizer,
        clip_grad: Optional[float] = None,
        inputs: Optional[int] = None,
        accumulate: int = 1,
        loss_scale: LossScale = LossScale(),  # noqa: B008 (it cannot be changed)
    ) -> None:
        made: Any = WithDistillLoss
        teachers: Sequence[nn.Cell] = [teacher] if isinstance(teacher, nn.Cell) else ()
        if isinstance(teacher, CachedTeachers):
            made = WithCachedAnswers
        elif not teachers:
            teachers = teacher
        with _flags_kept(teachers):
            network = made(student, teacher, loss, inputs)
            super().__init__(network, optimizer, clip_grad, accumulate, loss_scale)

    def __call__(self, *inputs: Any) -> Any:
        """Run one step on a batch and its labels; returns the loss (scalar Tensor).

        Raises:
            TrainingError: A batch has too few samples for the losses between layers.
        """
        loss = self.network.loss
        if isinstance(loss, DistillLoss):
            samples = len(inputs[0]) // self.parts
            if samples < loss.least_samples:
                raise TrainingError(
                    f"losses between layers compare the samples of a batch and need at least {loss.least_samples}; "
                    f"found {samples}{f' in each of {self.parts} parts' if self.parts > 1 else ''}; use a "
                    "larger batch, and leave out an incomplete last one"
                )
            loss.set_step(self.steps_done)
        with _flags_kept(self.network.teachers), _apart(self.network.teachers):
            for teacher in self.network.teachers:
                if any(cell.training for _, cell in teacher.cells_and_names()):
                    teacher.set_train(False)
            return super().__call__(*inputs)

    def set_train(self, mode: bool = True) -> nn.Cell:
        """Set the mode of the student; the teacher keeps its own, and is in evaluation mode during a step."""
        with _flags_kept(self.network.teachers):
            super().set_train(mode)
            self.network.set_train(mode)
        return self

    def quantized_part(self) -> nn.Cell:
        """The student: a quantised teacher keeps its phase and its ranges."""
        return self.network.student

    def state_parameters(self) -> list[Any]:
        """As `TrainStep`, with the parameters of the loss: adapters between features, the sizes of its terms."""
        known = super().state_parameters()
        held = {id(parameter) for parameter in known}
        return [*known, *(item for item in self.network.loss.get_parameters() if id(item) not in held)]


@contextmanager
def _flags_kept(teachers: Iterable[nn.Cell]) -> Iterator[None]:
    """Give every cell of the teachers its own mode and `requires_grad` back at the end."""
    cells = [cell for teacher in teachers for _, cell in teacher.cells_and_names()]
    before = [(cell, cell.training, cell.requires_grad, cell.phase) for cell in cells]
    try:
        yield
    finally:
        for cell, training, requires_grad, phase in before:
            if cell.training != training:
                cell.add_flags(training=training)
            if cell.requires_grad != requires_grad:
                cell.set_grad(requires_grad)
            cell.phase = phase


@contextmanager
def _apart(teachers: Iterable[nn.Cell]) -> Iterator[None]:
    """Give the teachers' parameters names of their own for a while.

    Student and teacher usually have the same names. MindSpore's compiler tells parameters apart by name, and renames
    those of both networks for good where two are equal: neither would find its checkpoint again.
    """
    names = [
        (f"teacher{index}.{parameter.name}", parameter, parameter.name)
        for index, teacher in enumerate(teachers)
        for parameter in teacher.get_parameters()
    ]
    try:
        for own, parameter, _ in names:
            parameter.name = own
        yield
    finally:
        for _, parameter, name in names:
            parameter.name = name
