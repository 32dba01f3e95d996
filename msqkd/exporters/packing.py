"""Integers of few distinct values as indices of a codebook, several in a byte.

Up to 16 distinct values take an index of four bits, up to 4 one of two bits, 2 a single bit: two, four or eight indices
in a uint8, the first in the lowest bits. A row of the table of :func:`digits` says which indices a byte holds, so that
bytes are unpacked by looking rows up: exactly, and by the same operation whatever the width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

_WIDTHS = (1, 2, 4)
_BYTE = 256
_LAYER_BYTES = 640  # what the operations that unpack a weight take in a file, and its codebook
_ROW_BYTES = 1  # what the table of digits takes for each index of each of the 256 bytes


@dataclass(frozen=True, eq=False)
class Packing:
    """How a weight is packed.

    Attributes:
        width: bits of an index; 1, 2 or 4.
        codebook: what indices stand for, rising; integer (K,), K at most 2 ** width. One array for all weights that
            share it.
    """

    width: int
    codebook: np.ndarray

    @property
    def per_byte(self) -> int:
        """Indices in a byte."""
        return 8 // self.width

    @property
    def suffix(self) -> str:
        """What the names of packed parameters end with: ``uint4x2``."""
        return f"uint{self.width}x{self.per_byte}"


def packings(weights: Mapping[str, np.ndarray]) -> dict[str, Packing]:
    """How those of the weights are packed that take fewer bytes so, with all it takes to unpack them; by their names.

    Args:
        weights: the integers of all weights of a file.
    """
    saved: dict[int, dict[str, int]] = defaultdict(dict)
    values: dict[str, np.ndarray] = {}
    for name, integers in weights.items():
        values[name] = np.unique(integers)
        width = next((width for width in _WIDTHS if values[name].size <= 1 << width), 8)
        less = integers.size - _bytes(integers.size, width) - _LAYER_BYTES
        if width < 8 and less > 0:
            saved[width][name] = less
    found: dict[str, Packing] = {}
    for width, names in saved.items():
        if sum(names.values()) <= _ROW_BYTES * _BYTE * (8 // width):
            continue
        codebooks: list[np.ndarray] = []
        for name in sorted(names, key=lambda name: -values[name].size):
            held = next((book for book in codebooks if np.isin(values[name], book).all()), None)
            if held is None:
                held = values[name]
                codebooks.append(held)
            found[name] = Packing(width, held)
    return found


def pack(integers: np.ndarray, packing: Packing) -> np.ndarray:
    """Integers of the codebook, of any shape, in their order: uint8 (bytes,). The last byte is filled up with 0."""
    flat = np.searchsorted(packing.codebook, integers.reshape(-1)).astype(np.uint8)
    rows = np.pad(flat, (0, -flat.size % packing.per_byte)).reshape(-1, packing.per_byte)
    return np.asarray((rows << _shifts(packing.width)).sum(axis=1, dtype=np.uint8))


def digits(width: int) -> np.ndarray:
    """The indices in every byte: int8 (256, 8 / width)."""
    return (np.arange(_BYTE)[:, None] >> _shifts(width) & (1 << width) - 1).astype(np.int8)


def padded(codebook: np.ndarray, width: int) -> np.ndarray:
    """A codebook with an entry, its last one again, for every index there is: float32 (2 ** width,)."""
    return np.pad(codebook, (0, (1 << width) - codebook.size), "edge").astype(np.float32)


def _bytes(size: int, width: int) -> int:
    return -(-size * width // 8)


def _shifts(width: int) -> np.ndarray:
    return np.arange(0, 8, width, dtype=np.uint8)
