"""What a runtime can compute in int8, as data; one file a target fills these in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Optional

WEIGHTED = "weighted"
FREE = "free"
SHARED = "shared"
SHARED_ROUNDED = "shared_rounded"
RESCALED = "rescaled"

DEPTHWISE = "depthwise"
"""The form as a depthwise convolution: of a mean, whose weights are all the same, and of what treats every channel on
its own."""

HARD_SIGMOID = "hard sigmoid"
"""The form of a hard sigmoid in the kernel before it: a sixth of its weights, and the range 0 to 1."""


@dataclass(frozen=True)
class Defect:
    """Something a runtime computes wrongly or refuses, and what is done instead.

    Attributes:
        name: short, for data.
        what: what goes wrong, as a clause.
        instead: what is written in its place, as a clause.
    """

    name: str
    what: str
    instead: str

    def __str__(self) -> str:
        return f"{self.what}; {self.instead}"


@dataclass(frozen=True)
class Int8Op:
    """One operation with an int8 kernel.

    Attributes:
        kernel: the runtime's name of it.
        kind: ``weighted`` (a weight at input 1, int32 bias, output requantised freely), ``free`` (each input and the
            output have their own parameters), ``shared`` (every output has the input's parameters and its values are
            among the input's), ``shared_rounded`` (the same parameters, but the result is rounded again) or
            ``rescaled`` (the output has the input's integers, and its scale times a constant).
        activations: activation functions that are computed in the same kernel.
        float_output: the kernel gives its result back in float: only its inputs are quantised.
        operands: how many inputs must be computed values, no constants; 0: any number.
        same_shape: both operands must have one shape; names the defect.
        sample_broadcast: where the second operand is (N, C, 1, 1) the kernel is right in files of batch 1; names the
            defect.
        max_window: most elements an averaging window may have.
        large_window: form of an unpadded average over more than `max_window` elements; None: it stays float.
        window_defect: the defect that `max_window` avoids.
        global_spatial: only over all of H and W of a 4-D input whose H and W are known.
        form: how the operation is written where that is not its own kernel.
        max_rank: largest rank of the input.
        maps_only: only for a feature map (N, C, H, W).
        follows: only where its input is computed in int8: it gains nothing from a float one.
        joins: it only joins values: int8 only where what it reads, or what reads it, is.
        fixed_range: of the output, whatever it holds.
        max_row: most elements along the axis it sums over.
        row_defect: the defect that `max_row` avoids.
        asymmetric: of a resize: the defect by which only coordinates that are neither aligned nor of half pixels are
            right.
        per_tensor: its weight has 8 bits and one scale, whatever the recipe says.
        limited: whether its kernel has the limits of `msqkd.targets.limits`.
        avoids: names of the defects that this form, or the parameters, avoid.
    """

    kernel: str
    kind: str
    activations: tuple[str, ...] = ()
    float_output: bool = False
    operands: int = 0
    same_shape: str = ""
    sample_broadcast: str = ""
    max_window: Optional[int] = None
    large_window: Optional[str] = None
    window_defect: str = ""
    global_spatial: bool = False
    form: Optional[str] = None
    max_rank: Optional[int] = None
    maps_only: bool = False
    follows: bool = False
    joins: bool = False
    fixed_range: Optional[tuple[float, float]] = None
    max_row: Optional[int] = None
    row_defect: str = ""
    asymmetric: str = ""
    per_tensor: bool = False
    limited: bool = False
    avoids: tuple[str, ...] = ()


@dataclass(frozen=True)
class FusedForm:
    """An activation that is computed in the kernel before it by other weights.

    Attributes:
        form: the name of the form.
        range: of the result; the ends of int8 do the clipping.
    """

    form: str
    range: tuple[float, float]


@dataclass(frozen=True)
class Target:
    """A runtime.

    Attributes:
        name: as recipes call it.
        description: one line for people.
        ops: operation (as in the graph) to its int8 kernel; what is not here stays float.
        float_reasons: why a named operation is kept float, where "no kernel" is not the whole reason.
        float_defects: the defect for which a named operation that has a kernel of sorts is kept float.
        defects: what the runtime gets wrong, by name.
        fused_forms: activations that are computed in the kernel before them by other weights.
        rescaling: how a product with a positive number is computed, for the operations in `rescaled`.
        rescaled: operations that are no more than that where one of their operands is a positive number.
        act_symmetric: activations are symmetric where the recipe does not say.
        act_bits: widths of activations the runtime's kernels clamp to.
        weight_bits: widths of weights it can hold (narrower ones are stored in 8 bits).
        float16_layers: whether a layer computes in float16 where the plan says so, between layers that do not.
        float16_reason: why not, where it does not, as a clause.
        grouped_per_channel: the defect by which a grouped convolution that is not depthwise may not have per-channel
            weights; empty where it may.
        padded_pointwise: the defect by which a 1×1 convolution may not pad; empty where it may.
    """

    name: str
    description: str
    ops: Mapping[str, Int8Op]
    float_reasons: Mapping[str, str] = field(default_factory=dict)
    float_defects: Mapping[str, str] = field(default_factory=dict)
    defects: Mapping[str, Defect] = field(default_factory=dict)
    fused_forms: Mapping[str, FusedForm] = field(default_factory=dict)
    rescaling: Optional[Int8Op] = None
    rescaled: tuple[str, ...] = ()
    act_symmetric: bool = False
    act_bits: tuple[int, ...] = (8,)
    weight_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    float16_layers: bool = False
    float16_reason: str = "its runtime chooses the type of floating-point numbers for a whole network"
    grouped_per_channel: str = ""
    padded_pointwise: str = ""
