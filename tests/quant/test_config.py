from __future__ import annotations

import mindspore as ms
import pytest

from msqkd.errors import PlanError
from msqkd.quant.config import FLOAT, QuantConfig, Rule, WeightQuantizer, bits_of


@pytest.mark.parametrize(("dtype", "bits"), [(ms.int8, 8), ("int8", 8), ("int4", 4), (4, 4), (2, 2), ("INT3", 3)])
def test_bits_of(dtype: object, bits: int) -> None:
    assert bits_of(dtype, "here") == bits


@pytest.mark.parametrize("dtype", [ms.float32, ms.int16, "int1", "int9", 1, 9, True, None, 8.0])
def test_bits_of_refuses_what_is_not_a_quantised_dtype(dtype: object) -> None:
    with pytest.raises(PlanError, match=r"^here is .*; allowed: mindspore.int8, 'int2' … 'int8', or a number"):
        bits_of(dtype, "here")


def test_values_may_have_sixteen_bits_where_they_are_quantised_at_each_call() -> None:
    for dtype in (16, "int16", ms.int16):
        assert bits_of(dtype, "here", wide=True) == 16
        config = QuantConfig(act_quant_dtype=dtype, precision="dynamic")
        assert config.act_bits == 16
        assert config.override({"precision": "float"}).is_float
    with pytest.raises(PlanError, match="allowed only with precision 'dynamic'"):
        config.override({"precision": "int8"})


def test_defaults() -> None:
    config = QuantConfig()
    assert (config.act_bits, config.weight_quantizer.bits, config.weight_quantizer.per_channel) == (8, 8, False)
    assert not config.is_float
    assert QuantConfig(act_quant_dtype=None).is_float
    assert QuantConfig(act_quant_dtype=None).act_bits is None


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: QuantConfig(act_quant_delay=-1), "act_quant_delay is -1"),
        (lambda: QuantConfig(act_quant_delay=1.5), "act_quant_delay is 1.5"),
        (lambda: QuantConfig(act_quant_delay=True), "act_quant_delay is True"),
        (lambda: QuantConfig(act_percentile=89.9), "act_percentile is 89.9; allowed: 90 to 100"),
        (lambda: QuantConfig(act_quant_dtype="float16"), "act_quant_dtype is 'float16'"),
        (lambda: QuantConfig(act_observer="minmx"), "did you mean 'minmax'"),
        (lambda: WeightQuantizer(observer="kl"), "WeightQuantizer.observer is 'kl'; allowed: minmax, mse"),
        (lambda: WeightQuantizer(quant_dtype=16), "WeightQuantizer.quant_dtype is 16"),
    ],
)
def test_bad_settings_are_one_sentence(build: object, text: str) -> None:
    with pytest.raises(PlanError) as caught:
        build()  # type: ignore[operator]
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_override_changes_only_what_it_names() -> None:
    base = QuantConfig(WeightQuantizer(per_channel=True, observer="mse"), act_quant_delay=7)
    changed = base.override({"weight.quant_dtype": 4, "act_observer": "kl"})
    assert changed.weight_quantizer == WeightQuantizer(4, True, "mse")
    assert (changed.act_observer, changed.act_quant_delay) == ("kl", 7)
    assert base.weight_quantizer.bits == 8
    assert base.override(FLOAT).is_float


def test_as_changes_carries_every_setting() -> None:
    wanted = QuantConfig(WeightQuantizer("int4", True, "mse"), "int7", 3, True, "percentile", 99.0)
    assert QuantConfig().override(wanted.as_changes()) == wanted


def test_override_is_checked() -> None:
    with pytest.raises(PlanError, match="observer"):
        QuantConfig().override({"act_observer": "none"})


def test_rule_names_itself() -> None:
    assert str(Rule("op", "Conv2D", FLOAT)) == "op: Conv2D"
    assert str(Rule("op", "Conv2D", FLOAT, "rules[0]")) == "rules[0]"
