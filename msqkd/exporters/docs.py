"""Writes docs/formats.md from the tables: ``python -m msqkd.exporters.docs > docs/formats.md``."""

from __future__ import annotations

from msqkd.exporters.device.float_steps import FLOAT_STEPS
from msqkd.exporters.device.freeze import FROZEN
from msqkd.exporters.onnx.table import supported
from msqkd.targets import get_target

_INTRODUCTION = """\
# What each format holds

Written from the tables in `msqkd/exporters/` by `python -m msqkd.exporters.docs`. The formats `lite_mindir`,
`portable_mindir` and `ascend_mindir` hold any operation that MindSpore can compile. A `.ms` file holds the operations
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


def page() -> str:
    """The page, as Markdown."""
    target = get_target("lite_arm")
    device = dict.fromkeys(FLOAT_STEPS, "float")
    device.update(dict.fromkeys((*target.ops, *target.rescaled), "int8"))
    device.update(dict.fromkeys(FROZEN, "constant"))
    onnx = set(supported())
    rows = [f"| {op} | {device.get(op, 'no')} | {'yes' if op in onnx else 'no'} |\n" for op in sorted({*device, *onnx})]
    return _INTRODUCTION + "".join(rows)


if __name__ == "__main__":
    from msqkd.platform import leave_quietly

    print(page(), end="")
    leave_quietly()
