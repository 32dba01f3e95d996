"""Datasets by name, as splits that are read by index; one reader a file."""

# Importing a reader registers it.
from msqkd.data import arrays, cifar10, digits, image_folder, mindrecord, mnist  # noqa: F401
from msqkd.data.augment import AUGMENTATIONS
from msqkd.data.base import ArraySplit, DataBundle, Split, check_labels, first, subset
from msqkd.data.encoded import EncodedSplit
from msqkd.data.registry import READERS, Request, load_data, register

__all__ = [
    "AUGMENTATIONS",
    "READERS",
    "ArraySplit",
    "DataBundle",
    "EncodedSplit",
    "Request",
    "Split",
    "check_labels",
    "first",
    "load_data",
    "register",
    "subset",
]
