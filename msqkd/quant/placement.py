"""From a graph, rules and a target to a QuantPlan."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Optional

from msqkd.graph.ir import Graph, Node
from msqkd.quant.config import QuantConfig, Rule
from msqkd.quant.plan import FLOAT_PRECISION, INT8, ActivationQuant, Group, NodePlan, QuantPlan, WeightQuant
from msqkd.quant.rules import RuleBook
from msqkd.targets import SHARED, SHARED_ROUNDED, WEIGHTED, Int8Op, Target, get_target

_VALID = 2  # MindSpore's number of the padding mode, as AvgPool takes it


def make_plan(
    graph: Graph, default: Optional[QuantConfig] = None, rules: Sequence[Rule] = (), target: str = "lite_arm"
) -> QuantPlan:
    """Decide for every operation and value of a deployment graph (BatchNorm folded) how `target` computes it.

    Raises:
        PlanError: a rule matches nothing, or asks for what the target cannot do.
    """
    return _Placement(graph, RuleBook(graph, default or QuantConfig(), rules), get_target(target)).run()


class _Placement:
    def __init__(self, graph: Graph, book: RuleBook, target: Target) -> None:
        self.graph, self.book, self.target = graph, book, target
        self.plan = QuantPlan(target.name, graph.name)
        self.settings = {node.name: book.settings(node) for node in graph.nodes}
        self.effective: set[str] = set()
        self.producers = {output: node for node in graph.nodes for output in node.outputs}
        self.readers: dict[str, list[Node]] = {}
        for node in graph.nodes:
            for name in dict.fromkeys(node.inputs):
                self.readers.setdefault(name, []).append(node)
        self.verdicts: dict[str, tuple[str, str]] = {}
        self.forms: dict[str, Optional[str]] = {}
        self.avoids: dict[str, list[str]] = {}
        self.fused: dict[str, str] = {}

    def run(self) -> QuantPlan:
        self._decide()
        self._follow_neighbours()
        self._values()
        self._weights()
        self._warn_of_surrounded()
        self._warn_of_idle_rules()
        for node in self.graph.nodes:
            precision, reason = self.verdicts[node.name]
            rule = self.settings[self.fused.get(node.name, node.name)][1]
            self.plan.nodes.append(
                NodePlan(
                    node.name,
                    node.op,
                    node.cell_path,
                    node.cell_types,
                    precision,
                    reason,
                    rule,
                    self.fused.get(node.name),
                    self.forms.get(node.name) if precision == INT8 else None,
                    tuple(dict.fromkeys(self.avoids.get(node.name, ()))),
                )
            )
        return self.plan

    # -- operations -----------------------------------------------------------------------------------------------
    def _decide(self) -> None:
        for node in self.graph.nodes:
            head = self._fusion_head(node)
            if head is not None:
                self.fused[node.name] = head.name
                self.verdicts[node.name] = (INT8, f"computed in the kernel of {head.name}")
            else:
                self.verdicts[node.name] = self._verdict(node)

    def _fusion_head(self, node: Node) -> Optional[Node]:
        """The int8 node in whose kernel the activation `node` is computed."""
        source = self.producers.get(node.inputs[0])
        if source is None or self.settings[node.name][0].is_float:
            return None
        support = self.target.ops.get(source.op)
        alone = len(self.readers.get(source.output, [])) == 1 and source.output not in self.graph.outputs
        fits = support is not None and node.op in support.activations and alone
        return source if fits and self.verdicts[source.name][0] == INT8 else None

    def _verdict(self, node: Node) -> tuple[str, str]:
        if self.settings[node.name][0].is_float:
            rule = self.book.author(node, "act_quant_dtype")
            self.effective.add(rule)
            return FLOAT_PRECISION, f"kept float by rule '{rule}'"
        support = self.target.ops.get(node.op)
        if support is None:
            return FLOAT_PRECISION, self._float_reason(node)
        obstacle = self._obstacle(node, support)
        if obstacle:
            return FLOAT_PRECISION, obstacle
        self._choose_form(node, support)
        kernel, form = support.kernel, self.forms.get(node.name)
        avoided = "; ".join(self.target.defects[name].what for name in self.avoids.get(node.name, ()))
        how = f"int8 kernel {kernel}" if form is None else f"int8, written as a {form} convolution"
        return INT8, f"{how} (avoids: {avoided})" if avoided else how

    def _float_reason(self, node: Node) -> str:
        """Why an operation that is not among the target's stays float."""
        reason, defect = self.target.float_reasons.get(node.op), self.target.float_defects.get(node.op)
        parts = [reason] if reason else []
        if defect:
            parts.append(self._avoid(node, defect))
        return "; ".join(parts) or f"{self.target.name} has no int8 kernel for {node.op}"

    def _avoid(self, node: Node, defect: str) -> str:
        """Note a defect as avoided at `node`; returns what it is."""
        self.avoids.setdefault(node.name, []).append(defect)
        return self.target.defects[defect].what

    def _choose_form(self, node: Node, support: Int8Op) -> None:
        avoided = list(support.avoids)
        self.forms[node.name] = support.form
        if support.max_window is not None and self._window(node, support) > support.max_window:
            self.forms[node.name] = support.large_window
            avoided = [support.window_defect]
        if self.target.padded_pointwise and node.op == "Conv2D" and is_padded_pointwise(self.graph, node):
            avoided.append(self.target.padded_pointwise)
        if support.sample_broadcast and len({self.graph.shape(name) for name in self.graph.tensor_inputs(node)}) > 1:
            avoided.append(support.sample_broadcast)
        if avoided:
            self.avoids[node.name] = avoided

    def _obstacle(self, node: Node, support: Int8Op) -> Optional[str]:
        shape = self.graph.shape(node.inputs[0])
        kind = self.graph.values[node.output].type
        if kind is not None and kind.dtype != "float32":
            return f"its output is {kind.dtype}, not float32"
        if support.max_rank is not None and len(shape) > support.max_rank:
            return f"its input has {len(shape)} dimensions, the int8 kernel takes {support.max_rank}"
        if support.kind == WEIGHTED and self.graph.values[node.inputs[1]].kind != "param":
            return "its weight is computed, not a parameter"
        tensors = self.graph.tensor_inputs(node)
        shapes = {self.graph.shape(name) for name in tensors}
        if support.operands and len(tensors) != support.operands:
            return f"{len(tensors)} of its operands are computed, the int8 kernel takes {support.operands}"
        if support.same_shape and len(shapes) != 1:
            return f"its operands differ in shape; {self._avoid(node, support.same_shape)}"
        if support.sample_broadcast and not (len(shapes) == 1 or _by_channel(*shapes)):
            return "its operands are neither of one shape nor (N, C, H, W) and (N, C, 1, 1)"
        return self._window_obstacle(node, support, shape)

    def _window_obstacle(self, node: Node, support: Int8Op, shape: tuple[int, ...]) -> Optional[str]:
        if support.max_window is None:
            return None
        if support.global_spatial and not _is_global(self.graph, node, shape):
            return "only a mean over the whole height and width of a feature map has an int8 form"
        window = self._window(node, support)
        if window <= support.max_window or (support.large_window and not _pads(self.graph, node)):
            return None
        defect = f"; {self._avoid(node, support.window_defect)}" if support.window_defect else ""
        return f"its window has {window} elements, allowed are {support.max_window}{defect}"

    def _window(self, node: Node, support: Int8Op) -> int:
        if support.global_spatial:
            return prod(self.graph.shape(node.inputs[0])[2:])
        return prod(self.graph.const(node.inputs[1]))

    def _kind(self, node: Node) -> str:
        return self.target.ops[node.op].kind if node.op in self.target.ops else ""

    def _is_int8(self, node: Optional[Node]) -> bool:
        return node is not None and self.verdicts[node.name][0] == INT8

    def _gives_int8(self, node: Optional[Node]) -> bool:
        """Whether what `node` computes is int8, not only what it reads."""
        return node is not None and self._is_int8(node) and not self._gives_float(node)

    def _gives_float(self, node: Node) -> bool:
        head = self.graph.node(self.fused.get(node.name, node.name))
        return head.op in self.target.ops and self.target.ops[head.op].float_output

    def _follow_neighbours(self) -> None:
        """A pool or reshape between float operations gains nothing from int8: it stays float unless a neighbour is
        int8."""
        anchored = {
            n.name for n in self.graph.nodes if self._is_int8(n) and self._kind(n) not in (SHARED, SHARED_ROUNDED)
        }
        movable = [
            n for n in self.graph.nodes if self._is_int8(n) and n.name not in anchored and n.name not in self.fused
        ]
        reached = True
        while reached:
            reached = False
            for node in movable:
                source = self.producers.get(node.inputs[0])
                around = [*self.readers.get(node.output, []), *([source] if source else [])]
                if node.name not in anchored and any(n.name in anchored for n in around):
                    anchored.add(node.name)
                    reached = True
        for node in movable:
            if node.name not in anchored:
                self.verdicts[node.name] = (FLOAT_PRECISION, "no neighbour runs in int8")

    # -- values ---------------------------------------------------------------------------------------------------
    def _values(self) -> None:
        for value in self.graph.activations():
            if value.type is None or value.type.dtype != "float32":
                continue  # a shape, an index, a mask
            source = self.producers.get(value.name)
            readers = self.readers.get(value.name, [])
            int8_readers = [n for n in readers if self._is_int8(n) and n.name not in self.fused]
            fused_away = any(
                n.name in self.fused and self.fused[n.name] == (source.name if source else "") for n in readers
            )
            if fused_away or not (self._gives_int8(source) or int8_readers):
                continue
            if source is not None and self._gives_int8(source) and self._kind(source) in (SHARED, SHARED_ROUNDED):
                group = self.plan.activations[source.inputs[0]].group
                self.plan.activations[value.name] = ActivationQuant(
                    value.name, group, exact=self._kind(source) == SHARED
                )
                continue
            self._own_group(value.name, source, readers, int8_readers)

    def _own_group(self, value: str, source: Optional[Node], readers: list[Node], int8_readers: list[Node]) -> None:
        edges: tuple[tuple[str, int], ...] = ()
        if source is not None and self._gives_int8(source):
            owner = self.graph.node(self.fused.get(source.name, source.name))
        else:
            owner = int8_readers[0]
            if len(int8_readers) < len(readers) or value in self.graph.outputs:
                edges = tuple((n.name, i) for n in int8_readers for i, name in enumerate(n.inputs) if name == value)
        config, rule = self.settings[owner.name][0], self.book.author(owner, "act_")
        self.effective.add(rule)
        symmetric = self.target.act_symmetric if config.act_symmetric is None else config.act_symmetric
        bits = config.act_bits
        assert bits is not None
        if bits not in self.target.act_bits:
            self._warn(
                f"{owner.name}: {self.target.name} clamps activations to 8 bits; "
                f"{bits}-bit ranges are simulated in training only"
            )
        self.plan.groups[value] = Group(
            value, bits, symmetric, config.act_observer, config.act_percentile, config.act_quant_delay, rule
        )
        self.plan.activations[value] = ActivationQuant(value, value, edges=edges)

    # -- weights --------------------------------------------------------------------------------------------------
    def _weights(self) -> None:
        for node in self.graph.nodes:
            if not self._is_int8(node) or self._kind(node) != WEIGHTED:
                continue
            quantizer, rule = self.settings[node.name][0].weight_quantizer, self.book.author(node, "weight.")
            self.effective.add(rule)
            axis: Optional[int] = 0 if quantizer.per_channel else None
            if axis == 0 and self.target.grouped_per_channel and self._grouped(node):
                axis = None
                self._avoid(node, self.target.grouped_per_channel)
                self._warn(f"{node.name}: {self.target.defects[self.target.grouped_per_channel]}")
            self.plan.weights[node.name] = WeightQuant(node.name, quantizer.bits, axis, quantizer.observer, rule)

    def _grouped(self, node: Node) -> bool:
        """A grouped convolution that is not purely depthwise."""
        group = int(node.attrs.get("group", 1)) if node.op == "Conv2D" else 1
        weight = self.graph.shape(node.inputs[1])
        return group > 1 and not (weight[1] == 1 and weight[0] == group)

    def _warn_of_surrounded(self) -> None:
        """A converter goes by the parameters of values: it may take a float operation between such values for int8."""
        if all(support.float_output for support in self.target.ops.values()):
            return  # its int8 operations are written out: nothing goes by the parameters of values
        kept_float = {*self.target.float_reasons, *self.target.float_defects}
        for node in self.graph.nodes:
            if self._is_int8(node) or not (node.op in self.target.ops or node.op in kept_float):
                continue
            around = [*self.graph.tensor_inputs(node), *node.outputs]
            if all(value in self.plan.activations for value in around):
                self._warn(
                    f"{node.name} ({node.op}) is planned in float, but every value around it is quantised: "
                    "a converter that goes by the parameters of values may compute it in int8 all the same"
                )

    def _warn_of_idle_rules(self) -> None:
        for idle in self.book.rules:
            if str(idle) not in self.effective:
                self._warn(
                    f"rule '{idle}' changes nothing: later rules override it, or what it matches has no weight and no "
                    "range of its own (a fused activation has that of the layer before it, a pool that of its input)"
                )

    def _warn(self, text: str) -> None:
        if text not in self.plan.warnings:
            self.plan.warnings.append(text)


def is_padded_pointwise(graph: Graph, node: Node) -> bool:
    """Whether `node` is a 1×1 convolution that pads."""
    return graph.shape(node.inputs[1])[2:] == (1, 1) and any(node.attrs["pad_list"])


def _by_channel(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether one of two 4-D shapes is the other's with H = W = 1."""
    if len(one) != 4 or len(other) != 4:
        return False
    return one[:2] == other[:2] and (1, 1) in (one[2:], other[2:])


def _is_global(graph: Graph, node: Node, shape: tuple[int, ...]) -> bool:
    """Whether a reduction is over the known H and W of a 4-D input."""
    axes = graph.const(node.inputs[1])
    axes = (axes,) if isinstance(axes, int) else tuple(axes or range(len(shape)))
    return len(shape) == 4 and sorted(a % 4 for a in axes) == [2, 3] and min(shape[2:]) >= 1


def _pads(graph: Graph, node: Node) -> bool:
    """Whether a pool's windows reach over the border."""
    return bool(graph.const(node.inputs[3]) != _VALID)
