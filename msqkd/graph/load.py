"""A MindIR file alone, without the Python code of its network, to Graph.

What `mindspore.export` wrote is all there is: the layers' paths and classes are read from the compiler's scopes, and a
batch that is fixed in the file is opened where the network can be shown to compute each sample for itself.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from msqkd.errors import CaptureError, did_you_mean
from msqkd.files import PathLike
from msqkd.graph.ir import Graph, TensorType
from msqkd.graph.mindir import input_types, network_class, outer_scope, read_model, scope_types
from msqkd.graph.norms import BATCH, MOVING, statistics_of
from msqkd.graph.passes.canonicalize import canonicalize
from msqkd.graph.passes.free_batch import free_batch
from msqkd.platform import mindspore

SUFFIX = ".mindir"

_ENCRYPTED = (0x7F3A5ED8).to_bytes(4, "little")  # how an encrypted file begins
_LAYER_CLASSES = {"Conv2D": "Conv2d", "Dense": "Dense", "MatMul": "Dense", "BatchNorm": "BatchNorm2d"}
_UPDATES = ("Apply", "Assign")
_EXPORT_CALL = "mindspore.export(net, mindspore.Tensor(shape=[None, ...], dtype=mindspore.float32), ...)"


def load_mindir(file: PathLike, *, fixed_batch: bool = True) -> Graph:
    """Read the network of a MindIR file that `mindspore.export` wrote.

    Layers have the paths and classes they had in the exported network; a file whose scopes are gone (as those msqkd
    writes) gives the layers that have parameters the paths of their parameters. The batch is open: that of a file with
    a fixed one is opened when the network then gives every sample of random batches what it gave it before, else it
    stays and a warning says so. BatchNorm's statistics are not trainable, all other float parameters are.

    Args:
        file: the path, ending with .mindir.
        fixed_batch: whether a batch that cannot be opened may stay.

    Returns:
        The graph, canonical, with the file's parameter names and values.

    Raises:
        CaptureError: the batch cannot be opened and may not stay, or the file is missing, damaged, encrypted, keeps
            its weights in other files, holds a training step or a network in training mode, is quantised already, or
            cannot be flattened (as `capture`).
    """
    path = Path(file)
    model = _parse(path)
    name = network_class(model) or path.stem
    try:
        graph = read_model(model, name, scope_types(model, name), outer=outer_scope(model, name))
    except CaptureError:
        raise
    except (ValueError, KeyError, IndexError) as error:
        raise CaptureError(f"{path} is damaged: its parts do not fit together ({error})") from error
    _refuse_other_graphs(graph, path)
    _paths_from_parameters(graph)
    canonicalize(graph)
    _mark_trainable(graph)
    kept = free_batch(graph)
    if kept is not None:
        batch = graph.shape(graph.inputs[0])[0]
        text = (
            f"{path}: the batch stays {batch}, as it was exported, since {kept}; to open it, export the network with "
            f"{_EXPORT_CALL}"
        )
        if not fixed_batch:
            raise CaptureError(text)
        warnings.warn(text, stacklevel=2)
    graph.check()
    return graph


def mindir_inputs(file: PathLike) -> list[TensorType]:
    """The types of the inputs of a MindIR file, an open dimension as -1; errors as `load_mindir`."""
    return input_types(_parse(Path(file)))


# -- the file ---------------------------------------------------------------------------------------------------------


def _parse(path: Path) -> Any:
    """The ``ModelProto`` of a file that holds a whole network, weights included."""
    if path.suffix.lower() != SUFFIX:
        raise CaptureError(f"{path}: the name of a MindIR file ends with {SUFFIX}{_hint(path)}")
    if not path.is_file():
        if path.is_dir():
            raise CaptureError(f"{path} is a folder, a {SUFFIX} file is needed")
        near = [entry.name for entry in path.parent.glob(f"*{SUFFIX}")] if path.parent.is_dir() else []
        raise CaptureError(f"{path} does not exist{did_you_mean(path.name, near)}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CaptureError(f"{path} cannot be read: {error.strerror}") from error
    if data.startswith(_ENCRYPTED):
        raise CaptureError(f"{path} is encrypted; export the network without enc_key")
    from google.protobuf.message import DecodeError
    from mindspore.train import mind_ir_pb2 as pb

    mindspore()
    model = pb.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise CaptureError(f"{path} is damaged or no MindIR file: it cannot be parsed ({len(data):,} bytes)") from error
    if model.producer_name != "MindSpore" or not model.graph.output:
        raise CaptureError(f"{path} is damaged or no MindIR file: it holds no network of MindSpore")
    if not model.little_endian:
        raise CaptureError(f"{path} was written on a big-endian machine, which is not supported")
    # Updates of weights are side effects, which a graph does not have: it would be the loss alone.
    steps = sorted(p.op_type for p in model.primitives if p.op_type.endswith("Grad") or p.op_type.startswith(_UPDATES))
    if steps:
        raise CaptureError(
            f"{path} holds a training step ({', '.join(steps[:3])}); export the network itself, not the cell that "
            "trains it"
        )
    for tensor in model.graph.parameter:
        if tensor.external_data.location:
            raise CaptureError(
                f"{path} keeps the weights in other files ({tensor.external_data.location}), as networks of more than "
                "1 GiB are exported; give the network's Python code and its checkpoint (source: python)"
            )
    return model


def _hint(path: Path) -> str:
    if path.suffix.lower() in (".ckpt", ".safetensors", ".npz", ".pth", ".pt", ".th"):
        return "; a checkpoint holds weights without their network: name the network, and give this as its checkpoint"
    if path.suffix.lower() == ".ms":
        return "; a .ms file is made for a device and cannot be quantised"
    return ""


def _refuse_other_graphs(graph: Graph, path: Path) -> None:
    for name in graph.inputs:
        if -1 in graph.shape(name)[1:]:
            raise CaptureError(
                f"{path}: input '{name}' has the shape {graph.shape(name)}; only the batch, in front, may be open: "
                "export the network with its other sizes given"
            )
    for node in graph.nodes:
        if "Quant" in node.op:
            raise CaptureError(
                f"{path} is quantised already: '{node.name}' is a {node.op}; give the MindIR of the float network"
            )
        if node.op == "BatchNorm" and statistics_of(graph, node) == BATCH:
            raise CaptureError(
                f"{path} was exported in training mode: '{node.name}' (BatchNorm) normalises by each batch; leave "
                "use_batch_statistics at its default, call net.set_train(False) and export it again"
            )
    for name, param in graph.params.items():
        if param.data.dtype.itemsize == 1 and param.data.dtype.kind in "iu":
            raise CaptureError(
                f"{path} is quantised already: parameter '{name}' is {param.data.dtype}; give the MindIR of the float "
                "network"
            )


# -- what the compiler did not write ----------------------------------------------------------------------------------


def _paths_from_parameters(graph: Graph) -> None:
    """Where no operation has a scope, give those with parameters the path of their parameters."""
    if any(node.cell_path for node in graph.nodes):
        return
    taken = {node.name for node in graph.nodes}
    for node in graph.nodes:
        owners = {name.rpartition(".")[0] for name in graph.param_inputs(node)} - {""}
        if len(owners) != 1:
            continue
        (node.cell_path,) = owners
        kinds = ["Cell"] * node.cell_path.count(".") + [_LAYER_CLASSES.get(node.op, node.op)]
        node.cell_types = (graph.name, *kinds)
        if node.op in _LAYER_CLASSES and node.cell_path not in taken:
            node.name = node.cell_path
            taken.add(node.name)


def _mark_trainable(graph: Graph) -> None:
    for node in graph.nodes:
        if node.op == "BatchNorm":
            for index in MOVING:
                if node.inputs[index] in graph.params:
                    graph.params[node.inputs[index]].trainable = False
    for param in graph.params.values():
        param.trainable = param.trainable and param.data.dtype.kind == "f"
