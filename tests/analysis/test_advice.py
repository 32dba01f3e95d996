"""What follows from a run, rule by rule; and that no two pieces of advice contradict each other."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any, Optional

import pytest
import yaml

from msqkd.analysis.advice import LOSS, MOST, Advice, advise
from msqkd.quant.plan import NO_NEIGHBOUR
from msqkd.recipe import load_recipe


def row(name: str, weight_db: float = 40.0, value_db: float = 41.0, **parts: Any) -> dict[str, Any]:
    return {
        "name": name, "op": "Conv2D", "value": f"{name}_out", "sqnr_db": 30.0,
        "weight": {"bits": 8, "per_channel": False, "sqnr_db": weight_db, **parts.get("weight", {})},
        "activation": {"bits": 8, "sqnr_db": value_db, "outside": 0.0, **parts.get("activation", {})},
    }  # fmt: skip


def node(name: str, op: str = "Conv2D", precision: str = "int8", reason: str = "int8 kernel") -> dict[str, Any]:
    return {"name": name, "op": op, "precision": precision, "reason": reason, "fused_into": None}


def run(exported: float = 92.0, **parts: Any) -> dict[str, Any]:
    """A run that begins with 93 %, of three layers with nothing wrong."""
    names = ("a", "b", "c")
    accuracy = {"float": 93.0, "ptq": 90.0, "qat_kd": exported, "exported": exported, "integer": exported}
    return {
        "name": "net",
        "target": "lite_arm",
        "data": {"test": 1000},
        "accuracy": {**accuracy, **parts.pop("accuracy", {})},
        "export": {"portable_mindir": {"file": "net_portable.mindir"}, "ms": {"file": "net_ms.ms"}},
        "parity": {"samples": 100, "split": "calibration", "exceeded": False, **parts.pop("parity", {})},
        "calibration": {"observer": "percentile"},
        "layers": [row(name) for name in names],
        "plan": {
            "target": "lite_arm",
            "nodes": [node(name) for name in names],
            "weights": [{"node": name, "observer": "minmax"} for name in names],
            "groups": [{"name": f"{name}_out", "learned": "none"} for name in names],
        },
        **parts,
    }


def rules(found: list[Advice]) -> list[str]:
    return [item.rule for item in found]


def of(found: list[Advice], rule: str) -> Advice:
    return next(item for item in found if item.rule == rule)


def fragment(found: list[Advice], rule: str) -> Any:
    return yaml.safe_load(of(found, rule).recipe)


ANALYSIS = {
    "layers": [],
    "diagnoses": [
        {"layer": name, "rank": rank, "causes": [f"cause of {name}"], "remedies": remedies}
        for rank, (name, remedies) in enumerate(
            [
                ("b", [{"text": "8 bits (+20 dB there)", "yaml": "quantization: {}\n"}, {"text": "no", "yaml": ""}]),
                ("a", [{"text": "float", "yaml": "quantization:\n  rules:\n  - precision: float\n"}]),
                ("c", [{"text": "a third", "yaml": ""}]),
            ],
            start=1,
        )
    ],
}


def test_a_small_loss_is_shipped_with_the_file_of_its_target() -> None:
    found = advise(run(92.7))
    assert rules(found) == ["ship"]
    assert found[0].text == (
        "Nothing has to be mended: INT8 loses 0.30 points against float (93.00 %), no more than 0.50 points; "
        "one of the 1000 test samples is 0.1 points. Ship net_ms.ms."
    )
    assert "Ship net_portable.mindir" in advise(run(92.7, target="ascend"))[0].text
    assert "loses nothing" in advise(run(93.4))[0].text


def test_the_device_counts_where_it_loses_more_and_is_asked_for_where_it_was_not_measured() -> None:
    assert "tune" in rules(advise(run(92.7, accuracy={"integer": 92.0})))
    found = advise(run(92.7, accuracy={"integer": None}))
    assert of(found, "ship").command == "msqkd verify RUN"


def test_a_training_that_gained_nothing_was_not_needed() -> None:
    found = advise(run(92.9, accuracy={"ptq": 92.85}))
    assert rules(found) == ["ship", "training"]
    assert "calibration alone (PTQ) reaches 92.85 %, QAT with distillation 92.90 %" in found[1].text
    assert found[1].command == "msqkd calibrate RECIPE"
    assert rules(advise(run(92.99, accuracy={"ptq": 92.6}))) == ["ship"]
    assert rules(advise(run(92.9, accuracy={"ptq": 92.9, "qat_kd": None}))) == ["ship"]


def test_a_training_that_did_harm_is_not_tuned_around() -> None:
    found = advise(run(90.0, accuracy={"ptq": 92.8}))
    assert rules(found) == ["training"]
    assert "The training did harm" in found[0].text


def test_a_device_beyond_its_bound_is_not_shipped() -> None:
    place = {"layer": "b", "op": "Conv2D", "max_lsb": 3}
    parity = {"exceeded": True, "deviation": 0.8, "max_deviation": 0.1, "first_beyond_one": place}
    found = advise(run(92.9, parity=parity))
    assert rules(found) == ["device"]
    assert "deviates by 0.80 points" in found[0].text
    assert "They part at 'b' (Conv2D), by up to 3 steps." in found[0].text
    assert fragment(found, "device")["quantization"]["rules"] == [{"match": {"path": "b"}, "precision": "float"}]
    parity["first_beyond_one"] = {**place, "layer": "x", "op": "input"}
    assert advise(run(92.9, parity=parity))[0].recipe == ""  # an input is no operation


def test_a_loss_is_analysed_and_tuned() -> None:
    found = advise(run(91.0))
    assert rules(found) == ["analyze", "tune"]
    assert "INT8 loses 2.00 points" in of(found, "tune").text
    assert of(found, "tune").command == "msqkd tune RECIPE --max-drop 0.5"


def test_measured_remedies_come_first_and_take_the_place_of_guesses() -> None:
    layers = [row("a"), row("b", weight_db=5.0), row("c")]
    found = advise(run(91.0, layers=layers, analysis=ANALYSIS))
    assert rules(found) == ["remedy", "remedy", "tune"]
    assert found[0].text == "'b' does the most harm: cause of b. Measured: 8 bits (+20 dB there)."
    assert found[1].text.startswith("'a' does the second most harm")
    assert rules(advise(run(92.8, analysis=ANALYSIS))) == ["ship"]


@pytest.mark.parametrize(
    ("weight", "change"),
    [
        ({}, {"per_channel": True}),
        ({"per_channel": True, "bits": 4}, {"bits": 8}),
        ({"per_channel": True, "max_over_percentile": 9.0}, {"observer": "mse"}),
        ({"per_channel": True, "max_over_percentile": 2.0}, None),
    ],
)
def test_a_weight_far_below_the_others_is_given_more(weight: dict[str, Any], change: Optional[dict[str, Any]]) -> None:
    result = run(91.0, layers=[row("a"), row("b", weight_db=22.0, weight=weight), row("c")])
    found = advise(result)
    assert ("weight" in rules(found)) == (change is not None)
    if change is not None:
        assert "The weight of 'b' loses most to rounding: 22.0 dB, the median layer 40.0." in of(found, "weight").text
        assert fragment(found, "weight")["quantization"]["rules"] == [{"match": {"path": "b"}, "weight": change}]
        recipe = load_recipe("digits_lenet5").to_dict()
        assert change.keys() <= recipe["quantization"]["weight"].keys()
    result["layers"][1]["weight"]["sqnr_db"] = 33.0
    assert "weight" not in rules(advise(result))


def test_a_kernel_with_one_scale_is_not_asked_for_more() -> None:
    layers = [row("a"), {**row("b", weight_db=10.0), "op": "LayerNorm"}, row("c")]
    assert "weight" not in rules(advise(run(91.0, layers=layers)))


@pytest.mark.parametrize(
    ("activation", "observer", "change"),
    [
        ({"bits": 4}, "percentile", {"quantization": {"rules": [{"match": {"path": "b"}, "activation": {"bits": 8}}]}}),
        ({"outside": 0.01}, "percentile", {"calibration": {"observer": "mse"}}),
        ({"outside": 0.01}, "mse", None),
        ({"max_over_percentile": 8.0}, "minmax", {"calibration": {"observer": "percentile"}}),
        ({"max_over_percentile": 8.0}, "percentile", None),
    ],
)
def test_noisy_values_get_bits_or_another_observer(
    activation: dict[str, Any], observer: str, change: Optional[dict[str, Any]]
) -> None:
    layers = [row("a"), row("b", value_db=15.0, activation=activation), row("c")]
    result = run(91.0, layers=layers, calibration={"observer": observer})
    found = advise(result)
    assert ("activation" in rules(found)) == (change is not None)
    if change is not None:
        assert "'b' lose most to rounding: 15.0 dB" in of(found, "activation").text
        assert fragment(found, "activation") == change


def test_a_trained_range_is_not_calibrated_again() -> None:
    layers = [row("a"), row("b", value_db=15.0, activation={"outside": 0.01}), row("c")]
    result = run(91.0, layers=layers)
    result["plan"]["groups"][1]["learned"] = "lsq"
    assert "activation" not in rules(advise(result))
    result["plan"]["groups"][1]["learned"] = "none"
    result["calibration"]["kept"] = "trained"
    assert "activation" not in rules(advise(result))


def test_float_operations_between_int8_ones_cost_conversions() -> None:
    result = run(92.8)
    inside = node("soft", "Softmax", "float", "lite_arm has no int8 kernel for Softmax")
    result["plan"]["nodes"].insert(1, inside)
    found = advise(result)
    assert rules(found) == ["ship", "float layers"]
    assert "1 of 4 operations runs in float between int8 ones" in found[1].text
    assert "there and back: 1 Softmax, lite_arm has no int8 kernel for Softmax." in found[1].text
    induced = node("reshape", "Reshape", "float", NO_NEIGHBOUR)
    result["plan"]["nodes"][1:1] = [induced, induced]
    text = of(advise(result), "float layers").text
    assert text.startswith("3 of 6 operations run in float")
    assert "Reshape" not in text  # it follows from the other one
    # At the ends nothing is converted twice.
    result["plan"]["nodes"] = [inside, *(node(name) for name in "abc"), inside]
    assert rules(advise(result)) == ["ship"]
    result = run(91.0, analysis=ANALYSIS)  # one remedy is a layer in float: the two would contradict each other
    result["plan"]["nodes"].insert(1, inside)
    assert "float layers" not in rules(advise(result))


def test_a_float_control_that_is_better_is_the_better_start() -> None:
    found = advise(run(92.8, accuracy={"float_kd": 94.0, "float_ft": 93.5}))
    assert rules(found) == ["ship", "float"]
    assert "distilled it reaches 94.00 %, 1.00 points better than before and 1.20 points better" in found[1].text
    assert fragment(found, "float") == {"model": {"checkpoint": "RUN/float_kd.ckpt"}, "pretrain": None}
    assert rules(advise(run(92.8, accuracy={"float_kd": 93.05}))) == ["ship"]
    assert rules(advise(run(94.0, accuracy={"float_kd": 94.0}))) == ["ship"]


def test_int8_that_is_slower_here_is_told() -> None:
    def measured(speed_up: float) -> dict[str, Any]:
        times = {"float32": {"median": 1.0}, "int8": {"median": 1 / speed_up}, "speed_up": speed_up, "batch": 1}
        return {**times, "environment": {"cpu": "A CPU"}}

    found = advise(run(92.8, latency=[measured(0.4), measured(0.5)]))
    assert rules(found) == ["ship", "latency"]
    assert "onnxruntime on A CPU takes longer for int8 than for float (2 ms and 1 ms for a batch of 1)" in found[1].text
    assert rules(advise(run(92.8, latency=[measured(0.4), measured(1.5)]))) == ["ship"]


def test_a_metric_that_is_an_error() -> None:
    metric = {"name": "error", "unit": "", "higher_is_better": False}
    accuracy = {"float": 0.1, "ptq": 0.2, "qat_kd": 0.1005, "exported": 0.1005, "integer": 0.1005}
    assert rules(advise(run(metric=metric, accuracy=accuracy))) == ["ship"]
    worse = {**accuracy, "exported": 0.15, "integer": 0.15, "qat_kd": 0.15}
    found = advise(run(metric=metric, accuracy=worse))
    assert of(found, "tune").command == "msqkd tune RECIPE --max-drop 0.001"
    assert "INT8 loses 0.0500 against float (0.1000)" in of(found, "tune").text


def test_nothing_measured_gives_no_advice() -> None:
    for accuracy in ({}, None, {"float": 93.0}, {"exported": 93.0}):
        assert advise({"accuracy": accuracy}) == []
    assert rules(advise({"accuracy": {"float": 93.0, "ptq": 90.0}})) == ["analyze", "tune"]


def test_in_no_state_does_advice_contradict_itself() -> None:
    mending = {"remedy", "weight", "activation", "analyze", "tune"}
    bad = [row("a"), row("b", 5.0, 5.0, activation={"outside": 0.1}), row("c")]
    parity = {"exceeded": True, "deviation": 0.8, "max_deviation": 0.1}
    seen = set()
    for exported, ptq, device, analysis, layers, control in itertools.product(
        (90.0, 92.9), (90.0, 92.9, None), ({}, parity), (None, ANALYSIS), (bad, bad[:1]), (None, 95.0)
    ):
        accuracy = {"ptq": ptq, "float_kd": control}
        found = advise(run(exported, accuracy=accuracy, parity=dict(device), analysis=analysis, layers=layers))
        names = set(rules(found))
        assert 1 <= len(found) <= MOST
        assert len({item.text for item in found}) == len(found)
        assert ("ship" in names) == (not device and 93.0 - exported <= LOSS)
        assert not names & {"ship", "device"} or not names & mending
        assert ("device" in names) == bool(device)
        assert "training" not in names or not names & mending
        seen |= names
    assert seen == {"ship", "device", "training", "float", *mending}


def test_importing_the_advice_imports_nothing_heavy() -> None:
    code = "import sys, msqkd.analysis.refresh; print(sorted({'mindspore', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
