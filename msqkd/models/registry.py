"""Networks by name: msqkd's own, mindcv's, and any Python factory."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any, Callable, NamedTuple, Optional

from mindspore import nn

from msqkd.errors import MissingDependencyError, ModelError, did_you_mean
from msqkd.models import cifar_resnet
from msqkd.models.lenet5 import LeNet5
from msqkd.user_code import find_python, make, reason_of

SOURCES = ("msqkd", "mindcv", "python")


class ModelEntry(NamedTuple):
    """A network of msqkd's own: how it is made, and the (C, H, W) it is meant for."""

    factory: Callable[..., nn.Cell]
    input_shape: tuple[int, int, int]


MODELS: dict[str, ModelEntry] = {
    "lenet5": ModelEntry(LeNet5, (1, 32, 32)),
    "resnet20": ModelEntry(cifar_resnet.resnet20, (3, 32, 32)),
    "resnet32": ModelEntry(cifar_resnet.resnet32, (3, 32, 32)),
    "resnet44": ModelEntry(cifar_resnet.resnet44, (3, 32, 32)),
    "resnet56": ModelEntry(cifar_resnet.resnet56, (3, 32, 32)),
    "resnet110": ModelEntry(cifar_resnet.resnet110, (3, 32, 32)),
}
"""Every network of source ``msqkd``; all take num_classes and in_channels."""


def default_input_shape(source: str, name: Optional[str], args: Mapping[str, Any]) -> Optional[tuple[int, int, int]]:
    """The (C, H, W) a network of source ``msqkd`` is meant for, with C from ``in_channels``; None for other sources."""
    if source != "msqkd" or name not in MODELS:
        return None
    channels, height, width = MODELS[name].input_shape
    return args.get("in_channels", channels), height, width


def build_model(source: str, name: Optional[str], args: Mapping[str, Any], where: str = "model") -> nn.Cell:
    """Make a network.

    Args:
        source: ``msqkd`` (one of `MODELS`), ``mindcv`` (a name of ``mindcv.list_models()``) or ``python``.
        name: the network; for ``python`` ``package.module:factory`` or ``path/to/file.py:factory``.
        args: keyword arguments of the factory.
        where: the place in the user's recipe, for messages.

    Raises:
        ModelError: an unknown source, name or argument, a factory that fails or gives something else than a Cell.
        MissingDependencyError: mindcv is wanted and not installed.
    """
    if source not in SOURCES:
        hint = did_you_mean(source, SOURCES)
        raise ModelError(f"{where}: source '{source}' is unknown; allowed: {', '.join(SOURCES)}{hint}")
    if not name:
        needed = "a target such as package.module:factory" if source == "python" else "a name"
        raise ModelError(f"{where}: source {source} needs {needed}")
    find = {"msqkd": _find_own, "mindcv": _find_mindcv, "python": find_python}[source]
    factory = find(name, where)
    cell = make(factory, name, args, where)
    if not isinstance(cell, nn.Cell):
        raise ModelError(f"{where}: '{name}' gave a {type(cell).__name__}; a mindspore.nn.Cell is needed")
    return cell


def _find_own(name: str, where: str) -> Callable[..., nn.Cell]:
    if name not in MODELS:
        raise _unknown(name, MODELS, where, f"allowed: {', '.join(MODELS)}")
    return MODELS[name].factory


def _find_mindcv(name: str, where: str) -> Callable[..., nn.Cell]:
    try:
        mindcv = importlib.import_module("mindcv")
    except ModuleNotFoundError as error:
        if error.name != "mindcv":
            raise ModelError(f"{where}: mindcv cannot be imported: {reason_of(error)}") from error
        raise MissingDependencyError(
            f"{where}: source mindcv needs the package mindcv; install it with: pip install 'msqkd[mindcv]'"
        ) from None
    names = mindcv.list_models()
    if name not in names:
        raise _unknown(name, names, where, f"mindcv has {len(names)} others (mindcv.list_models())")

    def create(**args: Any) -> nn.Cell:
        return mindcv.create_model(name, **args)

    return create


def _unknown(name: str, names: Iterable[str], where: str, allowed: str) -> ModelError:
    return ModelError(f"{where}: there is no network '{name}'; {allowed}{did_you_mean(name, names)}")
