"""Keeps the fusion passes of MindSpore Lite's converter off a quantized network.

The passes know nothing of quantization parameters: what they merge has integers that nobody calibrated. Each function
here writes a network so that one of them does not fire, and computes the same.
"""

from __future__ import annotations

from typing import Any

from msqkd.graph.ir import Graph, Node

_OTHER = {"valid": "same", "same": "valid", "pad": "valid"}


def prevent_fusions(graph: Graph) -> None:
    """Apply every function of this module, in place."""
    keep_pointwise_apart(graph)


def keep_pointwise_apart(graph: Graph) -> None:
    """Give a 1×1 convolution another padding mode than the 1×1 convolution it follows (conv_conv_fusion).

    Without padding, all modes mean the same for a kernel of one element.
    """
    producers = {output: node for node in graph.nodes for output in node.outputs}
    for node in graph.nodes:
        before = producers.get(node.inputs[0]) if node.inputs else None
        if before is not None and _is_pointwise(graph, node) and _is_pointwise(graph, before):
            if _mode(node.attrs) == _mode(before.attrs):
                node.attrs = {**node.attrs, "pad_mode": _OTHER[_mode(node.attrs)]}


def _is_pointwise(graph: Graph, node: Node) -> bool:
    return node.op == "Conv2D" and graph.shape(node.inputs[1])[2:] == (1, 1) and not any(node.attrs["pad_list"])


def _mode(attrs: dict[str, Any]) -> str:
    return str(attrs["pad_mode"]).lower()
