"""The keys of trained scales and of the schedule of a quantisation-aware training."""

from __future__ import annotations

from typing import Any

import pytest

from msqkd.errors import RecipeError
from msqkd.pipeline.build import qat_schedule, quant_settings
from msqkd.quant.schedule import DIRECT, BitStage
from msqkd.recipe import ActivationOverride, ActivationSection, make_recipe

STAGES = [{"from_epoch": 0, "weight": 8, "activation": 8}, {"from_epoch": 2, "weight": 4, "activation": 4}]


def recipe(**quantization: Any) -> dict[str, Any]:
    return {
        "apiversion": "msqkd/v1",
        "name": "low",
        "model": {"name": "lenet5", "checkpoint": "a.ckpt"},
        "data": {"name": "digits"},
        "train": {"epoch_size": 4},
        "quantization": quantization,
    }


def test_without_a_schedule_everything_is_as_it_was() -> None:
    default = make_recipe(recipe())
    activation = default.quantization.activation
    assert (activation.delay, activation.delay_epochs, activation.pact_decay) == (100, None, None)
    assert qat_schedule(default, 7) == DIRECT
    config, _ = quant_settings(default)
    assert (config.act_quant_delay, config.act_quant_delay_epochs, config.act_learned) == (100, 0, "none")


def test_every_key_arrives() -> None:
    given = make_recipe(
        recipe(
            batchnorm="live",
            noise=0.5,
            weight={"bits": 4, "learned": "lsq"},
            activation={"bits": 4, "delay_epochs": 1, "learned": "pact"},
            rules=[{"match": {"position": "first"}, "activation": {"delay": 3, "learned": "none"}}],
            schedule={
                "bits": STAGES,
                "progressive": {"order": "back", "stages": 2, "interval_epochs": 3},
                "freeze_ranges_epoch": 1,
                "freeze_batchnorm_epoch": 2,
            },
        )
    )
    schedule = qat_schedule(given, 7)
    assert (schedule.stages, schedule.interval, schedule.order) == (2, 21, "back")
    assert schedule.bits == (BitStage(0, 8, 8), BitStage(14, 2, 2))
    assert (schedule.freeze_ranges, schedule.freeze_batchnorm, schedule.noise) == (7, 14, 0.5)
    assert schedule.pact_decay == 2e-4
    config, rules = quant_settings(given)
    assert (config.weight_quantizer.learned, config.act_learned) == ("lsq", "pact")
    assert (config.act_quant_delay, config.act_quant_delay_epochs) == (0, 1)
    other = config.override(rules[0].changes)
    assert (other.act_quant_delay, other.act_quant_delay_epochs, other.act_learned) == (3, 0, "none")


def test_overridden_delays() -> None:
    section = ActivationSection(delay_epochs=2).overridden(ActivationOverride(delay=5))
    assert (section.delay, section.delay_epochs) == (5, None)


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({"activation": {"delay": 5, "delay_epochs": 1}}, "activation.delay_epochs: two delays"),
        ({"activation": {"delay_epochs": 4}}, "delay_epochs: begins at epoch 4, counted from 0, but the training"),
        ({"activation": {"pact_decay": 0.1}}, "pact_decay: found 0.1, allowed only with learned: pact"),
        ({"activation": {"learned": "lsk"}}, "activation.learned: found 'lsk', allowed: 'none', 'lsq' or 'pact'"),
        ({"weight": {"learned": "pact"}}, "weight.learned: found 'pact', allowed: 'none' or 'lsq'"),
        ({"precision": "weight-only", "activation": {"learned": "lsq"}}, "allowed only with precision: int8"),
        ({"precision": "dynamic", "activation": {"learned": "lsq"}}, "allowed only with precision: int8"),
        ({"noise": 1}, "noise: found 1"),
        ({"schedule": {"bits": STAGES}}, "bits[1].weight: found 4 in the last stage, allowed: 8"),
        ({"schedule": {"bits": STAGES[1:]}}, "bits[0].from_epoch: found 2, allowed: 0"),
        ({"schedule": {"bits": [STAGES[0], STAGES[0]]}}, "bits[1].from_epoch: found 0, allowed: above 0"),
        (
            {"schedule": {"bits": [{**STAGES[0], "weight": 4}, {**STAGES[1], "weight": 8, "activation": 8}]}},
            "bits[1].weight: found 8, allowed: at most 4, since bits only fall",
        ),
        ({"schedule": {"progressive": {}}}, "progressive: found none, allowed: exactly one of interval"),
        ({"schedule": {"progressive": {"interval": 5, "interval_epochs": 1}}}, "found both, allowed: exactly one"),
        ({"schedule": {"progressive": {"interval_epochs": 2}}}, "interval_epochs: begins at epoch 4"),
        ({"schedule": {"freeze_batchnorm_epoch": 1}}, "freeze_batchnorm_epoch: allowed only with batchnorm: live"),
        (
            {"schedule": {"freeze_ranges_epoch": 1}, "activation": {"observer": "kl"}},
            "freeze_ranges_epoch: not allowed with activation.observer: kl",
        ),
        (
            {"schedule": {"freeze_ranges_epoch": 1}, "activation": {"learned": "lsq"}},
            "freeze_ranges_epoch: not allowed with activation.learned: lsq",
        ),
        ({"schedule": {"freeze_ranges_epoch": 9}}, "freeze_ranges_epoch: begins at epoch 9"),
    ],
)
def test_what_cannot_be_is_refused(quantization: dict[str, Any], expected: str) -> None:
    with pytest.raises(RecipeError) as refused:
        make_recipe(recipe(**quantization))
    assert expected in str(refused.value)


def test_an_average_keeps_a_share() -> None:
    assert make_recipe({**recipe(), "train": {"ema": 0.999}}).train.ema == 0.999
    with pytest.raises(RecipeError, match=r"train.ema: found 1.0"):
        make_recipe({**recipe(), "train": {"ema": 1.0}})
