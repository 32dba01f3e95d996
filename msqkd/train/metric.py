"""What a network is judged by: top-1 accuracy, or a function of the user's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Callable, NamedTuple, Optional

import numpy as np

from msqkd.data import Arrays
from msqkd.errors import DataError
from msqkd.user_code import place_of, reason_of

Outputs = tuple[np.ndarray, ...]
"""The outputs of a network for every sample of a split."""

POINTS_LOST, PART_LOST = 5.0, 0.1  # of accuracy, and of another metric, beyond which a training is called diverged


def accuracy_of(logits: np.ndarray, labels: np.ndarray) -> float:
    """Top-1 accuracy in percent."""
    return float((logits.argmax(-1) == labels).mean() * 100.0)


class Scale(NamedTuple):
    """How people read the values of a metric: its name, and its unit (``%`` or empty)."""

    name: str = "accuracy"
    unit: str = "%"

    @classmethod
    def of(cls, metric: Optional[Mapping[str, Any]]) -> Scale:
        """From what `Metric.to_dict` gave; accuracy where there is nothing."""
        return cls(metric["name"], metric["unit"]) if metric else cls()

    @property
    def digits(self) -> int:
        """How many are shown behind the point."""
        return 2 if self.unit else 4

    @property
    def points(self) -> str:
        """What follows a difference of two values."""
        return " points" if self.unit else ""

    @property
    def title(self) -> str:
        """The name at the head of a table."""
        return "Accuracy" if self.unit else self.name

    @property
    def header(self) -> str:
        """The name and the unit, at the head of a column."""
        return f"{self.title}, {self.unit}" if self.unit else self.name

    def number(self, value: float) -> str:
        """``93.20`` or ``0.4312``."""
        return f"{value:.{self.digits}f}"

    def show(self, value: float) -> str:
        """``93.20 %`` or ``0.4312``."""
        return f"{self.number(value)} {self.unit}".rstrip()

    def words(self, value: float) -> str:
        """``93.20 %``, or with its name where it is not accuracy: ``mAP 0.4312``."""
        return self.show(value) if self.unit else f"{self.name} {self.show(value)}"


@dataclass(frozen=True)
class Metric:
    """A number for outputs and labels.

    Attributes:
        name: what it is called.
        function: (outputs, labels) -> number, the user's; None is top-1 accuracy of the first output in percent.
            Outputs are an array over all samples, or a tuple of them where the network has several, and so are labels.
        higher_is_better: False for an error.
    """

    name: str = "accuracy"
    function: Optional[Callable[[Any, Any], Any]] = None
    higher_is_better: bool = True

    @property
    def is_accuracy(self) -> bool:
        """Whether it is top-1 accuracy in percent."""
        return self.function is None

    def __call__(self, outputs: Outputs, labels: Optional[Arrays], where: str) -> float:
        """The metric on a whole split; `where` is the split's name, for messages.

        Raises:
            DataError: there are no labels, the function fails, or gives no finite number.
        """
        if labels is None:
            raise DataError(f"{where} has no labels; {self.name} cannot be measured")
        if self.function is None:
            assert isinstance(labels, np.ndarray)
            return accuracy_of(outputs[0], labels)
        place = f"evaluation.metric '{self.name}'"
        try:
            found = self.function(outputs if len(outputs) > 1 else outputs[0], labels)
            value = float(found.asnumpy() if hasattr(found, "asnumpy") else found)
        except Exception as error:
            raise DataError(f"{place}: it fails on {where}: {reason_of(error)}{place_of(error)}") from error
        if not math.isfinite(value):
            raise DataError(
                f"{place}: it is {value} on the {len(outputs[0])} samples of {where}; a finite number is needed"
            )
        return value

    @property
    def scale(self) -> Scale:
        """How its values are read."""
        return Scale(self.name, "%" if self.is_accuracy else "")

    def words(self, value: float) -> str:
        """The value as people read it: ``accuracy 93.20 %``, ``mAP 0.4312``."""
        return f"{self.name} {self.scale.show(value)}"

    def lost(self, before: float, after: float) -> float:
        """How much worse `after` is than `before`; negative where it is better."""
        return before - after if self.higher_is_better else after - before

    def is_collapse(self, before: float, after: float) -> bool:
        """Whether a training lost more than it may: 5 points of accuracy, a tenth of another metric's value."""
        return self.lost(before, after) > (POINTS_LOST if self.is_accuracy else PART_LOST * abs(before))

    def to_dict(self) -> dict[str, Any]:
        """What reports keep of it, JSON-able: its name, its unit (``%`` or empty) and its sense."""
        return {**self.scale._asdict(), "higher_is_better": self.higher_is_better}


ACCURACY = Metric()
"""The metric where a recipe names none."""
