"""MindSpore as msqkd needs it: the one place that knows the traps of the platform."""

from __future__ import annotations

import os
import re
import sys
from functools import cache
from importlib import metadata
from typing import Any, Optional

from msqkd.errors import MissingDependencyError

_ONEDNN_VARIABLE = "ONEDNN_MAX_CPU_ISA"
version = cache(metadata.version)  # it reads a file, and every capture asks


def cpu_flags() -> set[str]:
    """The CPU's feature flags as Linux reports them (empty where /proc/cpuinfo does not exist)."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as stream:
            for line in stream:
                if line.startswith(("flags", "Features")):
                    return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return set()


def avoid_slow_convolutions() -> None:
    """On AVX-512 machines let oneDNN use AVX2, unless the user has chosen.

    The oneDNN of the MindSpore 2.10 wheel falls back to its reference convolution there, 25 to 100 times slower. The
    variable is read at the first oneDNN operation, so calling this after ``import mindspore`` is early enough.
    """
    if _ONEDNN_VARIABLE not in os.environ and "avx512f" in cpu_flags():
        os.environ[_ONEDNN_VARIABLE] = "AVX2"


def mindspore() -> Any:
    """Import MindSpore with the environment prepared.

    Raises:
        MissingDependencyError: MindSpore is not installed, or numpy 2 is.
    """
    avoid_slow_convolutions()
    if version("numpy").split(".")[0] not in ("0", "1"):
        raise MissingDependencyError(
            f"numpy {version('numpy')} is installed, and MindSpore's operations fail with it; pip install 'numpy<2'"
        )
    try:
        import mindspore as ms
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise MissingDependencyError(f"MindSpore cannot be imported ({reason}); pip install mindspore") from error
    return ms


def without_kernel(error: RuntimeError) -> Optional[str]:
    """The operation MindSpore could not compute for want of a kernel; None for any other error of it."""
    found = re.search(r"Unsupported op \[(\w+)\] on \w+|The kernel (\w+) unregistered", str(error))
    return next(filter(None, found.groups())) if found else None


def leave_quietly() -> None:
    """Call it last: MindSpore's cells otherwise complain, one by one, about an interpreter that is half gone."""
    module = sys.modules.get("mindspore.nn.cell")
    if module is not None:
        module.Cell.__del__ = lambda self: None
