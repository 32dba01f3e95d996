"""A subsampling shortcut with zero-padded channels (He et al., arXiv:1512.03385, option A) as a 1×1 convolution.

No int8 runtime pads channels and subsamples without doubt about its parameters; a strided 1×1 convolution with the
identity as its weight computes the same numbers, in float and in int8, and every runtime has it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Optional

import numpy as np

from msqkd.graph.ir import Graph, Node, TensorType

IDENTITY_ROLE = "identity"


def shortcut_to_conv(graph: Graph) -> None:
    """Replace each ``x[:, :, ::s, ::s]`` whose channels are padded with zeros by a fixed 1×1 convolution, in place."""
    for pad in [node for node in graph.nodes if node.op in ("PadV3", "Pad")]:
        _rewrite(graph, pad)
    graph.prune()


def _rewrite(graph: Graph, pad: Node) -> None:
    source = graph.producer(pad.inputs[0])
    if source is None or source.op != "StridedSlice" or len(graph.consumers(source.output)) != 1:
        return
    stride, padding = _stride(graph, source), _padding(graph, pad)
    if stride is None or padding is None or source.output in graph.outputs:
        return
    batch, channels, *plane = graph.shape(source.inputs[0])
    before, after = padding
    if channels < 1 or min(padding) < 0:
        return
    out_channels = before + channels + after
    sizes = (-(-size // stride) if size > 0 else -1 for size in plane)
    graph.add_value(replace(graph.values[pad.output], type=TensorType((batch, out_channels, *sizes))))
    weight = np.zeros((out_channels, channels, 1, 1), np.float32)
    weight[np.arange(channels) + before, np.arange(channels)] = 1.0
    name = graph.unique_node(f"{pad.cell_path}.shortcut" if pad.cell_path else "shortcut")
    param = graph.add_param(graph.unique_value(f"{name}.weight"), weight, trainable=False)
    attrs: dict[str, Any] = {
        "kernel_size": (1, 1), "mode": 1, "out_channel": out_channels, "pad_mode": "valid", "pad": (0, 0, 0, 0),
        "stride": (1, 1, stride, stride), "dilation": (1, 1, 1, 1), "group": 1, "groups": 1, "format": "NCHW",
        "pad_list": (0, 0, 0, 0), "input_names": ["x", "w"], "output_names": ["output"], "role": IDENTITY_ROLE,
    }  # fmt: skip
    inputs = [source.inputs[0], param]
    conv = Node(name, "Conv2D", inputs, pad.outputs, attrs, pad.cell_path, pad.cell_types, functional=False)
    graph.nodes[graph.nodes.index(pad)] = conv


def _stride(graph: Graph, node: Node) -> Optional[int]:
    """The common spatial stride of a slice that takes everything else whole."""
    shape = graph.shape(node.inputs[0])
    if node.sequences:  # a limit is computed
        return None
    literals = [graph.const(name) for name in node.inputs[1:9]]
    begin, end, strides, begin_mask, end_mask, ellipsis, new_axis, shrink = literals
    if len(shape) != 4 or len(strides) != 4 or ellipsis or new_axis or shrink:
        return None
    for axis in range(4):
        from_start = begin_mask >> axis & 1 or begin[axis] == 0
        to_end = end_mask >> axis & 1 or (shape[axis] > 0 and end[axis] >= shape[axis])
        if not from_start or not to_end:
            return None
    return int(strides[2]) if tuple(strides[:2]) == (1, 1) and strides[2] == strides[3] and strides[2] >= 1 else None


def _padding(graph: Graph, node: Node) -> Optional[tuple[int, int]]:
    """How many zero channels come first and last, when only channels are padded, with zeros."""
    if node.op == "PadV3":
        paddings, value = graph.const(node.inputs[1]), graph.const(node.inputs[2])
        filling = 0.0 if value is None else float(np.asarray(value).reshape(-1)[0])
        if node.attrs.get("mode") != "constant" or filling != 0.0:
            return None
        flat = [int(p) for p in np.asarray(paddings).reshape(-1)]
        pairs = [(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)][::-1]  # the last axis comes first
    else:
        pairs = [(int(first), int(last)) for first, last in node.attrs["paddings"]]
    pairs = [(0, 0)] * (4 - len(pairs)) + pairs
    others = pairs[:1] + pairs[2:]
    return pairs[1] if all(pair == (0, 0) for pair in others) else None
