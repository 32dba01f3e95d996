"""MindSpore Lite's own Python package, in an interpreter of its own: its converter and its runtime.

The package of 2.0.0 is for CPython 3.7, so nothing of it can be imported here. The folder of a virtual environment that
holds it stands for it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

import numpy as np

from msqkd.errors import ExportError, MissingDependencyError
from msqkd.files import PathLike

HOME_VARIABLE = "MSLITE_HOME"
"""Environment variable with the folder that holds the virtual environment, itself or as ``x86``."""

DEFAULT_HOME = "~/.cache/mslite-2.0.0"
"""The folder where the variable is not set."""

TIME_LIMIT = 600.0
"""Seconds after which a program of the vendor's is ended."""

_LOG_LINES = 12
_PYTHON = ("bin/python", "x86/bin/python")
_ERRORS = "3"  # the least of its messages that say why something was refused
_CONVERT = """
import sys
import mindspore_lite as lite
converter = lite.Converter()
converter.save_type = lite.ModelType.MINDIR_LITE
converter.convert(lite.FmkType.MINDIR, sys.argv[1], sys.argv[2], config_file=sys.argv[3])
"""
_PREDICT = """
import sys
import mindspore_lite as lite
import numpy as np
path, given, out = sys.argv[1:4]
arrays = np.load(given)
context = lite.Context()
context.target = ["cpu"]
context.cpu.thread_num = 1
model = lite.Model()
kind = lite.ModelType.MINDIR if path.endswith(".mindir") else lite.ModelType.MINDIR_LITE
model.build_from_file(path, kind, context)
inputs, rows = model.get_inputs(), []
for number in range(len(arrays["i0"])):
    for index, tensor in enumerate(inputs):
        sample = arrays["i%d" % index][number]
        tensor.set_data_from_numpy(np.ascontiguousarray(sample).reshape(tensor.shape))
    rows.append([output.get_data_to_numpy().copy() for output in model.predict(inputs)])
np.savez(out, **{"o%d" % j: np.stack([row[j] for row in rows]) for j in range(len(rows[0]))})
"""


def vendor_python(home: Optional[PathLike] = None) -> Optional[Path]:
    """Return the interpreter of the environment in `home`, by default ``$MSLITE_HOME``; None where there is none."""
    folder = Path(home or os.environ.get(HOME_VARIABLE) or DEFAULT_HOME).expanduser()
    return next((folder / name for name in _PYTHON if is_vendor_python(folder / name)), None)


def is_vendor_python(program: Path) -> bool:
    """Return True if a program is the interpreter of a virtual environment with the package."""
    packages = program.parent.parent.glob("lib/python*/site-packages/mindspore_lite")
    return program.is_file() and program.parent.name == "bin" and any(packages)


def convert_command(python: Path, model: PathLike, output: PathLike, config: Optional[PathLike] = None) -> list[str]:
    """Return the command line that converts a MindIR as ``converter_lite --fmk=MINDIR`` does."""
    return [str(python), "-c", _CONVERT, str(model), str(output), str(config or "")]


def run_ms(python: Path, file: PathLike, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Compute a ``.ms`` file, or a MindIR of the format ``direct_mindir``, in the vendor's runtime with one thread.

    Args:
        python: from `vendor_python`.
        file: the file, for batch 1.
        inputs: one array (n, ...) an input, as the file takes them: pictures are (n, H, W, C) in a ``.ms`` file.

    Returns:
        One array (n, ...) an output.

    Raises:
        ExportError: the runtime refuses the file, fails or takes too long; with the first line of its log that says so.
        MissingDependencyError: the interpreter cannot be started.
    """
    with writing(), tempfile.TemporaryDirectory() as place:
        given, out = Path(place) / "in.npz", Path(place) / "out.npz"
        np.savez(given, **{f"i{index}": array for index, array in enumerate(inputs)})
        done = run_vendor([str(python), "-c", _PREDICT, str(file), str(given), str(out)])
        if done.returncode:
            how = ending(done.returncode)
            raise ExportError(f"MindSpore Lite does not run {Path(file).name} ({how}): {first_error(done.stdout)}")
        found = np.load(out)
        return [found[f"o{index}"] for index in range(len(found.files))]


def run_vendor(
    command: Sequence[str],
    environment: Optional[Mapping[str, str]] = None,
    folder: Optional[Path] = None,
    limit: float = TIME_LIMIT,
) -> subprocess.CompletedProcess[str]:
    """Run a program of the vendor's; its output and its messages are one text.

    Args:
        command: the program and its arguments.
        environment: of the program; by default this one's without the libraries of MindSpore.
        folder: where it is started.
        limit: seconds after which it is ended, with all that it started.

    Raises:
        ExportError: it did not end in time; with the last lines of its log.
        MissingDependencyError: the program cannot be started.
    """
    if environment is None:
        hidden = ("LD_LIBRARY_PATH", "PYTHONPATH")
        environment = {name: value for name, value in os.environ.items() if name not in hidden} | {"GLOG_v": _ERRORS}
    try:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise MissingDependencyError(f"{command[0]} cannot be started on this machine: {error.strerror}") from error
    try:
        log, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        log, _ = process.communicate()
        raise ExportError(f"{command[0]} did not end within {limit:g} s{end_of_log(log)}") from None
    except BaseException:  # Ctrl-C, which a session of its own does not see
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return subprocess.CompletedProcess(list(command), process.returncode, log)


def ending(code: int) -> str:
    """Return how a program ended, in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"it crashed: {signal.Signals(-code).name}"
    except ValueError:
        return f"it crashed: signal {-code}"


def end_of_log(log: str) -> str:
    """Return the last lines of a log as the end of a sentence."""
    lines = [line for line in log.splitlines() if line.strip()][-_LOG_LINES:]
    return "; the end of what it printed:\n" + "\n".join(f"  {line}" for line in lines) if lines else " and was silent"


@contextmanager
def writing() -> Iterator[None]:
    """Tell of a full disk, and of a folder that cannot be written, as an ExportError.

    Raises:
        ExportError: an OSError was raised inside.
    """
    try:
        yield
    except OSError as error:
        place = f"{error.filename} cannot be written" if error.filename else "a file cannot be written"
        raise ExportError(f"{place}: {error.strerror or error}") from error


def first_error(log: str) -> str:
    """Return the first line of a log that tells of an error, else the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    marked = [line for line in lines if "ERROR" in line or "Error" in line]
    return (marked or lines or ["it was silent"])[0 if marked else -1]
