"""Writes docs/formats.md from the tables: ``python -m msqkd.exporters.docs > docs/formats.md``."""

from __future__ import annotations

from msqkd.exporters.device.float_steps import FLOAT_STEPS
from msqkd.exporters.device.freeze import FROZEN
from msqkd.exporters.onnx.table import supported
from msqkd.targets import get_target

_INTRODUCTION = """\
# What each format holds

Written from the tables in `msqkd/exporters/` by `python -m msqkd.exporters.docs`. The formats `lite_mindir`,
`portable_mindir` and `ascend_mindir` hold any operation that MindSpore can compile, `direct_mindir` those that
MindSpore 2.0 can express, except LSTM. A `.ms` file holds the operations
that a kernel of MindSpore Lite is known to compute, alone or several of them together, and an ONNX file those that
operations of its operator set 20 compute. Names are those of MindSpore's primitives, as `msqkd plan RECIPE` lists them;
a form of an operation that cannot be written (a padding mode, an axis that is computed) is refused with a sentence that
names the layer.

In the column `.ms`, `int8` means int8 as well as float (when an operation is placed in int8 is in
[targets.md](targets.md)), and `constant` that it is computed when the file is written, for the batch of the file. What
reads parameters and literals alone is a constant whatever the operation.

| operation | `.ms` | ONNX |
|---|---|---|
"""

_CONVERTER = """
## What MindSpore Lite's converter reads

`lite_mindir` is the file for it ([deploy.md](deploy.md#the-vendors-converter)): the form of MindSpore 2.0, which
converter 2.0.0 takes and later ones read. Its int8 nodes are those of the `.ms` file, LayerNorm included. A plain
`mindspore.export` of MindSpore 2.3 or later is not read by 2.0.0, and neither are `portable_mindir`, `float.mindir` and
`ascend_mindir`. Of an ONNX file with QuantizeLinear the converter of 2.0.0 makes a file that its runtime refuses.
"""

_DIRECT = """
## What MindSpore Lite loads without a converter

`mindspore_lite.Model.build_from_file(file, ModelType.MINDIR)` loads `direct_mindir`: the ordinary operations of the
portable file, float32 weights on the grid, batch 1, in the form of MindSpore 2.0. It computes in float and rounds as
the fake-quantized network does. `python bench/converter.py --direct` computes such files in the runtime of 2.0.0 on x86
and compares them with MindSpore: most outputs are equal to the bit; where floats are summed in another order, single
values round to the next level. The runtime does not load `portable_mindir`: it cannot cast an int8 weight. Of
`ascend_mindir` nothing was tried.
"""

_WEIGHTS = """
## How weights are stored

| file | weights |
|---|---|
| `portable_mindir` | int8, or packed where their integers have at most 16 distinct values and that takes fewer bytes |
| `.ms`, ONNX | int8, whatever the bits and however few the values |
| `ascend_mindir` | the same in int8 layers; in others float32 on the grid |
| `lite_mindir` | float32 on the grid, with markers in int8 layers |
| `direct_mindir` | float32 on the grid |

Few bits (`quantization.weight.bits`) and clusters ([ptq.md](ptq.md#weight-clustering)) make the values few. Packed are
indices of a codebook: of 4 bits for up to 16 values, of 2 for up to 4, of 1 for two. They lie in the order of the
weight, two, four or eight in a byte, the first in the lowest bits, in a uint8 parameter `NAME.uint4x2`, `NAME.uint2x4`
or `NAME.uint1x8`. `codebook.uint4` (float32) is what the indices stand for, one parameter for all layers whose
integers it holds; `digits.uint4` (int8, 256 × 2) says which indices are in each byte. When the network runs, one Gather
makes of the two what every byte stands for, and one Gather a layer looks its bytes up; then comes the scale, as with
int8. The answers are bit for bit those of int8 weights. Reading a packed weight takes some 400 bytes of operations, 600
with a codebook of its own, so that smaller weights stay int8; two Gather and a Cast are all that a backend needs for it
(computed here on the CPU, not tried on an NPU).

The runtime of MindSpore Lite has layouts of its own for compressed weights in a `.ms` file. Whether it reads one right
can only be seen with the runtime, so they are not written: what clustering gains there is what compression of the whole
file gains from it.
"""


def page() -> str:
    """The page, as Markdown."""
    target = get_target("lite_arm")
    device = dict.fromkeys(FLOAT_STEPS, "float")
    device.update(dict.fromkeys((*target.ops, *target.rescaled), "int8"))
    device.update(dict.fromkeys(FROZEN, "constant"))
    onnx = set(supported())
    rows = [f"| {op} | {device.get(op, 'no')} | {'yes' if op in onnx else 'no'} |\n" for op in sorted({*device, *onnx})]
    return _INTRODUCTION + "".join(rows) + _CONVERTER + _DIRECT + _WEIGHTS


if __name__ == "__main__":
    from msqkd.platform import leave_quietly

    print(page(), end="")
    leave_quietly()
