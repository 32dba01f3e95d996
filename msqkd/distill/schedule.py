"""How the share and the temperature of a teacher change over a training, and where they start by default."""

from __future__ import annotations

import math
from dataclasses import dataclass

from msqkd.errors import PlanError, did_you_mean

SCHEDULES = ("constant", "linear", "cosine")

_FULL_BITS, _LOW_BITS = 8, 4
_ALPHA, _ALPHA_OF_A_BIT = 0.3, 0.1
_TEMPERATURE, _LOW_TEMPERATURE = 5.0, 2.0


@dataclass(frozen=True)
class Schedule:
    """A number for every step of a training.

    Attributes:
        kind: ``constant``, ``linear`` or ``cosine`` (half a period: slow at both ends).
        start: the number at step 0.
        end: the number at the last step; not used by ``constant``.
        steps: how many steps the training has.

    Raises:
        PlanError: an unknown kind, or no steps.
    """

    kind: str
    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise PlanError(
                f"schedule '{self.kind}' is unknown; allowed: {', '.join(SCHEDULES)}"
                f"{did_you_mean(self.kind, SCHEDULES)}"
            )
        if self.steps < 1:
            raise PlanError(f"a schedule has {self.steps} steps; allowed: at least 1")

    @property
    def ends(self) -> tuple[float, float]:
        """The numbers all others lie between."""
        return (self.start, self.start if self.kind == "constant" else self.end)

    def at(self, step: int) -> float:
        """The number at `step`, counted from 0; after the last step that of the last."""
        if self.kind == "constant":
            return self.start
        share = min(step / max(self.steps - 1, 1), 1.0)
        if self.kind == "cosine":
            share = (1.0 - math.cos(math.pi * share)) / 2.0
        return self.start + (self.end - self.start) * share


def default_alpha(bits: int) -> float:
    """The teacher's share where nobody chose one, by the fewest bits anything is quantised to.

    0.3 with 8 bits and 0.1 more for each bit less, so 0.7 with 4 and 0.9 with 2. The fewer bits, the further the
    student is from the float network: what it lost is what the teacher's whole answer tells it of every class, where a
    label tells of one.
    """
    return round(_ALPHA + _ALPHA_OF_A_BIT * (_FULL_BITS - bits), 2)


def default_temperature(bits: int) -> float:
    """The temperature where nobody chose one: 5 with 8 bits, falling evenly to 2 with 4 bits, and 2 below.

    A high temperature asks for the small differences between classes that are not the answer; a student of few bits
    cannot represent them, and pays for trying with the answer itself.
    """
    share = (_FULL_BITS - max(bits, _LOW_BITS)) / (_FULL_BITS - _LOW_BITS)
    return _TEMPERATURE + (_LOW_TEMPERATURE - _TEMPERATURE) * share
