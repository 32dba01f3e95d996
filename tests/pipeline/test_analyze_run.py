"""`msqkd analyze`: what is said of a run, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Callable

import yaml

from msqkd.analysis.diagnosis import with_fragment
from msqkd.pipeline.rundir import RunDirectory
from msqkd.recipe import load_recipe, make_recipe

Command = Callable[..., tuple[int, str, str]]
Recipe = Finished = Callable[..., Path]

LEARNT = {"epoch_size": 12, "batch_size": 12, "lr": 0.05}
BROKEN = {"rules": [{"match": {"path": "block.conv"}, "weight": {"bits": 2}}], "weight": {"per_channel": True}}


def test_the_broken_layer_of_a_run_is_named_first_with_a_cure_its_recipe_takes(
    finished: Finished, msqkd: Command
) -> None:
    methods = {"methods": ["equalize", "adaround"], "adaround": {"iterations": 10}}
    folder = finished("calibrate", pretrain=LEARNT, quantization=BROKEN, ptq=methods)
    before = {child.name: child.read_bytes() for child in folder.iterdir()}
    code, out, err = msqkd("analyze", folder, "--samples", "40")
    assert code == 0, err
    assert "1. block.conv (Conv2D): quantised alone it costs a KL divergence of" in out
    assert "report: out/analysis.html" in out
    result = json.loads((folder / "analysis.json").read_text())
    assert (result["name"], result["trained"], result["warnings"]) == ("tiny", False, [])
    assert 24 <= result["samples"]["statistics"] <= 40
    assert result["ranking"][0] == "block.conv"
    first = result["diagnoses"][0]
    assert first["layer"] == "block.conv"
    cure = yaml.safe_load(first["remedies"][0]["yaml"])
    assert make_recipe(with_fragment(load_recipe("tiny.yaml").to_dict(), cure)).quantization.rules[-1].weight.bits == 8
    after = {name: (folder / name).read_bytes() for name in before}
    report = json.loads(after.pop("report.json"))  # written again, with what was found
    assert report["analysis"]["diagnoses"][0]["layer"] == "block.conv"
    assert len(report["analysis"]["layers"]) == len(result["layers"])
    assert b"Loss alone" in after.pop("report.html")
    assert after == {name: before[name] for name in after}
    RunDirectory(folder, load_recipe("tiny.yaml"), verb="calibrate").__exit__()  # what was written is known there


def test_a_recipe_is_calibrated_and_analysed(tiny: Recipe, msqkd: Command) -> None:
    recipe = tiny(pretrain=LEARNT)
    code, out, err = msqkd("analyze", recipe, "--set", "quantization.weight.bits=3", "--samples", "24", "--json")
    assert code == 0, err
    assert json.loads(out) == json.loads(Path("runs/tiny_ptq/analysis.json").read_text())
    assert load_recipe("runs/tiny_ptq/recipe.yaml").quantization.weight.bits == 3
    code, _, err = msqkd("analyze", "runs/tiny_ptq", "--set", "quantization.weight.bits=4")
    assert code == 2
    assert "is the folder of a run, whose recipe is fixed; --set is for a recipe" in " ".join(err.split())


def test_a_run_is_analysed_as_far_as_it_got_and_what_is_lacking_is_one_sentence(tiny: Recipe, msqkd: Command) -> None:
    code, _, err = msqkd("analyze", "nowhere")
    assert (code, len(err.strip().splitlines())) == (2, 1)
    assert "nowhere is not the folder of a run: there is no such folder" in err
    code, _, err = msqkd("run", tiny(distillation=None), "-o", "out")
    assert code == 0, err
    folder = Path("out")
    code, out, err = msqkd("analyze", folder, "--samples", "12", "--layer-samples", "5", "--json", "-o", "elsewhere")
    assert code == 0, err
    result = json.loads(out)
    assert result == json.loads((Path("elsewhere") / "analysis.json").read_text())
    assert (result["trained"], result["warnings"], result["samples"]["sensitivity"]) == (True, [], 5)
    state = json.loads((folder / "state.json").read_text())
    del state["stages"]["calibration"], state["stages"]["export"]
    (folder / "state.json").write_text(json.dumps(state))
    code, out, err = msqkd("analyze", folder, "--samples", "12", "--json")
    assert code == 0, err
    unfinished = json.loads(out)
    assert unfinished["trained"] is False
    assert "not finished: its float network is analysed" in unfinished["warnings"][0]
    assert unfinished["outputs"]["values"][0]["float"] != result["outputs"]["values"][0]["float"]
    Path("data.npz").unlink()
    code, _, err = msqkd("analyze", folder)
    assert code == 2
    assert "data.npz" in err.strip().splitlines()[-1]
    state["stages"] = {name: state["stages"][name] for name in ("float", "plan")}
    (folder / "state.json").write_text(json.dumps(state))
    code, _, err = msqkd("analyze", folder)
    assert code == 2
    assert "has no ranges to analyse: the stage ptq, its calibration, is missing (done: float, plan)" in err
