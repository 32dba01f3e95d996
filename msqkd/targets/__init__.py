"""The runtimes msqkd knows, by name."""

from msqkd.errors import PlanError, did_you_mean
from msqkd.targets.ascend import ASCEND
from msqkd.targets.base import (
    DEPTHWISE,
    FREE,
    HARD_SIGMOID,
    RESCALED,
    SHARED,
    SHARED_ROUNDED,
    WEIGHTED,
    Defect,
    FusedForm,
    Int8Op,
    Target,
)
from msqkd.targets.lite_arm import LITE_ARM

TARGETS = {target.name: target for target in (LITE_ARM, ASCEND)}

__all__ = [
    "DEPTHWISE",
    "FREE",
    "HARD_SIGMOID",
    "RESCALED",
    "SHARED",
    "SHARED_ROUNDED",
    "TARGETS",
    "WEIGHTED",
    "Defect",
    "FusedForm",
    "Int8Op",
    "Target",
    "get_target",
]


def get_target(name: str) -> Target:
    """The target called `name`.

    Raises:
        PlanError: there is none.
    """
    if name not in TARGETS:
        raise PlanError(f"target '{name}' is unknown; allowed: {', '.join(TARGETS)}{did_you_mean(name, TARGETS)}")
    return TARGETS[name]
