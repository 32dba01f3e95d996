"""The runtimes msqkd knows, by name."""

from msqkd.errors import PlanError, did_you_mean
from msqkd.targets.base import FREE, SHARED, SHARED_ROUNDED, WEIGHTED, Int8Op, Target
from msqkd.targets.lite_arm import LITE_ARM

TARGETS = {target.name: target for target in (LITE_ARM,)}

__all__ = ["FREE", "SHARED", "SHARED_ROUNDED", "TARGETS", "WEIGHTED", "Int8Op", "Target", "get_target"]


def get_target(name: str) -> Target:
    """The target called `name`.

    Raises:
        PlanError: there is none.
    """
    if name not in TARGETS:
        raise PlanError(f"target '{name}' is unknown; allowed: {', '.join(TARGETS)}{did_you_mean(name, TARGETS)}")
    return TARGETS[name]
