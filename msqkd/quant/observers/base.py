"""What every observer does, and the registry that finds one by name."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Callable, ClassVar, TypeVar, Union

import numpy as np

from msqkd.errors import PlanError, did_you_mean
from msqkd.quant.qparams import quant_limits

StateValue = Union[np.ndarray, float, int]


class Observer(ABC):
    """Looks at the values of one activation, batch after batch, and proposes the range to quantise.

    A subclass sets `name`, takes its options as keyword arguments of ``__init__``, and writes `_add`, `_range`, `state`
    and `_restore`. Options are no part of the state, so a state may be read under other options.
    """

    name: ClassVar[str]

    def __init__(self) -> None:
        self.count = 0
        """How many values were seen."""

    def update(self, x: np.ndarray, where: str = "the observed value") -> None:
        """Take in one batch: an array of any shape, seen as float32; an empty one changes nothing.

        Raises PlanError, beginning with `where`, when a value is not finite; nothing of that batch is taken in.
        """
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes inf and is reported below
            values = np.asarray(x, dtype=np.float32).ravel(order="K")
        if values.size == 0:
            return
        lo, hi = float(values.min()), float(values.max())  # NaN comes through both
        if not (math.isfinite(lo) and math.isfinite(hi)):
            bad = int(values.size - np.count_nonzero(np.isfinite(values)))
            raise PlanError(f"{where}: {bad} of {values.size} values are not finite (NaN or infinite)")
        self._add(values, lo, hi)
        self.count += values.size

    def range(self, bits: int, symmetric: bool, where: str = "the observed value") -> tuple[float, float]:
        """The range (lo, hi) to quantise to `bits` bits (2 to 8), lo <= hi, never beyond what was observed.

        `symmetric` says which kind of quantiser will use it; the range itself need be neither symmetric nor include 0,
        ``activation_qparams`` widens it. Raises PlanError, beginning with `where`, when nothing was seen, and for other
        `bits`.
        """
        quant_limits(bits)
        if self.count == 0:
            raise PlanError(
                f"{where}: the '{self.name}' observer has seen no values; calibrate with at least one batch"
            )
        return self._range(int(bits), bool(symmetric))

    @abstractmethod
    def state(self) -> dict[str, StateValue]:
        """Everything observed so far, as plain numbers and arrays (fit for ``np.savez``)."""

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned; PlanError when it is not the state of such an observer."""
        expected = self.state()
        lacking = [key for key in expected if key not in state]
        unknown = [key for key in state if key not in expected]
        if lacking:
            raise PlanError(f"the state of the '{self.name}' observer lacks '{lacking[0]}'")
        if unknown:
            hint = did_you_mean(unknown[0], expected)
            raise PlanError(f"the state of the '{self.name}' observer has an unknown entry '{unknown[0]}'{hint}")
        try:
            self._restore(state)
        except (TypeError, ValueError, OverflowError) as error:
            raise PlanError(f"the state of the '{self.name}' observer is damaged: {error}") from error

    @abstractmethod
    def _add(self, values: np.ndarray, lo: float, hi: float) -> None:
        """Take in `values`: float32, one-dimensional, finite, not empty, with minimum `lo` and maximum `hi`."""

    @abstractmethod
    def _range(self, bits: int, symmetric: bool) -> tuple[float, float]:
        """The range, once something was seen and `bits` is known to be allowed."""

    @abstractmethod
    def _restore(self, state: Mapping[str, Any]) -> None:
        """Take over `state`, whose keys are right; ValueError, and nothing taken, when its values cannot be."""


def read_extent(state: Mapping[str, Any]) -> tuple[int, float, float]:
    """(count, lo, hi) of a state; ValueError unless count >= 0 and lo <= hi are finite."""
    count, lo, hi = int(state["count"]), float(state["lo"]), float(state["hi"])
    if count < 0:
        raise ValueError(f"count is {count}")
    if not (math.isfinite(lo) and math.isfinite(hi) and lo <= hi):
        raise ValueError(f"the range is [{lo}, {hi}]")
    return count, lo, hi


OBSERVERS: dict[str, type[Observer]] = {}
"""Every observer by the name a recipe uses."""

_Class = TypeVar("_Class", bound=type[Observer])


def register(name: str) -> Callable[[_Class], _Class]:
    """A class decorator: enter an Observer in OBSERVERS under `name`."""

    def enter(cls: _Class) -> _Class:
        cls.name = name
        OBSERVERS[name] = cls
        return cls

    return enter


def make_observer(name: str, **options: Any) -> Observer:
    """A new observer: ``make_observer("percentile", percentile=99.9)``.

    Raises PlanError for an unknown name, an option this observer does not have, or a value the option does not allow.
    """
    if name not in OBSERVERS:
        hint = did_you_mean(str(name), OBSERVERS)
        raise PlanError(f"observer: '{name}' is unknown; allowed are {', '.join(sorted(OBSERVERS))}{hint}")
    cls = OBSERVERS[name]
    allowed = list(inspect.signature(cls).parameters)
    for option in options:
        if option not in allowed:
            has = f"it has {', '.join(allowed)}" if allowed else "it has none"
            raise PlanError(f"observer '{name}': no option '{option}'; {has}{did_you_mean(option, allowed)}")
    return cls(**options)


def check_number(where: str, value: Any, low: float, high: float) -> float:
    """`value` as a float; PlanError, beginning with `where`, unless it is a number in [low, high]."""
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise PlanError(f"{where}: {value!r} is not allowed; allowed is a number from {low:g} to {high:g}")
    return float(value)
