"""Dropout as the built cell has it: random in training mode, nothing in evaluation."""

from __future__ import annotations

from typing import Any

from mindspore import nn, ops

MASKS = {"sample": 1, "channel": 2}
"""For masks that are not elementwise: how many leading dimensions have a random number of their own."""


class MaskedDropout(nn.Cell):
    """Drops whole samples (stochastic depth, Huang et al., arXiv:1603.09382) or whole channels.

    Args:
        rate: the probability with which one is dropped, 0 < rate < 1.
        mask: ``sample`` or ``channel``.
        scale: divide what is kept by 1 - rate, so that the mean stays.
    """

    def __init__(self, rate: float, mask: str, scale: bool = True) -> None:
        super().__init__()
        self.leading = MASKS[mask]
        self.dropout = nn.Dropout(p=rate)
        self.factor = 1.0 if scale else 1.0 - rate

    def construct(self, x: Any) -> Any:
        """`x` of any rank and float dtype; the same shape comes back."""
        if not self.training:
            return x
        shape = x.shape[: self.leading] + (1,) * (x.ndim - self.leading)
        return x * (self.dropout(ops.ones(shape, x.dtype)) * self.factor)


def dropout_cell(rate: float, mask: str, scale: bool) -> nn.Cell:
    """The cell for a node ``TrainingDropout`` with these attributes."""
    return nn.Dropout(p=rate) if mask == "element" else MaskedDropout(rate, mask, scale)
