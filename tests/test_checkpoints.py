import io
import json
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn

from msqkd.checkpoints import load_checkpoint, read_checkpoint, save_checkpoint
from msqkd.errors import CheckpointError


class Block(nn.Cell):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.bn = nn.BatchNorm2d(3)


class Net(nn.Cell):
    """Its names are such that matching by their ends would go wrong: `weight` is an end of all the others."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.norm = nn.LayerNorm((4,))
        self.embed = nn.Embedding(5, 4)
        self.linear = nn.Dense(4, 2)
        self.gamma = Parameter(Tensor(np.ones(7, np.float32)), name="gamma")


TORCH_NAMES = {
    "block.conv.weight": "block.conv.weight",
    "block.bn.gamma": "block.bn.weight",
    "block.bn.beta": "block.bn.bias",
    "block.bn.moving_mean": "block.bn.running_mean",
    "block.bn.moving_variance": "block.bn.running_var",
    "norm.gamma": "norm.weight",
    "norm.beta": "norm.bias",
    "embed.embedding_table": "embed.weight",
    "linear.weight": "linear.weight",
    "linear.bias": "linear.bias",
    "gamma": "gamma",
}


def values_of(net: nn.Cell) -> dict:
    return {parameter.name: parameter.asnumpy().copy() for parameter in net.get_parameters()}


def random_values(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=value.shape).astype(np.float32) for name, value in values_of(Net()).items()}


def torch_values(seed: int = 0) -> dict:
    return {TORCH_NAMES[name]: value for name, value in random_values(seed).items()}


def assert_loaded(net: nn.Cell, expected: dict) -> None:
    for name, value in values_of(net).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def assert_untouched(net: nn.Cell, before: dict) -> None:
    assert_loaded(net, before)


# --- writing PyTorch's formats without PyTorch ------------------------------------------------------------------------


STORAGES = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "int64": "LongStorage",
    "uint16": "BFloat16Storage",
}


class FakeTensor:
    """What torch pickles for a tensor; with `strides` the array is the storage."""

    def __init__(self, array: np.ndarray, offset: int = 0, shape: tuple = (), strides: tuple = ()) -> None:
        self.array = np.array(array, order="C")
        self.offset = offset
        self.shape = shape if strides else self.array.shape
        itemsize = self.array.itemsize
        self.strides = strides or tuple(stride // itemsize for stride in self.array.strides)


def dump_torch(value: object, keys: dict, function: str = "_rebuild_tensor_v2") -> bytes:
    """`value` pickled as torch does; `keys` collects the storages."""
    utils, torch = types.ModuleType("torch._utils"), types.ModuleType("torch")

    def rebuild(*args: object) -> None: ...

    rebuild.__module__, rebuild.__qualname__ = "torch._utils", function
    setattr(utils, function, rebuild)
    kinds = {}
    for name in STORAGES.values():
        kinds[name] = type(name, (), {"__module__": "torch"})
        setattr(torch, name, kinds[name])

    class Key:
        def __init__(self, tensor: FakeTensor) -> None:
            self.tensor = tensor

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: object) -> object:
            if not isinstance(item, Key):
                return None
            array = item.tensor.array
            key = next((key for key, known in keys.items() if known is array), str(len(keys)))
            keys[key] = array
            kind = kinds[STORAGES[str(array.dtype)]]
            return ("storage", kind, key, "cpu", array.size, *extra)

        def reducer_override(self, item: object) -> object:
            if not isinstance(item, FakeTensor):
                return NotImplemented
            extra = (False, OrderedDict()) if function.endswith("v2") else ()
            return rebuild, (Key(item), item.offset, item.shape, item.strides, *extra)

    extra = (None,) if function == "_rebuild_tensor" else ()
    stream = io.BytesIO()
    saved = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
    sys.modules.update({"torch": torch, "torch._utils": utils})
    try:
        Pickler(stream, protocol=2).dump(value)
    finally:
        for name, module in saved.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return stream.getvalue()


def write_zip(path, value: object, byteorder: bytes = b"little") -> None:
    keys: dict = {}
    content = dump_torch(value, keys)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", byteorder)
        for key, array in keys.items():
            archive.writestr(f"archive/data/{key}", array.tobytes())


def write_legacy(path, value: object, function: str = "_rebuild_tensor") -> None:
    keys: dict = {}
    content = dump_torch(value, keys, function)
    header = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}]
    parts = [pickle.dumps(item, protocol=2) for item in header] + [content, pickle.dumps(list(keys), protocol=2)]
    parts += [struct.pack("<q", array.size) + array.tobytes() for array in keys.values()]
    path.write_bytes(b"".join(parts))


def tensors(arrays: dict) -> OrderedDict:
    return OrderedDict((name, FakeTensor(array)) for name, array in arrays.items())


# --- the formats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "crc"), [(".ckpt", "ok"), (".npz", "absent"), (".safetensors", "absent")])
def test_save_and_load(suffix: str, crc: str, tmp_path) -> None:
    expected = random_values()
    file = tmp_path / f"net{suffix}"
    save_checkpoint(expected, file)
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]
    net = Net()
    report = load_checkpoint(net, file)
    assert_loaded(net, expected)
    assert sorted(report.loaded) == sorted(expected)
    assert (report.cast, report.missing, report.unused, report.crc) == ([], [], [], crc)
    save_checkpoint(random_values(1), str(file))  # over the old one
    load_checkpoint(net, str(file))
    assert_loaded(net, random_values(1))


@pytest.mark.parametrize("suffix", [".ckpt", ".npz", ".safetensors"])
def test_types_scalars_and_odd_names_survive(suffix: str, tmp_path) -> None:
    transposed = np.arange(6, dtype=np.float64).reshape(2, 3).T
    arrays = {
        "file": np.float32(2.5).reshape(()),
        "a/b.c": transposed,
        "half": np.ones((2, 1), np.float16),
        "count": np.array(2**40, np.int64),
        "flag": np.array([True, False]),
    }
    save_checkpoint(arrays, tmp_path / f"x{suffix}")
    got = read_checkpoint(tmp_path / f"x{suffix}")
    assert got.keys() == arrays.keys()
    for name, array in arrays.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array)
        assert got[name].shape == array.shape
        assert memoryview(got[name]).format == memoryview(array).format, "MindSpore 2.7 takes native formats alone"


def test_empty_arrays(tmp_path) -> None:
    arrays = {"full": np.ones(2, np.float32), "empty": np.zeros((0, 3), np.float32)}
    for suffix in (".npz", ".safetensors"):
        save_checkpoint(arrays, tmp_path / f"x{suffix}")
        assert read_checkpoint(tmp_path / f"x{suffix}")["empty"].shape == (0, 3)
    with pytest.raises(CheckpointError, match="cannot hold the empty array 'empty'"):
        save_checkpoint(arrays, tmp_path / "x.ckpt")
    assert not (tmp_path / "x.ckpt").exists()


@pytest.mark.parametrize("crc", [True, False])
@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_files_of_mindspore_itself(kind: str, crc: bool, tmp_path) -> None:
    source, net = Net(), Net()
    for parameter in source.get_parameters():
        parameter.set_data(Tensor(random_values()[parameter.name]))
    file = tmp_path / f"net.{kind}"
    extra = {"append_dict": {"epoch_num": 3, "note": "text"}} if kind == "ckpt" else {}
    ms.save_checkpoint(source, str(file), crc_check=crc, format=kind, **extra)
    report = load_checkpoint(net, file)
    assert_loaded(net, random_values())
    assert report.crc == ("ok" if crc else "absent")
    assert report.unused == (["epoch_num"] if kind == "ckpt" else [])


def test_files_saved_here_load_with_mindspore(tmp_path) -> None:
    save_checkpoint(random_values(), tmp_path / "x.ckpt")
    net = Net()
    not_loaded, unused = ms.load_param_into_net(net, ms.load_checkpoint(str(tmp_path / "x.ckpt"), crc_check=True))
    assert (not_loaded, unused) == ([], [])
    assert_loaded(net, random_values())


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("prefix", ["", "module.", "module.module."])
def test_pytorch(write, nested: bool, prefix: str, tmp_path) -> None:
    arrays = {prefix + name: array for name, array in torch_values().items()}
    arrays[f"{prefix}block.bn.num_batches_tracked"] = np.array(17, np.int64)
    value: object = tensors(arrays)
    if nested:
        optimizer = {"state": {0: FakeTensor(np.ones(2, np.float32))}}
        value = {"epoch": 3, "best": 91.5, "state_dict": value, "optimizer": optimizer}
    file = tmp_path / "net.pth"
    write(file, value)
    net = Net()
    report = load_checkpoint(net, file)
    assert_loaded(net, random_values())
    assert report.missing == []
    assert report.unused == [f"{prefix}block.bn.num_batches_tracked"]
    assert (f"{prefix}block.bn.weight", "block.bn.gamma") in report.renamed
    assert report.crc == "absent"


def test_pytorch_strides_shared_storage_and_bfloat16(tmp_path) -> None:
    base = np.arange(12, dtype=np.float32)
    upper = np.array([1.5, -2.0, 3.25], np.float32).view(np.uint32) >> 16
    value = {
        "transposed": FakeTensor(base, 0, (4, 3), (1, 4)),
        "slice": FakeTensor(base, 5, (2,), (2,)),
        "scalar": FakeTensor(np.array(7.0, np.float32)),
        "brain": FakeTensor(upper.astype(np.uint16)),
        "none": FakeTensor(np.zeros((0, 3), np.float32)),
    }
    write_zip(tmp_path / "x.pt", value)
    got = read_checkpoint(tmp_path / "x.pt")
    np.testing.assert_array_equal(got["transposed"], base.reshape(3, 4).T)
    np.testing.assert_array_equal(got["slice"], [5, 7])
    np.testing.assert_array_equal(got["brain"], [1.5, -2.0, 3.25])
    assert got["scalar"].shape == ()
    assert got["none"].shape == (0, 3)


def test_one_pytorch_storage_is_stored_once(tmp_path) -> None:
    base = np.arange(4, dtype=np.float32)
    shared = FakeTensor(base)
    alias = FakeTensor(base, 1, (3,), (1,))
    alias.array = shared.array
    for write in (write_zip, write_legacy):
        write(tmp_path / "x.pt", {"a": shared, "b": alias})
        np.testing.assert_array_equal(read_checkpoint(tmp_path / "x.pt")["b"], [1, 2, 3])


# --- what is refused --------------------------------------------------------------------------------------------------


class Hostile:
    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)

    def __init__(self, path) -> None:
        self.path = path


@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_a_pickle_that_calls_something_is_refused_by_name(write, tmp_path) -> None:
    made = tmp_path / "made"
    write(tmp_path / "x.pth", {"a": FakeTensor(np.ones(2, np.float32)), "b": Hostile(made)})
    with pytest.raises(CheckpointError, match=rf"refused to load '{os.mkdir.__module__}\.mkdir'"):
        read_checkpoint(tmp_path / "x.pth")
    assert not made.exists()


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [(0, (5,), (1,)), (3, (2,), (1,)), (0, (2, 2), (3, 1)), (-1, (2,), (1,)), (0, (2,), (-1,)), (0, (10**6,), (0,))],
)
def test_tensors_outside_their_storage(offset: int, shape: tuple, strides: tuple, tmp_path) -> None:
    write_zip(tmp_path / "x.pth", {"a": FakeTensor(np.ones(4, np.float32), offset, shape, strides)})
    with pytest.raises(CheckpointError, match=r"x\.pth is damaged"):
        read_checkpoint(tmp_path / "x.pth")


def test_big_endian_is_refused(tmp_path) -> None:
    write_zip(tmp_path / "x.pth", tensors(torch_values()), b"big")
    with pytest.raises(CheckpointError, match="big-endian"):
        read_checkpoint(tmp_path / "x.pth")


def test_no_tensors(tmp_path) -> None:
    write_zip(tmp_path / "x.pth", {"epoch": 3})
    with pytest.raises(CheckpointError, match="holds no state_dict"):
        read_checkpoint(tmp_path / "x.pth")


def test_objects_in_npz_are_refused(tmp_path) -> None:
    np.savez(tmp_path / "x.npz", a=np.array([Hostile(tmp_path / "made")], object))
    with pytest.raises(CheckpointError, match=r"x\.npz is damaged or not a \.npz checkpoint .*allow_pickle"):
        read_checkpoint(tmp_path / "x.npz")
    assert not (tmp_path / "made").exists()


def write_file(path) -> bytes:
    if path.suffix in (".ckpt", ".npz", ".safetensors"):
        save_checkpoint(random_values(), path)
    else:
        {".pth": write_zip, ".th": write_legacy}[path.suffix](path, tensors(torch_values()))
    return path.read_bytes()


@pytest.mark.parametrize("suffix", [".ckpt", ".npz", ".safetensors", ".pth", ".th"])
def test_truncated_and_foreign_files(suffix: str, tmp_path) -> None:
    file = tmp_path / f"x{suffix}"
    content = write_file(file)
    net = Net()
    before = values_of(net)
    for damaged in (content[:-1], content[: len(content) // 2], content[:9], b"something else entirely", b"\0" * 100):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"^{file} ") as error:
            load_checkpoint(net, file)
        assert "\n" not in str(error.value)
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is empty"):
        load_checkpoint(net, file)
    assert_untouched(net, before)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_changed_bit_is_found_by_the_crc(suffix: str, tmp_path) -> None:
    file = tmp_path / f"x{suffix}"
    ms.save_checkpoint(Net(), str(file), crc_check=True, format=suffix[1:])
    content = bytearray(file.read_bytes())
    os.chmod(file, 0o600)
    content[-40] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged: its CRC is [0-9a-f]{8}, the file says [0-9a-f]{8}"):
        load_checkpoint(Net(), file)


def test_missing_file_folder_and_ending(tmp_path) -> None:
    save_checkpoint(random_values(), tmp_path / "resnet20.npz")
    with pytest.raises(CheckpointError, match=r"resnet.npz does not exist; did you mean 'resnet20\.npz'"):
        load_checkpoint(Net(), tmp_path / "resnet.npz")
    (tmp_path / "x.ckpt").mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        load_checkpoint(Net(), tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"ends with one of \.ckpt, \.safetensors, \.npz, \.pth, \.pt, \.th"):
        load_checkpoint(Net(), tmp_path / "x.onnx")
    with pytest.raises(CheckpointError, match=r"ends with one of \.ckpt, \.safetensors, \.npz"):
        save_checkpoint(random_values(), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="no parameters to save"):
        save_checkpoint({}, tmp_path / "y.npz")


def test_a_failed_save_keeps_the_old_file(tmp_path) -> None:
    file = tmp_path / "x.npz"
    save_checkpoint(random_values(), file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="allow_pickle"):
        save_checkpoint({"good": np.ones(3), "bad": np.array([object()])}, file)
    assert file.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.npz"]


# --- matching ---------------------------------------------------------------------------------------------------------


def load(arrays: dict, folder, **options: object):
    file = folder / "x.npz"
    save_checkpoint(arrays, file)
    net = Net()
    before = values_of(net)
    try:
        return net, load_checkpoint(net, file, **options)
    except CheckpointError:
        assert_untouched(net, before)
        raise


def test_pytorch_names_in_any_format_and_own_gamma_stays(tmp_path) -> None:
    net, report = load(torch_values(), tmp_path)
    assert_loaded(net, random_values())
    assert sorted(report.loaded) == sorted(TORCH_NAMES)


def test_mindspore_names_into_a_network_with_pytorch_names(tmp_path) -> None:
    from mindspore import mint

    save_checkpoint(
        {f"bn.{name}": np.full(3, 2.0, np.float32) for name in ("gamma", "beta", "moving_mean", "moving_variance")},
        tmp_path / "x.npz",
    )
    net = nn.SequentialCell(OrderedDict(bn=mint.nn.BatchNorm2d(3)))
    report = load_checkpoint(net, tmp_path / "x.npz")
    assert sorted(report.loaded) == ["bn.bias", "bn.running_mean", "bn.running_var", "bn.weight"]
    assert (net[0].weight.asnumpy() == 2).all()


def test_training_state_is_allowed_and_reported(tmp_path) -> None:
    names = ["moments.linear.weight", "global_step", "learning_rate", "beta1_power", "epoch_num", "adam_v.linear.bias"]
    extra = {name: np.zeros(1, np.float32) for name in names}
    _, report = load({**random_values(), **extra}, tmp_path)
    assert sorted(report.unused) == sorted(names)
    with pytest.raises(CheckpointError, match=r"unexpected moments\.other\.weight$"):
        load({**random_values(), "moments.other.weight": np.zeros(1, np.float32)}, tmp_path)


def test_strict_mismatch_counts_and_lists(tmp_path) -> None:
    arrays = random_values()
    del arrays["linear.bias"]
    arrays["linear.weight"] = np.zeros((9, 4), np.float32)
    for index in range(7):
        arrays[f"extra{index}"] = np.zeros(1, np.float32)
    with pytest.raises(CheckpointError) as error:
        load(arrays, tmp_path)
    said = str(error.value)
    assert "is a checkpoint of another network: 9 of 18 parameters do not match; missing linear.bias; " in said
    assert "unexpected extra0, extra1, extra2, extra3, extra4 and 2 more; shape linear.weight (9, 4) for (2, 4)" in said


def test_names_are_not_matched_by_their_ends(tmp_path) -> None:
    arrays = random_values()
    arrays["backbone.linear.weight"] = arrays.pop("linear.weight")
    with pytest.raises(CheckpointError, match=r"missing linear\.weight; unexpected backbone\.linear\.weight; did you"):
        load(arrays, tmp_path)


def test_not_strict_takes_what_fits(tmp_path) -> None:
    arrays = random_values()
    del arrays["linear.bias"]
    arrays["linear.weight"] = np.zeros((9, 4), np.float32)
    arrays["extra"] = np.zeros(1, np.float32)
    net, report = load(arrays, tmp_path, strict=False)
    assert sorted(report.missing) == ["linear.bias", "linear.weight"]
    assert report.reshaped == [("linear.weight", (9, 4), (2, 4))]
    assert sorted(report.unused) == ["extra", "linear.weight"]
    np.testing.assert_array_equal(values_of(net)["block.conv.weight"], arrays["block.conv.weight"])
    with pytest.raises(CheckpointError, match=r"has no parameter of the network; it holds other$"):
        load({"other": np.zeros(3, np.float32)}, tmp_path, strict=False)


def test_casts_are_reported(tmp_path) -> None:
    arrays = random_values()
    arrays["linear.weight"] = arrays["linear.weight"].astype(np.float64)
    arrays["linear.bias"] = np.array([1, 2], np.int64)
    net, report = load(arrays, tmp_path)
    assert sorted(report.cast) == [("linear.bias", "int64", "float32"), ("linear.weight", "float64", "float32")]
    assert_loaded(net, {**arrays, "linear.weight": arrays["linear.weight"].astype(np.float32)})


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (np.array([np.nan, 0], np.float32), r"parameter 'linear\.bias': 1 of 2 values are not finite"),
        (np.array([np.inf, -np.inf], np.float32), "2 of 2 values are not finite"),
        (np.array([1e300, 0]), "has values up to 1e.300, too great for float32"),
        (np.array([1j, 0]), "holds complex128, the network needs float32"),
    ],
)
def test_values_that_make_no_weight(value: np.ndarray, said: str, tmp_path) -> None:
    with pytest.raises(CheckpointError, match=said):
        load({**random_values(), "linear.bias": value}, tmp_path)


def test_narrow_network(tmp_path) -> None:
    save_checkpoint(
        {"weight": np.full((2, 3), 0.5, np.float32), "bias": np.array([1, 1e6], np.float32)}, tmp_path / "x.npz"
    )
    net = nn.Dense(3, 2).to_float(ms.float16)
    for parameter in net.get_parameters():
        parameter.set_dtype(ms.float16)
    with pytest.raises(CheckpointError, match=r"parameter 'bias' has values up to 1e.06, too great for float16"):
        load_checkpoint(net, tmp_path / "x.npz")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "_backbone.", "network._backbone."])
def test_the_prefix_of_a_wrapper_is_dropped_from_optimiser_state_too(prefix: str, tmp_path) -> None:
    wrapped = {prefix + name: value for name, value in random_values().items()}
    extra = {f"moments.{prefix}linear.weight": np.zeros((2, 4), np.float32), "global_step": np.zeros(1, np.int32)}
    net, report = load({**wrapped, **extra}, tmp_path)
    assert_loaded(net, random_values())
    assert sorted(report.unused) == sorted(extra), "by the names they have in the file"
    assert (f"{prefix}linear.weight", "linear.weight") in report.renamed


def test_a_prefix_on_some_names_only_stays(tmp_path) -> None:
    arrays = random_values()
    arrays["module.linear.weight"] = arrays.pop("linear.weight")
    with pytest.raises(CheckpointError, match=r"did you mean 'module\.linear\.weight'\?; where only the names differ"):
        load(arrays, tmp_path)


def test_the_report_in_words_and_as_json(tmp_path) -> None:
    arrays = {name: value.astype(np.float64) for name, value in torch_values().items()}
    _, report = load({**arrays, "global_step": np.zeros(1, np.int32)}, tmp_path)
    words = report.words()
    assert words.startswith(f"11 of 11 parameters loaded from {tmp_path / 'x.npz'}; 7 renamed: ")
    assert words.endswith(" and 5 more; 11 cast: float64 → float32; 1 of the file not used: global_step")
    told = json.loads(json.dumps(report.to_dict()))
    assert told["unused"] == ["global_step"]
    assert ["norm.weight", "norm.gamma"] in told["renamed"]


def test_name_map(tmp_path) -> None:
    renames = {"body.": "block.", "head.w": "linear.weight", "body.batch.": "block.bn."}
    arrays = random_values()
    stored = {}
    for name, value in arrays.items():
        new = name.replace("block.bn.", "body.batch.").replace("block.", "body.")
        stored["head.w" if name == "linear.weight" else new] = value
    file = tmp_path / "map.json"
    file.write_text(json.dumps(renames))
    net, report = load(stored, tmp_path, name_map=file)
    assert_loaded(net, arrays)
    assert report.missing == report.unused == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", r"name map .*map\.json cannot be read"),
        ("[1]", "must be one JSON object"),
        ('{"a": 1}', "must be one JSON object"),
        ('{"linear.wieght": "x"}', r"no parameter 'linear\.wieght'; did you mean 'linear\.weight'"),
        ('{"linear.weight": "linear.bias"}', r"two parameters of .* the name 'linear\.bias'"),
    ],
)
def test_wrong_name_maps(text: str, said: str, tmp_path) -> None:
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        load(random_values(), tmp_path, name_map=tmp_path / "map.json")


def test_a_network_with_the_name_module_keeps_it(tmp_path) -> None:
    net = nn.SequentialCell(OrderedDict(module=nn.Dense(3, 2)))
    save_checkpoint(
        {"module.weight": np.ones((2, 3), np.float32), "module.bias": np.ones(2, np.float32)}, tmp_path / "x.npz"
    )
    assert load_checkpoint(net, tmp_path / "x.npz").loaded == ["module.weight", "module.bias"]


def test_a_lone_batch_norm_whose_parameters_are_called_otherwise(tmp_path) -> None:
    net = nn.BatchNorm2d(3)
    names = ("weight", "bias", "running_mean", "running_var")
    save_checkpoint({name: np.full(3, i, np.float32) for i, name in enumerate(names)}, tmp_path / "x.npz")
    load_checkpoint(net, tmp_path / "x.npz")
    got = [net.gamma, net.beta, net.moving_mean, net.moving_variance]
    assert [parameter.asnumpy()[0] for parameter in got] == [0, 1, 2, 3]
