"""How large the numbers of one value are, in powers of two."""

from __future__ import annotations

import numpy as np

_LOWEST, _HIGHEST = -160, 130
"""Beyond the exponents of all float32 numbers."""
_LOOKED_AT = 2**16
"""The numbers of a batch that are looked at, drawn at random where there are more."""


class Magnitudes:
    """Counts of the magnitudes of one value, batch after batch; zeros are not counted."""

    def __init__(self) -> None:
        self.counts = np.zeros(_HIGHEST - _LOWEST + 1, np.int64)
        self._random = np.random.default_rng(0)

    def update(self, x: np.ndarray) -> None:
        """Take in one batch: an array of any shape, of finite numbers."""
        values = x.reshape(-1)
        if values.size > _LOOKED_AT:
            values = values[self._random.integers(values.size, size=_LOOKED_AT)]
        exponents = np.frexp(values[values != 0])[1]
        self.counts += np.bincount(exponents - _LOWEST, minlength=len(self.counts))

    def quantile(self, share: float) -> float:
        """Return the power of two below which this share of the magnitudes lies; 0 if only zeros were seen."""
        total = self.counts.sum()
        if not total:
            return 0.0
        return float(2.0 ** (int(np.searchsorted(np.cumsum(self.counts), share * total)) + _LOWEST))
