"""From a graph, rules and a target to a QuantPlan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Optional

from msqkd.errors import PlanError
from msqkd.graph.half import HALF_OPS, float_inputs
from msqkd.graph.ir import Graph, Node
from msqkd.graph.norms import batch_dependence
from msqkd.graph.passes.computed_weights import computed_from_constants
from msqkd.graph.passes.padded_pools import NON_NEGATIVE
from msqkd.quant import uses
from msqkd.quant.config import (
    DYNAMIC,
    FLOAT16,
    FLOAT_PRECISION,
    HALF,
    INT8,
    NONE,
    PACT,
    PRECISIONS,
    STORING,
    WEIGHT_ONLY,
    WEIGHT_ONLY_FLOAT16,
    QuantConfig,
    Rule,
)
from msqkd.quant.masks import masked_nodes
from msqkd.quant.plan import (
    FLOAT_INPUT,
    NO_NEIGHBOUR,
    ActivationQuant,
    DynamicQuant,
    Group,
    NodePlan,
    QuantPlan,
    WeightQuant,
)
from msqkd.quant.rules import RuleBook
from msqkd.targets import RESCALED, SHARED, SHARED_ROUNDED, WEIGHTED, Int8Op, Target, get_target

_MOVES = (SHARED, SHARED_ROUNDED, RESCALED)
_PRECISION = ("precision", "act_quant_dtype")  # the settings that say how a layer is computed


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
        self.constants = {node.name for node in computed_from_constants(graph)}
        self.supports = {node.name: self._support(node) for node in graph.nodes}
        self.masked = masked_nodes(graph)
        self.verdicts: dict[str, tuple[str, str]] = {}
        self.forms: dict[str, Optional[str]] = {}
        self.avoids: dict[str, list[str]] = {}
        self.fused: dict[str, str] = {}
        self.weight_uses = {
            node.name: use
            for node in graph.nodes
            if self.settings[node.name][0].precision in STORING and (use := uses.weight_use(graph, node)) is not None
        }

    def run(self) -> QuantPlan:
        self._check_precision_rules()
        self._decide()
        self._follow_neighbours()
        self._values()
        self._weights()
        self._stored_weights()
        self._warn_of_stored()
        self._warn_of_files()
        self._warn_of_batch()
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
    def _support(self, node: Node) -> Optional[Int8Op]:
        """How the target computes `node` in int8, as far as it can."""
        if node.op in self.target.rescaled and uses.rescale_factor(self.graph, node) is not None:
            return self.target.rescaling
        return self.target.ops.get(node.op)

    def _decide(self) -> None:
        for node in self.graph.nodes:
            head = self._fusion_head(node)
            if head is not None:
                self._fuse(node, head)
            else:
                self.verdicts[node.name] = self._verdict(node)

    def _fusion_head(self, node: Node) -> Optional[Node]:
        """The int8 node in whose kernel the activation `node` is computed."""
        source = self.producers.get(node.inputs[0])
        if source is None or self.settings[node.name][0].precision != INT8:
            return None
        support = self.supports[source.name]
        alone = len(self.readers.get(source.output, [])) == 1 and source.output not in self.graph.outputs
        fits = support is not None and node.op in support.activations and alone
        if node.op in self.target.fused_forms and self.settings[source.name][0].act_bits != 8:
            return None  # a narrower range would not clip where int8 does
        return source if fits and self.verdicts[source.name][0] == INT8 else None

    def _fuse(self, node: Node, head: Node) -> None:
        self.fused[node.name] = head.name
        how = f"computed in the kernel of {head.name}"
        if node.op in self.target.fused_forms:
            self.forms[node.name] = self.target.fused_forms[node.op].form
            how += f", as a {self.forms[node.name]}"
        self.verdicts[node.name] = (INT8, how)

    def _verdict(self, node: Node) -> tuple[str, str]:
        precision = self.settings[node.name][0].precision
        if precision != INT8:
            return self._outside_int8(node, precision)
        if node.name in self.masked:
            return FLOAT_PRECISION, self.masked[node.name]
        support = self.supports[node.name]
        if support is None:
            return FLOAT_PRECISION, self._float_reason(node)
        obstacle = self._obstacle(node, support)
        if obstacle:
            return FLOAT_PRECISION, obstacle
        self._choose_form(node, support)
        kernel, form = support.kernel, self.forms.get(node.name)
        avoided = "; ".join(self.target.defects[name].what for name in self.avoids.get(node.name, ()))
        how = f"int8 kernel {kernel}" if form in (None, RESCALED) else f"int8, written as a {form} convolution"
        return INT8, f"{how} (avoids: {avoided})" if avoided else how

    def _outside_int8(self, node: Node, precision: str) -> tuple[str, str]:
        """The verdict on a node whose settings do not want it in int8."""
        rule = self.book.author(node, *_PRECISION)
        self.effective.add(rule)
        if precision == FLOAT_PRECISION:
            return FLOAT_PRECISION, f"kept float by rule '{rule}'"
        if precision in HALF:
            return self._in_half(node, precision, rule)
        if node.name not in self.weight_uses:
            return FLOAT_PRECISION, f"computed in float by rule '{rule}' ({precision}): it has no weight to store"
        quantizer = self.settings[node.name][0].weight_quantizer
        stored = f"weights stored in {quantizer.bits} bits"
        obstacle = uses.dynamic_obstacle(self.graph, node) if precision == DYNAMIC else None
        if precision == WEIGHT_ONLY or obstacle:
            return WEIGHT_ONLY, f"{stored}, computed in float" + (f": {obstacle}" if obstacle else "")
        return DYNAMIC, f"{stored}, every row of its input quantised by its own range at each call"

    def _in_half(self, node: Node, precision: str, rule: str) -> tuple[str, str]:
        """The verdict on a node that is wanted in float16."""
        if not self.target.float16_layers:
            raise PlanError(self._no_half(node, precision, rule))
        obstacle = self._half_obstacle(node)
        has_weight = node.name in self.weight_uses
        if obstacle and has_weight:
            bits = self.settings[node.name][0].weight_quantizer.bits
            return WEIGHT_ONLY, f"weights stored in {bits} bits, computed in float: {obstacle}"
        if obstacle:
            return FLOAT_PRECISION, f"computed in float by rule '{rule}' ({precision}): {obstacle}"
        if precision == WEIGHT_ONLY_FLOAT16 and has_weight:
            bits = self.settings[node.name][0].weight_quantizer.bits
            return WEIGHT_ONLY_FLOAT16, f"weights stored in {bits} bits, inputs and results in float16"
        return FLOAT16, f"inputs, parameters and results in float16, by rule '{rule}'"

    def _half_obstacle(self, node: Node) -> Optional[str]:
        """Why a node cannot compute in float16."""
        if node.op not in HALF_OPS or node.body is not None:
            return f"msqkd has no float16 form of {node.op}"
        if not self.graph.tensor_inputs(node) or not float_inputs(self.graph, node):
            return "it reads no float32 value that is computed"
        return None

    def _no_half(self, node: Node, precision: str, rule: str) -> str:
        others = ", ".join(name for name in PRECISIONS if name not in HALF)
        return (
            f"rule '{rule}': {node.name} ({node.op}) cannot have precision '{precision}' on {self.target.name}: "
            f"{self.target.float16_reason}; allowed: {others}"
        )

    def _float_reason(self, node: Node) -> str:
        """Why an operation that is not among the target's stays float."""
        reason, defect = self.target.float_reasons.get(node.op), self.target.float_defects.get(node.op)
        parts = [reason] if reason else []
        if defect:
            parts.append(f"a defect of the runtime's int8 kernel: {self._avoid(node, defect)}")
        return "; ".join(parts) or f"{self.target.name} has no int8 kernel for {node.op}"

    def _avoid(self, node: Node, defect: str) -> str:
        """Note a defect as avoided at `node`; returns what it is."""
        self.avoids.setdefault(node.name, []).append(defect)
        return self.target.defects[defect].what

    def _choose_form(self, node: Node, support: Int8Op) -> None:
        avoided = list(support.avoids)
        self.forms[node.name] = RESCALED if support.kind == RESCALED else support.form
        if support.max_window is not None and self._window(node, support) > support.max_window:
            self.forms[node.name] = support.large_window
            avoided = [support.window_defect]
        if self.target.padded_pointwise and node.op == "Conv2D" and uses.is_padded_pointwise(self.graph, node):
            avoided.append(self.target.padded_pointwise)
        if support.sample_broadcast and len({self.graph.shape(name) for name in self.graph.tensor_inputs(node)}) > 1:
            avoided.append(support.sample_broadcast)
        if avoided:
            self.avoids[node.name] = avoided

    def _obstacle(self, node: Node, support: Int8Op) -> Optional[str]:
        tensors = self.graph.tensor_inputs(node)
        if not tensors or node.name in self.constants:
            return "it reads nothing that is computed"
        shape = self.graph.shape(tensors[0])
        read = tensors if support.operands or support.joins else tensors[:1]
        kinds = [self.graph.values[name].type for name in (*read, node.output)]
        if any(kind is not None and kind.dtype != "float32" for kind in kinds):
            odd = next(kind.dtype for kind in kinds if kind is not None and kind.dtype != "float32")
            found = f"it reads or gives {odd}, not float32"
            if node.op == "Gather" and uses.weight_use(self.graph, node) is not None:
                return f"{found} (a rule with precision weight-only stores its table as integers)"
            return found
        if support.max_rank is not None and len(shape) > support.max_rank:
            return f"its input has {len(shape)} dimensions, the int8 kernel takes {support.max_rank}"
        if support.maps_only and len(shape) != 4:
            return f"its input has {len(shape)} dimensions; only a feature map (N, C, H, W) has an int8 form"
        if support.kind in _MOVES and tensors[0] != node.inputs[0] and support.kind != RESCALED:
            return "what it moves is a parameter"
        if support.kind == WEIGHTED and self.graph.values[node.inputs[1]].kind != "param":
            return "its weight is computed, not a parameter"
        use = uses.LIMITS[node.op] if support.limited else uses.OBSTACLES.get(node.op)
        return (use and use(self.graph, node)) or self._operand_obstacle(node, support, tensors)

    def _operand_obstacle(self, node: Node, support: Int8Op, tensors: list[str]) -> Optional[str]:
        shapes = {self.graph.shape(name) for name in tensors}
        if support.operands and len(tensors) != support.operands:
            computed = "1 of its operands is" if len(tensors) == 1 else f"{len(tensors)} of its operands are"
            return f"{computed} computed, the int8 kernel takes {support.operands}"
        if support.same_shape and len(shapes) != 1:
            return f"its operands differ in shape; {self._avoid(node, support.same_shape)}"
        if support.sample_broadcast and not (len(shapes) == 1 or uses.by_channel(*shapes)):
            return "its operands are neither of one shape nor (N, C, H, W) and (N, C, 1, 1)"
        if support.asymmetric and uses.resize_flags(self.graph, node) != (False, False):
            return f"it aligns corners or has half-pixel coordinates; {self._avoid(node, support.asymmetric)}"
        if support.kind == SHARED_ROUNDED and self._is_rescaled(tensors[0]):
            return "its input has the integers of another value, with another scale"
        return self._row_obstacle(node, support) or self._window_obstacle(node, support)

    def _row_obstacle(self, node: Node, support: Int8Op) -> Optional[str]:
        if support.max_row is None:
            return None
        axes = uses.axes_of(self.graph, node, 1)
        size = self.graph.shape(node.inputs[0])[axes[0]] if len(axes) == 1 else 0
        if size < 1:
            return "it is over several axes, or over one of unknown size"
        if size <= support.max_row:
            return None
        return f"it is over {size} values, allowed are {support.max_row}; {self._avoid(node, support.row_defect)}"

    def _window_obstacle(self, node: Node, support: Int8Op) -> Optional[str]:
        if support.max_window is None:
            return None
        if support.global_spatial and not uses.is_global(self.graph, node):
            return "only a mean over the whole height and width of a feature map has an int8 form"
        window = self._window(node, support)
        if window <= support.max_window or (support.large_window and not uses.pads(self.graph, node)):
            return None
        defect = f"; {self._avoid(node, support.window_defect)}" if support.window_defect else ""
        return f"its window has {window} elements, allowed are {support.max_window}{defect}"

    def _window(self, node: Node, support: Int8Op) -> int:
        return uses.window_of(self.graph, node, support.global_spatial)

    def _is_rescaled(self, value: str) -> bool:
        """Whether `value` has the integers of another one, with another scale."""
        source = self.producers.get(value)
        while source is not None and self._is_int8(source) and self._kind(source) == SHARED:
            source = self.producers.get(source.inputs[0])
        return source is not None and self._is_int8(source) and self._kind(source) == RESCALED

    def _kind(self, node: Node) -> str:
        support = self.supports[node.name]
        return support.kind if support is not None else ""

    def _is_int8(self, node: Optional[Node]) -> bool:
        return node is not None and self.verdicts[node.name][0] == INT8

    def _gives_int8(self, node: Optional[Node]) -> bool:
        """Whether what `node` computes is int8, not only what it reads."""
        return node is not None and self._is_int8(node) and not self._gives_float(node)

    def _gives_float(self, node: Node) -> bool:
        support = self.supports[self.fused.get(node.name, node.name)]
        return support is not None and support.float_output

    def _follow_neighbours(self) -> None:
        """What only moves values gains nothing from int8 between float operations, nor does a cheap operation whose
        input is float: they stay float."""
        placed = [n for n in self.graph.nodes if self._is_int8(n) and n.name not in self.fused]
        waiting = [n for n in placed if self._kind(n) in _MOVES or self._follows(n) or self._joins(n)]
        anchored = {n.name for n in placed} - {n.name for n in waiting}
        reached = True
        while reached:
            anchored |= {name for name, head in self.fused.items() if head in anchored}
            found = {n.name for n in waiting if n.name not in anchored and self._is_reached(n, anchored)}
            anchored |= found
            reached = bool(found)
        for node in waiting:
            if node.name not in anchored:
                reason = FLOAT_INPUT if self._follows(node) else NO_NEIGHBOUR
                self._place_in_float(node, reason)

    def _follows(self, node: Node) -> bool:
        support = self.supports[node.name]
        return support is not None and support.follows

    def _joins(self, node: Node) -> bool:
        support = self.supports[node.name]
        return support is not None and support.joins

    def _is_reached(self, node: Node, anchored: set[str]) -> bool:
        """Whether a neighbour that matters is among the nodes that are int8 in any case."""
        tensors = self.graph.tensor_inputs(node)
        sources = [self.producers.get(name) for name in (tensors if self._joins(node) else tensors[:1])]
        readers = [reader for output in node.outputs for reader in self.readers.get(output, [])]
        if any(s is not None and s.name in anchored and not self._gives_float(s) for s in sources):
            # What a number does to the scale is nothing to those who compute in float.
            return self._kind(node) != RESCALED or any(self._is_int8(reader) for reader in readers)
        return not self._follows(node) and any(reader.name in anchored for reader in readers)

    def _place_in_float(self, node: Node, reason: str) -> None:
        self.verdicts[node.name] = (FLOAT_PRECISION, reason)
        for name, head in list(self.fused.items()):
            if head == node.name:
                del self.fused[name]
                self.verdicts[name] = (FLOAT_PRECISION, FLOAT_INPUT)

    # -- values ---------------------------------------------------------------------------------------------------
    def _values(self) -> None:
        for value in self.graph.activations():
            if value.type is None or value.type.dtype != "float32":
                continue  # a shape, an index, a mask
            source = self.producers.get(value.name)
            readers = self.readers.get(value.name, [])
            if not readers and value.name not in self.graph.outputs:
                continue  # the statistics of a normalisation
            int8_readers = [n for n in readers if self._is_int8(n) and n.name not in self.fused]
            fused_away = any(
                n.name in self.fused and self.fused[n.name] == (source.name if source else "") for n in readers
            )
            if fused_away or not (self._gives_int8(source) or int8_readers):
                continue
            if source is not None and self._gives_int8(source) and self._kind(source) in _MOVES:
                self._inherit(value.name, source)
            else:
                self._own_group(value.name, source, readers, int8_readers)

    def _inherit(self, value: str, source: Node) -> None:
        """The parameters of what `source` reads, or in another scale."""
        group = self.plan.activations[self.graph.tensor_inputs(source)[0]].group
        kind = self._kind(source)
        if kind == RESCALED:
            origin, factor = self.plan.groups[group], uses.rescale_factor(self.graph, source)
            assert factor is not None
            span = (origin.range[0] * factor, origin.range[1] * factor) if origin.range is not None else None
            self.plan.groups[value] = replace(
                origin, name=value, source=origin.source or group, factor=origin.factor * factor, range=span
            )
            group = value
        self.plan.activations[value] = ActivationQuant(value, group, exact=kind != SHARED_ROUNDED)

    def _own_group(self, value: str, source: Optional[Node], readers: list[Node], int8_readers: list[Node]) -> None:
        edges: tuple[tuple[str, int], ...] = ()
        if source is not None and self._gives_int8(source):
            owner = self.graph.node(self.fused.get(source.name, source.name))
        else:
            owner = int8_readers[0]
            if len(int8_readers) < len(readers) or value in self.graph.outputs:
                edges = tuple((n.name, i) for n in int8_readers for i, name in enumerate(n.inputs) if name == value)
        config, rule = self.settings[owner.name][0], self.book.author(owner, "act_", "precision")
        self.effective.add(rule)
        symmetric = self._symmetric(config)
        bits = config.act_bits
        assert bits is not None
        if bits not in self.target.act_bits:
            self._warn(
                f"{owner.name}: {self.target.name} clamps activations to 8 bits; "
                f"{bits}-bit ranges are simulated in training only"
            )
        group = Group(
            value, bits, symmetric, config.act_observer, config.act_percentile, config.act_quant_delay, rule,
            delay_epochs=config.act_quant_delay_epochs, learned=self._learned(config, source),
        )  # fmt: skip
        fixed = self._fixed_range(source) if source is not None and not edges and self._gives_int8(source) else None
        if fixed is not None:
            group = replace(group, bits=8, symmetric=False, range=fixed, fixed=True)
            group = replace(group, delay=0, delay_epochs=0, learned=NONE)
        self.plan.groups[value] = group
        self.plan.activations[value] = ActivationQuant(value, value, edges=edges)

    def _learned(self, config: QuantConfig, source: Optional[Node]) -> str:
        """By which rule the step size of what `source` gives is trained: PACT is for what is never negative."""
        clipped = source is not None and source.op in NON_NEGATIVE
        return NONE if config.act_learned == PACT and not clipped else config.act_learned

    def _symmetric(self, config: QuantConfig) -> bool:
        return self.target.act_symmetric if config.act_symmetric is None else config.act_symmetric

    def _fixed_range(self, node: Node) -> Optional[tuple[float, float]]:
        """The range of what `node` gives, where it is the same for every network."""
        if node.name in self.fused:
            form = self.target.fused_forms.get(node.op)
            return form.range if form is not None else None
        support = self.supports[node.name]
        return support.fixed_range if support is not None else None

    # -- weights --------------------------------------------------------------------------------------------------
    def _weights(self) -> None:
        for node in self.graph.nodes:
            if not self._is_int8(node) or self._kind(node) != WEIGHTED:
                continue
            if self.supports[node.name].per_tensor:  # type: ignore[union-attr]
                self.plan.weights[node.name] = WeightQuant(node.name, 8, None, "minmax", "default")
                continue
            quantizer, rule = self.settings[node.name][0].weight_quantizer, self.book.author(node, "weight.")
            self.effective.add(rule)
            axis: Optional[int] = 0 if quantizer.per_channel else None
            if axis == 0 and self.target.grouped_per_channel and self._grouped(node):
                axis = None
                self._avoid(node, self.target.grouped_per_channel)
                self._warn(f"{node.name}: {self.target.defects[self.target.grouped_per_channel]}")
            self.plan.weights[node.name] = WeightQuant(
                node.name, quantizer.bits, axis, quantizer.observer, rule, learned=quantizer.learned
            )

    def _stored_weights(self) -> None:
        """The weights of layers that compute in float, and the inputs of those that are dynamic."""
        for node in self.graph.nodes:
            precision = self.verdicts[node.name][0]
            if precision not in STORING:
                continue
            config, use = self.settings[node.name][0], self.weight_uses[node.name]
            quantizer, rule = config.weight_quantizer, self.book.author(node, "weight.")
            self.effective.add(rule)
            if quantizer.per_channel and use.axis is None:
                self._warn(f"{node.name}: its weight has no axis of output channels or rows; it has one scale")
            axis = use.axis if quantizer.per_channel else None
            self.plan.weights[node.name] = WeightQuant(
                node.name, quantizer.bits, axis, quantizer.observer, rule, index=use.index, learned=quantizer.learned
            )
            if precision == DYNAMIC:
                bits, rule = config.act_bits, self.book.author(node, "act_", "precision")
                assert bits is not None
                self.effective.add(rule)
                self.plan.dynamic[node.name] = DynamicQuant(
                    node.name, bits, self._symmetric(config), config.act_quant_delay, rule,
                    config.act_quant_delay_epochs,
                )  # fmt: skip

    def _check_precision_rules(self) -> None:
        """A rule that asks for stored weights, or for float16, must match a layer that can have them so.

        Raises:
            PlanError: none of the layers can.
        """
        for rule in self.book.rules:
            wanted = rule.changes.get("precision")
            if wanted not in (*STORING, *HALF):
                continue
            nodes = [self.graph.node(name) for name in self.book.matched(rule)]
            if wanted in HALF and not self.target.float16_layers:
                raise PlanError(self._no_half(nodes[0], wanted, str(rule)))
            if wanted == FLOAT16:
                if all(self._half_obstacle(node) for node in nodes):
                    why = self._half_obstacle(nodes[0])
                    raise PlanError(
                        f"rule '{rule}': {nodes[0].name} ({nodes[0].op}) cannot have precision '{wanted}': {why}"
                    )
                continue
            weighted = [node for node in nodes if uses.weight_use(self.graph, node) is not None]
            if wanted in (WEIGHT_ONLY, WEIGHT_ONLY_FLOAT16) and not weighted:
                why = f"it has no parameter as weight; allowed: {', '.join(uses.STORABLE)} with one"
            elif wanted == DYNAMIC and all(uses.dynamic_obstacle(self.graph, node) for node in weighted):
                why = (weighted and uses.dynamic_obstacle(self.graph, weighted[0])) or "it has no parameter as weight"
            else:
                continue
            first = (weighted or nodes)[0]
            raise PlanError(f"rule '{rule}': {first.name} ({first.op}) cannot have precision '{wanted}': {why}")

    def _warn_of_stored(self) -> None:
        """What files other than the portable one make of stored weights, and who is less than was asked for."""
        texts = {
            WEIGHT_ONLY: "the file for a converter holds their weights as float32 on the grid; .ms and ONNX files hold "
            "narrower ones in 8 bits",
            DYNAMIC: ".ms files and the file for a converter compute them in float from their stored weights: no "
            "kernel there quantises an input at each call",
            WEIGHT_ONLY_FLOAT16: "the file for Ascend holds their weights as float16 numbers on the grid",
        }
        for precision, text in texts.items():
            names = [name for name, (found, _) in self.verdicts.items() if found == precision]
            if names:
                self._warn(f"{precision} ({len(names)} of the operations, first {names[0]}): {text}")
        short = [
            node
            for node in self.graph.nodes
            if self.settings[node.name][0].precision == DYNAMIC and self.verdicts[node.name][0] == WEIGHT_ONLY
        ]
        if short:
            why = uses.dynamic_obstacle(self.graph, short[0])
            self._warn(
                f"dynamic: {len(short)} of the operations (first {short[0].name}, {short[0].op}) are weight-only "
                f"instead: {why}"
            )

    def _grouped(self, node: Node) -> bool:
        """A grouped convolution that is not purely depthwise."""
        group = int(node.attrs.get("group", 1)) if node.op == "Conv2D" else 1
        weight = self.graph.shape(node.inputs[1])
        return group > 1 and not (weight[1] == 1 and weight[0] == group)

    def _warn_of_files(self) -> None:
        """Warn of what the converter refuses."""
        unknown = [n for n in self.graph.nodes if n.op in ("MaxPool", "AvgPool") and self._is_unknown_to_converter(n)]
        if unknown:
            self._warn(
                f"{unknown[0].name} ({unknown[0].op}, {len(unknown)} such) pads in a way that MindSpore Lite's "
                "converter does not know: it will not take the file made for it; a .ms file needs no converter"
            )

    def _warn_of_batch(self) -> None:
        """Warn that the predictions for a sample depend on its batch."""
        found = batch_dependence(self.graph)
        if found is not None:
            node, how = found
            self._warn(
                f"{node.name} ({node.op}) {how}: the predictions for a sample depend on its batch, and a file for "
                "batch 1 gives other predictions than a larger batch"
            )

    def _is_unknown_to_converter(self, node: Node) -> bool:
        """Of a pool: whether there is no form of its padding in the file for the converter."""
        if node.op not in self.target.ops or uses.pooling_of(self.graph, node).mode != "PAD":
            return False
        return uses.padded_pool_form(self.graph, node) is None

    def _warn_of_idle_rules(self) -> None:
        for idle in self.book.rules:
            if str(idle) not in self.effective and not idle.is_default:
                self._warn(
                    f"rule '{idle}' changes nothing: later rules override it, or what it matches has no weight and no "
                    "range of its own (a fused activation has that of the layer before it, a pool that of its input)"
                )

    def _warn(self, text: str) -> None:
        if text not in self.plan.warnings:
            self.plan.warnings.append(text)
