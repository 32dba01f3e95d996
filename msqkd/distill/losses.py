"""Losses that teach a student network what its teacher answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Callable, Optional, Union

from mindspore import nn, ops

from msqkd.errors import PlanError, did_you_mean


class SoftKL(nn.Cell):
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), mean over the batch.

    The factor T² keeps the size of the gradient when T changes (Hinton et al., arXiv:1503.02531, §2).
    """

    def construct(self, student, teacher, temperature):  # type: ignore[no-untyped-def]
        """Logits of shape (N, classes), float32; a number above 0. Returns a scalar."""
        inverse = 1.0 / temperature
        log_student = ops.log_softmax(student * inverse, -1)
        log_teacher = ops.log_softmax(teacher * inverse, -1)
        divergence = (ops.exp(log_teacher) * (log_teacher - log_student)).sum(-1)
        return divergence.mean() * (temperature * temperature)


class SoftMSE(nn.Cell):
    """Mean squared difference of the logits (Ba & Caruana, arXiv:1312.6184); the temperature plays no part."""

    def construct(self, student, teacher, temperature):  # type: ignore[no-untyped-def]
        """Logits of shape (N, classes), float32. Returns a scalar."""
        return ops.square(student - teacher).mean()


SOFT_LOSSES: dict[str, Callable[[], nn.Cell]] = {"kl": SoftKL, "mse": SoftMSE}


def hard_loss(name: str, label_smoothing: float = 0.1) -> Optional[nn.Cell]:
    """The loss against labels by name: cross_entropy, label_smoothing, or none (returns None)."""
    losses: dict[str, Callable[[], Optional[nn.Cell]]] = {
        "cross_entropy": lambda: nn.CrossEntropyLoss(),
        "label_smoothing": lambda: nn.CrossEntropyLoss(label_smoothing=label_smoothing),
        "none": lambda: None,
    }
    if name not in losses:
        raise PlanError(f"hard loss '{name}' is unknown; allowed: {', '.join(losses)}{did_you_mean(name, losses)}")
    return losses[name]()


class DistillLoss(nn.Cell):
    """(1 − alpha) · hard(student, labels) + alpha · soft(student, teacher, T).

    Args:
        hard_loss: loss of (logits, labels), by name that of the first output; ``cross_entropy`` when not given, None
            or ``none`` leaves the soft loss alone. A cell is called with all outputs of the student, then the labels.
        soft_loss: ``kl``, ``mse``, or a cell of (student logits, teacher logits, temperature).
        alpha: share of the soft loss, 0 to 1.
        temperature: T > 0; higher temperatures show more of what the teacher thinks of wrong classes.
        outputs: numbers of the outputs the soft loss is the mean over, where networks have several.

    Raises:
        PlanError: a name or a number is out of range.
    """

    def __init__(
        self,
        hard_loss: Union[str, nn.Cell, None] = "cross_entropy",
        soft_loss: Union[str, nn.Cell] = "kl",
        alpha: float = 0.3,
        temperature: float = 5.0,
        outputs: Sequence[int] = (0,),
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise PlanError(f"DistillLoss.alpha is {alpha}; allowed: 0 to 1")
        if not 0 < temperature < math.inf:
            raise PlanError(f"DistillLoss.temperature is {temperature}; allowed: above 0")
        if isinstance(soft_loss, str) and soft_loss not in SOFT_LOSSES:
            raise PlanError(
                f"DistillLoss.soft_loss is '{soft_loss}'; allowed: {', '.join(SOFT_LOSSES)}"
                f"{did_you_mean(soft_loss, SOFT_LOSSES)}"
            )
        if not outputs or min(outputs) < 0:
            raise PlanError(f"DistillLoss.outputs is {list(outputs)}; allowed: at least one number from 0")
        self.hard: Any = _named_hard(hard_loss)
        self.soft = SOFT_LOSSES[soft_loss]() if isinstance(soft_loss, str) else soft_loss
        self.has_hard = self.hard is not None and alpha < 1
        self.alpha, self.temperature = float(alpha), float(temperature)
        self.on_first = isinstance(hard_loss, str)
        self.outputs = tuple(outputs)

    def construct(self, student, teacher, *labels):  # type: ignore[no-untyped-def]
        """Student and teacher logits (N, classes) float32, or tuples of outputs, and labels. Returns a scalar."""
        soft = self._soft(student, ops.stop_gradient(teacher))
        if not self.has_hard:
            return self.alpha * soft
        return (1.0 - self.alpha) * self._hard(student, labels) + self.alpha * soft

    def _soft(self, student, teacher):  # type: ignore[no-untyped-def]
        """The mean over the outputs chosen."""
        total = self.soft(_output(student, self.outputs[0]), _output(teacher, self.outputs[0]), self.temperature)
        for index in self.outputs[1:]:
            total = total + self.soft(_output(student, index), _output(teacher, index), self.temperature)
        return total if len(self.outputs) == 1 else total / len(self.outputs)

    def _hard(self, student, labels):  # type: ignore[no-untyped-def]
        if isinstance(student, tuple) and not self.on_first:
            return self.hard(*student, *labels)
        return self.hard(_output(student, 0), *labels)


def _output(outputs, index):  # type: ignore[no-untyped-def]
    """One of a network's outputs; a network with a single one gives that itself."""
    return outputs[index] if isinstance(outputs, tuple) else outputs


def _named_hard(loss: Union[str, nn.Cell, None]) -> Optional[nn.Cell]:
    return hard_loss(loss) if isinstance(loss, str) else loss
