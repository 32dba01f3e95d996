"""The layout of a ``.ms`` file: a FlatBuffers buffer with identifier ``MSL2``, as MindSpore Lite 2.7 defines it.

Tables are data: one text a table, a ``name:kind`` a field, ``=value`` where the default is not 0. A field's slot in the
table is its place in the text. Kinds: ``bool``, ``byte``, ``ubyte``, ``int``, ``uint``, ``long``, ``float``,
``double``, ``string``, the name of a table, ``union``, or one of these in brackets for a vector; a ``skip`` field is
neither written nor read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Union

import numpy as np

IDENTIFIER = b"MSL2"
VERSION = "MindSpore Lite 2.7.0"
FRAMEWORK = 3
"""The source framework MindIR, as the file numbers it."""

DATA_TYPES = {"int8": 32, "int32": 34, "int64": 35, "float32": 43}
CONSTANT, COMPUTED = 0, 2
"""Kinds of tensor (the field nodeType)."""

MAX_RANK = 8
"""Dimensions of a tensor the runtime's kernels have room for."""

REFERENCES = {CONSTANT: 999, COMPUTED: 1}
"""The count of readers the runtime starts from; a constant is never freed."""

QUANT_NONE, QUANT_WEIGHT, QUANT_ALL = 0, 4, 5
INT8_QUANT_TYPES = (1, 3, QUANT_ALL)
"""Nodes that compute in int8: the present number, and the two former ones the runtime still takes."""

FLOAT_QUANT_TYPES = (QUANT_NONE, 2, QUANT_WEIGHT)
"""Nodes that compute in float, the last two with weights that are dequantised when the file is loaded."""

Scalar = Union[bool, int, float]
_TEXT = {
    "MetaGraph": "name:string version:string fmkType:int inputIndex:[uint] outputIndex:[uint] mempoolSize:uint"
    " nodes:[CNode] allTensors:[Tensor] subGraph:[SubGraph] obfuscate:bool",
    "SubGraph": "name:string inputIndices:[uint] outputIndices:[uint] nodeIndices:[uint] tensorIndices:[uint]",
    "CNode": "name:string nodeType:int primitive:Primitive inputIndex:[uint] outputIndex:[uint] quantType:int"
    " deviceType:int=-1",
    "Tensor": "nodeType:int dataType:int dims:[int] format:int refCount:int offset:int data:[ubyte]"
    " quantParams:[QuantParam] quantClusters:[float] name:string enableHuffmanCode:bool weightQuantCompressType:int"
    " externalData:[ExternalData]",
    "QuantParam": "scale:double=1 zeroPoint:int min:double max:double narrowRange:bool=1 numBits:int=8 inited:bool"
    " varCorr:float=1 meanCorr:float",
    "ExternalData": "checkSum:string location:string",
    "Primitive": "value_type:ubyte value:union",
}
_ACTIVATION = "activation_type:byte"
_POOL = (
    "kernel_size:[long] strides:[long] pad:[long] pad_mode:byte round_mode:byte format:int global:bool " + _ACTIVATION
)
_PRIMITIVES: dict[str, tuple[int, str]] = {
    "Abs": (1, ""),
    "Activation": (2, "activation_type:byte alpha:float min_val:float max_val:float approximate:bool"),
    "AddFusion": (5, _ACTIVATION),
    "AvgPoolFusion": (17, _POOL),
    "BatchNorm": (19, "epsilon:float format:int is_training:bool"),
    "BiasAdd": (23, "format:int"),
    "Cast": (28, ""),
    "Concat": (31, "axis:long"),
    "Conv2DFusion": (
        35,
        "format:int kernel_size:[long] stride:[long] dilation:[long] pad_mode:byte pad_list:[long] mode:long"
        " group:long in_channel:long out_channel:long " + _ACTIVATION,
    ),
    "Conv2dTransposeFusion": (
        36,
        "format:int kernel_size:[long] stride:[long] dilation:[long] pad_mode:byte pad:[long] pad_list:[long]"
        " mode:long group:long in_channel:long out_channel:long activation_type:byte output_paddings:[long]",
    ),
    "DivFusion": (47, _ACTIVATION),
    "Erf": (178, ""),
    "ExpFusion": (55, "base:float=-1 scale:float=1 shift:float"),
    "ExpandDims": (56, ""),
    "Flatten": (61, "axis:long=1"),
    "FullConnection": (67, "has_bias:bool use_axis:bool axis:long " + _ACTIVATION),
    "Gather": (69, ""),
    "LayerNormFusion": (
        75,
        "begin_norm_axis:long epsilon:float=0.00001 elementwise_affine:bool begin_params_axis:long",
    ),
    "Log": (79, ""),
    "MatMulFusion": (89, "transpose_a:bool transpose_b:bool " + _ACTIVATION),
    "Maximum": (90, ""),
    "MaxPoolFusion": (92, _POOL),
    "Minimum": (96, ""),
    "MulFusion": (99, _ACTIVATION),
    # The runtime reads the paddings from the second input, which has to be there.
    "PadFusion": (107, "paddings:skip padding_mode:byte constant_value:float"),
    "PowFusion": (110, "scale:float=1 shift:float"),
    "QuantDTypeCast": (113, "src_t:long dst_t:long axis:long"),
    "ReduceFusion": (118, "keep_dims:bool mode:byte reduce_to_end:bool coeff:float"),
    "Reshape": (119, ""),
    "Resize": (
        120,
        "format:int method:byte new_height:long new_width:long preserve_aspect_ratio:bool"
        " coordinate_transform_mode:byte cubic_coeff:float exclude_outside:long extrapolation_value:float"
        " nearest_mode:byte",
    ),
    "Rsqrt": (126, ""),
    "ScaleFusion": (127, "axis:long " + _ACTIVATION),
    "Shape": (130, ""),
    "SliceFusion": (135, "axes:[long]"),
    "Softmax": (138, "axis:[long]"),
    "Split": (145, "output_num:long size_splits:[long] axis:long"),
    "Sqrt": (146, ""),
    "Squeeze": (147, "axis:[long]"),
    "Stack": (150, "axis:long"),
    "StridedSlice": (
        151,
        "begin_mask:long end_mask:long ellipsis_mask:long new_axis_mask:long shrink_axis_mask:long",
    ),
    "SubFusion": (152, _ACTIVATION),
    "Transpose": (162, ""),
    "Unsqueeze": (165, "axis:[long]"),
}

SIZES = {"bool": 1, "byte": 1, "ubyte": 1, "int": 4, "uint": 4, "float": 4, "long": 8, "double": 8}
"""Bytes of a scalar of each kind."""


@dataclass(frozen=True)
class Field:
    """One field of a table: its slot, name and kind, and the value that is left out of a file (None for a vector)."""

    slot: int
    name: str
    kind: str
    default: Any


def _fields(text: str) -> tuple[Field, ...]:
    fields = []
    for slot, item in enumerate(text.split()):
        name, _, rest = item.partition(":")
        kind, _, default = rest.partition("=")
        number = float(default or 0) if kind in ("float", "double") else int(default or 0)
        value = (bool(number) if kind == "bool" else number) if kind in SIZES else None
        fields.append(Field(slot, name, kind, value))
    return tuple(fields)


TABLES: dict[str, tuple[Field, ...]] = {
    name: _fields(text) for name, text in [*_TEXT.items(), *((op, text) for op, (_, text) in _PRIMITIVES.items())]
}
"""The fields of every table, primitives among them, in slot order."""

TAGS = {op: tag for op, (tag, _) in _PRIMITIVES.items()}
"""The union tag of every primitive that can be written and read."""

FIELDS = {op: {f.name: f for f in TABLES[op] if f.kind != "skip"} for op in TAGS}
"""The attributes of every primitive by name."""

_INTEGERS = {"byte": (-(2**7), 2**7 - 1), "int": (-(2**31), 2**31 - 1), "long": (-(2**63), 2**63 - 1)}
_FLOAT_LIMIT = float(np.finfo(np.float32).max)


def default(op: str, name: str) -> Any:
    """What an absent attribute stands for: 0, False or the schema's own value (as float32), None for a list."""
    value = FIELDS[op][name].default
    return float(np.float32(value)) if isinstance(value, float) else value


def clean_attrs(op: str, attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes in plain Python types, without those that have the schema's default, in slot order.

    Two steps whose cleaned attributes are equal mean the same. Floats are rounded to float32, as a file holds them.

    Raises:
        ValueError: an attribute `op` does not have, or a value of the wrong type or range; says which and what is
            allowed.
    """
    fields = FIELDS[op]
    unknown = [name for name in attrs if name not in fields]
    if unknown:
        raise ValueError(f"there is no attribute {unknown[0]}; allowed: {', '.join(fields) or 'none'}")
    cleaned = {name: _clean(field, attrs[name]) for name, field in fields.items() if name in attrs}
    return {name: value for name, value in cleaned.items() if value != default(op, name)}


def _clean(field: Field, value: Any) -> Any:
    if not field.kind.startswith("["):
        return _clean_scalar(field.name, field.kind, value)
    if isinstance(value, (str, bytes)) or not hasattr(value, "__len__"):
        raise ValueError(f"{field.name} is {value!r}; allowed is a list of whole numbers")
    return [_clean_scalar(field.name, field.kind[1:-1], item) for item in value]


def _clean_scalar(name: str, kind: str, value: Any) -> Scalar:
    number = isinstance(value, (bool, int, float, np.bool_, np.number))
    if kind == "float":
        if not number or not abs(value) <= _FLOAT_LIMIT:
            raise ValueError(f"{name} is {value!r}; allowed is a finite float32")
        return float(np.float32(value))
    if kind == "bool":
        if not number or value not in (0, 1):
            raise ValueError(f"{name} is {value!r}; allowed: true, false")
        return bool(value)
    low, high = _INTEGERS[kind]
    if not number or isinstance(value, (float, np.floating)) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; allowed is a whole number from {low} to {high}")
    return int(value)
