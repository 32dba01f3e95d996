"""`msqkd search`: what is chosen is within the budget, can be run on the target, and is what its recipe gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
import yaml

Write, Command = Callable[..., Path], Callable[..., tuple[int, str, str]]


def searched(tiny: Write, **sections: Any) -> Path:
    return tiny("searched", export={"formats": ["portable_mindir"]}, **sections)


def test_a_budget_is_kept_and_the_recipe_gives_what_was_chosen(tiny: Write, msqkd: Command, tmp_path: Path) -> None:
    code, out, err = msqkd("search", searched(tiny), "-o", "found", "--budget", "0.2", "--json")
    assert code == 0, err
    result = json.loads(out)
    chosen, choices = result["chosen"], result["choices"]
    assert chosen["share"] <= 0.2
    assert result["widths"] == [2, 3, 4, 5, 6, 7, 8]
    assert set(chosen["layers"]) == {"stem", "block.conv", "fc"}
    cost = {(name, item["name"]): item["cost"] for name, items in choices.items() for item in items}
    assert sum(cost[pair] for pair in chosen["layers"].items()) == chosen["cost"]
    assert cost["stem", "float"] == 4 * 4 * 9
    assert cost["stem", "4 bits"] == 4 * 9 / 2 + 4  # one scale
    losses = [item["loss"] for item in choices["block.conv"]]
    assert losses[0] == 0.0
    assert losses[1] > losses[-1]  # 2 bits against 8
    # The recipe has what was chosen, and calibrating it gives the metric that was told.
    rules = yaml.safe_load((tmp_path / "found" / "searched.yaml").read_text())["quantization"]["rules"]
    wanted = {name: what for name, what in chosen["layers"].items() if what != "8 bits"}
    found = {rule["match"]["path"]: rule for rule in rules}
    assert set(found) == set(wanted)
    code, _, err = msqkd("calibrate", "found/searched.yaml", "-o", "again")
    assert code == 0, err
    report = json.loads((tmp_path / "again" / "report.json").read_text())
    assert report["accuracy"]["ptq"] == chosen["test"]
    planned = {weight["node"]: weight["bits"] for weight in report["plan"]["weights"]}
    assert all(f"{bits} bits" == chosen["layers"][name] for name, bits in planned.items())
    # A second call finds everything done.
    assert json.loads(msqkd("search", searched(tiny), "-o", "found", "--budget", "0.2", "--json")[1]) == result


def test_a_device_is_offered_what_it_has(tiny: Write, msqkd: Command) -> None:
    code, out, err = msqkd("search", tiny(), "-o", "found", "--budget", "0.6", "--by", "bops", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert "weights of 8 bits or float" in " ".join(err.split())
    assert {name for items in result["choices"].values() for name in (item["name"] for item in items)} == {
        "float", "8 bits",
    }  # fmt: skip
    assert np.isclose(result["choices"]["stem"][1]["cost"] / result["choices"]["stem"][0]["cost"], 64 / 1024)


@pytest.mark.parametrize(("options", "sections", "text"), [
    (["--budget", "0.01"], {}, "the least that can be reached is"),
    (["--by", "bop"], {}, "--by: found 'bop', allowed: size, bops; did you mean 'bops'?"),
    ([], {"ptq": {"methods": ["adaround"]}}, "ptq.methods: 'adaround' works on the bits a layer has; search"),
])  # fmt: skip
def test_what_cannot_be_searched(
    tiny: Write, msqkd: Command, options: list[str], sections: dict[str, Any], text: str
) -> None:
    code, _, err = msqkd("search", searched(tiny, **sections), "-o", "found", *options)
    assert code == 2
    assert text in " ".join(err.split())
