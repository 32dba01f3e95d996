"""Losses that teach a student network what its teacher answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Callable, Optional, Union

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from msqkd.distill.balance import BALANCES, RunningBalance
from msqkd.distill.layers import Link
from msqkd.distill.schedule import Schedule
from msqkd.distill.shapes import class_axis
from msqkd.errors import PlanError, did_you_mean

Scheduled = Union[float, Schedule]


def _classes_last(values, axis):  # type: ignore[no-untyped-def]
    """Logits with the classes on the last axis."""
    place = class_axis(values.ndim, axis)
    return values if place == values.ndim - 1 else ops.movedim(values, place, -1)


def _same_shape(student, teacher):  # type: ignore[no-untyped-def]
    if student.shape != teacher.shape:
        raise ValueError("a soft loss needs outputs of the same shape from student and teacher")


class SoftKL(nn.Cell):
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), mean over the batch and over positions.

    The factor T² keeps the size of the gradient when T changes (Hinton et al., arXiv:1503.02531, §2). With
    δ = log p(student) − log p(teacher) the divergence is Σ p(teacher) · (exp(δ) − 1 − δ), whose terms are never
    negative, so that no digits cancel. A class whose logit is −inf has no probability.

    Args:
        axis: Axis of the classes; None takes that of `class_axis`.
    """

    def __init__(self, axis: Optional[int] = None) -> None:
        super().__init__(auto_prefix=False)
        self.axis = axis

    def construct(self, student, teacher, temperature):  # type: ignore[no-untyped-def]
        """Logits, float32, and a number above 0. Returns a scalar."""
        _same_shape(student, teacher)
        student, teacher = _classes_last(student, self.axis), _classes_last(teacher, self.axis)
        inverse = 1.0 / temperature
        finite_student, finite_teacher = student > _NO_LOGIT, teacher > _NO_LOGIT
        both = ops.logical_and(finite_student, finite_teacher)
        alone = ops.logical_xor(finite_student, finite_teacher)
        zeros = ops.zeros_like(teacher)
        log_teacher = ops.log_softmax(teacher * inverse, -1)
        of_teacher = ops.exp(log_teacher)

        # Differences of logits without what all classes have in common. Where all are far below T the logarithms of
        # the probabilities agree in nearly every digit; what they differ by is computed from the differences then.
        apart = ops.where(both, ops.where(both, student, zeros) - ops.where(both, teacher, zeros), zeros)
        apart = ops.where(both, apart - ops.stop_gradient((of_teacher * apart).sum(-1, keepdims=True)), zeros)
        size = ops.where(alone, zeros + _FAR, ops.abs(apart) * inverse).max(-1, keepdims=True)
        near = ops.stop_gradient(ops.logical_and(size <= _NEAR, ops.logical_or(both, zeros < 1.0)))
        close = ops.where(near, apart, zeros)
        step = close * inverse
        grown = close * _expm1_ratio(step)  # T · (exp(step) − 1)
        mean = (of_teacher * grown).sum(-1, keepdims=True)
        shift = mean * _log1p_ratio(mean * inverse)  # T · log of the mean of exp(step)
        delta = close - shift
        small = of_teacher * ops.square(delta) * _second_ratio(delta * inverse)

        # Everywhere else the logarithms differ enough to be subtracted.
        far = ops.logical_not(near)
        mask = ops.logical_and(far, finite_student)
        log_student = ops.log_softmax(ops.where(far, student, zeros) * inverse, -1)
        possible = ops.logical_and(far, of_teacher > 0.0)
        difference = ops.where(possible, log_student, zeros) - ops.where(possible, log_teacher, zeros)
        of_student = ops.where(mask, ops.exp(ops.where(mask, log_student, zeros)), zeros)
        tiny = ops.logical_and(possible, ops.abs(difference) <= _NEAR)
        narrow = ops.where(tiny, difference, zeros)
        wide = ops.where(tiny, zeros, of_student - of_teacher - of_teacher * ops.where(tiny, zeros, difference))
        large = of_teacher * ops.square(narrow) * _second_ratio(narrow) + ops.where(far, wide, zeros)
        return (small.sum(-1) + large.sum(-1) * temperature * temperature).mean()


def _expm1_ratio(x):  # type: ignore[no-untyped-def]
    """(exp(x) − 1) / x for |x| up to `_NEAR`."""
    return 1.0 + x / 2.0 * (1.0 + x / 3.0 * (1.0 + x / 4.0 * (1.0 + x / 5.0 * (1.0 + x / 6.0 * (1.0 + x / 7.0)))))


def _second_ratio(x):  # type: ignore[no-untyped-def]
    """(exp(x) − 1 − x) / x² for |x| up to twice `_NEAR`."""
    inner = 1.0 + x / 5.0 * (1.0 + x / 6.0 * (1.0 + x / 7.0 * (1.0 + x / 8.0 * (1.0 + x / 9.0))))
    return 0.5 + x / 6.0 * (1.0 + x / 4.0 * inner)


def _log1p_ratio(x):  # type: ignore[no-untyped-def]
    """log(1 + x) / x for |x| up to exp(`_NEAR`) − 1, by the series of 2 · artanh(x / (2 + x))."""
    half = x / (2.0 + x)
    square = half * half
    series = 1.0 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9 + square / 11))))
    return 2.0 / (2.0 + x) * series


class SoftMSE(nn.Cell):
    """Mean squared difference of the logits (Ba & Caruana, arXiv:1312.6184); the temperature plays no part.

    A class whose logit is the same in both, −inf included, adds nothing.

    Args:
        axis: Not used; each number counts for itself.
    """

    def __init__(self, axis: Optional[int] = None) -> None:
        super().__init__(auto_prefix=False)

    def construct(self, student, teacher, temperature):  # type: ignore[no-untyped-def]
        """Outputs of any shape, float32. Returns a scalar."""
        _same_shape(student, teacher)
        equal, zeros = student == teacher, ops.zeros_like(teacher)
        return ops.square(ops.where(equal, zeros, student) - ops.where(equal, zeros, teacher)).mean()


class SoftCosine(nn.Cell):
    """1 − cosine of the angle between the logits, mean over the batch and positions; the temperature plays no part.

    The term by which DistilBERT aligns the directions of student and teacher (Sanh et al., arXiv:1910.01108, §3), here
    on the outputs. It leaves the size of the logits to the other terms. A class whose logit is −inf in both networks is
    left out.

    Args:
        axis: Axis of the classes; None takes that of `class_axis`.
    """

    def __init__(self, axis: Optional[int] = None) -> None:
        super().__init__(auto_prefix=False)
        self.axis = axis

    def construct(self, student, teacher, temperature):  # type: ignore[no-untyped-def]
        """Logits, float32. Returns a scalar, 0 to 2."""
        _same_shape(student, teacher)
        student, teacher = _classes_last(student, self.axis), _classes_last(teacher, self.axis)
        left_out = ops.logical_and(student <= _NO_LOGIT, teacher <= _NO_LOGIT)
        zeros = ops.zeros_like(teacher)
        student, teacher = ops.where(left_out, zeros, student), ops.where(left_out, zeros, teacher)
        lengths = ops.square(student).sum(-1) * ops.square(teacher).sum(-1)
        return (1.0 - (student * teacher).sum(-1) / ops.sqrt(lengths + _TINY)).mean()


SOFT_LOSSES: dict[str, Callable[[Optional[int]], nn.Cell]] = {"kl": SoftKL, "mse": SoftMSE, "cosine": SoftCosine}
COMBINES = ("weighted", "best")

_TINY = 1e-12
_NO_LOGIT = -3e38  # at or below which a class has no probability
_NEAR, _FAR = 0.25, 1.0


class CrossEntropy(nn.Cell):
    """`nn.CrossEntropyLoss` with the same bits in every run, for logits of shape (N, classes) and labels int32 (N,).

    MindSpore's own takes a logarithm element by element, shared among as many threads as were fastest so far; where a
    share ends, the CPU's last bit is another. The gradient does not see it, but the loss that is told does.

    Args:
        label_smoothing: Share of the label's probability that all classes get.
        axis: Axis of the classes in logits of three and more dimensions. None takes the one that the labels lack: axis
            1 of (N, classes, …) or the last of (N, …, classes).
        reduction: ``mean``, or ``none`` for one loss a sample, the mean over its positions.
    """

    def __init__(self, label_smoothing: float = 0.0, axis: Optional[int] = None, reduction: str = "mean") -> None:
        super().__init__(auto_prefix=False)
        self.smoothing, self.axis, self.reduction = label_smoothing, axis, reduction

    def construct(self, logits, labels):  # type: ignore[no-untyped-def]
        """Also what `nn.CrossEntropyLoss` takes beyond that: labels as probabilities, maps. Returns a scalar."""
        if logits.ndim == 2 and labels.ndim == 1:
            return ops.nll_loss(
                ops.log_softmax(logits, -1), labels, reduction=self.reduction, label_smoothing=self.smoothing
            )
        if logits.ndim > 2 and self._has_classes_last(logits.shape, labels.shape):
            if labels.ndim == logits.ndim:
                labels = ops.movedim(labels, -1, 1)
            logits = ops.movedim(logits, -1, 1)
        loss = ops.cross_entropy(logits, labels, reduction=self.reduction, label_smoothing=self.smoothing)
        return loss.reshape((loss.shape[0], -1)).mean(-1) if self.reduction == "none" else loss

    def _has_classes_last(self, logits, labels):  # type: ignore[no-untyped-def]
        last = len(logits) - 1
        if self.axis is not None:
            place = class_axis(len(logits), self.axis)
            if place != 1 and place != last:
                raise ValueError("the cross-entropy needs the classes on axis 1 or on the last axis")
            return place == last
        if len(labels) == len(logits):
            return class_axis(len(logits)) == last
        fits_last, fits_first = labels == logits[:-1], labels == (logits[0], *logits[2:])
        if fits_last and fits_first:
            raise ValueError(
                "axis 1 and the last axis of the logits could both be the classes; name the axis (distillation.axis), "
                "or use another loss (train.loss)"
            )
        return fits_last


def hard_loss(name: str, label_smoothing: float = 0.1, axis: Optional[int] = None) -> Optional[nn.Cell]:
    """The loss against labels by name: cross_entropy, label_smoothing, or none (returns None); `axis` of the classes as
    in `CrossEntropy`."""
    losses: dict[str, Callable[[], Optional[nn.Cell]]] = {
        "cross_entropy": lambda: CrossEntropy(axis=axis),
        "label_smoothing": lambda: CrossEntropy(label_smoothing, axis),
        "none": lambda: None,
    }
    if name not in losses:
        raise PlanError(f"hard loss '{name}' is unknown; allowed: {', '.join(losses)}{did_you_mean(name, losses)}")
    return losses[name]()


class BestTeacher(nn.Cell):
    """For each sample the outputs of the teacher that knows its label best, by the least cross-entropy.

    Args:
        judged: number of the output the cross-entropy is computed of.
        outputs: numbers of the outputs wanted.
        axis: of the classes, as in `CrossEntropy`.
    """

    def __init__(self, judged: int, outputs: Sequence[int], axis: Optional[int] = None) -> None:
        super().__init__(auto_prefix=False)
        self.judged, self.outputs = judged, tuple(outputs)
        self.cross_entropy = CrossEntropy(axis=axis, reduction="none")

    def construct(self, teachers, labels):  # type: ignore[no-untyped-def]
        """A tuple of the teachers' outputs, and labels int32 (N,). Returns a tuple of outputs."""
        best = self._loss(teachers[0], labels)
        chosen = ()
        for index in self.outputs:
            chosen = (*chosen, _output(teachers[0], index))
        for teacher in teachers[1:]:
            loss = self._loss(teacher, labels)
            better = loss < best
            best = ops.select(better, loss, best)
            taken = ()
            for place, index in enumerate(self.outputs):
                mine, other = chosen[place], _output(teacher, index)
                rows = better.reshape((-1,) + (1,) * (mine.ndim - 1))
                taken = (*taken, ops.where(rows, other, mine))
            chosen = taken
        return chosen

    def _loss(self, teacher, labels):  # type: ignore[no-untyped-def]
        return self.cross_entropy(_output(teacher, self.judged), labels)


class DistillLoss(nn.Cell):
    """(1 − alpha) · hard(student, labels) + alpha · soft(student, teacher, T) + Σ weight · feature(student, teacher).

    Args:
        hard_loss: loss of (logits, labels), by name that of the first output; ``cross_entropy`` when not given, None
            or ``none`` leaves it out. A cell is called with all outputs of the student, then the labels.
        soft_loss: ``kl``, ``mse``, ``cosine``, or a cell of (student logits, teacher logits, temperature).
        alpha: share of the soft loss, 0 to 1, or a `Schedule` of it.
        temperature: T > 0, or a `Schedule` of it; higher temperatures show more of what the teacher thinks of wrong
            classes.
        outputs: numbers of the outputs the soft loss is the mean over, where networks have several.
        axis: Axis of the classes in the outputs, for ``kl``, ``cosine`` and the hard losses by name; negative axes
            count from the end. None takes the last axis of (N, C) and (N, T, C), and axis 1 of (N, C, H, W) and beyond.
        features: losses between values that student and teachers give behind their outputs, as `link_features` finds
            them: the student one for each, a teacher one for each of its own.
        balance: ``none``, or ``running`` (`msqkd.distill.balance.RunningBalance`).
        weights: one number for each of several teachers, whose outputs then come as a tuple; None for a single one.
        combine: what several teachers are to the soft loss: ``weighted``, the mean of their soft losses by `weights`,
            or ``best``, for each sample the teacher with the least cross-entropy (needs labels int32 (N,)).

    A scheduled number is a parameter that `set_step` sets; `DistillTrainOneStepCell` calls it.

    Raises:
        PlanError: a name or a number is out of range.
    """

    def __init__(
        self,
        hard_loss: Union[str, nn.Cell, None] = "cross_entropy",
        soft_loss: Union[str, nn.Cell] = "kl",
        alpha: Scheduled = 0.3,
        temperature: Scheduled = 5.0,
        outputs: Sequence[int] = (0,),
        features: Sequence[Link] = (),
        balance: str = "none",
        weights: Optional[Sequence[float]] = None,
        combine: str = "weighted",
        axis: Optional[int] = None,
    ) -> None:
        super().__init__()
        if not all(0 <= number <= 1 for number in _ends(alpha)):
            raise PlanError(f"DistillLoss.alpha is {_show(alpha)}; allowed: 0 to 1")
        if not all(0 < number < math.inf for number in _ends(temperature)):
            raise PlanError(f"DistillLoss.temperature is {_show(temperature)}; allowed: above 0")
        for key, name, options in (
            ("soft_loss", soft_loss, tuple(SOFT_LOSSES)), ("balance", balance, BALANCES), ("combine", combine, COMBINES)
        ):  # fmt: skip
            if isinstance(name, str) and name not in options:
                raise PlanError(
                    f"DistillLoss.{key} is '{name}'; allowed: {', '.join(options)}{did_you_mean(name, options)}"
                )
        if not outputs or min(outputs) < 0:
            raise PlanError(f"DistillLoss.outputs is {list(outputs)}; allowed: at least one number from 0")
        given = (1.0,) if weights is None else tuple(float(weight) for weight in weights)
        if not given or not all(0 < weight < math.inf for weight in given):
            raise PlanError(f"DistillLoss.weights is {list(given)}; allowed: a number above 0 for each teacher")
        if axis == 0:
            raise PlanError("DistillLoss.axis is 0, the batch; allowed: the axis of the classes, or None")
        self.hard: Any = _hard_cell(hard_loss, axis)
        self.soft = SOFT_LOSSES[soft_loss](axis) if isinstance(soft_loss, str) else soft_loss
        self.has_hard = self.hard is not None and min(_ends(alpha)) < 1
        self.on_first = isinstance(hard_loss, str)
        self.outputs = tuple(outputs)
        numbers = {"alpha": alpha, "temperature": temperature}
        self.schedules = {key: value for key, value in numbers.items() if isinstance(value, Schedule)}
        self.alpha, self.temperature = (_number(key, value) for key, value in numbers.items())
        self.several = weights is not None
        self.weights = tuple(weight / sum(given) for weight in given)
        self.best = BestTeacher(self.outputs[0], self.outputs, axis) if self.several and combine == "best" else None
        self._take_features(features)
        terms = int(self.has_hard) + 1 + len(features)
        self.balance = RunningBalance(terms) if balance == "running" and terms > 1 else None
        for path, parameter in self.parameters_and_names():
            parameter.name = (
                f"distill.{path}"  # the compiler tells parameters apart by name, and a student may have any
            )

    def _take_features(self, features: Sequence[Link]) -> None:
        for link in features:
            if not 0 <= link.of < len(self.weights):
                raise PlanError(f"DistillLoss.features: teacher {link.of} of {len(self.weights)}, counted from 0")
        self.features = nn.CellList([link.loss for link in features])
        # (which feature, its weight, its teacher, its place among that teacher's values, counted from the end)
        counts = [sum(link.of == teacher for link in features) for teacher in range(len(self.weights))]
        self.seen_of = tuple(counts)
        self.watched = tuple(
            (index, float(link.weight), link.of, sum(other.of == link.of for other in features[:index]))
            for index, link in enumerate(features)
        )

    @property
    def least_samples(self) -> int:
        """Samples a batch needs at least, so that every term says something."""
        return max([1, *(getattr(loss, "least_samples", 1) for loss in self.features)])

    def set_step(self, step: int) -> None:
        """Bring what is scheduled to its number at a training step, counted from 0."""
        for key, schedule in self.schedules.items():
            getattr(self, key).set_data(ms.Tensor(np.float32(schedule.at(step))))

    def construct(self, student, teacher, *labels):  # type: ignore[no-untyped-def]
        """Student and teacher outputs, float32, or tuples of outputs, and labels. Returns a scalar.

        With `weights` the teacher's is a tuple, one entry a teacher.
        """
        teachers = ops.stop_gradient(teacher if self.several else (teacher,))
        outputs, seen = _split(student, len(self.watched))
        answers, known = (), ()
        for index, count in enumerate(self.seen_of):
            answer, values = _split(teachers[index], count)
            answers, known = (*answers, answer), (*known, values)
        terms, shares = (self._soft(outputs, answers, labels),), (self.alpha,)
        if self.has_hard:
            terms, shares = (self._hard(outputs, labels), *terms), (1.0 - self.alpha, *shares)
        for index, weight, of, place in self.watched:
            terms = (*terms, self.features[index](seen[index], known[of][place]))
            shares = (*shares, weight)
        if self.balance is not None:
            return self._balanced(terms, shares)
        total = shares[0] * terms[0]
        for index in range(1, len(terms)):
            total = total + shares[index] * terms[index]
        return total

    def _balanced(self, terms, shares):  # type: ignore[no-untyped-def]
        factors = self.balance(*terms)
        total = shares[0] * terms[0]
        for index in range(1, len(terms)):
            total = total + shares[index] * factors[index] * terms[index]
        return total

    def _soft(self, student, teachers, labels):  # type: ignore[no-untyped-def]
        if self.best is not None:
            return self._mean(student, self.best(teachers, labels[0]), True)
        total = self._mean(student, teachers[0], False)
        if not self.several:
            return total
        total = self.weights[0] * total
        for index in range(1, len(self.weights)):
            total = total + self.weights[index] * self._mean(student, teachers[index], False)
        return total

    def _mean(self, student, teacher, chosen):  # type: ignore[no-untyped-def]
        """The mean over the outputs chosen; those of a teacher may be chosen already."""
        total = 0.0
        for place, index in enumerate(self.outputs):
            wanted = teacher[place] if chosen else _output(teacher, index)
            total = total + self.soft(_output(student, index), wanted, self.temperature)
        return total if len(self.outputs) == 1 else total / len(self.outputs)

    def _hard(self, student, labels):  # type: ignore[no-untyped-def]
        if isinstance(student, tuple) and not self.on_first:
            return self.hard(*student, *labels)
        return self.hard(_output(student, 0), *labels)


def _output(outputs, index):  # type: ignore[no-untyped-def]
    """One of a network's outputs; a network with a single one gives that itself."""
    return outputs[index] if isinstance(outputs, tuple) else outputs


def _split(outputs, count):  # type: ignore[no-untyped-def]
    """A network's outputs, and the last `count` of what it gives."""
    return (outputs[:-count], outputs[-count:]) if count else (outputs, ())


def _hard_cell(loss: Union[str, nn.Cell, None], axis: Optional[int]) -> Optional[nn.Cell]:
    return hard_loss(loss, axis=axis) if isinstance(loss, str) else loss


def _ends(value: Scheduled) -> tuple[float, ...]:
    return value.ends if isinstance(value, Schedule) else (value,)


def _show(value: Scheduled) -> str:
    return f"scheduled from {value.start} to {value.ends[1]}" if isinstance(value, Schedule) else str(value)


def _number(key: str, value: Scheduled) -> Any:
    """What the compiled loss reads: a constant, or a parameter."""
    if isinstance(value, Schedule):
        return ms.Parameter(ms.Tensor(np.float32(value.at(0))), key, requires_grad=False)
    return float(value)
