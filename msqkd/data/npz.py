"""Reading .npz files of arrays, never pickled objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from msqkd.errors import DataError


def read_npz(path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The arrays `needed`, and those of `optional` that are there, from `path`.

    DataError for a file that is missing, damaged, without a needed array, or with Python objects in it.
    """
    arrays = {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [key for key in needed if key not in archive]
            if missing:
                found = ", ".join(archive.files) or "nothing"
                raise DataError(f"{path}: no array {', '.join(missing)}; found {found}")
            for key in [*needed, *(key for key in optional if key in archive)]:
                arrays[key] = archive[key]
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except Exception as error:  # zipfile, zlib and numpy each raise their own kinds for damaged files
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(f"{path} is damaged or not an .npz file of plain arrays ({reason})") from error
    return arrays
