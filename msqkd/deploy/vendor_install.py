"""Sets up MindSpore Lite's Python package in a virtual environment of its own, from its wheel or the package index."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

from msqkd.deploy.vendor_runtime import DEFAULT_HOME, HOME_VARIABLE, end_of_log, run_vendor, vendor_python, writing
from msqkd.errors import ExportError, MissingDependencyError
from msqkd.files import PathLike

PACKAGE = "mindspore-lite==2.0.0"
"""The latest release on the package index; its wheels are for CPython 3.7 alone."""

_VERSION = (3, 7)
_MINUTES = 20
_WHEEL = re.compile(r"mindspore_lite-[^-]+(-[^-]+)?-cp(?P<major>\d)(?P<minor>\d+)-[^-]+-(?P<platform>.+)\.whl")
_MACHINES = {"x86_64": ("x86_64", "amd64"), "aarch64": ("aarch64", "arm64")}


def install(wheel: Optional[PathLike] = None, home: Optional[PathLike] = None) -> Path:
    """Set the package up, unless it is there, and return its interpreter.

    Args:
        wheel: the wheel; by default the package index is asked for `PACKAGE`.
        home: the folder of the environment; by default ``$MSLITE_HOME`` or ``~/.cache/mslite-2.0.0``, and a folder of
            its own in ``~/.cache/msqkd`` for a wheel.

    Raises:
        MissingDependencyError: there is no such wheel, it is for another processor, or there is no fitting Python.
        ExportError: the package cannot be installed, or the disk is full.
    """
    version, source = _VERSION, PACKAGE
    folder = Path(home or os.environ.get(HOME_VARIABLE) or DEFAULT_HOME).expanduser()
    if wheel is not None:
        file = Path(wheel).expanduser()
        version, source = _python_of(file), str(file.resolve())
        folder = Path(home).expanduser() if home is not None else Path("~/.cache/msqkd").expanduser() / file.stem
    found = vendor_python(folder)
    if found is not None:
        return found
    with writing():
        _make(_interpreter(version), source, folder)
    made = vendor_python(folder)
    if made is None:
        raise ExportError(f"{source} was installed into {folder}, but holds no package mindspore_lite")
    return made


def _make(python: Path, source: str, folder: Path) -> None:
    """Make the environment beside its place, so that a failure leaves nothing behind."""
    if folder.is_dir() and any(folder.iterdir()):
        raise ExportError(f"{folder} holds other files; choose an empty or new folder with {HOME_VARIABLE}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as place:
        made = Path(place) / "environment"
        _run([str(python), "-m", "venv", str(made)])
        _run([str(made / "bin" / "python"), "-m", "pip", "install", "-q", source, "numpy"])
        folder.rmdir() if folder.is_dir() else None
        shutil.move(str(made), folder)


def _run(command: list[str]) -> None:
    done = run_vendor(command, dict(os.environ), limit=60.0 * _MINUTES)
    if done.returncode:
        raise ExportError(f"{' '.join(command[:4])} … failed{end_of_log(done.stdout)}")


def _python_of(wheel: Path) -> tuple[int, int]:
    """Return the version of Python that a wheel is for.

    Raises:
        MissingDependencyError: it is not there, is no wheel of MindSpore Lite, or is for another processor.
    """
    named = _WHEEL.fullmatch(wheel.name)
    if named is None or not wheel.is_file():
        what = (
            "is not there" if named else "is no wheel of mindspore-lite (mindspore_lite-2.0.0-cp37-…-linux_x86_64.whl)"
        )
        raise MissingDependencyError(f"{wheel} {what}; pip download {PACKAGE} fetches it")
    here = platform.machine()
    family = next((names for names in _MACHINES.values() if here.lower() in names), (here,))
    if named["platform"] != "any" and not named["platform"].endswith(family):
        raise MissingDependencyError(f"{wheel.name} is for {named['platform']}, and this machine is {here}")
    return int(named["major"]), int(named["minor"])


def _interpreter(version: tuple[int, int]) -> Path:
    """Return a Python of that version.

    Raises:
        MissingDependencyError: there is none.
    """
    name, variable = ".".join(map(str, version)), "PYTHON" + "".join(map(str, version))
    for candidate in _candidates(name, variable):
        code = f"import sys, venv; sys.exit(sys.version_info[:2] != {version})"
        try:
            if subprocess.run([candidate, "-c", code], capture_output=True, check=False, timeout=60).returncode == 0:
                return Path(candidate)
        except (OSError, subprocess.TimeoutExpired):
            continue
    raise MissingDependencyError(
        f"there is no Python {name}, which mindspore-lite needs; install one (pyenv install {name}) and name it in "
        f"the environment variable {variable}"
    )


def _candidates(name: str, variable: str) -> Iterator[str]:
    given = os.environ.get(variable)
    if given:
        yield given
    found = shutil.which(f"python{name}")
    if found:
        yield found
    yield from map(str, sorted(Path("~/.pyenv/versions").expanduser().glob(f"{name}*/bin/python")))
