from __future__ import annotations

from pathlib import Path

import pytest

from msqkd.errors import PlanError
from msqkd.exporters.device.int8_steps import INT8_STEPS
from msqkd.targets import TARGETS, get_target
from msqkd.targets.docs import page

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_data_say() -> None:
    assert (ROOT / "docs" / "targets.md").read_text(encoding="utf-8") == page(), "run python -m msqkd.targets.docs"


@pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))
def test_every_defect_that_is_named_is_described(target) -> None:  # type: ignore[no-untyped-def]
    named = {target.grouped_per_channel, target.padded_pointwise, *target.float_defects.values()}
    for support in target.ops.values():
        named |= {support.same_shape, support.sample_broadcast, support.window_defect, *support.avoids}
        named |= {support.row_defect, support.asymmetric}
    assert named - {""} <= set(target.defects)
    assert not set(target.ops) & {*target.float_reasons, *target.float_defects}


def test_every_int8_operation_of_the_device_can_be_written() -> None:
    target = get_target("lite_arm")
    forms = {op for op, support in target.ops.items() if support.form is None}
    assert forms | set(target.rescaled) <= set(INT8_STEPS)


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(PlanError, match="target 'lite_arn' is unknown; allowed: lite_arm, ascend; did you mean"):
        get_target("lite_arn")
