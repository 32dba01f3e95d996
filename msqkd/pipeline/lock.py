"""One process at a time in the folder of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

from msqkd.errors import FolderError
from msqkd.progress import Reporter

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
"""The file that is locked where a folder itself cannot be, as on NFS; it stays behind, and means nothing by itself."""

_held: dict[Path, int] = {}


def lock(folder: Path) -> Optional[str]:
    """Keep other processes from working in `folder`, until `release` or the end of this process, however it ends.

    The folder itself is locked (flock), so that nothing is left behind that could be stale. NFS locks only files that
    are open for writing, so a file in the folder is locked there. The process that has the lock may take it again.

    Returns:
        None, or a sentence for the user where nothing could be locked.

    Raises:
        FolderError: another process has it.
    """
    folder = folder.resolve()
    if folder in _held:
        return None
    if fcntl is None:
        return _warning(folder, "this system has no flock")
    reason = ""
    for place, mode in ((folder, os.O_RDONLY), (folder / LOCK_FILE, os.O_RDWR | os.O_CREAT)):
        try:
            handle = os.open(place, mode, 0o666)
        except OSError as error:
            reason = error.strerror or str(error)
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise FolderError(
                f"another run is at work in {folder}; wait for its end, or choose another folder with --output"
            ) from None
        except OSError as error:
            os.close(handle)
            reason = error.strerror or str(error)
            continue
        _held[folder] = handle
        return None
    return _warning(folder, reason)


def _warning(folder: Path, reason: str) -> str:
    return f"{folder} cannot be locked ({reason}); let no other msqkd command work in it at the same time"


def release(folder: Path) -> None:
    """Let other processes work in `folder`."""
    handle = _held.pop(folder.resolve(), None)
    if handle is not None:
        os.close(handle)


@contextmanager
def locked(folder: Path, reporter: Reporter) -> Iterator[None]:
    """Hold the lock of a folder, unless this process holds it already, in which case it keeps it.

    Raises:
        FolderError: another process has it.
    """
    if folder.resolve() in _held:
        yield
        return
    warning = lock(folder)
    if warning is not None:
        reporter.warn(warning)
    try:
        yield
    finally:
        release(folder)
