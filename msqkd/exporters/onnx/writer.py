"""An ONNX model as it is built: nodes, initialisers, names that are used once; and the file it becomes.

Operator set 20 (the first with Gelu) and IR version 9, which every onnxruntime since 1.17 reads. The bytes depend on
the network alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Union

import numpy as np

from msqkd.errors import ExportError, MissingDependencyError
from msqkd.files import PathLike, write_bytes
from msqkd.graph.ir import TensorType, unique_name
from msqkd.version import __version__

OPSET, IR_VERSION = 20, 9
BATCH = "N"
"""The name of the open dimension."""

_PROBE = 999_983  # a prime no layer has as its size: where it comes out of shape inference, the batch does
_FILE_LIMIT = 2**31 - 2**24  # a protobuf file holds less than 2 GiB; the rest is for nodes and names


def onnx_package() -> Any:
    """The package `onnx`.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import onnx
        import onnx.numpy_helper
        import onnx.shape_inference
    except ImportError as error:
        raise MissingDependencyError(
            "ONNX files are written with the package onnx, which is not installed; pip install 'msqkd[onnx]'"
        ) from error
    return onnx


class ModelWriter:
    """Collects the parts of one model.

    Args:
        name: of the graph.
        taken: names that new ones must not repeat (values of the network).

    Attributes:
        owner: the operation of the network that what is written next is part of; empty where that is none.
        owners: of every operation and value written, by name.
    """

    def __init__(self, name: str, taken: Iterable[str]) -> None:
        self.onnx = onnx_package()
        self.name = name
        self.owner = ""
        self.owners: dict[str, str] = {}
        self.nodes: list[Any] = []
        self.inputs: dict[str, TensorType] = {}
        self.initializers: dict[str, Any] = {}
        self._taken = set(taken)
        self._node_names: set[str] = set()
        self._derived: dict[str, str] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def unique(self, hint: str) -> str:
        """A value name not in use, built from `hint`; it is in use from now on."""
        name = unique_name(hint, self._taken)
        self._taken.add(name)
        return name

    def parameter(self, name: str, array: np.ndarray) -> str:
        """Store a parameter or constant of the network under its own name, which is returned."""
        if name not in self.initializers:
            self.initializers[name] = self.onnx.numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def derived(self, hint: str, array: np.ndarray) -> str:
        """Store what is made of the network, once for each `hint`; returns the name, `hint` unless that is taken."""
        if hint not in self._derived:
            self._derived[hint] = self.parameter(self.unique(hint), array)
        return self._derived[hint]

    def constant(self, array: np.ndarray, hint: str) -> str:
        """The name of a small `array`; equal ones are stored once."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.parameter(self.unique(hint), array)
        return self._constants[key]

    def node(self, op: str, inputs: Sequence[str], outputs: Sequence[str], name: str, **attrs: Any) -> None:
        """Append an operation; its own name is `name`, or that with a number where it is taken."""
        unique = unique_name(name, self._node_names)
        self._node_names.add(unique)
        self.owners.update(dict.fromkeys((unique, *outputs), self.owner))
        self.nodes.append(self.onnx.helper.make_node(op, inputs, outputs, name=unique, **attrs))

    def input(self, name: str, kind: TensorType) -> None:
        """Declare an input of the model; an unknown dimension is the batch."""
        self.inputs[name] = kind

    def element(self, dtype: str) -> int:
        """ONNX's number of a numpy dtype."""
        return int(self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def model(self, outputs: Sequence[tuple[str, str]]) -> Any:
        """The ModelProto with `outputs` (name, dtype), whose shapes follow from the operations.

        Raises:
            ExportError: the model is larger than a file can be.
        """
        helper = self.onnx.helper
        size = sum(len(tensor.raw_data) for tensor in self.initializers.values())
        if size > _FILE_LIMIT:
            raise ExportError(f"{self.name}: its weights take {size / 2**30:.1f} GiB; a single ONNX file holds 2 GiB")
        results = [helper.make_tensor_value_info(name, self.element(dtype), None) for name, dtype in outputs]
        graph = helper.make_graph(
            self.nodes, self.name, self._inputs(_PROBE), results, list(self.initializers.values())
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="msqkd",
            producer_version=__version__,
        )
        inferred = self.onnx.shape_inference.infer_shapes(model, data_prop=True).graph.output
        del model.graph.input[:], model.graph.output[:]
        model.graph.input.extend(self._inputs(BATCH))
        model.graph.output.extend(self._opened(result) for result in inferred)
        return model

    def _inputs(self, batch: Union[int, str]) -> list[Any]:
        return [
            self.onnx.helper.make_tensor_value_info(
                name, self.element(kind.dtype), [batch if size < 0 else size for size in kind.shape]
            )
            for name, kind in self.inputs.items()
        ]

    def _opened(self, result: Any) -> Any:
        """An output inferred for the batch `_PROBE`, with that dimension open and others that depend on it unknown."""
        kind = result.type.tensor_type
        sizes = [dim.dim_value for dim in kind.shape.dim]
        shape = [BATCH if size == _PROBE else None if size % _PROBE == 0 else size for size in sizes]
        return self.onnx.helper.make_tensor_value_info(result.name, kind.elem_type, shape)


def write_model(model: Any, file: PathLike) -> Path:
    """Check `model` and write it atomically; returns the path.

    Raises:
        ExportError: the model is not valid ONNX, or the file cannot be written.
    """
    onnx, path = onnx_package(), Path(file)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name}: onnx.checker refuses the model: {str(error).splitlines()[0]}") from error
    try:
        write_bytes(path, model.SerializeToString(deterministic=True))
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror}") from error
    return path
