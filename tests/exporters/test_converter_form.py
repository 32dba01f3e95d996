"""The marked MindIR in the form of MindSpore 2.0, held against a table of its operators and against MindSpore."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops

import msqkd
from msqkd.exporters.lite import read_marked
from msqkd.exporters.mindir_form import settings_of
from msqkd.exporters.verify import load_lite

# Operator of MindSpore 2.0 -> how many inputs it takes, and attributes it must have
OPERATORS: dict[str, tuple[int, set[str]]] = {
    "Conv2D": (
        2,
        {"kernel_size", "pad_mode", "pad_list", "stride", "dilation", "group", "format", "out_channel", "mode"},
    ),
    "Conv2DTranspose": (3, {"kernel_size", "pad_mode", "stride", "dilation", "group", "format", "out_channel"}),
    "BiasAdd": (2, {"format"}),
    "MatMul": (2, {"transpose_a", "transpose_b"}),
    "BatchMatMul": (2, {"transpose_a", "transpose_b"}),
    "AvgPool": (1, {"kernel_size", "strides", "pad_mode", "format"}),
    "MaxPool": (1, {"kernel_size", "strides", "pad_mode", "format"}),
    "Softmax": (1, {"axis"}),
    "LayerNorm": (3, {"begin_norm_axis", "begin_params_axis", "epsilon"}),
    "ReduceMean": (2, {"keep_dims"}),
    "ReduceMax": (2, {"keep_dims"}),
    "ReduceMin": (2, {"keep_dims"}),
    "Squeeze": (1, {"axis"}),
    "Pad": (1, {"paddings"}),
    "ResizeNearestNeighbor": (1, {"size", "align_corners"}),
    "ResizeBilinear": (1, {"size", "align_corners", "half_pixel_centers"}),
    "StridedSlice": (4, {"begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask"}),
    "FakeQuantParam": (1, {"linear_quant_scale", "linear_quant_zero_point"}),
    "Gather": (3, set()),
    **{op: (3, set()) for op in ("Slice",)},
    **{op: (2, set()) for op in ("Add", "Sub", "Mul", "Div", "Maximum", "Minimum", "Pow", "Depend")},
    **{op: (2, set()) for op in ("Reshape", "Transpose", "ExpandDims", "TupleGetItem")},
    **{
        op: (1, set())
        for op in ("ReLU", "ReLU6", "Sigmoid", "Tanh", "HSwish", "HSigmoid", "GeLU", "Erf", "Exp", "Sqrt")
    },
}
MANY = {"Concat": {"axis"}, "MakeTuple": set()}  # of any number of inputs


class Maps(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 8, 3, has_bias=True), nn.ReLU()
        self.wide, self.narrow = nn.Conv2d(8, 12, 1, has_bias=True), nn.Conv2d(12, 8, 1, has_bias=True)
        self.same = nn.AvgPool2d(3, 2, "same")
        self.silu, self.head = nn.SiLU(), nn.Dense(8, 4)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.narrow(self.wide(self.relu(self.stem(x))))
        x = ops.cat((x[:, :4] * 0.5, x[:, 4:]), 1)
        x = self.same(self.silu(x))
        x = ops.interpolate(x, size=(16, 16), mode="nearest")
        x = ops.interpolate(x, size=(9, 9), mode="bilinear", align_corners=True)
        return self.head(ops.pad(x, (1, 1, 1, 1)).mean((2, 3)))


class Tokens(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.qkv, self.out = nn.Dense(8, 8), nn.LayerNorm((8,)), nn.Dense(8, 24), nn.Dense(8, 8)
        self.softmax, self.gelu = nn.Softmax(), nn.GELU()

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.inner(x)
        q, k, v = ops.split(self.qkv(self.norm(x)), 8, -1)
        y = ops.matmul(self.softmax(ops.matmul(q, k.transpose(0, 2, 1)) / 3.0), v)
        return (x + self.gelu(self.out(y))).max(1)


NETWORKS = {"maps": (Maps, (3, 12, 12)), "tokens": (Tokens, (5, 8))}


def marked(make: type, shape: tuple[int, ...], folder: Path) -> tuple[Path, Any, np.ndarray]:
    """Quantize a network after training; returns its marked file, the float network and the samples."""
    ms.set_seed(4)
    net = make()
    net.set_train(False)
    x = np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32)
    config = msqkd.QuantConfig(msqkd.WeightQuantizer(per_channel=True), act_observer="minmax")
    cell = msqkd.quantize(msqkd.create_ptq_network(net, config, [x]))
    return Path(msqkd.export(cell, shape, str(folder / "marked"), "MINDIR")), cell, x


def model_of(file: Path) -> Any:
    from mindspore.train import mind_ir_pb2 as pb

    model = pb.ModelProto()
    model.ParseFromString(file.read_bytes())
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_every_node_has_the_form_of_its_operator(name: str, tmp_path: Path) -> None:
    make, shape = NETWORKS[name]
    file, cell, x = marked(make, shape, tmp_path)
    model = model_of(file)
    assert model.mind_ir_version == 1
    primitives = {primitive.name: primitive for primitive in model.primitives}
    nodes = [node for node in model.graph.node if node.op_type != "Constant"]
    used = [node.op_type.removeprefix("REF::") for node in nodes]
    assert sorted(used) == sorted(primitives), "every node has a primitive of its own"
    for node, primitive in zip(nodes, (primitives[name] for name in used)):
        op, attributes = primitive.op_type, {attribute.name for attribute in primitive.attribute}
        assert primitive.prim_type == primitive.PRIMITIVE
        if op in MANY:
            assert attributes >= MANY[op]
            continue
        inputs, wanted = OPERATORS[op]
        assert len(node.input) == inputs, op
        assert attributes >= wanted, op
    found, expected = load_lite(file)(ms.Tensor(x)).asnumpy(), cell(ms.Tensor(x)).asnumpy()
    assert np.abs(found - expected).max() <= 0.02 * np.ptp(expected)


def test_words_are_those_of_the_older_version(tmp_path: Path) -> None:
    from msqkd.graph.mindir import attribute_value

    file, _, _ = marked(Maps, (3, 12, 12), tmp_path)
    model = model_of(file)
    pool = next(primitive for primitive in model.primitives if primitive.op_type == "AvgPool")
    attributes = {attribute.name: attribute_value(attribute) for attribute in pool.attribute}
    assert attributes["pad_mode"] == "SAME"
    assert attributes["format"] == "NCHW"
    assert attributes["kernel_size"] == (1, 1, 3, 3)
    assert attributes["strides"] == (1, 1, 2, 2)


def without_markers(model: Any) -> Any:
    """The float network of a marked file, which MindSpore has kernels for."""
    ops_of = {primitive.name: primitive.op_type for primitive in model.primitives}
    names: dict[str, str] = {}
    kept = []
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        if ops_of.get(node.op_type.removeprefix("REF::")) in ("FakeQuantParam", "Depend"):
            names[node.output[0]] = node.input[0]
        else:
            kept.append(node.SerializeToString())
    del model.graph.node[:]
    for blob in kept:
        model.graph.node.add().ParseFromString(blob)
    for output in model.graph.output:
        output.name = names.get(output.name, output.name)
    return model


class Plain(nn.Cell):
    """Operations that MindSpore itself loads in the older form."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu, self.next = nn.Conv2d(3, 8, 3, has_bias=True), nn.ReLU(), nn.Conv2d(8, 8, 3)
        self.pool, self.head, self.softmax = nn.MaxPool2d(2, 2), nn.Dense(8, 4), nn.Softmax()

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.relu(self.stem(x))
        x = self.pool(x + self.next(x)) * 0.5
        return self.softmax(self.head(x.mean((2, 3))))


def test_mindspore_loads_the_older_form(tmp_path: Path) -> None:
    file, _, x = marked(Plain, (3, 10, 10), tmp_path)
    graph, _, _ = read_marked(file)
    from msqkd.graph.cell import to_cell

    bare = tmp_path / "bare.mindir"
    bare.write_bytes(without_markers(model_of(file)).SerializeToString())
    loaded = nn.GraphCell(ms.load(str(bare)))
    sample = ms.Tensor(x[:1])
    np.testing.assert_allclose(loaded(sample).asnumpy(), to_cell(graph)(sample).asnumpy(), atol=1e-6)


def test_settings_come_from_the_definitions() -> None:
    assert settings_of("BiasAdd") == (2, ("data_format",))
    assert settings_of("Gather") == (3, ("batch_dims",))
    assert settings_of("NoSuchOperator") == (0, ())


# -- what the converter and the runtime would change -------------------------------------------------------------------
def test_pointwise_convolutions_in_a_row_have_different_padding_modes(tmp_path: Path) -> None:
    file, _, _ = marked(Maps, (3, 12, 12), tmp_path)
    graph, _, _ = read_marked(file)
    rows = [node for node in graph.nodes if node.op == "Conv2D" and node.attrs["kernel_size"] == (1, 1)]
    assert len(rows) >= 2
    assert rows[0].attrs["pad_mode"] != rows[1].attrs["pad_mode"]


def test_what_is_planned_float_has_a_depend_before_its_marker(tmp_path: Path) -> None:
    file, _, _ = marked(Maps, (3, 12, 12), tmp_path)
    model = model_of(file)
    ops_of = {primitive.name: primitive.op_type for primitive in model.primitives}
    kinds = {node.output[0]: ops_of.get(node.op_type.removeprefix("REF::"), "") for node in model.graph.node}
    sources = {node.output[0]: list(node.input) for node in model.graph.node}
    depends = [output for output, kind in kinds.items() if kind == "Depend"]
    assert {kinds[sources[output][0]] for output in depends} == {"ResizeBilinear"}
    assert all(sources[output][0] == sources[output][1] for output in depends)


class Cube(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 6, 3, has_bias=True), nn.Dense(216, 4)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.head(ops.relu(self.stem(x)).reshape(-1, 216))


class Square(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Dense(49, 4)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.head(x.transpose(0, 2, 1).reshape(-1, 49))


@pytest.mark.parametrize(("make", "shape"), [(Cube, (3, 6, 6)), (Square, (7, 7))])
def test_no_reshape_reads_a_transposition_of_its_own_shape(make: type, shape: tuple[int, ...], tmp_path: Path) -> None:
    file, cell, x = marked(make, shape, tmp_path)
    graph, _, _ = read_marked(file)
    for node in graph.nodes:
        if node.op == "Reshape":
            read, source = graph.shape(node.inputs[0]), graph.producer(node.inputs[0])
            assert len(read) != 4 or read[1] == 1 or len(set(read[1:])) > 1, "the converter transposes maps"
            if source is not None and source.op == "Transpose":
                assert graph.shape(source.inputs[0]) != read
    found, expected = load_lite(file)(ms.Tensor(x)).asnumpy(), cell(ms.Tensor(x)).asnumpy()
    assert np.abs(found - expected).max() <= 0.02 * np.ptp(expected)


class Padded(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.second = nn.Dense(8, 8), nn.ReLU(), nn.Dense(8, 8)
        self.norm, self.last = nn.LayerNorm((8,)), nn.Dense(8, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.second(ops.pad(self.relu(self.first(x)), (0, 0, 1, 2)))
        return self.last(self.norm(x)).max(1)


def test_a_marker_stands_before_the_first_of_several_results(tmp_path: Path) -> None:
    file, _, _ = marked(Padded, (5, 8), tmp_path)
    model = model_of(file)
    kinds = {primitive.name: primitive.op_type for primitive in model.primitives}
    ops_of = {node.output[0]: kinds.get(node.op_type.removeprefix("REF::")) for node in model.graph.node}
    readers = [kinds.get(node.op_type.removeprefix("REF::")) for node in model.graph.node]
    before = {reader: ops_of.get(node.input[0]) for node, reader in zip(model.graph.node, readers) if node.input}
    assert before["TupleGetItem"] == "FakeQuantParam"
    sources = [ops_of.get(n.input[0]) for n, reader in zip(model.graph.node, readers) if reader == "FakeQuantParam"]
    assert "LayerNorm" in sources
    assert "TupleGetItem" not in sources
    graph, values, weights = read_marked(file)
    (norm,) = [node for node in graph.nodes if node.op == "LayerNorm"]
    assert norm.output in values
    assert (norm.name, 1) in weights


def test_rows_are_padded_with_four_axes(tmp_path: Path) -> None:
    file, _, _ = marked(Padded, (5, 8), tmp_path)
    graph, values, _ = read_marked(file)
    (pad,) = [node for node in graph.nodes if node.op == "Pad"]
    assert len(graph.shape(pad.inputs[0])) == 4
    assert pad.inputs[0] in values
    assert pad.output in values


def test_a_maximum_is_a_negative_minimum(tmp_path: Path) -> None:
    """Over an axis that is not the last, or of a map, whose axes the converter moves."""
    file, _, _ = marked(Padded, (5, 8), tmp_path)
    graph, _, _ = read_marked(file)
    kinds = [node.op for node in graph.nodes]
    assert "ReduceMax" not in kinds
    assert kinds.count("ReduceMin") == 1


class ReadOutput(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.softmax = nn.Dense(8, 5), nn.Softmax()

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.head(x)
        return x, self.softmax(x)


def test_an_output_that_is_read_has_a_marker(tmp_path: Path) -> None:
    file, cell, _ = marked(ReadOutput, (8,), tmp_path)
    assert all(node.precision == "int8" for node in cell.sync()[1].nodes)
    graph, values, _ = read_marked(file)
    (softmax,) = [node for node in graph.nodes if node.op == "Softmax"]
    assert softmax.inputs[0] in values
    assert softmax.output in values


class FloatPath(nn.Cell):
    """A float value that an int8 sum reads, and a float operation behind a transposition."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.sigmoid, self.last = nn.Dense(6, 6), nn.Sigmoid(), nn.Dense(6, 5)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.sigmoid(self.first(x))
        return self.last(x + self.first(x)), ops.exp(x.transpose(0, 2, 1) * -1.5)


def test_what_moves_a_float_value_for_float_readers_reads_no_marker(tmp_path: Path) -> None:
    file, cell, x = marked(FloatPath, (4, 6), tmp_path)
    model = model_of(file)
    kinds = {primitive.name: primitive.op_type for primitive in model.primitives}
    ops_of = {node.output[0]: kinds.get(node.op_type.removeprefix("REF::")) for node in model.graph.node}
    turned = [n for n in model.graph.node if kinds.get(n.op_type.removeprefix("REF::")) == "Transpose"]
    assert "Sigmoid" in [ops_of[node.input[0]] for node in turned]
    for found, expected in zip(load_lite(file)(ms.Tensor(x)), cell(ms.Tensor(x))):
        np.testing.assert_allclose(found.asnumpy(), expected.asnumpy(), atol=1e-5)


class FloatHead(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Dense(6, 6), nn.Dense(6, 5)

    def construct(self, x):  # type: ignore[no-untyped-def]
        return self.head(self.first(x))


def test_a_float_dense_layer_is_a_product_without_parameters_and_a_sum(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    rules = [msqkd.Rule("path", "head", {"precision": "float"})]
    config = msqkd.QuantConfig(act_observer="minmax")
    cell = msqkd.quantize(msqkd.create_ptq_network(FloatHead(), config, [x], rules=rules))
    file = Path(msqkd.export(cell, (6,), str(tmp_path / "head"), "MINDIR"))
    model = model_of(file)
    kinds = {primitive.name: primitive.op_type for primitive in model.primitives}
    ops_of = {node.output[0]: kinds.get(node.op_type.removeprefix("REF::")) for node in model.graph.node}
    (product,) = [n for n in model.graph.node if kinds.get(n.op_type.removeprefix("REF::")) == "MatMul"]
    assert ops_of[product.input[0]] == "Depend"
    (total,) = [n for n in model.graph.node if n.input and n.input[0] == product.output[0]]
    assert ops_of[total.output[0]] == "Add"
    np.testing.assert_allclose(load_lite(file)(ms.Tensor(x)).asnumpy(), cell(ms.Tensor(x)).asnumpy(), atol=1e-5)


class FlattenedSum(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu, self.conv, self.head = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Dense(144, 3)

    def construct(self, x):  # type: ignore[no-untyped-def]
        x = self.relu(self.stem(x))
        return self.head(self.relu(self.conv(x) + x).reshape(-1, 144))


def test_a_sum_that_is_flattened_clips_by_its_parameters(tmp_path: Path) -> None:
    file, cell, x = marked(FlattenedSum, (3, 6, 6), tmp_path)
    graph, values, _ = read_marked(file)
    (total,) = [node for node in graph.nodes if node.op == "Add"]
    assert "ReLU" not in [reader.op for reader in graph.consumers(total.output)]
    assert int(values[total.output].zero_point) == -128
    np.testing.assert_allclose(load_lite(file)(ms.Tensor(x)).asnumpy(), cell(ms.Tensor(x)).asnumpy(), atol=1e-5)
