"""`msqkd search`: what is chosen is within the budget, can be run on the target, and is what its recipe gives."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
import yaml

from msqkd.bench import bench_layers

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
    assert all(chosen["layers"][name].startswith(f"{bits} bits") for name, bits in planned.items())
    # A dense layer has rows, whose inputs may have 16 bits; a convolution has none.
    wide = {name for name, items in choices.items() if any(item["name"] == "8 bits, 16-bit inputs" for item in items)}
    assert wide == {"fc"}
    assert cost["fc", "8 bits, 16-bit inputs"] == cost["fc", "8 bits"]
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


TIMES = {"stem": {"float": 40, "8": 10, "4": 6}, "block.conv": {"float": 50, "8": 30, "4": 12},
         "fc": {"float": 10, "8": 9, "4": 8.5}, "reduce_mean": {"float": 3}}  # fmt: skip


def test_a_budget_of_a_device_s_time(tiny: Write, msqkd: Command, tmp_path: Path) -> None:
    (tmp_path / "times.json").write_text(json.dumps(TIMES))
    options = ("-o", "found", "--budget", "0.5", "--by", "latency", "--times", "times.json")
    code, out, err = msqkd("search", searched(tiny), *options, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert "there are no times of it: 2, 3, 5, 6, 7" in " ".join(err.split())
    assert result["float"]["cost"] == 100
    assert result["chosen"]["cost"] == sum(
        TIMES[name][chosen.split()[0]] for name, chosen in result["chosen"]["layers"].items()
    )
    assert result["chosen"]["share"] <= 0.5
    assert result["times"] == {
        "source": "times.json", "rest": {},
        "table": {name: times for name, times in TIMES.items() if name != "reduce_mean"},
    }  # fmt: skip
    assert [item["name"] for item in result["choices"]["stem"]] == ["float", "4 bits", "8 bits"]
    page = (tmp_path / "found" / "search.html").read_text()
    assert "What the layer costs, in microseconds a sample." in page
    assert "<td>40.0 µs</td>" in page
    assert "Times: times.json." in page
    # Another table needs no layer to be tried again; the same one gives the same.
    (tmp_path / "times.json").write_text(json.dumps({**TIMES, "stem": {"float": 40, "8": 39, "4": 1}}))
    code, out, err = msqkd("search", searched(tiny), *options, "--json")
    assert json.loads(out)["chosen"]["layers"]["stem"] == "4 bits", err
    assert "layers tried (done before)" in err
    assert all(point["share"] == point["cost"] / 100 for point in json.loads(out)["points"])


def test_times_are_measured_once(tiny: Write, msqkd: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("msqkd.pipeline.search.bench_layers", partial(bench_layers, rounds=5))
    options = ("-o", "found", "--budget", "1", "--by", "latency", "--json")
    code, out, err = msqkd("search", tiny(), *options)
    assert code == 0, err
    result = json.loads(out)
    assert {item["name"] for item in result["choices"]["fc"]} == {"float", "8 bits"}
    assert set(result["times"]["rest"]) == {"float", "8"}
    assert result["times"]["source"] == "measured here with onnxruntime"
    assert result["float"]["cost"] == sum(row["float"] for row in result["times"]["table"].values())
    assert json.loads(msqkd("search", tiny(), *options)[1]) == result, "a second measurement would be another one"


def test_an_npu_is_offered_float16(tiny: Write, msqkd: Command, tmp_path: Path) -> None:
    code, out, err = msqkd("search", searched(tiny, target="ascend"), "-o", "found", "--budget", "0.4", "--json")
    assert code == 0, err
    result = json.loads(out)
    costs = {item["name"]: item["cost"] for item in result["choices"]["stem"]}
    assert costs["float16"] == costs["float"] / 2
    assert costs["8 bits, float16 values"] == costs["8 bits"]
    losses = {item["name"]: item["loss"] for item in result["choices"]["block.conv"]}
    assert 0 < losses["float16"] < losses["8 bits, float16 values"]
    losses = {item["name"]: item["loss"] for item in result["choices"]["fc"]}
    assert losses["8 bits, 16-bit inputs"] < losses["8 bits"], "its input is rounded with it"
    chosen = result["chosen"]
    code, _, err = msqkd("calibrate", "found/searched.yaml", "-o", "again")
    assert code == 0, err
    report = json.loads((tmp_path / "again" / "report.json").read_text())
    assert report["accuracy"]["ptq"] == chosen["test"]
    planned = {node["name"]: node["precision"] for node in report["plan"]["nodes"]}
    for name, what in chosen["layers"].items():
        assert (planned[name] == "float16") == (what == "float16")
    assert report["export"]["portable_mindir"]["max_abs_diff"] == 0


@pytest.mark.parametrize(("options", "sections", "text"), [
    (["--times", "none.json"], {}, "--times: allowed only with --by latency, found --by size"),
    (["--by", "latency", "--times", "none.json"], {}, "none.json cannot be read: No such file"),
    (["--by", "latency"], {"target": "ascend", "quantization": {
        "activation": {"delay": 3}, "rules": [{"match": {"path": "fc"}, "precision": "float16"}]}},
     "--by latency: onnxruntime, with which layers are measured here, cannot have the network: fc (Dense) has "),
    (["--budget", "0.01"], {}, "the least that can be reached is"),
    (["--by", "bop"], {}, "--by: found 'bop', allowed: size, bops, latency; did you mean 'bops'?"),
    ([], {"ptq": {"methods": ["adaround"]}}, "ptq.methods: 'adaround' works on the bits a layer has; search"),
])  # fmt: skip
def test_what_cannot_be_searched(
    tiny: Write, msqkd: Command, options: list[str], sections: dict[str, Any], text: str
) -> None:
    code, _, err = msqkd("search", searched(tiny, **sections), "-o", "found", *options)
    assert code == 2
    assert text in " ".join(err.split())
