"""msqkd: from a trained MindSpore network to the INT8 model that runs on an ARM device or an Ascend NPU."""

from msqkd.platform import avoid_slow_convolutions as _avoid_slow_convolutions
from msqkd.version import __version__

_avoid_slow_convolutions()

__all__ = ["__version__"]
