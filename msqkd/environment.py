"""The environment: what is installed, and what is wrong with it (`msqkd doctor`)."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from typing import Any, Optional

from msqkd.platform import avoid_slow_convolutions, cpu_flags
from msqkd.version import __version__

OK, NOTE, PROBLEM = "ok", "note", "problem"


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what was found, whether it is a problem, and what cures it."""

    name: str
    status: str
    found: str
    cure: str = ""

    def to_dict(self) -> dict[str, str]:
        """As JSON-able data."""
        return asdict(self)


def version_of(package: str) -> Optional[str]:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, Any]:
    """What a result depends on."""
    return {
        "msqkd": __version__,
        "mindspore": version_of("mindspore"),
        "numpy": version_of("numpy"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def examine() -> list[Finding]:
    """Look at everything msqkd needs of its surroundings."""
    return [_python(), _mindspore(), _numpy(), _onednn(), _device(), _temporary_space(), *_extras()]


def _python() -> Finding:
    found = platform.python_version()
    good = sys.version_info >= (3, 9)
    return Finding("python", OK if good else PROBLEM, found, "" if good else "install Python 3.9 or newer")


def _mindspore() -> Finding:
    found = version_of("mindspore")
    if found is None:
        return Finding("mindspore", PROBLEM, "not installed", "pip install 'mindspore>=2.7'")
    if _tuple(found) < (2, 7):
        return Finding("mindspore", PROBLEM, found, "pip install 'mindspore>=2.7'")
    return Finding("mindspore", OK, found)


def _numpy() -> Finding:
    found = version_of("numpy") or "not installed"
    if _tuple(found) >= (2,) or found == "not installed":
        return Finding(
            "numpy",
            PROBLEM,
            found,
            "pip install 'numpy<2': MindSpore 2.10 fails on its first eager operation with numpy 2",
        )
    return Finding("numpy", OK, found)


def _onednn() -> Finding:
    value = os.environ.get("ONEDNN_MAX_CPU_ISA")
    if "avx512f" not in cpu_flags():
        return Finding("oneDNN", OK, "this CPU has no AVX-512")
    if value is None:
        avoid_slow_convolutions()
        value = os.environ.get("ONEDNN_MAX_CPU_ISA")
    if value == "AVX2":
        return Finding("oneDNN", OK, "ONEDNN_MAX_CPU_ISA=AVX2 (set by msqkd unless you set it)")
    cure = (
        "unset ONEDNN_MAX_CPU_ISA, or set it to AVX2: above it MindSpore 2.10 takes convolutions 25 to 100 times slower"
    )
    return Finding("oneDNN", PROBLEM, f"ONEDNN_MAX_CPU_ISA={value} on a CPU with AVX-512", cure)


def _device() -> Finding:
    if _mindspore().status != OK or _numpy().status != OK:
        return Finding("device", NOTE, "not looked at", "mend the problems above first")
    try:
        import mindspore as ms

        return Finding("device", OK, f"{ms.get_context('device_target')}, {os.cpu_count()} CPU cores")
    except Exception as error:  # whatever an incomplete installation raises
        return Finding(
            "device", PROBLEM, f"MindSpore cannot be imported: {str(error).splitlines()[0]}", "reinstall mindspore"
        )


def _temporary_space() -> Finding:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    good = free > 1 << 30
    cure = "" if good else "free some space, or set TMPDIR to a larger folder"
    return Finding("temporary space", OK if good else PROBLEM, f"{free / 2**30:.1f} GiB free in {folder}", cure)


def _extras() -> list[Finding]:
    mindcv = version_of("mindcv")
    cure = "" if mindcv else "pip install 'msqkd[mindcv]' for recipes with `source: mindcv`"
    return [Finding("mindcv (optional)", OK if mindcv else NOTE, mindcv or "not installed", cure)]


def _tuple(version: str) -> tuple[int, ...]:
    parts = []
    for part in version.split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)
