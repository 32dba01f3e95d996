"""msqkd: from a trained MindSpore network to the INT8 model that runs on an ARM device or an Ascend NPU."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from msqkd.platform import avoid_slow_convolutions as _avoid_slow_convolutions
from msqkd.version import __version__

if TYPE_CHECKING:
    from msqkd.api import (
        PTQNetwork,
        QuantizationAwareTraining,
        create_ptq_network,
        export,
        plan_network,
        prepare_qat,
        quantize,
    )
    from msqkd.distill.losses import DistillLoss
    from msqkd.distill.step import DistillTrainOneStepCell
    from msqkd.quant.config import QuantConfig, Rule, WeightQuantizer
    from msqkd.train.callbacks import ActQuantDelay, SaveQuantized
    from msqkd.train.decay import decay_groups
    from msqkd.train.step import TrainStep, WithLoss

_avoid_slow_convolutions()

# Each name is imported when it is first used: `import msqkd` and `msqkd doctor` work where MindSpore does not.
_HOMES = {
    "msqkd.api": (
        "PTQNetwork", "QuantizationAwareTraining", "create_ptq_network", "export", "plan_network", "prepare_qat",
        "quantize",
    ),
    "msqkd.distill.losses": ("DistillLoss",),
    "msqkd.distill.step": ("DistillTrainOneStepCell",),
    "msqkd.quant.config": ("QuantConfig", "Rule", "WeightQuantizer"),
    "msqkd.train.callbacks": ("ActQuantDelay", "SaveQuantized"),
    "msqkd.train.decay": ("decay_groups",),
    "msqkd.train.step": ("TrainStep", "WithLoss"),
}  # fmt: skip
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ActQuantDelay",
    "DistillLoss",
    "DistillTrainOneStepCell",
    "PTQNetwork",
    "QuantConfig",
    "QuantizationAwareTraining",
    "Rule",
    "SaveQuantized",
    "TrainStep",
    "WeightQuantizer",
    "WithLoss",
    "__version__",
    "create_ptq_network",
    "decay_groups",
    "export",
    "plan_network",
    "prepare_qat",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'msqkd' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value
