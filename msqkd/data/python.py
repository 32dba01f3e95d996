"""``python``: the user's own data, from a function of the user's.

The function returns the training and the test set. Each may be

* the pair ``(inputs, labels)``, or the mapping ``{"inputs": ..., "labels": ...}``, of arrays or tuples of arrays;
* an object with ``__len__`` and ``batch(indices, rng)`` -> ``(inputs, labels)`` (`msqkd.data.tensors.Source`);
* an object with ``__len__`` and ``__getitem__(index)`` -> ``(inputs, labels)`` of one sample;
* a `msqkd.data.Split`.
"""

from __future__ import annotations

from msqkd.data.base import DataBundle
from msqkd.data.registry import Request, register
from msqkd.data.tensors import TensorSplit
from msqkd.errors import DataError
from msqkd.user_code import find_python, make


@register("python")
def read_python(request: Request) -> DataBundle:
    """The two sets that the function `target` gives for `args`; see the module's text for what they may be."""
    if request.target is None:
        raise DataError("data 'python' needs a target, the function that gives the training and the test set")
    where = "data.target"
    found = make(find_python(request.target, where), request.target, request.args, where)
    if isinstance(found, DataBundle):
        return found
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        what = f"{len(found)} values" if isinstance(found, (tuple, list)) else f"a {type(found).__name__}"
        raise DataError(f"{where}: '{request.target}' gave {what}; allowed: the pair (training set, test set)")
    name = request.target.rpartition(":")[2]
    sets = [TensorSplit.of(data, request.inputs, f"{name} {part}") for data, part in zip(found, ("train", "test"))]
    return DataBundle(name, sets[0], sets[1])
