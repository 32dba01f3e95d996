"""The state of a training on disk: written whole, checked when read, exact to the bit."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Optional

import mindspore as ms
import numpy as np

from msqkd.errors import CheckpointError
from msqkd.files import PathLike, sha256, write_bytes, write_text
from msqkd.train.step import TrainStep

_SCHEMA = 1
_META = "__meta__"


@dataclass
class History:
    """What is told of a training afterwards."""

    loss: list[tuple[int, float]] = field(default_factory=list)
    learning_rate: list[tuple[int, float]] = field(default_factory=list)
    accuracy: list[tuple[int, float]] = field(default_factory=list)
    skipped_steps: int = 0
    seconds: float = 0.0
    start_of_activation_quantisation: Optional[int] = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return asdict(self)


def save_state(step: TrainStep, network: Any, history: History, key: str, path: PathLike) -> None:
    """Write parameters, ranges, optimiser and history; `key` says which training it is."""
    arrays = {f"net/{name}": value for name, value in _arrays(network.get_parameters()).items()}
    arrays.update({f"opt/{name}": value for name, value in _arrays(_own(step, network)).items()})
    meta = {"schema": _SCHEMA, "key": key, "steps": step.steps_done, "history": history.to_dict()}
    arrays[_META] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    write_bytes(path, stream.getvalue())
    write_text(f"{path}.sha256", sha256(path) + "\n")


def load_state(step: TrainStep, network: Any, key: str, path: PathLike) -> History:
    """Bring parameters, ranges and optimiser back to where `save_state` left them.

    Raises:
        CheckpointError: the file is damaged, or belongs to another training.
    """
    try:
        with open(f"{path}.sha256", encoding="ascii") as stream:
            expected = stream.read().strip()
        if sha256(path) != expected:
            raise CheckpointError(f"{path} is damaged: its checksum differs; remove it to start this training over")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); remove it to start this training over") from error
    meta = json.loads(arrays.pop(_META).tobytes().decode())
    if meta["schema"] != _SCHEMA or meta["key"] != key:
        raise CheckpointError(f"{path} belongs to another training; remove it to start this training over")
    for prefix, parameters in (("net/", network.get_parameters()), ("opt/", _own(step, network))):
        for parameter in parameters:
            stored = arrays.get(prefix + parameter.name)
            if stored is None or stored.shape != tuple(parameter.shape):
                raise CheckpointError(f"{path} lacks '{parameter.name}'; remove it to start this training over")
            parameter.set_data(ms.Tensor(stored))
    step.steps_done = int(meta["steps"])
    held = meta["history"]
    pairs = {name: [tuple(pair) for pair in held[name]] for name in ("loss", "learning_rate", "accuracy")}
    return History(**{**held, **pairs})


def _own(step: TrainStep, network: Any) -> list[Any]:
    """The optimiser's own parameters: moments, the step counter."""
    known = {id(parameter) for parameter in network.get_parameters()}
    return [parameter for parameter in step.optimizer.get_parameters() if id(parameter) not in known]


def _arrays(parameters: Any) -> dict[str, np.ndarray]:
    return {parameter.name: parameter.asnumpy() for parameter in parameters}
