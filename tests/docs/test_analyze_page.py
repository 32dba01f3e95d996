"""What docs/analyze.md says is what the code has."""

import re
from pathlib import Path

import yaml

from msqkd.analysis import diagnosis
from msqkd.recipe import make_recipe

PAGE = (Path(__file__).parents[2] / "docs" / "analyze.md").read_text(encoding="utf-8")
RECIPE = {
    "apiversion": "msqkd/v1",
    "name": "page",
    "model": {"name": "resnet20", "input_shape": [3, 32, 32], "checkpoint": "resnet20.ckpt"},
    "data": {"name": "cifar10", "root": "cifar10"},
}


def test_the_fragment_is_one_and_the_bounds_are_those_of_the_code():
    (fragment,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    recipe = make_recipe(diagnosis.with_fragment(RECIPE, yaml.safe_load(fragment)))
    assert recipe.quantization.rules[-1].weight.per_channel is True
    assert (diagnosis.MOST, diagnosis.HARM, diagnosis.LOW_SQNR, diagnosis.WORTH) == (5, 0.1, 20.0, 0.8)
    assert diagnosis.NEGLIGIBLE == {"kl": 1e-4, "relative error": 1e-3}


def test_the_python_block_names_what_there_is():
    for module, name in re.findall(r"^from (msqkd\S*) import (\w+)$", PAGE, re.M):
        assert hasattr(__import__(module, fromlist=[name]), name)
