"""Which layer gets which precision: the best choices within a budget.

Losses of layers are taken to add up, as is usual (HAWQ-V3, Yao et al. 2021, arXiv:2011.10680, §3.4): the choice is then
a multiple-choice knapsack, which is solved exactly by merging Pareto fronts layer by layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Optional

from msqkd.errors import PlanError

_MOST_POINTS = 20_000


@dataclass(frozen=True)
class Choice:
    """One precision of a layer.

    Attributes:
        name: of the precision.
        cost: what it takes of the budget (bytes, bit operations, microseconds), 0 or more.
        loss: what it costs in accuracy, by any measure that adds up over layers.
    """

    name: str
    cost: float
    loss: float


@dataclass(frozen=True)
class Assignment:
    """A precision for every layer, and the sums of their costs and losses."""

    names: dict[str, str]
    cost: float
    loss: float


def pareto_front(layers: Mapping[str, Sequence[Choice]], most: int = _MOST_POINTS) -> list[Assignment]:
    """Every assignment that no other one beats in both cost and loss, the cheapest first.

    Exact while no front on the way has more than `most` points. Beyond, costs are told apart no more finely than a
    `most`-th of what is between the cheapest and the dearest, and of those that are alike the least loss is kept.

    Args:
        layers: the choices of each layer, one at least.
        most: see above.

    Raises:
        PlanError: a layer has no choice, or a number is not finite.
    """
    points: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, ())]
    for layer, choices in layers.items():
        if not choices:
            raise PlanError(f"layer '{layer}' has no precision to choose from")
        for choice in choices:
            if not (math.isfinite(choice.cost) and math.isfinite(choice.loss)):
                raise PlanError(f"layer '{layer}': '{choice.name}' has cost {choice.cost} and loss {choice.loss}")
        merged = [
            (cost + choice.cost, loss + choice.loss, (*picked, index))
            for cost, loss, picked in points
            for index, choice in enumerate(choices)
        ]
        points = _thinned(_front(merged), most)
    names = list(layers)
    return [
        Assignment({name: layers[name][index].name for name, index in zip(names, picked)}, cost, loss)
        for cost, loss, picked in points
    ]


def best_within(front: Sequence[Assignment], budget: float, what: str, whole: Optional[float] = None) -> Assignment:
    """The least loss whose cost is within a budget.

    Args:
        front: from `pareto_front`.
        budget: the most it may cost.
        what: the unit, for the message.
        whole: of which budgets are shares, for the message.

    Raises:
        PlanError: nothing is within; says what is the least that can be reached.
    """
    fitting = [item for item in front if item.cost <= budget]
    if not fitting:
        share = "" if whole is None else f", {math.ceil(front[0].cost / whole * 1e4) / 1e4:g} of the float network's"
        raise PlanError(f"a budget of {budget:g} {what} cannot be met: the least that can be reached is "
                        f"{front[0].cost:g} {what}{share}")  # fmt: skip
    return min(fitting, key=lambda item: (item.loss, item.cost))


def _front(points: list[tuple[float, float, tuple[int, ...]]]) -> list[tuple[float, float, tuple[int, ...]]]:
    """The points that no other one beats, by rising cost; of equal ones the one with the earlier choices."""
    kept: list[tuple[float, float, tuple[int, ...]]] = []
    for point in sorted(points):
        if not kept or point[1] < kept[-1][1]:
            kept.append(point)
    return kept


def _thinned(
    points: list[tuple[float, float, tuple[int, ...]]], most: int
) -> list[tuple[float, float, tuple[int, ...]]]:
    if len(points) <= most:
        return points
    width = (points[-1][0] - points[0][0]) / most
    kept: dict[int, tuple[float, float, tuple[int, ...]]] = {}
    for point in points:  # losses fall along the front: the last of a step has the least
        kept[int((point[0] - points[0][0]) / width)] = point
    return [points[0], *(point for step, point in sorted(kept.items()) if point is not points[0])]
