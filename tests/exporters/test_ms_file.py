from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ms_parser import CAST, Model, check_int8_file, parse
from ms_programs import Builder, every_primitive, quant, resnet20, small_net, weight_only

from msqkd.errors import ExportError
from msqkd.exporters.ms import layout
from msqkd.exporters.ms.check import check_structure
from msqkd.exporters.ms.read import read_ms
from msqkd.exporters.ms.write import ms_bytes, write_ms
from msqkd.integer.program import Program, Step, Tensor
from msqkd.integer.registry import X86
from msqkd.integer.simulator import Simulator

RECORDED = Path(__file__).parent / "recorded"
NETWORKS = {
    "net_lenet5A": (10, "10ead66fec32d9ff43418e461109ab5678fc95f7f349f8cdb5ead78acd6b7dd9"),
    "net_mobileA": (25, "4a5083063d4d1ff85e4ee60a07b3c0f55fcf35bcab9e57764268578f755a5189"),
    "net_resnet20A": (34, "da1d380bf54a7ed302aec0cd553da54728bbc423776bf7197b628eb7faf518da"),
}
"""Models that ran on MindSpore Lite 2.7: their nodes, and the SHA-256 of the weights and biases recorded with them."""

relaxed = settings(deadline=None)  # a busy machine is no failure


def assert_same(found: Program, wanted: Program) -> None:
    """Equal but for what a file does not hold."""
    assert (found.name, found.inputs, found.outputs) == (wanted.name, wanted.inputs, wanted.outputs)
    assert list(found.tensors) == list(wanted.tensors)
    for tensor in found.tensors.values():
        _assert_same_tensor(tensor, wanted.tensors[tensor.name])
    assert len(found.steps) == len(wanted.steps)
    for step, other in zip(found.steps, wanted.steps):
        _assert_same_step(step, other)


def _assert_same_tensor(found: Tensor, wanted: Tensor) -> None:
    assert (found.dtype, found.shape, found.format) == (wanted.dtype, tuple(wanted.shape), wanted.format)
    assert (found.data is None) == (wanted.data is None)
    if found.data is not None:
        assert found.data.dtype == found.dtype
        np.testing.assert_array_equal(found.data, wanted.data)
    held = wanted.quant if wanted.dtype == "int8" else None
    assert (found.quant is None) == (held is None)
    if found.quant is not None:
        assert found.quant.bits == 8
        assert found.quant.scale.tolist() == held.scale.tolist()
        assert found.quant.zero_point.tolist() == held.zero_point.tolist()


def _assert_same_step(found: Step, wanted: Step) -> None:
    assert (found.name, found.op, found.inputs, found.outputs) == (
        wanted.name,
        wanted.op,
        wanted.inputs,
        wanted.outputs,
    )
    assert found.quantized == wanted.quantized
    for name, value in found.attrs.items():
        assert _plain(value) == _plain(wanted.attrs[name]), name
    for name in set(wanted.attrs) - set(found.attrs):
        assert _plain(wanted.attrs[name]) == layout.default(wanted.op, name), name


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(np.float32(value))
    return [int(item) for item in value] if isinstance(value, (list, tuple)) else value


def test_every_primitive_of_the_layout_has_a_program_here() -> None:
    assert set(every_primitive()) == set(layout.TAGS)


@pytest.mark.parametrize("op", sorted(layout.TAGS))
def test_primitive_comes_back(op: str) -> None:
    program = every_primitive()[op]
    data = ms_bytes(program)
    assert_same(read_ms(data), program)
    assert parse(data).nodes[-1].tag == layout.TAGS[op]


@pytest.mark.parametrize(
    "program", [small_net(True), small_net(False), weight_only()], ids=["channel", "tensor", "weight"]
)
def test_network_comes_back_and_is_what_the_runtime_needs(program: Program) -> None:
    data = ms_bytes(program)
    check_int8_file(data)
    assert_same(read_ms(data), program)


def test_equal_programs_give_equal_bytes() -> None:
    assert ms_bytes(small_net()) == ms_bytes(small_net())
    assert ms_bytes(read_ms(ms_bytes(small_net()))) == ms_bytes(small_net())


def test_values_are_where_an_independent_reader_looks() -> None:
    program = small_net()
    model = check_int8_file(ms_bytes(program))
    conv = program.steps[1]
    weight = program.tensors[conv.inputs[1]]
    found = model.tensor(weight.name)
    assert found.data == weight.data.tobytes()
    assert [q[0] for q in found.quant] == weight.quant.scale.tolist()
    node = model.node(conv.name)
    assert node.primitive.numbers(1, "q") == [3, 3]
    assert [node.primitive.scalar(slot, code) for slot, code in ((4, "b"), (7, "q"), (10, "b"))] == [1, 1, 1]
    assert [n.quant_type for n in model.nodes] == [0, 5, 5, 5, 5, 5, 5, 0]
    assert (model.nodes[0].tag, model.nodes[-1].tag) == (CAST, CAST)
    assert model.node("s6").primitive.scalar(1, "B") == 1


def test_weight_only_nodes_are_marked_for_dequantisation_on_loading() -> None:
    model = check_int8_file(ms_bytes(weight_only()))
    assert [node.quant_type for node in model.nodes] == [4, 0, 4]
    assert [len(model.tensors[node.inputs[1]].quant) for node in model.nodes] == [6, 0, 1]


def test_no_integer_constant_carries_parameters() -> None:
    """In a weight-only node the runtime would dequantise it."""
    program = small_net()
    for tensor in program.tensors.values():
        if tensor.dtype == "int32":
            tensor.quant = quant(0.5, 0)
    assert ms_bytes(program) == ms_bytes(small_net())


def test_narrow_weights_are_marked_8_bits_wide() -> None:
    """The runtime unpacks a constant that is marked narrower."""
    program = small_net()
    weight = program.tensors[program.steps[1].inputs[1]]
    weight.quant = replace(weight.quant, bits=4)
    assert check_int8_file(ms_bytes(program)).tensor(weight.name).quant[0][2] == 8


def test_cast_is_no_int8_node_whatever_the_step_says() -> None:
    program = small_net()
    program.steps[0].quantized = True
    assert ms_bytes(program) == ms_bytes(small_net())


def test_big_endian_and_strided_values_are_stored_alike() -> None:
    program = small_net()
    for tensor in program.tensors.values():
        if tensor.data is not None:
            swapped = np.asfortranarray(tensor.data)
            tensor.data = swapped.astype(swapped.dtype.newbyteorder(">"))
    with pytest.raises(ExportError, match="agree"):
        ms_bytes(program)
    for tensor in program.tensors.values():
        if tensor.data is not None:
            tensor.data = np.asfortranarray(tensor.data.astype(tensor.dtype))
    assert ms_bytes(program) == ms_bytes(small_net())


@pytest.mark.parametrize("name", NETWORKS)
def test_recorded_network_is_read(name: str) -> None:
    program = read_ms(RECORDED / f"{name}.ms")
    model = parse((RECORDED / f"{name}.ms").read_bytes())
    nodes, digest = NETWORKS[name]
    assert len(program.steps) == len(model.nodes) == nodes
    assert _digest(program) == digest
    assert [step.quantized for step in program.steps] == [node.quant_type == 5 for node in model.nodes]
    for tensor in model.tensors:
        found = program.tensors[tensor.name]
        assert list(found.shape) == tensor.dims
        assert tensor.data == (None if found.data is None else found.data.tobytes())
        assert [(s, z, b) for s, z, b, _ in tensor.quant] == (
            [(s, z, found.quant.bits) for s, z in zip(found.quant.scale, found.quant.zero_point)] if found.quant else []
        )


def _digest(program: Program) -> str:
    """Of every weight and bias, in the order of their names ``b__<node>`` and ``w__<node>``."""
    arrays = {}
    for step in program.steps:
        if step.op in ("Conv2DFusion", "MatMulFusion"):
            for prefix, name in zip(("w__", "b__"), step.inputs[1:]):
                arrays[prefix + step.name] = program.tensors[name].data
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize("name", NETWORKS)
def test_recorded_network_is_rewritten(name: str) -> None:
    program = read_ms(RECORDED / f"{name}.ms")
    data = ms_bytes(program)
    check_int8_file(data)
    assert_same(read_ms(data), program)
    assert len(data) < (RECORDED / f"{name}.ms").stat().st_size


@pytest.mark.parametrize("per_channel", [False, True])
def test_int8_file_is_a_quarter_of_the_float_file(per_channel: bool) -> None:
    program = resnet20(True, per_channel)
    weights = sum(t.data.size for t in program.tensors.values() if t.dtype == "int8" and t.data is not None)
    assert 268_000 < weights < 274_000
    data, floating = ms_bytes(program), ms_bytes(resnet20(False))
    check_int8_file(data)
    assert parse(floating).nodes[0].quant_type == 0
    assert len(data) <= (0.28 if per_channel else 0.26) * len(floating)


@pytest.fixture(scope="module")
def small_file() -> bytes:
    return ms_bytes(small_net())


def test_reading_names_the_file(tmp_path: Path, small_file: bytes) -> None:
    file = tmp_path / "net.ms"
    for data, problem in [
        (b"", "is truncated: it has 0 bytes"),
        (small_file[:7], "is truncated: it has 7 bytes"),
        (small_file[:60], "is truncated or damaged: it has 60 bytes and refers to byte"),
        (
            b"\x10\0\0\0TFL3" + small_file[8:],
            r"is not a MindSpore Lite model: its identifier is b'TFL3'; allowed: b'MSL2'",
        ),
    ]:
        file.write_bytes(data)
        with pytest.raises(ExportError, match=f"^{file} {problem}"):
            read_ms(file)
    for missing in (tmp_path / "missing.ms", tmp_path):
        with pytest.raises(ExportError, match=f"^{missing} cannot be read: "):
            read_ms(missing)


def _readable(data: bytes) -> None:
    """Either a program that holds together or one sentence."""
    problem = ""
    try:
        check_structure(read_ms(data))
    except ExportError as error:
        problem = str(error)
    assert not problem or problem.startswith("the model")
    assert "\n" not in problem


@relaxed
@given(st.data())
def test_truncated_file_is_refused_or_whole(small_file: bytes, data: st.DataObject) -> None:
    _readable(small_file[: data.draw(st.integers(0, len(small_file) - 1))])


@settings(deadline=None, max_examples=600)
@given(st.data())
def test_damaged_file_is_refused_or_read(data: st.DataObject) -> None:
    program = every_primitive()[data.draw(st.sampled_from(["Conv2DFusion", "Split", "SliceFusion", "Resize"]))]
    damaged = bytearray(ms_bytes(program))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(8, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    _readable(bytes(damaged))


@relaxed
@given(st.binary(max_size=300), st.integers(0, 2**32 - 1))
def test_any_bytes_with_the_identifier_are_refused(data: bytes, root: int) -> None:
    with pytest.raises(ExportError, match=r"^the model "):
        read_ms(root.to_bytes(4, "little") + b"MSL2" + data)


@relaxed
@given(st.data())
def test_numbers_and_names_come_back(data: st.DataObject) -> None:
    """Masks, names, shapes, scales and values of any size."""
    sizes = st.integers(1, 5)
    channels = data.draw(sizes)
    positive = st.floats(1e-2, 1e2)
    build = Builder(data.draw(st.text(max_size=12)), seed=data.draw(st.integers(0, 9)))
    x = build.input(
        (data.draw(sizes), data.draw(sizes)), "int8", quant(data.draw(positive), data.draw(st.integers(-128, 127)))
    )
    rows, columns = build.program.tensors[x].shape
    masks = {name: data.draw(st.integers(-(2**63), 2**63 - 1)) for name in ("begin_mask", "ellipsis_mask")}
    cut = [build.constant([0, 0]), build.constant([rows, columns]), build.constant([1, 1])]
    y = build.step("StridedSlice", [x, *cut], (rows, columns), masks, build.program.tensors[x].quant)
    weights = quant(data.draw(st.lists(positive, min_size=channels, max_size=channels)))
    weight = build.constant(build.rng.integers(-128, 128, (columns, channels)), "int8", weights)
    z = build.step("MatMulFusion", [y, weight], (rows, channels), {}, quant(data.draw(positive), -1))
    program = build.finish(z)
    assert_same(read_ms(ms_bytes(program)), program)


def test_write_is_all_or_nothing(tmp_path: Path) -> None:
    file = tmp_path / "new" / "net.ms"
    assert write_ms(small_net(), file) == file
    assert file.read_bytes() == ms_bytes(small_net())
    broken = small_net()
    broken.outputs = ["nothing"]
    with pytest.raises(ExportError, match="the output 'nothing' of the program is computed by no step"):
        write_ms(broken, file)
    assert file.read_bytes() == ms_bytes(small_net())
    assert list(file.parent.iterdir()) == [file]


def test_names_used_twice_are_told_apart(small_file: bytes) -> None:
    data = bytearray(small_file)
    place = parse(small_file).tensor("s1.y").table.follow(9) + 4
    data[place : place + 4] = b"s2.y"
    plain, found = read_ms(small_file), read_ms(bytes(data))
    assert len(found.tensors) == len(plain.tensors)
    assert {"s2.y", "s2.y_1"} <= set(found.tensors)
    x = np.random.default_rng(0).normal(size=plain.tensors[plain.inputs[0]].shape).astype(np.float32)
    for one, other in zip(Simulator(found, X86).run(x), Simulator(plain, X86).run(x)):
        np.testing.assert_array_equal(one, other)


def test_more_constants_than_a_file_holds() -> None:
    build = Builder("huge")
    x = build.input((1, 1))
    y = build.step("AddFusion", [x, build.constant(np.zeros((1, 1)), "float32")], (1, 1))
    program = build.finish(y)
    constant = program.tensors[program.steps[0].inputs[1]]
    constant.data = np.broadcast_to(np.float32(0), (600_000_000, 1))
    constant.shape = constant.data.shape
    with pytest.raises(ExportError, match=r"the constants of huge have 2400000000 bytes; one .ms file holds at most"):
        ms_bytes(program)


Patch = Callable[[bytearray, Model], None]


def _put(data: bytearray, place: int, number: int, size: int = 4) -> None:
    """Replace a number the file holds."""
    assert place > 0
    data[place : place + size] = number.to_bytes(size, "little", signed=number < 0)


def _tensor_field(name: str, slot: int, number: int) -> Patch:
    return lambda data, model: _put(data, model.tensor(name).table.place(slot), number)


@pytest.mark.parametrize(
    ("patch", "problem"),
    [
        (_tensor_field("x0", 1, 42), r": tensor 'x0' is of data type 42; allowed: 32 \(int8\), 34 \(int32\)"),
        (_tensor_field("x0", 3, 5), r": tensor 'x0' has format 5; allowed: 0 \(NCHW\), 1 \(NHWC\), 7 \(KHWC\)"),
        (
            lambda data, model: _put(data, model.tensor("x0").table.span(2, 4)[0], -1),
            r": tensor 'x0' has the shape \(-1, 8, 8, 3\); allowed are fixed sizes",
        ),
        (
            lambda data, model: _put(data, model.tensor("c2").table.span(2, 4)[0], 9),
            r": tensor 'c2' has 216 bytes of values where its shape \(9, 3, 3, 3\) needs 243",
        ),
        (
            lambda data, model: _put(data, model.node("s1").table.place(5), 6),
            r": the node 's1' has quantType 6; allowed: \[0, 1, 2, 3, 4, 5\]",
        ),
        (
            lambda data, model: _put(data, model.node("s1").union.place(0), 160, 1),
            " holds the primitive number 160; allowed: Abs, Activation, ",
        ),
        (
            lambda data, model: _put(data, model.node("s1").union.place(0), 5, 1),
            " is of a later version: AddFusion has an attribute that is not known here",
        ),
        (
            lambda data, model: _put(data, model.node("s1").table.span(3, 4)[0], 99),
            " is damaged: it refers to number 99 of 16 tensors",
        ),
        (
            lambda data, model: _put(data, model.node("s1").table.span(3, 4)[0], 9),
            r": step 's1' \(Conv2DFusion\): it reads 's4.y' before it is computed",
        ),
        (
            lambda data, model: _put(data, model.node("s1").table.place(2), 2**31),
            " is truncated or damaged: it has [0-9]+ bytes and refers to byte",
        ),
    ],
)
def test_file_a_program_cannot_express(small_file: bytes, patch: Patch, problem: str) -> None:
    data = bytearray(small_file)
    patch(data, parse(small_file))
    with pytest.raises(ExportError, match="^the model" + problem):
        read_ms(bytes(data))


def test_packed_weights_are_refused() -> None:
    """A bias is recorded as 32 bits wide; called int8, it is wider than what one byte holds."""
    data = bytearray((RECORDED / "net_lenet5A.ms").read_bytes())
    _put(data, parse(bytes(data)).tensor("conv1.b").table.place(1), 32)
    with pytest.raises(
        ExportError, match=r"tensor 'conv1.b' has weights of 32 bits packed together; allowed are 8 bits"
    ):
        read_ms(bytes(data))
