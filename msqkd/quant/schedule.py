"""What of a plan is in force at which step of a training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

from msqkd.errors import PlanError
from msqkd.quant.qparams import quant_limits

FRONT, BACK = "front", "back"


@dataclass(frozen=True)
class BitStage:
    """From a step on, weights and activations have at least so many bits; a layer planned with more keeps them."""

    from_step: int
    weight: int
    activation: int


@dataclass(frozen=True)
class QatSchedule:
    """A schedule in steps, counted from 0. Every change but that of `noise` costs a compilation.

    Attributes:
        stages: the layers are quantised in so many parts, in graph order.
        interval: steps from one part to the next.
        order: ``front`` begins with the layers at the input, ``back`` with those at the output.
        bits: stages of falling bits, the first from step 0 on, of which the last usually asks for 2, so that the plan
            alone decides; empty: the planned bits throughout (progressive quantisation, Zhuang et al. 2018,
            arXiv:1711.00205).
        freeze_ranges: until this step the ranges of activations that are quantised go on to follow what is observed;
            None: they stand still from the moment they are quantised.
        freeze_batchnorm: from this step on a live BatchNorm computes with its running statistics, which stand still
            (Krishnamoorthi 2018, arXiv:1806.08342); None: never.
        noise: the share of every weight that is quantised in each step (see `FakeQuantWeight`); None: all.
        pact_decay: λ of the L2 regularisation of the ends that PACT trains.

    Raises:
        PlanError: a number is out of range, or the stages of bits are not in order.
    """

    stages: int = 1
    interval: int = 0
    order: str = FRONT
    bits: Sequence[BitStage] = ()
    freeze_ranges: Optional[int] = None
    freeze_batchnorm: Optional[int] = None
    noise: Optional[float] = None
    pact_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.stages < 1 or self.interval < 0 or (self.stages > 1 and self.interval < 1):
            raise PlanError(
                f"QatSchedule: {self.stages} stages every {self.interval} steps; allowed: 1 stage, or more with an "
                "interval of 1 step or more"
            )
        if self.order not in (FRONT, BACK):
            raise PlanError(f"QatSchedule.order is '{self.order}'; allowed: {FRONT}, {BACK}")
        if self.noise is not None and not 0 < self.noise < 1:
            raise PlanError(f"QatSchedule.noise is {self.noise}; allowed: a share above 0 and below 1")
        for before, stage in zip([None, *self.bits], self.bits):
            for bits in (stage.weight, stage.activation):
                quant_limits(bits)
            if before is None and stage.from_step != 0:
                raise PlanError(f"QatSchedule.bits begin at step {stage.from_step}; the first stage begins at 0")
            if before is None:
                continue
            if stage.from_step <= before.from_step:
                raise PlanError(
                    f"QatSchedule.bits: a stage from step {stage.from_step} follows one from step {before.from_step}; "
                    "they come in rising order"
                )
            if stage.weight > before.weight or stage.activation > before.activation:
                raise PlanError("QatSchedule.bits: bits rise from one stage to the next; they can only fall")

    def start_of(self, place: int, places: int) -> int:
        """The step from which the layer at `place` of `places`, in graph order, is quantised."""
        part = place * self.stages // max(places, 1)
        return (part if self.order == FRONT else self.stages - 1 - part) * self.interval

    def bits_at(self, step: int) -> tuple[int, int]:
        """The least bits of weights and of activations at a step; 0 where the plan alone decides."""
        found = (0, 0)
        for stage in self.bits:
            if stage.from_step <= step:
                found = (stage.weight, stage.activation)
        return found

    def last_change(self) -> int:
        """The step at which all of it is in force."""
        ends = [stage.from_step for stage in self.bits] + [(self.stages - 1) * self.interval]
        ends += [step for step in (self.freeze_ranges, self.freeze_batchnorm) if step is not None]
        return max(ends)


DIRECT = QatSchedule()
"""Everything from its delay on."""
