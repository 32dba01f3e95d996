from __future__ import annotations

from typing import Any, get_args

import pytest

from msqkd import targets
from msqkd.errors import RecipeError
from msqkd.exporters import FORMATS
from msqkd.recipe import (
    ActivationOverride,
    ActivationSection,
    Recipe,
    WeightOverride,
    WeightSection,
    make_recipe,
    path_pattern,
)
from msqkd.recipe.schema import DEFAULT_FORMATS, TARGETS, ExportFormat


def complaints(values: dict[str, Any], *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        make_recipe(values, overrides)
    return str(caught.value).split("\n")


def complaint(values: dict[str, Any], *overrides: str) -> str:
    lines = complaints(values, *overrides)
    assert len(lines) == 1, lines
    return lines[0]


def test_defaults(minimal: dict[str, Any]) -> None:
    recipe = make_recipe(minimal)
    assert recipe.seed == 0
    assert recipe.target == "lite_arm"
    assert recipe.model.source == "msqkd"
    assert recipe.teacher.source == "self"
    assert recipe.distillation is None
    assert recipe.quantization.weight.bits == 8
    assert recipe.quantization.weight.per_channel is False
    assert recipe.quantization.activation.observer == "ema"
    assert recipe.quantization.activation.percentile is None
    assert recipe.quantization.activation.delay == 100
    assert recipe.train.momentum == 0.9
    assert recipe.calibration.observer == "percentile"
    assert recipe.calibration.percentile == 99.99
    assert recipe.export.formats == ["lite_mindir", "portable_mindir", "ms"]
    assert (recipe.verify.max_deviation, recipe.verify.samples, recipe.verify.machine) == (0.1, None, "arm64")
    assert recipe.warnings() == []


def test_defaults_that_depend_on_another_setting(minimal: dict[str, Any]) -> None:
    assert make_recipe(minimal, ["train.opt=adamw"]).train.momentum is None
    assert make_recipe(minimal, ["train.opt=null", "train.momentum=null"]).train.momentum == 0.9
    exponential = make_recipe(minimal, ["train.scheduler=exponential_decay"]).train
    assert exponential.decay_rate == 0.9
    polynomial = make_recipe(minimal, ["train.scheduler=polynomial_decay"]).train
    assert (polynomial.power, polynomial.decay_rate) == (1.0, None)
    mixed = make_recipe(minimal, ["train.amp_level=O2", "train.accumulate=4", "train.batch_size=8"]).train
    assert (mixed.loss_scale, mixed.samples_a_step) == ("dynamic", 32)
    assert make_recipe(minimal, ["train.amp_level=O1", "train.loss_scale=1e3"]).train.loss_scale == 1000.0
    step = make_recipe(minimal, ["train.scheduler=step_decay", "train.decay_epochs=2", "train.epoch_size=3"]).train
    assert (step.decay_rate, step.decay_epochs) == (0.1, 2)
    assert make_recipe(minimal, ["calibration.observer=kl"]).calibration.percentile is None
    assert make_recipe(minimal, ["quantization.activation.observer=percentile"]).quantization.activation.percentile
    assert make_recipe(minimal).compare == ["float"]
    assert make_recipe(minimal, ["distillation={}"]).compare == ["qat", "float", "float_kd"]
    smooth = make_recipe(minimal, ["distillation.hard_loss=label_smoothing"]).distillation
    assert smooth is not None
    assert smooth.label_smoothing == 0.1


def test_what_depends_on_the_target(minimal: dict[str, Any]) -> None:
    recipe = make_recipe(minimal, ["target=ascend"])
    assert recipe.export.formats == ["ascend_mindir", "portable_mindir"]
    assert recipe.verify.machine is None
    assert make_recipe(recipe.to_dict()) == recipe
    changed = make_recipe(minimal, ["target=ascend", "export.verify_tolerance=0.1", "verify.samples=5"])
    assert changed.export.formats == ["ascend_mindir", "portable_mindir"]
    assert (
        "found 'ms', allowed with target: ascend: 'portable_mindir', 'direct_mindir', 'ascend_mindir' or 'onnx'"
        in complaint(minimal, "target=ascend", "export.formats=[onnx, ms]")
    )
    assert "found 'x86', allowed only with target: lite_arm" in complaint(
        minimal, "target=ascend", "verify.machine=x86"
    )


def test_the_converter_of_a_recipe(minimal: dict[str, Any]) -> None:
    assert make_recipe(minimal).verify.converter == "auto"
    assert make_recipe({**minimal, "verify": {"converter": False}}).verify.converter == "off"
    assert make_recipe(minimal, ["verify.converter=off"]).verify.converter == "off"
    assert make_recipe(minimal, ["verify.converter=~/converter_lite"]).verify.converter.startswith("/")
    found = complaint(minimal, "export.formats=[ms]", "verify.converter=converter_lite")
    assert "verify.converter" in found
    assert "lite_mindir" in found
    assert make_recipe(minimal, ["export.formats=[ms]", "verify.converter=auto"]).verify.converter == "auto"


def test_a_recipe_knows_the_targets_and_formats_there_are() -> None:
    assert set(TARGETS) == set(targets.TARGETS)
    assert set(get_args(ExportFormat)) == set(FORMATS)
    for name, formats in DEFAULT_FORMATS.items():
        assert all(name in FORMATS[form].targets for form in formats)


def test_null_is_the_default_everywhere(minimal: dict[str, Any]) -> None:
    nulls = ["train=null", "train.lr=null", "teacher=null", "quantization.weight.bits=null", "compare=null"]
    assert make_recipe(minimal, nulls) == make_recipe(minimal)


def test_a_number_in_exponent_form_without_a_dot_is_a_number(minimal: dict[str, Any]) -> None:
    assert make_recipe(minimal, ["train.weight_decay=5e-4"]).train.weight_decay == 5e-4
    assert "found 'fast'" in complaint(minimal, "train.lr=fast")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=true", "found true, allowed: an integer from 0 to 4294967295"),
        ("seed=-1", "found -1, allowed: an integer from 0 to 4294967295"),
        ("train.epoch_size=2.0", "found 2.0, allowed: an integer of 1 or more"),
        ("train.epoch_size=0", "found 0, allowed: an integer of 1 or more"),
        ("train.lr=0", "found 0, allowed: a number above 0"),
        ("train.lr=true", "found true, allowed: a number above 0"),
        ("train.lr=.nan", "found nan, allowed: a number above 0"),
        ("train.clip_grad=.inf", "found inf, allowed: a number above 0"),
        ("train.filter_bias_and_bn=1", "found 1, allowed: true or false"),
        ("train.batch_size='64'", "found '64', allowed: an integer of 1 or more"),
        ("quantization.weight.bits=9", "found 9, allowed: an integer from 2 to 8"),
        ("quantization.activation.bits=1", "found 1, allowed: an integer from 2 to 8"),
        ("quantization.activation.delay=-1", "found -1, allowed: an integer of 0 or more"),
        ("quantization.weight.symmetric=false", "found false, allowed: true"),
        ("quantization.precision=weight_only", "'weight-only' or 'dynamic'; did you mean 'weight-only'?"),
        ("quantization.precision=float", "found 'float', allowed: 'int8', 'weight-only' or 'dynamic'"),
        ("quantization.batchnorm=folded", "allowed: 'fold', 'freeze' or 'live'; did you mean 'fold'?"),
        ("train.opt=adm", "allowed: 'momentum', 'sgd', 'adamw' or 'adam'; did you mean 'adam' or 'adamw'?"),
        ("target=lite_arn", "found 'lite_arn', allowed: 'lite_arm' or 'ascend'; did you mean 'lite_arm'?"),
        ("apiversion=msqkd/v2", "found 'msqkd/v2', allowed: 'msqkd/v1'"),
        ("name=My Recipe", "found 'My Recipe', allowed: a text of a-z, 0-9"),
        ("name=..", "found '..', allowed: a text of a-z, 0-9"),
        ("calibration.samples=0", "found 0, but calibration needs at least 1 sample"),
        ("calibration.iterations=0", "found 0, allowed: an integer of 1 or more"),
        ("calibration.percentile=89", "found 89, allowed: a number from 90 to 100"),
        ("model.input_shape=[32, 32]", "found [32, 32], allowed: a list of three integers [channels, height, width]"),
        ("model.source=torch", "found 'torch', allowed: 'msqkd', 'mindcv', 'python' or 'mindir'"),
        ("data.name=cifar", "allowed: 'digits', 'cifar10'"),
        ("data.augment=flip", "found 'flip', allowed: a list"),
        ("data.augment=[flip, flip]", "'flip' given twice"),
        ("compare=[float, float]", "'float' given twice"),
        (
            "export.formats=[]",
            "found [], allowed: a list, at least one of 'lite_mindir', 'portable_mindir', 'direct_mindir'",
        ),
        ("export.formats=[onx]", "'onnx' or 'ascend_mindir'; did you mean 'onnx'?"),
        ("export.formats=[ms, ms]", "'ms' given twice"),
        (
            "export.formats=[ascend_mindir]",
            "found 'ascend_mindir', allowed with target: lite_arm: 'lite_mindir', 'portable_mindir', 'direct_mindir', ",
        ),
        ("verify.max_deviation=-0.1", "found -0.1, allowed: a number of 0 or more"),
        ("verify.samples=0", "found 0, allowed: an integer of 1 or more"),
        ("verify.machine=arm32", "found 'arm32', allowed: 'x86' or 'arm64'; did you mean 'arm64'?"),
        ("export=lite_mindir", "found 'lite_mindir', allowed: a section, keys formats, verify_tolerance"),
        ("model.args={1: a}", "key 1 is not a text; write it in quotes"),
        ("model.args.when=2024-01-01", "found 2024-01-01; versions 1.1 and 1.2 of YAML read 2024-01-01 differently"),
        ("result.accuracy=.nan", "found nan, allowed: a finite number"),
    ],
)
def test_a_wrong_value_is_refused_in_words(minimal: dict[str, Any], override: str, expected: str) -> None:
    line = complaint(minimal, override)
    assert line.startswith(f"--set {override}: ")
    assert expected in line


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["model.name=null"], "--set model.name=null: is missing, required by source: msqkd"),
        (["model.source=python", "model.name=null"], "model.target: is missing, required by source: python"),
        (["model.source=python", "model.target=nets:lenet"], "model.name: found 'lenet5', not allowed"),
        (["model.target=nets:lenet"], "found 'nets:lenet', allowed only with source: python"),
        (["model.source=python", "model.name=null", "model.target=nets"], "found 'nets', allowed: a text like"),
        (["model.checkpoint=null"], "--set model.checkpoint=FILE"),
        (["pretrain={}"], "two origins of the weights, training from scratch and model.checkpoint"),
        (["model.source=mindcv", "model.args.pretrained=true"], "model.checkpoint: two origins of the weights"),
        (["teacher.name=resnet56"], "found 'resnet56', not allowed with source: self"),
        (["distillation={}", "teacher={source: msqkd, name: resnet56}"], "--set teacher.checkpoint=FILE"),
        (["teacher={source: msqkd, name: resnet56, checkpoint: a.ckpt}"], "not used without distillation"),
        (["compare=[float_kd]"], "found 'float_kd', allowed only with a distillation section"),
        (["compare=[qat]"], "found 'qat', allowed only with a distillation section"),
        (["data.root=somewhere"], "found 'somewhere', not allowed with name: digits"),
        (["data.mean=[0.5]"], "data.std: is missing, required beside mean"),
        (["data.mean=[0.5]", "data.std=[1, 1]"], "found 2 values, allowed: 1, as many as mean has"),
        (["data.mean=[0.5]", "data.std=[0]"], "data.std[0]: found 0, allowed: a number above 0"),
        (["data={name: digits, mean: [0], std: [1]}", "model.input_shape=[3, 8, 8]"], "found 1 values, allowed: 3"),
        (["train.opt=adam", "train.momentum=0.9"], "found 0.9, allowed only with opt: momentum or sgd"),
        (["train.opt=adam", "train.use_nesterov=true"], "found true, allowed only with opt: momentum or sgd"),
        (["train.momentum=0", "train.use_nesterov=true"], "not allowed with momentum: 0"),
        (["train.scheduler=step_decay"], "train.decay_epochs: is missing, required by scheduler: step_decay"),
        (
            ["train.decay_rate=0.5"],
            "found 0.5, allowed only with scheduler: step_decay or multi_step_decay or exponential_decay",
        ),
        (
            ["train.scheduler=constant", "train.min_lr=0.001"],
            "found 0.001, allowed only with scheduler: cosine_decay or polynomial_decay",
        ),
        (["train.min_lr=0.1"], "found 0.1, allowed: at most lr, 0.01"),
        (["train.scheduler=multi_step_decay"], "train.milestones: is missing, required by scheduler: multi_step_decay"),
        (
            ["train.scheduler=multi_step_decay", "train.epoch_size=9", "train.milestones=[4, 2]"],
            "found [4, 2], allowed: numbers that rise",
        ),
        (
            ["train.scheduler=multi_step_decay", "train.epoch_size=9", "train.milestones=[4, 9]"],
            "found 9, allowed: less than epoch_size, 9: nothing would decay after the end",
        ),
        (
            ["train.scheduler=step_decay", "train.decay_epochs=3", "train.epoch_size=2"],
            "found 3, allowed: less than epoch_size, 2: nothing would decay after the end",
        ),
        (["train.power=2"], "found 2.0, allowed only with scheduler: polynomial_decay"),
        (["train.amp_level=O4"], "found 'O4', allowed: 'O0', 'O1', 'O2' or 'O3'"),
        (["train.loss_scale=dynamic"], "found 'dynamic', allowed only with amp_level: O1, O2 or O3"),
        (["train.amp_level=O1", "train.loss_scale=high"], "found 'high', allowed: a number above 0, or 'dynamic'"),
        (["train.amp_level=O1", "train.loss_scale=0"], "found 0, allowed: a number above 0, or 'dynamic'"),
        (["train.accumulate=0"], "found 0, allowed: an integer of 1 or more"),
        (
            ["train.weight_decay=0", "train.no_weight_decay=[fc.weight]"],
            "found a list, not allowed with weight_decay: 0, which decays nothing",
        ),
        (["train.no_weight_decay=['re:(']"], "found 're:(', which is not a regular expression"),
        (["train.warmup_epochs=2"], "found 2.0, allowed: at most epoch_size, 1"),
        (["distillation.label_smoothing=0.1"], "found 0.1, allowed only with hard_loss: label_smoothing"),
        (
            ["distillation={}", "compare=[float_kd]", "train.label_smoothing=0.1"],
            "every training here has distillation",
        ),
        (["quantization.activation.percentile=99.9"], "found 99.9, allowed only with observer: percentile"),
        (["calibration={observer: kl, percentile: 99.9}"], "found 99.9, allowed only with observer: percentile"),
    ],
)
def test_impossible_combinations_are_refused(minimal: dict[str, Any], overrides: list[str], expected: str) -> None:
    assert expected in complaint(minimal, *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.checkpoint=null", "pretrain={}"],
        ["model={source: mindcv, name: resnet50, args: {pretrained: true}}"],
        ["model={source: mindcv, name: resnet50, args: {pretrained: false}, checkpoint: a.ckpt}"],
        ["model={source: python, target: 'nets/mine.py:lenet', checkpoint: a.ckpt}"],
        ["distillation={}", "teacher={source: msqkd, name: resnet56, checkpoint: a.ckpt}"],
        ["distillation={}", "teacher={source: mindcv, name: resnet50, args: {pretrained: true}}"],
        ["distillation={}", "train.label_smoothing=0.1", "compare=[qat]"],
        ["compare=[]"],
        ["quantization.rules=[{match: {op: Add}, precision: float}, {match: {position: last}, weight: {bits: 4}}]"],
        ["quantization.rules=[{match: {path: 're:layer[12].*'}, activation: {observer: percentile}}]"],
        ["quantization.precision=weight-only", "quantization.rules=[{match: {op: Conv2D}, precision: int8}]"],
        ["quantization.rules=[{match: {op: Dense}, precision: dynamic, activation: {bits: 4, symmetric: true}}]"],
        ["quantization.rules=[{match: {op: Gather}, precision: weight-only, weight: {bits: 4}}]"],
    ],
)
def test_possible_combinations_are_accepted(minimal: dict[str, Any], overrides: list[str]) -> None:
    assert isinstance(make_recipe(minimal, overrides), Recipe)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("{precision: float}", "quantization.rules[0].match: is missing"),
        ("{match: {}, precision: float}", "quantization.rules[0].match: found none, allowed: exactly one of 'path'"),
        ("{match: {path: a, type: B}, precision: float}", "found 'path' and 'type', allowed: exactly one of"),
        ("{match: {path: a}}", "quantization.rules[0]: the rule sets nothing"),
        (
            "{match: {path: a}, precision: weight-only, activation: {bits: 4}}",
            "quantization.rules[0].activation: not allowed with precision: weight-only",
        ),
        (
            "{match: {path: a}, precision: dynamic, activation: {observer: minmax}}",
            "quantization.rules[0].activation.observer: not allowed with precision: dynamic",
        ),
        ("{match: {path: a}, weight: {bits: null}}", "quantization.rules[0]: the rule sets nothing"),
        (
            "{match: {path: a}, precision: float, weight: {bits: 4}}",
            "rules[0].weight: not allowed with precision: float",
        ),
        ("{match: {path: 're:('}, precision: float}", "found 're:(', which is not a regular expression"),
        ("{match: {path: ''}, precision: float}", "found '', allowed: a cell path, a glob"),
        ("{match: {position: middle}, precision: float}", "found 'middle', allowed: 'first' or 'last'"),
        (
            "{match: {path: a}, precision: int4}",
            "found 'int4', allowed: 'int8', 'weight-only', 'dynamic', 'float', 'float16' or 'weight-only-float16'; did "
            "you mean 'int8'?",
        ),
        ("{match: {path: a}, weight: {bit: 4}}", "rules[0].weight.bit: unknown key 'bit'"),
        ("{match: {path: a}, activation: {percentile: 99.9}}", "allowed only with observer: percentile"),
        ("{match: {path: a}, activation: {bits: 12}}", "found 12, allowed: an integer from 2 to 8, or 16 with"),
        ("{match: {path: a}, activation: {bits: 16}}", "found 16, allowed only with precision: dynamic"),
        ("{match: {path: a}, precision: float16, weight: {bits: 4}}", "not allowed with precision: float16, which"),
    ],
)
def test_a_wrong_rule_is_refused(minimal: dict[str, Any], rule: str, expected: str) -> None:
    assert expected in complaint(minimal, f"quantization.rules=[{rule}]")


def test_an_unknown_key_lists_the_known_ones(minimal: dict[str, Any]) -> None:
    minimal["data"]["rot"] = "x"
    assert complaint(minimal) == (
        "recipe: data.rot: unknown key 'rot', allowed in data: name, root, augment, eval_batch_size, mean, std, "
        "target, args; "
        "did you mean 'root'?"
    )


def test_all_problems_are_reported_together(minimal: dict[str, Any]) -> None:
    minimal["train"] = {"lr": -1, "opt": "adam", "warmup_epoch": 1}
    minimal["quantization"] = {"weight": {"bits": 1}}
    minimal["data"] = {"root": "x"}
    keys = [line.split(": ")[1] for line in complaints(minimal)]
    assert sorted(keys) == ["data.name", "quantization.weight.bits", "train.lr", "train.warmup_epoch"]


def test_conflicts_of_one_section_are_reported_together(minimal: dict[str, Any]) -> None:
    minimal["train"] = {"opt": "adam", "momentum": 0.9, "use_nesterov": True, "decay_rate": 0.5}
    assert [line.split(": ")[1] for line in complaints(minimal)] == [
        "train.momentum",
        "train.use_nesterov",
        "train.decay_rate",
    ]


def test_warning_about_a_high_temperature_at_low_bits(minimal: dict[str, Any]) -> None:
    minimal["distillation"] = {"temperature": 5.0}
    assert make_recipe(minimal).warnings() == []
    (warning,) = make_recipe(minimal, ["quantization.weight.bits=3"]).warnings()
    assert "distillation.temperature: 5 " in warning
    assert "(quantization.weight.bits)" in warning
    assert "12 points at W3A8" in warning
    rule = "quantization.rules=[{match: {position: first}, activation: {bits: 4}}]"
    (warning,) = make_recipe(minimal, [rule]).warnings()
    assert "(quantization.rules[0].activation.bits)" in warning
    assert make_recipe(minimal, [rule, "distillation.temperature=2"]).warnings() == []
    assert make_recipe(minimal, [rule, "distillation=null"]).warnings() == []


def test_sha_depends_on_every_setting_but_not_on_the_result(minimal: dict[str, Any]) -> None:
    recipe = make_recipe(minimal)
    assert len(recipe.sha()) == 64
    assert recipe.sha() == make_recipe(minimal).sha() == make_recipe(recipe.to_dict()).sha()
    assert recipe.sha() == make_recipe(minimal, ["train.lr=0.01"]).sha()  # the default, written out
    assert recipe.sha() == make_recipe(minimal, ["result.accuracy=0.9"]).sha()
    others = ["seed=1", "train.lr=0.02", "model.args.num_classes=10", "quantization.weight.per_channel=true"]
    assert len({make_recipe(minimal, [other]).sha() for other in others} | {recipe.sha()}) == 5


def test_sha_is_stable_across_key_order(minimal: dict[str, Any]) -> None:
    backwards = dict(reversed(list(minimal.items())))
    assert make_recipe(backwards).sha() == make_recipe(minimal).sha()


def test_a_recipe_is_read_only(minimal: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_recipe(minimal).train.lr = 1.0  # type: ignore[misc]


def test_overridden_weight_settings() -> None:
    base = WeightSection(bits=8, observer="mse")
    assert base.overridden(None) is base
    assert base.overridden(WeightOverride(bits=4)) == WeightSection(bits=4, observer="mse")
    assert base.overridden(WeightOverride(per_channel=True, observer="minmax")) == WeightSection(per_channel=True)


def test_overridden_activation_settings_keep_the_percentile_with_its_observer() -> None:
    base = ActivationSection(observer="percentile", percentile=99.0, delay=5)
    assert base.overridden(ActivationOverride(bits=4)).percentile == 99.0
    other = base.overridden(ActivationOverride(observer="kl"))
    assert (other.observer, other.percentile, other.delay) == ("kl", None, 5)
    finer = ActivationSection().overridden(ActivationOverride(observer="percentile", percentile=99.9))
    assert (finer.observer, finer.percentile, finer.delay) == ("percentile", 99.9, 100)


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("layer1.0.conv1", "layer1.0.conv1", True),
        ("layer1.0.conv1", "layer1x0.conv1", False),
        ("layer1.0.conv1", "layer1.0.conv10", False),
        ("layer1.*", "layer1.0.conv1", True),
        ("layer1.*", "layer10.conv1", False),
        ("layer?.0.*", "layer2.0.conv1", True),
        ("re:layer[12]\\..*", "layer2.0.conv1", True),
        ("re:layer[12]", "layer2.0.conv1", False),
    ],
)
def test_path_pattern(pattern: str, path: str, matches: bool) -> None:
    assert bool(path_pattern(pattern).fullmatch(path)) is matches


@pytest.mark.parametrize(
    "target", ["nets.py:Réseau", "nets.py:网络", "网络.py:Net", "文件夹/网.py:建网_2", "包.模块:Σ"]
)
def test_a_factory_has_any_name_that_python_allows(minimal: dict[str, Any], target: str) -> None:
    recipe = make_recipe(minimal, ["model.source=python", "model.name=null", f"model.target={target}"])
    assert recipe.model.target == target


@pytest.mark.parametrize("target", ["nets.py:2网", "nets.py:网-络", "nets.py:", "网络"])
def test_what_is_no_name_in_python_is_no_factory(minimal: dict[str, Any], target: str) -> None:
    overrides = ("model.source=python", "model.name=null", f"model.target='{target}'")
    assert "allowed: a text like" in "".join(complaints(minimal, *overrides))


def test_a_factory_may_bring_its_weights(minimal: dict[str, Any]) -> None:
    overrides = ["model={source: python, target: 'nets.py:loaded', input_shape: [1, 8, 8]}", "pretrain=null"]
    assert make_recipe(minimal, overrides).missing_weights() is None
    teacher = "teacher={source: python, target: 'nets.py:loaded'}"
    assert make_recipe(minimal, [*overrides, "distillation={}", teacher]).teachers[0].checkpoint is None
