"""Example inputs of any structure: tensors in tuples, lists and by name, as the flat tensors a graph has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspore import Tensor

from msqkd.errors import CaptureError


def is_structured(example: Any) -> bool:
    """Whether the arguments are more than tensors one after the other: by name, or one a sequence of tensors."""
    if isinstance(example, Mapping):
        return True
    nested = [item for item in example if isinstance(item, (tuple, list))] if isinstance(example, (tuple, list)) else []
    return bool(nested)


def flatten(example: Any) -> tuple[list[Any], list[str], str]:
    """The tensors of a structured example, a name for each, and the text of the call that takes them.

    Example:
        ``{"ids": a, "pair": (b, c)}`` gives ([a, b, c], ["ids", "pair_0", "pair_1"],
        "ids=ids, pair=(pair_0, pair_1,)").

    Raises:
        CaptureError: something in it is not a tensor.
    """
    tensors: list[Any] = []
    names: list[str] = []

    def text(item: Any, name: str) -> str:
        if isinstance(item, (tuple, list)):
            parts = "".join(text(part, f"{name}_{index}") + ", " for index, part in enumerate(item))
            return f"[{parts}]" if isinstance(item, list) else f"({parts})"
        if not isinstance(item, Tensor):
            raise CaptureError(
                f"the example input '{name}' is a {type(item).__name__}; give a Tensor or a tuple of them"
            )
        tensors.append(item)
        names.append(name)
        return name

    if isinstance(example, Mapping):
        call = ", ".join(f"{name}={text(item, name)}" for name, item in example.items())
    else:
        call = ", ".join(text(item, f"input_{index}") for index, item in enumerate(example))
    return tensors, names, call
