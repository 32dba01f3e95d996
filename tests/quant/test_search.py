from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msqkd.errors import PlanError
from msqkd.quant.search import Assignment, Choice, best_within, pareto_front

CHOICES = st.lists(
    st.builds(Choice, st.sampled_from(["w8", "w6", "w4", "float"]), st.integers(0, 50), st.integers(0, 40)),
    min_size=1, max_size=4,
)  # fmt: skip
LAYERS = st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), CHOICES, min_size=1)


@settings(deadline=None)
@given(LAYERS, st.integers(0, 200))
def test_no_assignment_beats_the_front_and_the_best_within_a_budget(
    layers: dict[str, list[Choice]], budget: int
) -> None:
    every = [(sum(c.cost for c in picked), sum(c.loss for c in picked)) for picked in product(*layers.values())]
    front = pareto_front(layers)
    expected = sorted({(cost, loss) for cost, loss in every
                       if not any(c <= cost and d <= loss and (c, d) != (cost, loss) for c, d in every)})  # fmt: skip
    assert [(item.cost, item.loss) for item in front] == expected
    fitting = [loss for cost, loss in every if cost <= budget]
    if fitting:
        assert best_within(front, budget, "bytes").loss == min(fitting)
    else:
        with pytest.raises(PlanError, match=f"the least that can be reached is {min(every)[0]:g} bytes"):
            best_within(front, budget, "bytes")


def test_an_assignment_adds_up() -> None:
    layers = {
        "conv": [Choice("w8", 8, 0.0), Choice("w4", 4, 1.5)],
        "fc": [Choice("w8", 80, 0.0), Choice("w4", 40, 0.1)],
    }
    assert pareto_front(layers)[1] == Assignment({"conv": "w8", "fc": "w4"}, 48, 0.1)


def test_a_long_front_is_thinned_and_stays_good() -> None:
    layers = {
        str(i): [Choice("w8", 100 + i, 0.0), Choice("w4", 50, 1.0 + i / 7), Choice("w2", 25, 4.0)] for i in range(30)
    }
    front = pareto_front(layers, most=200)
    assert len(front) <= 202
    exact = pareto_front(layers)
    middle = exact[len(exact) // 2].cost
    assert best_within(front, middle, "bytes").loss <= best_within(exact, middle, "bytes").loss * 1.1
    assert front[0].cost == exact[0].cost


@pytest.mark.parametrize("choices", [[], [Choice("w8", float("nan"), 0)], [Choice("w8", 1, float("inf"))]])
def test_bad_choices(choices: list[Choice]) -> None:
    with pytest.raises(PlanError, match="layer 'fc'"):
        pareto_front({"fc": choices})
