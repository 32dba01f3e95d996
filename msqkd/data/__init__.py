"""Datasets by name, as splits that are read by index; one reader a file."""

# Importing a reader registers it.
from msqkd.data import arrays, cifar10, digits, image_folder, mindrecord, mnist, python  # noqa: F401
from msqkd.data.augment import AUGMENTATIONS
from msqkd.data.base import Arrays, ArraySplit, DataBundle, InputSpec, Split, as_tuple, subset, taken
from msqkd.data.draw import draw, fair_order
from msqkd.data.encoded import EncodedSplit
from msqkd.data.registry import READERS, Request, load_data, register
from msqkd.data.tensors import TensorSplit

__all__ = [
    "AUGMENTATIONS",
    "READERS",
    "ArraySplit",
    "Arrays",
    "DataBundle",
    "EncodedSplit",
    "InputSpec",
    "Request",
    "Split",
    "TensorSplit",
    "as_tuple",
    "draw",
    "fair_order",
    "load_data",
    "register",
    "subset",
    "taken",
]
