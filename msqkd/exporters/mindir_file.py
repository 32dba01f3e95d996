"""A cell as a MindIR file; weights go from the cell into the file one after the other, without a copy of them all."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, BinaryIO, Callable, Optional

import mindspore as ms
import numpy as np

from msqkd.errors import ExportError
from msqkd.exporters.canonical import canonical_model
from msqkd.files import PathLike, replacing
from msqkd.graph.ir import Graph

Form = Callable[[Any], None]
Store = Callable[[str, np.ndarray], np.ndarray]
_LARGEST = 1 << 30  # bytes of weights in one file; mindspore.export splits what is larger, which nobody reads


def fixed_inputs(graph: Graph, batch_size: int) -> list[Any]:
    """Return a Tensor of zeros for each input of a graph, with this batch."""
    kinds = [graph.values[name].type for name in graph.inputs]
    return [ms.Tensor(np.zeros((batch_size, *kind.shape[1:]), kind.dtype)) for kind in kinds if kind is not None]


def write_cell(
    cell: Any, inputs: list[Any], file: PathLike, form: Form = canonical_model, store: Optional[Store] = None
) -> Path:
    """`mindspore.export` to `file`, atomically; the bytes depend on the network alone.

    Args:
        cell: the network.
        inputs: Tensors of the shapes and dtypes it takes.
        file: where to.
        form: brings the ``ModelProto``, without the numbers of its weights, to the form it is written in, in place.
        store: (parameter's name, array) -> the array of this shape and dtype that is written for it.

    Raises:
        ExportError: MindSpore cannot compile the network, or the file cannot be written.
    """
    target = Path(file)
    raised: list[Exception] = []

    def write(model: Any) -> None:
        try:
            _write(model, cell.parameters_dict(), target, form, store)
        except Exception as error:  # it would come back as the compiler's
            raised.append(error)
        model.Clear()  # what MindSpore writes itself is not looked at

    with tempfile.TemporaryDirectory() as folder:
        try:
            file_name = str(Path(folder) / "model.mindir")
            ms.export(cell, *inputs, file_name=file_name, file_format="MINDIR", custom_func=write)
        except Exception as error:  # MindSpore raises whatever the compiler met
            raise ExportError(
                f"{target.name}: MindSpore cannot export the network: {str(error).splitlines()[0]}"
            ) from error
    if raised and isinstance(raised[0], OSError):
        raise ExportError(f"cannot write {target}: {raised[0].strerror}") from raised[0]
    if raised:
        raise raised[0]
    return target


def _write(model: Any, parameters: dict[str, Any], target: Path, form: Form, store: Optional[Store]) -> None:
    names = [entry.name.partition(":")[2] for entry in model.graph.parameter]
    form(model)
    if sum(parameters[name].nbytes for name in names) > _LARGEST:
        raise ExportError(f"{target.name}: the network is larger than the 1 GiB a single MindIR file holds")

    def bytes_of(index: int) -> memoryview:
        array = parameters[names[index]].asnumpy()
        if store is not None:
            array = store(names[index], array)
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data

    with replacing(target) as place, open(place, "wb") as stream:
        write_model(model, [parameters[name].nbytes for name in names], bytes_of, stream)


def write_model(model: Any, sizes: list[int], bytes_of: Callable[[int], Any], stream: BinaryIO) -> None:
    """Serialise a ModelProto whose parameters have their numbers elsewhere, as the protobuf library does it, with all
    fields in the order of their numbers; `model` is taken apart.

    Args:
        model: its ``graph.parameter`` have no ``raw_data``.
        sizes: the bytes of each parameter.
        bytes_of: index of a parameter -> its bytes; asked for once, in order.
        stream: where to.
    """
    weights = [_around(entry, "raw_data") for entry in model.graph.parameter]
    heads = [before + (_tag(9, size) if size else b"") for (before, _), size in zip(weights, sizes)]  # 9 is raw_data
    lengths = [len(head) + size + len(after) for head, size, (_, after) in zip(heads, sizes, weights)]
    tags = [_tag(3, length) for length in lengths]  # 3 is graph.parameter
    before_weights, behind_weights = _around(model.graph, "parameter")
    graph_size = len(before_weights) + sum(map(len, tags)) + sum(lengths) + len(behind_weights)
    before_graph, behind_graph = _around(model, "graph")
    stream.write(before_graph + _tag(7, graph_size) + before_weights)  # 7 is graph
    for index, (tag, head, (_, after)) in enumerate(zip(tags, heads, weights)):
        stream.write(tag + head)
        if sizes[index]:
            stream.write(bytes_of(index))
        stream.write(after)
    stream.write(behind_weights + behind_graph)


def _around(message: Any, field: str) -> tuple[bytes, bytes]:
    """The fields before and behind `field`, serialised; all but those before are cleared."""
    number = message.DESCRIPTOR.fields_by_name[field].number
    message.ClearField(field)
    behind = type(message)()
    for other, value in message.ListFields():
        if other.number > number:
            if other.is_repeated:
                getattr(behind, other.name).MergeFrom(value)
            elif other.message_type is not None:
                getattr(behind, other.name).CopyFrom(value)
            else:
                setattr(behind, other.name, value)
            message.ClearField(other.name)
    return message.SerializeToString(deterministic=True), behind.SerializeToString(deterministic=True)


def _tag(number: int, length: int) -> bytes:
    """What stands before a field of `length` bytes."""
    found = bytearray([number << 3 | 2])
    while length > 127:
        found.append(length & 127 | 128)
        length >>= 7
    return bytes([*found, length])
