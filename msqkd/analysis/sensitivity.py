"""What each layer's quantisation does to the network: on its own, and to the rest when it alone is left out.

One compiled cell serves all runs. The quantisers of activations are there twice, on and off, mixed by parameters that
are 0 or 1, and weights are parameters that hold either their float or their quantised numbers: changing a parameter
needs no compilation.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Optional

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from msqkd.analysis.layers import decibel, owner_of
from msqkd.data import Split, as_tuple, subset
from msqkd.graph.cell import Hooks, to_cell
from msqkd.graph.ir import Graph
from msqkd.quant.algorithms.stream import activation_cell, dynamic_cell, piece_of
from msqkd.quant.fake_quant import FakeQuantActivation
from msqkd.quant.half import with_half
from msqkd.quant.plan import QuantPlan
from msqkd.quant.ptq import divergence, relative_error
from msqkd.quant.qparams import QParams
from msqkd.train.evaluate import input_batches, output_arrays
from msqkd.train.metric import Metric, Outputs

KL, RELATIVE_ERROR = "kl", "relative error"


@dataclass
class Layer:
    """What is switched together: the weight of one operation and the quantised values that begin with it.

    Attributes:
        name: of the operation, or of the network's input.
        op: the operation, ``input`` for an input.
        value: what it gives.
        weights: nodes whose weight is quantised.
        values: activations that are rounded.
        dynamic: nodes whose input is quantised at each call.
        half: nodes that compute in float16.
    """

    name: str
    op: str
    value: str
    weights: list[str] = field(default_factory=list)
    values: list[str] = field(default_factory=list)
    dynamic: list[str] = field(default_factory=list)
    half: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sensitivity:
    """What one layer's quantisation costs.

    Attributes:
        name: of the layer.
        sqnr_db: signal-to-quantisation-noise ratio of what the layer gives when it alone is quantised; None without
            noise.
        cosine: similarity of the same two values, 1 without noise; None where one of them is all 0.
        only_loss: divergence or relative error of the network's outputs to the float ones, when this layer alone is
            quantised.
        only_metric: the metric then; None without labels.
        float_loss, float_metric: the same when every layer but this one is quantised.
    """

    name: str
    sqnr_db: Optional[float]
    cosine: Optional[float]
    only_loss: float
    only_metric: Optional[float]
    float_loss: float
    float_metric: Optional[float]


@dataclass(frozen=True)
class Sensitivities:
    """Of all layers, in execution order, with what they are held against.

    Attributes:
        layers: see `Sensitivity`.
        loss: ``kl`` (mean over the samples, in nats) or ``relative error``, of what the losses are.
        samples: how many were computed.
        quantised_loss: with every layer quantised.
        float_metric, quantised_metric: with none and with every layer quantised; None without labels.
    """

    layers: list[Sensitivity]
    loss: str
    samples: int
    quantised_loss: float
    float_metric: Optional[float]
    quantised_metric: Optional[float]

    def ranked(self) -> list[Sensitivity]:
        """The layers, the one that does most harm on its own first; of equal ones that with the most noise."""
        return sorted(self.layers, key=lambda row: (-row.only_loss, np.inf if row.sqnr_db is None else row.sqnr_db))

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return asdict(self)


def layers_of(graph: Graph, plan: QuantPlan) -> list[Layer]:
    """The layers whose quantisation can be switched, in execution order."""
    found: dict[str, Layer] = {}
    ends = {node.name: node.output for node in graph.nodes}
    for node in graph.nodes:
        head = plan.node(node.name).fused_into
        if head is not None:
            ends[head] = node.output

    def layer(value: str, owner: Optional[str]) -> Layer:
        name = owner or value
        op, end = (graph.node(owner).op, ends[owner]) if owner else ("input", value)
        return found.setdefault(name, Layer(name, op, end))

    half = {node.name for node in plan.half_nodes()}
    for name in graph.inputs:
        _add_value(plan, layer, graph, name)
    for node in graph.nodes:
        if node.name in half:
            layer(node.output, node.name).half.append(node.name)
        if node.name in plan.weights:
            layer(node.output, node.name).weights.append(node.name)
        if node.name in plan.dynamic:
            layer(node.output, node.name).dynamic.append(node.name)
        for output in node.outputs:
            _add_value(plan, layer, graph, output)
    return list(found.values())


def _add_value(plan: QuantPlan, layer: Callable[[str, Optional[str]], Layer], graph: Graph, value: str) -> None:
    quant = plan.activations.get(value)
    if quant is not None and not quant.exact:
        owned = layer(value, owner_of(graph, plan, value))
        owned.values.append(value)
        owned.value = value


class _Switch(nn.Cell):
    """What a quantiser makes of a value, or the value itself, bit for bit, as a parameter says."""

    def __init__(self, quantizer: nn.Cell, name: str) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.on, self.off = _parameter(f"{name}.on", 0.0), _parameter(f"{name}.off", 1.0)
        self.mul, self.add = ops.Mul(), ops.Add()

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.add(self.mul(self.quantizer(x), self.on), self.mul(x, self.off))

    def turn(self, on: bool) -> None:
        for parameter, state in ((self.on, on), (self.off, not on)):
            parameter.set_data(ms.Tensor(np.float32(state)))


class _Weight(nn.Cell):
    """Stands for a weight: its float or its quantised numbers."""

    def __init__(self, plain: np.ndarray, quantised: np.ndarray, name: str) -> None:
        super().__init__()
        self.states = [ms.Tensor(np.array(plain, np.float32)), ms.Tensor(np.array(quantised, np.float32))]
        self.value = ms.Parameter(ms.Tensor(np.array(plain, np.float32)), name=name, requires_grad=False)

    def construct(self, w):  # type: ignore[no-untyped-def]
        return self.value

    def turn(self, on: bool) -> None:
        self.value.set_data(self.states[on])


class _Plain:
    """Another parameter of a quantised layer (a bias), where the quantised network has other numbers in it."""

    def __init__(self, parameter: Any, plain: np.ndarray, quantised: np.ndarray) -> None:
        self.parameter, self.states = parameter, (ms.Tensor(plain.copy()), ms.Tensor(quantised.copy()))

    def turn(self, on: bool) -> None:
        self.parameter.set_data(self.states[on])


def _parameter(name: str, number: float) -> Any:
    return ms.Parameter(ms.Tensor(np.float32(number)), name=name, requires_grad=False)


class SwitchedNetwork:
    """A network whose layers are quantised or not as is asked for at each call, without a new compilation.

    With every layer on it computes what the fake-quantised network does (`quantize_cell`), with none what `base` does.

    Args:
        graph: the deployment graph with the quantised network's parameters.
        plan: its plan, every range known.
        base: a graph with the same nodes whose parameters a layer has while it is float; `graph` by default. It differs
            where a method has rounded or corrected the parameters for quantisation.
    """

    def __init__(self, graph: Graph, plan: QuantPlan, base: Optional[Graph] = None) -> None:
        base = base or graph
        self.plan = plan.with_weight_observers(graph)
        self.layers = layers_of(graph, self.plan)
        owned = [value for layer in self.layers for value in (layer.value, *layer.values)]
        self.values = list(dict.fromkeys([*owned, *self.plan.groups]))
        self.on: set[str] = set()
        self._outputs = len(graph.outputs)
        values: dict[str, _Switch] = {}
        edges: dict[tuple[str, int], nn.Cell] = {}
        self._switches: dict[str, list[Any]] = {}
        self._quantizers: dict[str, FakeQuantActivation] = {}
        self._weights: dict[str, _Weight] = {}
        for layer in self.layers:
            switches = self._switches[layer.name] = []
            for value in layer.values:
                self._quantizers[value] = activation_cell(graph, self.plan, value)
                switch = _Switch(self._quantizers[value], value)
                quant = self.plan.activations[value]
                edges.update(dict.fromkeys(quant.edges, switch))
                values.update({} if quant.edges else {value: switch})
                switches.append(switch)
            for name in layer.weights:
                quant_weight = self.plan.weights[name]
                parameter = graph.node(name).inputs[quant_weight.index]
                held = graph.params[parameter].data
                rounded = quant_weight.qparams(held).fake_quantize(held)
                weight = _Weight(base.params[parameter].data, rounded, f"{name}.weight{quant_weight.index}.switched")
                edges[name, quant_weight.index] = self._weights[name] = weight
                switches.append(weight)
            for name in layer.dynamic:
                edges[name, 0] = _Switch(dynamic_cell(self.plan, name), f"{name}.dynamic")
                switches.append(edges[name, 0])
        self.cell = to_cell(base, self._with_half(base, Hooks(values=values, edges=edges, observe=self.values)))
        held_by = {name: getattr(self.cell, attribute) for attribute, name in self.cell.parameter_names.items()}
        for layer in self.layers:
            for name in layer.weights:
                for parameter in set(graph.param_inputs(graph.node(name))) - {
                    graph.node(name).inputs[self.plan.weights[name].index]
                }:
                    plain, other = base.params[parameter].data, graph.params[parameter].data
                    if not np.array_equal(plain, other):
                        self._switches[layer.name].append(_Plain(held_by[parameter], plain, other))

    def _with_half(self, graph: Graph, hooks: Hooks) -> Hooks:
        """The hooks with the rounding of float16 layers, each behind a switch."""
        for layer in self.layers:
            for name in layer.half:
                own = with_half(Hooks(), piece_of(graph, [graph.node(name)], []), self.plan)
                arguments = {place: _Switch(cell, f"{name}.half{place[1]}") for place, cell in own.arguments.items()}
                results = {value: _Switch(cell, f"{value}.half") for value, cell in own.results.items()}
                self._switches[layer.name] += [*arguments.values(), *results.values()]
                hooks = replace(hooks, arguments={**hooks.arguments, **arguments}, results={**hooks.results, **results})
        return hooks

    @property
    def names(self) -> list[str]:
        """Of the layers, in execution order."""
        return [layer.name for layer in self.layers]

    def turn(self, names: Collection[str]) -> None:
        """Quantise the layers called `names` from the next call on, and no others."""
        for name in self._switches:
            if (name in names) != (name in self.on):
                for switch in self._switches[name]:
                    switch.turn(name in names)
        self.on = set(names)

    @contextmanager
    def trial(
        self, names: Collection[str], groups: Mapping[str, QParams] = {}, weights: Mapping[str, np.ndarray] = {}
    ) -> Iterator[None]:
        """Quantise the layers called `names`, and no others, in another way while the context lasts.

        Args:
            names: of the layers.
            groups: scale and zero point of values, by group.
            weights: quantised weights, by node.
        """
        changed = [value for value in self._quantizers if self.plan.activations[value].group in groups]
        before = {node: self._weights[node].states[1] for node in weights}
        self.turn(())
        try:
            for value in changed:
                self._quantizers[value].set_qparams(groups[self.plan.activations[value].group])
            for node, array in weights.items():
                self._weights[node].states[1] = ms.Tensor(np.array(array, np.float32))
            self.turn(names)
            yield
        finally:
            self.turn(())
            for value in changed:
                self._quantizers[value].set_qparams(self.plan.group_of(value).qparams())
            for node, tensor in before.items():
                self._weights[node].states[1] = tensor

    def __call__(self, *inputs: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The outputs, and the `values` as they are before they are rounded themselves."""
        found = self.cell(*inputs)
        return found[: self._outputs], found[self._outputs :]

    def rounded(self, value: str, seen: np.ndarray) -> np.ndarray:
        """`seen` as the readers of `value` that compute in int8 get it while its layer is on."""
        return self.plan.group_of(value).qparams().fake_quantize(seen) if value in self.plan.activations else seen


class _Likeness:
    """How alike two arrays are, batch after batch."""

    def __init__(self) -> None:
        self.signal = self.noise = self.product = self.other = 0.0

    def update(self, exact: np.ndarray, found: np.ndarray) -> None:
        x, y = exact.astype(np.float64).ravel(), found.astype(np.float64).ravel()
        self.signal += float(x @ x)
        self.other += float(y @ y)
        self.product += float(x @ y)
        difference = x - y
        self.noise += float(difference @ difference)

    def cosine(self) -> Optional[float]:
        norm = float(np.sqrt(self.signal * self.other))
        return min(self.product / norm, 1.0) if norm else None


def whole_batches(samples: Split, size: int) -> Split:
    """The first samples that fill batches of `size`; all where they do not fill one."""
    return subset(samples, len(samples) // size * size or len(samples))


def output_loss(found: Outputs, reference: Outputs, kind: str) -> float:
    """Of `kind` ``kl`` the divergence of the first output, of ``relative error`` that of all."""
    return divergence(found[0], reference[0]) if kind == KL else relative_error(found, reference)


class Probe:
    """Tries layers in another way: the loss of the network's outputs while only they are quantised.

    Args:
        network: see `SwitchedNetwork`.
        samples, batch_size, kind: as for `measured_sensitivity`.
    """

    def __init__(self, network: SwitchedNetwork, samples: Split, batch_size: int, kind: str) -> None:
        self.network, self.samples, self.batch_size, self.kind = network, samples, batch_size, kind
        network.turn(())
        self.reference = self._outputs()

    def loss(
        self,
        names: Collection[str],
        groups: Mapping[str, QParams] = {},
        weights: Mapping[str, np.ndarray] = {},
    ) -> float:
        """The loss with the layers called `names` quantised as `SwitchedNetwork.trial` says."""
        with self.network.trial(names, groups, weights):
            return output_loss(self._outputs(), self.reference, self.kind)

    def _outputs(self) -> Outputs:
        return output_arrays(lambda *inputs: self.network(*inputs)[0], self.samples, self.batch_size)


def loss_kind(graph: Graph, metric: Metric) -> str:
    """``kl`` for a classifier: one output (N, classes), judged by accuracy."""
    single = len(graph.outputs) == 1 and len(graph.shape(graph.outputs[0])) == 2
    return KL if metric.is_accuracy and single else RELATIVE_ERROR


def measured_sensitivity(
    network: SwitchedNetwork,
    samples: Split,
    batch_size: int,
    metric: Metric,
    kind: str,
    progress: Optional[Callable[[int], None]] = None,
) -> Sensitivities:
    """Run `samples` through the network with each layer alone quantised, and with each alone float.

    Args:
        network: what is measured; it is left with no layer on.
        samples: two forward passes a layer; they fill batches of `batch_size` (see `whole_batches`).
        batch_size: samples a batch.
        metric: of the outputs, where the samples have labels.
        kind: see `output_loss`.
        progress: called with the number of runs done, of two a layer and two more, each over a batch.

    Raises:
        DataError: the metric gives no finite number.
    """
    names = network.names
    states: dict[tuple[str, str], Collection[str]] = {("float", ""): (), ("quantised", ""): set(names)}
    states.update({("only", name): {name} for name in names})
    states.update({("without", name): set(names) - {name} for name in names})
    parts: dict[tuple[str, str], list[Outputs]] = {state: [] for state in states}
    likeness = {name: _Likeness() for name in names}
    place = {layer.name: network.values.index(layer.value) for layer in network.layers}
    done = 0
    for batch in input_batches(samples, batch_size):
        tensors = [ms.Tensor(array) for array in as_tuple(batch)]
        exact: Sequence[Any] = ()
        for (kind_of_run, name), on in states.items():
            network.turn(on)
            outputs, values = network(*tensors)
            parts[kind_of_run, name].append(tuple(output.asnumpy() for output in outputs))
            if kind_of_run == "float":
                exact = values
            if kind_of_run == "only":
                seen = network.rounded(network.values[place[name]], values[place[name]].asnumpy())
                likeness[name].update(exact[place[name]].asnumpy(), seen)
            done += 1
            if progress is not None:
                progress(done)
    network.turn(())
    found = {state: tuple(np.concatenate(column) for column in zip(*part)) for state, part in parts.items()}

    def judged(state: tuple[str, str]) -> tuple[float, Optional[float]]:
        reached = None if samples.labels is None else metric(found[state], samples.labels, samples.name)
        return output_loss(found[state], found["float", ""], kind), reached

    rows = [
        Sensitivity(
            name,
            decibel(likeness[name].signal, likeness[name].noise),
            likeness[name].cosine(),
            *judged(("only", name)),
            *judged(("without", name)),
        )
        for name in names
    ]
    loss, reached = judged(("quantised", ""))
    return Sensitivities(rows, kind, len(samples), loss, judged(("float", ""))[1], reached)
