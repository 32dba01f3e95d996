"""Weights from and to files: MindSpore, safetensors, numpy and PyTorch, matched by exact names.

`mindspore.load_param_into_net` matches names by their ends and casts without a word; `load_checkpoint` here matches
whole names, says what it cast, and refuses a file that does not fit. PyTorch files are read without PyTorch, by an
unpickler that knows tensors and plain containers and refuses everything else.
"""

from __future__ import annotations

import binascii
import io
import json
import math
import pickle
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Literal, NamedTuple, Optional

import numpy as np

from msqkd.errors import CheckpointError, did_you_mean
from msqkd.files import PathLike, replacing

if TYPE_CHECKING:
    from mindspore import Parameter, nn

Crc = Literal["ok", "absent"]


class Stored(NamedTuple):
    """An array of a file: bfloat16 values come as float32, `dtype` says what the file holds."""

    array: np.ndarray
    dtype: str


@dataclass(frozen=True)
class LoadReport:
    """What `load_checkpoint` did.

    Attributes:
        file: the checkpoint.
        loaded: names of the network's parameters that took a value from the file.
        renamed: (name in the file, parameter) where the two differ.
        cast: (parameter, type in the file, type in the network) where the two differ.
        missing: parameters of the network the file has no value for, or none of their shape.
        reshaped: (parameter, shape in the file, shape in the network) where the two differ; those are missing.
        unused: names in the file that no parameter of the network took, optimiser state and counters included.
        crc: ``ok`` when the file has a CRC of its own and it is right, ``absent`` when it has none.
    """

    file: str
    loaded: list[str]
    renamed: list[tuple[str, str]]
    cast: list[tuple[str, str, str]]
    missing: list[str]
    reshaped: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    unused: list[str]
    crc: Crc

    def words(self) -> str:
        """All of it in a sentence: ``270 of 270 parameters loaded from resnet20.pth; 3 entries ... not used: ...``."""
        total = len(self.loaded) + len(self.missing)
        parts = [f"{len(self.loaded)} of {total} parameters loaded from {self.file}"]
        parts[0] += " (CRC checked)" if self.crc == "ok" else ""
        if self.renamed:
            parts.append(f"{len(self.renamed)} renamed: {_some([f'{old} → {new}' for old, new in self.renamed], 2)}")
        if self.cast:
            kinds = dict.fromkeys(f"{source} → {target}" for _, source, target in self.cast)
            parts.append(f"{len(self.cast)} cast: {', '.join(kinds)}")
        if self.missing:
            parts.append(f"not in the file: {_some(self.missing)}")
        if self.unused:
            parts.append(f"{len(self.unused)} of the file not used: {_some(self.unused)}")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The attributes, as JSON can hold them."""
        return asdict(self)


# --- loading -------------------------------------------------------------------------------------------------------


def load_checkpoint(
    net: nn.Cell, file: PathLike, *, name_map: Optional[PathLike] = None, strict: bool = True
) -> LoadReport:
    """Set the parameters of `net` from `file`; nothing is changed when anything is wrong.

    A parameter takes the value of exactly its name, or of the same name in the other framework's words for
    normalisation and embedding (gamma, beta, moving_mean, moving_variance, embedding_table are weight, bias,
    running_mean, running_var, weight in PyTorch). A prefix that wrappers put before all names (``module.``,
    ``_orig_mod.``, ``model.``, ``net.``, ``network.``, ``backbone.``, ``_backbone.``) is dropped where no parameter of
    the network begins with it.

    Args:
        net: the network.
        file: .ckpt, .safetensors, .npz, .pth, .pt or .th.
        name_map: a JSON file {name in `file`: name in the network}, applied first. A name that ends with a dot
            stands for all names it begins.
        strict: refuse a file that has not exactly the network's parameters. Optimiser state, epoch and batch counters
            may always be there. Without it a parameter of another shape counts as missing and unused.

    Raises:
        CheckpointError: a missing, damaged or unsafe file, weights that are not finite, a value that would lose its
            meaning as the parameter's type, a file of another network (`strict`), or one that shares nothing with it.
    """
    path = Path(file)
    stored, crc = _read(path)
    if name_map is not None:
        stored = _rename(stored, Path(name_map), path)
    parameters = {parameter.name: (name, parameter) for name, parameter in net.parameters_and_names()}
    stored, original = _without_wrappers(stored, parameters)
    match = _match(parameters, stored)
    shapes = {
        name: (stored[found].array.shape, tuple(parameters[name][1].shape))
        for name, found in match.items()
        if stored[found].array.shape != tuple(parameters[name][1].shape)
    }
    missing = [name for name in parameters if name not in match and not _may_be_missing(name)]
    taken = set(match.values())
    unused = [name for name in stored if name not in taken]
    if strict:
        unexpected = [name for name in unused if not _is_training_state(name, parameters)]
        if missing or unexpected or shapes:
            raise CheckpointError(_mismatch(path, len(parameters), missing, unexpected, shapes))
    for name in shapes:
        missing.append(name)
        unused.append(match.pop(name))
    renamed = [(original[found], name) for name, found in match.items() if original[found] != name]
    if not match:
        raise CheckpointError(f"{path} has no parameter of the network; it holds {_some(list(stored))}")
    values, cast = {}, []
    for name, found in match.items():
        parameter = parameters[name][1]
        source, target = stored[found].dtype, str(parameter.dtype).lower()
        values[name] = _to_tensor(stored[found].array, parameter, f"{path}: parameter '{found}'", source, target)
        if source != target:
            cast.append((name, source, target))
    for name, tensor in values.items():
        parameters[name][1].set_data(tensor)
    reshaped = [(name, *pair) for name, pair in shapes.items()]
    left = [original[name] for name in unused]
    return LoadReport(str(path), list(values), renamed, cast, missing, reshaped, left, crc)


def read_checkpoint(file: PathLike) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint by the names in the file (bfloat16 as float32), values as they are.

    Formats and errors are those of `load_checkpoint`.
    """
    return {name: value.array for name, value in _read(Path(file))[0].items()}


_WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "network.", "backbone.", "_backbone.")
"""What PyTorch's DataParallel and compile, MindSpore's training cells and training frameworks put before every name."""
_WORDS = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
    "embedding_table": "weight",
}
"""The last part of a name in MindSpore and in PyTorch."""

# fmt: off
_TRAINING_STATE = {
    "epoch", "epoch_num", "step_num", "global_step", "learning_rate", "momentum", "weight_decay", "beta1_power",
    "beta2_power", "loss_scale", "scale_sense", "current_iterator_step", "last_overflow_iterator_step",
}
"""Names MindSpore's callbacks, optimisers and loss scaling save beside the network's."""
_OPTIMIZER_PREFIXES = {
    "accum", "accum_update", "adam_m", "adam_v", "exp_avg", "lamb_m", "lamb_v", "mean_grad", "mean_square", "moment",
    "moment1", "moment2", "moments", "prev", "stat", "step_size", "vhat",
}
"""What mindspore.nn's optimisers put, with a dot, before the name of the parameter their state belongs to."""
# fmt: on


def _match(parameters: Mapping[str, tuple[str, Parameter]], stored: Mapping[str, Stored]) -> dict[str, str]:
    """Parameter name to the name in the file it takes; exact names go first."""
    match = {}
    for name, (structural, _) in parameters.items():
        found = next((candidate for candidate in (name, structural) if candidate in stored), None)
        if found is not None:
            match[name] = found
    taken = set(match.values())
    free = {_common_name(name): name for name in stored if name not in taken}
    for name, (structural, _) in parameters.items():
        if name not in match:
            found = free.get(_common_name(name)) or free.get(_common_name(structural))
            if found is not None:
                match[name] = found
    return match


def _common_name(name: str) -> str:
    head, dot, last = name.rpartition(".")
    return head + dot + _WORDS.get(last, last)


def _may_be_missing(name: str) -> bool:
    """Whether a file may lack a parameter: a counter, or what checkpoints of quantised cells did not have at first."""
    return _is_counter(name) or name.endswith("quantization.phases")


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] == "num_batches_tracked"


def _is_training_state(name: str, parameters: Mapping[str, Any]) -> bool:
    prefix, _, rest = name.partition(".")
    return _is_counter(name) or name in _TRAINING_STATE or (prefix in _OPTIMIZER_PREFIXES and rest in parameters)


def _without_wrappers(
    stored: dict[str, Stored], parameters: Mapping[str, Any]
) -> tuple[dict[str, Stored], dict[str, str]]:
    """`stored` without the wrappers' prefixes, and the name each entry has in the file."""
    original = {name: name for name in stored}
    prefixes = [prefix for prefix in _WRAPPERS if not any(name.startswith(prefix) for name in parameters)]
    while True:
        for prefix in prefixes:
            names = {name: _without_prefix(name, prefix) for name in original}
            weights = [name for name in names if name not in _TRAINING_STATE and not _is_counter(name)]
            if weights and None not in names.values() and any(name.startswith(prefix) for name in weights):
                break
        else:
            return stored, original
        stored = {names[name] or name: value for name, value in stored.items()}
        original = {names[name] or name: held for name, held in original.items()}


def _without_prefix(name: str, prefix: str) -> Optional[str]:
    """`name`, or the optimiser's state of it, without `prefix`; None where it does not begin with it."""
    if name in _TRAINING_STATE:
        return name
    head, dot, rest = name.partition(".")
    if head in _OPTIMIZER_PREFIXES and rest.startswith(prefix):
        return head + dot + rest[len(prefix) :]
    return name[len(prefix) :] if name.startswith(prefix) else None


def _rename(stored: dict[str, Stored], map_file: Path, path: Path) -> dict[str, Stored]:
    try:
        names = json.loads(map_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"name map {map_file} cannot be read: {error}") from error
    if not isinstance(names, dict) or not all(isinstance(new, str) for new in names.values()):
        raise CheckpointError(
            f"name map {map_file} must be one JSON object of names in the file to names in the network"
        )
    renamed: dict[str, Stored] = {}
    used = set()
    for name, value in stored.items():
        prefixes = [old for old in names if old.endswith(".") and name.startswith(old)]
        old = name if name in names else max(prefixes, key=len, default="")
        if old:
            used.add(old)
        new = names[old] + name[len(old) :] if old else name
        if new in renamed:
            raise CheckpointError(f"name map {map_file} gives two parameters of {path} the name '{new}'")
        renamed[new] = value
    idle = [old for old in names if old not in used]
    if idle:
        raise CheckpointError(
            f"name map {map_file}: {path} has no parameter '{idle[0]}'{did_you_mean(idle[0], stored)}"
        )
    return renamed


def _mismatch(
    path: Path,
    parameters: int,
    missing: list[str],
    unexpected: list[str],
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> str:
    wrong = len(missing) + len(unexpected) + len(shapes)
    parts = [f"{wrong} of {parameters + len(unexpected)} parameters do not match"]
    if missing:
        parts.append(f"missing {_some(missing)}")
    if unexpected:
        parts.append(f"unexpected {_some(unexpected)}{did_you_mean(missing[0], unexpected) if missing else ''}")
    if shapes:
        parts.append("shape " + _some([f"{name} {found} for {needed}" for name, (found, needed) in shapes.items()]))
    advice = "; where only the names differ, give them in a name_map" if missing and unexpected else ""
    return f"{path} is a checkpoint of another network: " + "; ".join(parts) + advice


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _to_tensor(array: np.ndarray, parameter: Parameter, where: str, source: str, target: str) -> Any:
    """`array` as a Tensor of the parameter's type; CheckpointError when its values do not survive that."""
    from mindspore import Tensor, float32

    if array.dtype.kind == "c" or (array.dtype.kind == "f" and "float" not in target):
        raise CheckpointError(f"{where} holds {source}, the network needs {target}")
    tensor = Tensor(array, dtype=parameter.dtype)
    if array.dtype.kind == "f":
        bad = array.size - int(np.isfinite(array).sum())
        if bad:
            raise CheckpointError(f"{where}: {bad} of {array.size} values are not finite")
        if source != target and not np.isfinite(tensor.astype(float32).asnumpy()).all():
            raise CheckpointError(f"{where} has values up to {np.abs(array).max():g}, too great for {target}")
    return tensor


# --- reading a file ------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[str, Stored], Crc]:
    """All arrays of a checkpoint file."""
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise CheckpointError(f"{path}: a checkpoint's name ends with one of {', '.join(_READERS)}")
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, a checkpoint file is needed")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        beside = [entry.name for entry in path.parent.glob("*") if entry.suffix.lower() in _READERS]
        raise CheckpointError(f"{path} does not exist{did_you_mean(path.name, beside)}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not content:
        raise CheckpointError(f"{path} is empty")
    try:
        stored, crc = read(content, path)
    except CheckpointError:
        raise
    except Exception as error:  # parsers of damaged files raise a great many kinds
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{path} is damaged or not a {path.suffix} checkpoint ({reason})") from error
    if not stored:
        raise CheckpointError(f"{path} holds no parameters")
    return stored, crc


_ALIASES = {"half": "float16", "float": "float32", "double": "float64", "bool_": "bool"}
_SAFETENSORS_TYPES = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint"}


def _decode(raw: bytes, dtype: str, shape: Optional[tuple[int, ...]] = None) -> Stored:
    """Little-endian `raw` bytes of a type named in any of the formats' ways; flat without a shape."""
    name = dtype.lower()
    name = _ALIASES.get(name, name)
    if name == "bfloat16":
        # The upper half of a float32.
        array = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        # Through its text the dtype is the native one where the bytes are in its order: MindSpore 2.7 takes no other.
        array = np.frombuffer(raw, np.dtype(np.dtype(name).newbyteorder("<").str))
    return Stored(array if shape is None else array.reshape(shape), name)


def _check_crc(path: Path, computed: int, written: int) -> Crc:
    if computed != written:
        raise CheckpointError(f"{path} is damaged: its CRC is {computed:08x}, the file says {written:08x}")
    return "ok"


def _read_ckpt(content: bytes, path: Path) -> tuple[dict[str, Stored], Crc]:
    """MindSpore's own: a protobuf Checkpoint, followed by ``crc_num`` and ten bytes when it was saved with CRC."""
    from mindspore.train.checkpoint_pb2 import Checkpoint

    crc: Crc = "absent"
    if content[-17:-10] == b"crc_num":
        content, written = content[:-17], int.from_bytes(content[-10:], "big")
        crc = _check_crc(path, binascii.crc32(content), written)
    message = Checkpoint()
    message.ParseFromString(content)
    pieces: dict[str, list[Any]] = {}  # a great parameter is stored in several pieces
    for value in message.value:
        if not value.HasField("tensor"):
            raise CheckpointError(f"{path}: '{value.tag}' is a MapParameter, which is not supported")
        if value.tensor.tensor_type != "str":  # text is information appended for people
            pieces.setdefault(value.tag, []).append(value.tensor)
    stored = {}
    for name, tensors in pieces.items():
        raw = b"".join(tensor.tensor_content for tensor in tensors)
        dims = tuple(tensors[0].dims)
        # Scalars have been written with dims [0] as well as without.
        stored[name] = _decode(raw, tensors[0].tensor_type, () if dims == (0,) and raw else dims)
    return stored, crc


def _read_safetensors(content: bytes, path: Path) -> tuple[dict[str, Stored], Crc]:
    from safetensors import deserialize

    tensors = sorted(deserialize(content), key=lambda item: item[0])
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    written = header.get("__metadata__", {}).get("crc_num")
    crc: Crc = "absent"
    if written is not None:
        computed = 0
        for name, tensor in tensors:  # as MindSpore computes it
            computed = binascii.crc32(tensor["data"], binascii.crc32(name.encode(), computed))
        crc = _check_crc(path, computed, int(written))
    stored = {}
    for name, tensor in tensors:
        kind = tensor["dtype"].rstrip("0123456789")
        dtype = _SAFETENSORS_TYPES.get(kind, kind) + tensor["dtype"][len(kind) :]
        stored[name] = _decode(bytes(tensor["data"]), dtype, tuple(tensor["shape"]))
    return stored, crc


def _read_npz(content: bytes, path: Path) -> tuple[dict[str, Stored], Crc]:
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        if isinstance(archive, np.ndarray):
            raise CheckpointError(f"{path} is a single .npy array, not an .npz file")
        arrays = {name: archive[name] for name in archive.files}
    return {name: Stored(array, str(array.dtype)) for name, array in arrays.items()}, "absent"


# --- PyTorch, without PyTorch ---------------------------------------------------------------------------------------

_TORCH_MAGIC = 0x1950A86A20F9469CFC6C
_TORCH_STORAGES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")


class _StorageType(NamedTuple):
    dtype: str


@dataclass
class _Storage:
    """The memory of one or more tensors; in old files its bytes come after the pickle."""

    dtype: str
    count: int
    values: np.ndarray = field(default_factory=lambda: np.empty(0))


class _Strided(NamedTuple):
    """A tensor before its values are known."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def to_array(self) -> np.ndarray:
        """The values, contiguous. ValueError when they would lie outside the storage or overlap."""
        numbers = (self.offset, *self.shape, *self.strides)
        if len(self.shape) != len(self.strides) or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"a tensor of shape {self.shape} with strides {self.strides}")
        size = math.prod(self.shape)
        if size == 0:
            return np.zeros(self.shape, self.storage.values.dtype)
        last = self.offset + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides))
        # More values than the storage has would be overlapping, and could be made to fill the memory.
        if last >= self.storage.values.size or size > self.storage.values.size:
            raise ValueError(f"a tensor of shape {self.shape} in a storage of {self.storage.values.size} values")
        step = self.storage.values.itemsize
        view = np.lib.stride_tricks.as_strided(
            self.storage.values[self.offset :], self.shape, [stride * step for stride in self.strides]
        )
        return np.array(view, order="C")


class _TorchUnpickler(pickle.Unpickler):
    """Tensors and plain containers; every other global is refused before anything of it can run."""

    def __init__(self, stream: io.BytesIO, path: Path, storage: Callable[[str, str, int], _Storage]) -> None:
        """`storage` gives the storage of (key, type, number of values)."""
        super().__init__(stream, encoding="utf-8")
        self._path = path
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a global."""
        if module in ("torch", "torch.storage") and name in _TORCH_STORAGES:
            return _StorageType(_TORCH_STORAGES[name])
        allowed: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("builtins", "set"): set,
            ("__builtin__", "set"): set,
            ("torch", "Size"): tuple,
            # Functions made here, so that a pickle which sets attributes on them changes nothing that lasts.
            ("torch._utils", "_rebuild_tensor"): lambda *args: _Strided(*args),
            ("torch._utils", "_rebuild_tensor_v2"): lambda *args: _Strided(*args[:4]),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if (module, name) not in allowed:
            raise CheckpointError(
                f"{self._path}: refused to load '{module}.{name}', which is neither a tensor nor a plain container; "
                "save the network's state_dict() alone"
            )
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage a tensor refers to: ('storage', type, key, device, number of values, and None in old files)."""
        kind, storage_type, key, _, count = pid[:5]
        if kind != "storage" or not isinstance(storage_type, _StorageType) or any(pid[5:]):
            raise ValueError(f"a reference to {kind!r}")
        return self._storage(str(key), storage_type.dtype, int(count))


def _read_torch(content: bytes, path: Path) -> tuple[dict[str, Stored], Crc]:
    stream = io.BytesIO(content)
    if zipfile.is_zipfile(stream):
        state = _torch_zip(stream, path)
    elif content[257:262] == b"ustar" and tarfile.is_tarfile(path):
        raise CheckpointError(f"{path} is a tar file of PyTorch before 0.1.10, which is not supported")
    else:
        stream.seek(0)
        state = _torch_legacy(stream, path)
    stored = {}
    for name, value in _state_dict(state, path).items():
        if isinstance(name, str) and isinstance(value, _Strided):
            stored[name] = Stored(value.to_array(), value.storage.dtype)
    return stored, "absent"


def _state_dict(state: Any, path: Path) -> Mapping[Any, Any]:
    """The mapping that holds the tensors: `state`, or what it keeps under a usual key."""
    if isinstance(state, Mapping):
        if any(isinstance(value, _Strided) for value in state.values()):
            return state
        for key in _STATE_KEYS:
            if isinstance(state.get(key), Mapping):
                return state[key]
    raise CheckpointError(
        f"{path} holds no state_dict: neither tensors by name nor a mapping {' or '.join(_STATE_KEYS)}"
    )


def _torch_zip(stream: io.BytesIO, path: Path) -> Any:
    """The format since PyTorch 1.6: a zip with data.pkl and one file a storage."""
    with zipfile.ZipFile(stream) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError(f"{len(pickles)} data.pkl in it")
        folder = pickles[0][: -len("data.pkl")]
        if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
            raise CheckpointError(f"{path} was saved on a big-endian machine, which is not supported")
        storages: dict[str, _Storage] = {}

        def storage(key: str, dtype: str, count: int) -> _Storage:
            if key not in storages:
                values = _decode(archive.read(f"{folder}data/{key}"), dtype).array
                if values.size != count:
                    raise ValueError(f"storage {key} has {values.size} values, {count} are expected")
                storages[key] = _Storage(dtype, count, values)
            return storages[key]

        return _TorchUnpickler(io.BytesIO(archive.read(pickles[0])), path, storage).load()


def _torch_legacy(stream: io.BytesIO, path: Path) -> Any:
    """The format before PyTorch 1.6: pickles of magic number, version, machine, object and keys; then the storages."""
    storages: dict[str, _Storage] = {}

    def storage(key: str, dtype: str, count: int) -> _Storage:
        return storages.setdefault(key, _Storage(dtype, count))

    def load() -> Any:
        return _TorchUnpickler(stream, path, storage).load()

    if load() != _TORCH_MAGIC:
        raise ValueError("no PyTorch magic number")
    load()  # the version, 1001 ever since
    if not load()["little_endian"]:
        raise CheckpointError(f"{path} was saved on a big-endian machine, which is not supported")
    state = load()
    for key in load():
        expected = storages[str(key)]
        count = int.from_bytes(stream.read(8), "little")
        width = 2 if expected.dtype == "bfloat16" else np.dtype(expected.dtype).itemsize
        raw = stream.read(count * width)
        if count != expected.count or len(raw) != count * width:
            raise ValueError(f"storage {key} has {len(raw)} bytes, {expected.count} values are expected")
        expected.values = _decode(raw, expected.dtype).array
    return state


_Reader = Callable[[bytes, Path], "tuple[dict[str, Stored], Crc]"]
_READERS: dict[str, _Reader] = {
    ".ckpt": _read_ckpt,
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".th": _read_torch,
}


# --- saving --------------------------------------------------------------------------------------------------------


def save_checkpoint(params: Mapping[str, np.ndarray], file: PathLike) -> None:
    """Write `params` to `file`, whole or not at all: .ckpt (with a CRC), .safetensors or .npz by the name's end.

    Raises CheckpointError for another ending, no parameters, or an array without values in a .ckpt file.
    """
    path = Path(file)
    write = _WRITERS.get(path.suffix)  # in lower case only: MindSpore appends .ckpt to a name on .CKPT
    if write is None:
        raise CheckpointError(f"{path}: a checkpoint to save ends with one of {', '.join(_WRITERS)}")
    if not params:
        raise CheckpointError(f"{path}: there are no parameters to save")
    with replacing(path) as temporary:
        # ascontiguousarray would make scalars one-dimensional.
        write({name: np.array(value, order="C") for name, value in params.items()}, temporary)


def _write_ckpt(params: dict[str, np.ndarray], path: Path) -> None:
    import mindspore

    empty = [name for name, value in params.items() if value.size == 0]
    if empty:  # MindSpore would leave it out without a word
        raise CheckpointError(f"a .ckpt file cannot hold the empty array '{empty[0]}'; .npz and .safetensors can")
    values = [{"name": name, "data": mindspore.Tensor(value)} for name, value in params.items()]
    mindspore.save_checkpoint(values, str(path), crc_check=True)


def _write_safetensors(params: dict[str, np.ndarray], path: Path) -> None:
    from safetensors.numpy import save

    path.write_bytes(save(params, metadata={"format": "ms"}))


def _write_npz(params: dict[str, np.ndarray], path: Path) -> None:
    # Not np.savez: it takes names as keywords, and one may be called "file".
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in params.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, value, allow_pickle=False)


_WRITERS: dict[str, Callable[[dict[str, np.ndarray], Path], None]] = {
    ".ckpt": _write_ckpt,
    ".safetensors": _write_safetensors,
    ".npz": _write_npz,
}
