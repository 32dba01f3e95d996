"""A network that both the `.ms` and the ONNX writer are tried with."""

from __future__ import annotations

from mindspore import nn


class Grown(nn.Cell):
    """Transposed convolutions of maps (N, 4, 5, 3), with every padding, in groups, with gaps, wider than the window."""

    def __init__(self) -> None:
        super().__init__()
        make = nn.Conv2dTranspose
        self.parts = nn.CellList([
            make(4, 3, 3, 2, "same", has_bias=True), make(4, 2, 4, 2, "pad", 1), make(4, 4, 2, 2, "valid", group=4),
            make(4, 6, (3, 2), 1, "same", dilation=2, group=2), make(4, 1, 3, (2, 1), "pad", (1, 0, 0, 2)),
            make(4, 2, 1, 2, "same"),
        ])  # fmt: skip

    def construct(self, x):  # type: ignore[no-untyped-def]
        return tuple([part(x) for part in self.parts])
