from __future__ import annotations

from dataclasses import fields
from typing import Any, get_args

import pytest

from msqkd.errors import RecipeError
from msqkd.quant.algorithms.base import FLOAT_STAGE
from msqkd.quant.algorithms.methods import METHODS
from msqkd.quant.algorithms.order import STAGES, against_order
from msqkd.recipe import Recipe, make_recipe
from msqkd.recipe.ptq import MethodName, PtqSection


def recipe(**ptq: Any) -> Recipe:
    model = {"name": "lenet5", "checkpoint": "lenet5.ckpt"}
    return make_recipe({"apiversion": "msqkd/v1", "name": "x", "model": model, "data": {"name": "digits"}, "ptq": ptq})


def test_recipe_registry_and_stages_name_the_same_methods() -> None:
    assert list(get_args(MethodName)) == list(STAGES) == list(METHODS)
    assert {name: method.stage for name, method in METHODS.items()} == STAGES


@pytest.mark.parametrize("name", list(STAGES))
def test_a_method_without_settings_has_those_of_its_class(name: str) -> None:
    section = getattr(recipe(methods=[name]).ptq, name)
    made = METHODS[name](**section.model_dump())
    default = METHODS[name]()
    for field in fields(default):  # type: ignore[arg-type]
        found, expected = getattr(made, field.name), getattr(default, field.name)
        assert (tuple(found) if isinstance(found, list) else found) == expected
    assert set(type(section).model_fields) == {field.name for field in fields(default)}  # type: ignore[arg-type]


def test_nothing_is_done_where_nothing_is_said() -> None:
    assert recipe().ptq == PtqSection()
    assert recipe().ptq.adaround is None


@pytest.mark.parametrize(("ptq", "text"), [
    ({"methods": ["adarond"]}, "ptq.methods[0]: found 'adarond', allowed: 'equalize', 'smoothquant'"),
    ({"methods": ["adarond"]}, "did you mean 'adaround'"),
    ({"methods": ["equalize", "equalize"]}, "ptq.methods"),
    ({"methods": ["adaround", "equalize"]}, "'equalize' changes the ranges that 'adaround' needs, and comes before it"),
    ({"methods": ["adaround", "split"]}, "'split' changes the ranges that 'adaround' needs, and comes before it"),
    ({"methods": ["split", "equalize"]}, "'equalize' would scale up again what 'split' has made smaller, and comes"),
    ({"methods": ["split"], "split": {"ratio": 0}}, "ptq.split.ratio"),
    ({"methods": ["adaround", "reconstruct"]}, "'adaround' and 'reconstruct' train the same roundings; keep one"),
    ({"methods": ["adaround", "weight_ranges"]}, "'weight_ranges' chooses the scales that 'adaround' rounds with"),
    ({"methods": ["cluster", "reconstruct"]}, "'cluster' and 'reconstruct' choose the same integers; keep one"),
    ({"methods": ["cluster", "weight_ranges"]}, "'weight_ranges' chooses the scales that 'cluster' rounds with"),
    ({"methods": ["bias_correction", "cluster"]}, "'bias_correction' takes out what 'cluster' leaves, and comes after"),
    ({"methods": ["cluster", "equalize"]}, "'equalize' changes the ranges that 'cluster' needs, and comes before it"),
    ({"methods": ["clusters"]}, "did you mean 'cluster'"),
    ({"methods": ["cluster"], "cluster": {"cluster": 4}}, "did you mean 'clusters'"),
    ({"methods": ["cluster"], "cluster": {"clusters": 1}}, "ptq.cluster.clusters: found 1, allowed: an integer from 2"),
    ({"methods": ["cluster"], "cluster": {"clusters": 256}}, "found 256, allowed: an integer from 2 to 128"),
    ({"methods": ["cluster"], "cluster": {"shared": "all"}}, "ptq.cluster.shared: found 'all'"),
    ({"cluster": {"clusters": 4}}, "ptq.cluster: found settings, allowed only with 'cluster' in ptq.methods"),
    ({"adaround": {}}, "ptq.adaround: found settings, allowed only with 'adaround' in ptq.methods"),
    ({"methods": ["adaround"], "adaround": {"beta": [2, 20]}}, "found [2.0, 20.0], allowed: two numbers of 1 or more"),
    ({"methods": ["equalize"], "equalize": {"iteration": 3}}, "did you mean 'iterations'"),
])  # fmt: skip
def test_what_cannot_be_is_refused(ptq: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(**ptq)
    assert text in str(caught.value)


def test_every_order_of_stages_is_possible() -> None:
    assert against_order(list(STAGES)[:4]) is None
    for one in ("adaround", "reconstruct", "cluster"):
        others = {"adaround", "reconstruct", "cluster"} - {one}
        assert against_order([name for name in STAGES if name not in others]) is None
    assert [name for name, stage in STAGES.items() if stage == FLOAT_STAGE] == ["equalize", "smoothquant", "split"]
