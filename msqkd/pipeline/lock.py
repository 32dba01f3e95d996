"""One run at a time in a folder."""

from __future__ import annotations

import os
from pathlib import Path

from msqkd.errors import ExportError

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

_held: dict[Path, int] = {}


def lock(folder: Path) -> None:
    """Keep other processes from running in `folder`, until `release` or the end of this process, however it ends.

    The folder itself is locked (flock), so that nothing is left behind that could be stale. The process that has the
    lock may take it again. Where a file system knows no locks, or a system no flock, nothing is locked.

    Raises:
        ExportError: another process has it.
    """
    folder = folder.resolve()
    if fcntl is None or folder in _held:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ExportError(
            f"another run is at work in {folder}; wait for its end, or choose another folder with --output"
        ) from None
    except OSError:
        os.close(handle)
        return
    _held[folder] = handle


def release(folder: Path) -> None:
    """Let other processes run in `folder`."""
    handle = _held.pop(folder.resolve(), None)
    if handle is not None:
        os.close(handle)
