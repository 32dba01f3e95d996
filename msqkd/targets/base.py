"""What a runtime can compute in int8, as data; one file a target fills these in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Optional

WEIGHTED = "weighted"
FREE = "free"
SHARED = "shared"
SHARED_ROUNDED = "shared_rounded"


@dataclass(frozen=True)
class Int8Op:
    """One operation with an int8 kernel.

    Attributes:
        kernel: the runtime's name of it.
        kind: ``weighted`` (a weight at input 1, int32 bias, output requantised freely), ``free`` (each input and the
            output have their own parameters), ``shared`` (the output has the input's parameters and its values are
            among the input's) or ``shared_rounded`` (the same parameters, but the result is rounded again).
        activations: activation functions that are computed in the same kernel.
        same_shape: both operands must have one shape (broadcasting is not to be trusted).
        max_window: most elements an averaging window may have.
        global_spatial: only over all of H and W of a 4-D input whose H and W are known.
        max_rank: largest rank of the input.
    """

    kernel: str
    kind: str
    activations: tuple[str, ...] = ()
    same_shape: bool = False
    max_window: Optional[int] = None
    global_spatial: bool = False
    max_rank: Optional[int] = None


@dataclass(frozen=True)
class Target:
    """A runtime.

    Attributes:
        name: as recipes call it.
        description: one line for people.
        ops: operation (as in the graph) to its int8 kernel; what is not here stays float.
        float_reasons: why a named operation that has a kernel of sorts is kept float all the same.
        act_symmetric: activations are symmetric where the recipe does not say.
        act_bits: widths of activations the runtime's kernels clamp to.
        weight_bits: widths of weights it can hold (narrower ones are stored in 8 bits).
        grouped_per_channel: whether a grouped convolution that is not depthwise may have per-channel weights.
    """

    name: str
    description: str
    ops: Mapping[str, Int8Op]
    float_reasons: Mapping[str, str] = field(default_factory=dict)
    act_symmetric: bool = False
    act_bits: tuple[int, ...] = (8,)
    weight_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    grouped_per_channel: bool = True
