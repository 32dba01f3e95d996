"""Networks that are no image classifiers: several inputs and outputs, and data, loss and metric of the user's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
import yaml

from msqkd.checkpoints import read_checkpoint

Command = Callable[..., tuple[int, str, str]]
Write = Callable[..., Path]

OWN = '''
import mindspore as ms
import numpy as np
from mindspore import nn, ops

LENGTH, WORDS = 6, 20


class Encoder(nn.Cell):
    """One layer of a transformer over word ids, classified by the first position."""

    def __init__(self, width=8, heads=2, classes=3):
        super().__init__()
        self.words, self.kinds = nn.Embedding(WORDS, width), nn.Embedding(2, width)
        self.query, self.key, self.value, self.out = (nn.Dense(width, width) for _ in range(4))
        self.norm, self.norm2 = nn.LayerNorm((width,)), nn.LayerNorm((width,))
        self.up, self.act, self.down = nn.Dense(width, 2 * width), nn.GELU(), nn.Dense(2 * width, width)
        self.head = nn.Dense(width, classes)
        self.heads, self.size, self.width = heads, width // heads, width

    def split(self, x):
        return x.reshape(-1, LENGTH, self.heads, self.size).transpose(0, 2, 1, 3)

    def construct(self, ids, mask, kinds):
        x = self.words(ids) + self.kinds(kinds)
        q, k, v = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        away = (1.0 - mask.astype(ms.float32)).expand_dims(1).expand_dims(1) * -100.0
        share = ops.softmax(ops.matmul(q, k.transpose(0, 1, 3, 2)) * self.size**-0.5 + away, -1)
        y = ops.matmul(share, v).transpose(0, 2, 1, 3).reshape(-1, LENGTH, self.width)
        x = self.norm(x + self.out(y))
        return self.head(self.norm2(x + self.down(self.act(self.up(x))))[:, 0])


def sentences(train=48, test=20):
    def part(count, seed):
        rng = np.random.default_rng(seed)
        ids = rng.integers(3, WORDS, (count, LENGTH))
        ids[:, 0] = np.arange(count) % 3  # the first word is the class
        mask = np.arange(LENGTH) < rng.integers(2, LENGTH + 1, (count, 1))
        return (ids, mask.astype(np.int64), np.zeros_like(ids)), np.arange(count) % 3

    return part(train, 0), part(test, 1)


class Detector(nn.Cell):
    """Per cell of a 4 x 4 grid: whether something is there, and where."""

    def __init__(self):
        super().__init__()
        self.body, self.relu = nn.Conv2d(1, 4, 3, 2, has_bias=True), nn.ReLU()
        self.there, self.box = nn.Conv2d(4, 1, 1, has_bias=True), nn.Conv2d(4, 2, 1, has_bias=True)

    def construct(self, image):
        x = self.relu(self.body(image))
        return self.there(x), self.box(x)


class DetectionLoss(nn.Cell):
    def __init__(self, box_weight=1.0):
        super().__init__()
        self.box_weight = box_weight

    def construct(self, there, box, is_there, boxes):
        found = ops.binary_cross_entropy_with_logits(
            there, is_there, ops.ones_like(there), ops.ones_like(there), reduction="mean"
        )
        return found + self.box_weight * (ops.abs(box - boxes) * is_there).mean()


def mean_error(outputs, labels):
    (there, box), (is_there, boxes) = outputs, labels
    assert len(there) == len(is_there)
    return np.abs(1 / (1 + np.exp(-there)) - is_there).mean() + (np.abs(box - boxes) * is_there).mean()


class Scenes:
    """Bright squares on a dark ground, made when they are asked for."""

    def __init__(self, count, seed):
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def batch(self, indices, rng=None):
        images = np.zeros((len(indices), 1, 8, 8), np.float32)
        there, boxes = np.zeros((len(indices), 1, 4, 4)), np.zeros((len(indices), 2, 4, 4))
        for row, index in enumerate(indices):
            y, x = np.random.default_rng([self.seed, index]).integers(0, 4, 2)
            images[row, 0, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] = 1.0
            there[row, 0, y, x], boxes[row, :, y, x] = 1.0, (0.5, -0.5)
        if rng is not None:
            images = images + rng.normal(0, 0.01, images.shape)
        return images, (there, boxes)


def scenes():
    return Scenes(24, 0), Scenes(10, 1)


class Branches(nn.Cell):
    """A classifier with two auxiliary heads; one is behind a convolution that the main output does not need."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn, self.relu = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.block, self.bn2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.fc, self.aux1, self.side, self.aux2 = nn.Dense(4, 3), nn.Dense(4, 3), nn.Conv2d(4, 4, 3), nn.Dense(4, 3)

    def construct(self, x):
        y = self.relu(self.bn(self.stem(x)))
        z = self.relu(self.bn2(self.block(y)))
        return self.fc(z.mean((2, 3))), self.aux1(y.mean((2, 3))), self.aux2(self.relu(self.side(y)).mean((2, 3)))


class ThreeHeads(nn.Cell):
    def __init__(self, share=0.3):
        super().__init__()
        self.loss, self.share = nn.CrossEntropyLoss(), share

    def construct(self, main, aux1, aux2, labels):
        return self.loss(main, labels) + self.share * (self.loss(aux1, labels) + self.loss(aux2, labels))


def loaded():
    """A network with weights of its own, but for a head that is trained later."""
    net = Branches()
    for parameter in net.get_parameters():
        if not parameter.name.startswith("aux2"):
            data = np.random.default_rng(1).uniform(0.1, 0.9, parameter.shape)
            parameter.set_data(ms.Tensor(data.astype(np.float32)))
    return net


class Shuffled(Branches):
    """Holds an operation without a gradient."""

    def construct(self, x):
        return self.fc(ops.channel_shuffle(self.relu(self.bn(self.stem(x))), 2).mean((2, 3)))


# -- wrong ones ---------------------------------------------------------------------------------------------------
class Vector(nn.Cell):
    def construct(self, there, box, is_there, boxes):
        return (there - is_there).mean((1, 2, 3))


class Raising(nn.Cell):
    def construct(self, there, box, is_there, boxes):
        return ops.matmul(box, is_there.reshape(-1)).mean()


def no_loss():
    return "loss"


def nothing(outputs, labels):
    return float("nan")


def wrong_classes():
    (inputs, labels), test = sentences()
    return (inputs, labels + 1), test
'''

ENCODER: dict[str, Any] = {
    "name": "encoder",
    "model": {
        "source": "python",
        "target": "own.py:Encoder",
        "inputs": [
            {"name": "ids", "shape": [6], "dtype": "int32"},
            {"name": "mask", "shape": [6], "dtype": "int32"},
            {"name": "kinds", "shape": [6], "dtype": "int32"},
        ],
    },
    "data": {"name": "python", "target": "own.py:sentences", "eval_batch_size": 8},
    "distillation": {"soft_loss": "mse"},
    "export": {"formats": ["portable_mindir", "ms"]},
}
DETECTOR: dict[str, Any] = {
    "name": "detector",
    "model": {"source": "python", "target": "own.py:Detector", "input_shape": [1, 8, 8]},
    "data": {"name": "python", "target": "own.py:scenes", "eval_batch_size": 4},
    "train": {"loss": "own.py:DetectionLoss", "loss_args": {"box_weight": 2.0}},
    "evaluation": {"metric": "own.py:mean_error", "higher_is_better": False},
    "distillation": {"soft_loss": "mse", "outputs": [0, 1]},
    "export": {"formats": ["lite_mindir", "portable_mindir", "ms", "ms_float"]},
}
BRANCHES: dict[str, Any] = {
    "name": "branches",
    "model": {"source": "python", "target": "own.py:Branches", "input_shape": [1, 8, 8], "outputs": [0]},
    "data": {"name": "arrays", "root": "data.npz", "eval_batch_size": 15},
    "train": {"loss": "own.py:ThreeHeads"},
    "export": {"formats": ["portable_mindir", "ms"]},
}


@pytest.fixture
def own(tiny: Write, tmp_path: Path) -> Write:
    """Writes a recipe for the networks of own.py; keyword arguments are put over its sections."""
    (tmp_path / "own.py").write_text(OWN)

    def write(base: dict[str, Any], **changes: Any) -> Path:
        recipe = yaml.safe_load(tiny().read_text())
        recipe = {key: value for key, value in recipe.items() if key not in ("model", "data", "distillation")}
        recipe["calibration"] = {"samples": 10, "batch_size": 4}
        for key, value in {**base, **changes}.items():
            merge = isinstance(value, dict) and key in ("train", "pretrain")
            recipe[key] = {**recipe[key], **value} if merge else value
        file = tmp_path / f"{base['name']}.yaml"
        file.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return file

    return write


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def test_an_encoder_of_three_inputs(own: Write, msqkd: Command, tmp_path: Path) -> None:
    code, out, err = msqkd("run", own(ENCODER, pretrain={"epoch_size": 6, "lr": 0.1}), "-o", "out")
    assert code == 0, err
    found = report(tmp_path / "out")
    assert "sentences: 48 training and 20 test samples of ids 6 int32, mask 6 int32, kinds 6 int32" in " ".join(
        err.split()
    )
    assert found["metric"] == {"name": "accuracy", "unit": "%", "higher_is_better": True}
    assert found["accuracy"]["float"] > 60, "the first word says it all"
    assert found["accuracy"]["integer"] is not None
    assert found["parity"]["samples"] == 10
    assert found["parity"]["agreement"]["integer_fake_quantised"] >= 90
    assert found["export"]["portable_mindir"]["max_abs_diff"] <= 1e-4
    assert found["export"]["ms"]["differing_values"] == 0
    assert found["plan"]["training_only"] == []
    assert "accuracy in percent" in out


def test_a_detector_with_loss_and_metric_of_its_own(own: Write, msqkd: Command, tmp_path: Path) -> None:
    code, out, err = msqkd("run", own(DETECTOR), "-o", "out")
    assert code == 0, err
    found = report(tmp_path / "out")
    assert found["metric"] == {"name": "mean_error", "unit": "", "higher_is_better": False}
    reached = found["accuracy"]
    assert 0 < reached["qat_kd"] < 2
    assert reached["integer"] == pytest.approx(reached["exported"], abs=0.05)
    parity = found["parity"]
    assert parity["accuracy"]["integer"] == pytest.approx(parity["accuracy"]["fake_quantised"], abs=0.01)
    assert (parity["max_deviation"], parity["deviating_samples"], parity["agreement"]) == (0.01, None, {})
    assert {value["layer"] for value in parity["values"]} >= {"body", "there", "box"}
    assert found["export"]["ms_float"]["relative_error"] < 1e-4
    assert "agreement" not in found["export"]["portable_mindir"]
    assert "detector: mean_error" in out
    assert "the device reaches mean_error 0." in " ".join(out.split())
    page = (tmp_path / "out" / "report.html").read_text()
    assert "mean_error" in page
    assert "accuracy" not in page.replace('id="accuracy"', "").replace('href="#accuracy"', "").lower()
    code, out, err = msqkd("verify", "out", "--samples", 6)
    assert code == 0, err
    assert "mean_error" in out
    assert "accuracy" not in out


def test_auxiliary_heads_are_trained_and_left_out(own: Write, msqkd: Command, tmp_path: Path) -> None:
    from msqkd.checkpoints import read_checkpoint

    quantization = {"batchnorm": "live", "activation": {"delay": 3}}
    code, _, err = msqkd(
        "run", own(BRANCHES, quantization=quantization, distillation={"soft_loss": "mse"}), "-o", "out"
    )
    assert code == 0, err
    found = report(tmp_path / "out")
    left_out = {row["cell_path"] for row in found["plan"]["training_only"]}
    assert left_out >= {"aux1", "side", "aux2"}
    assert "trained only, not deployed:" in err
    assert not {node["cell_path"] for node in found["plan"]["nodes"]} & {"aux1", "side", "aux2"}
    assert found["export"]["portable_mindir"]["max_abs_diff"] <= 1e-4
    for name in ("branches_portable.mindir", "branches_ms.ms", "float.mindir"):
        data = (tmp_path / "out" / name).read_bytes()
        assert b"aux1" not in data, f"{name} holds an auxiliary head"
    before = read_checkpoint(str(tmp_path / "out" / "float.ckpt"))
    after = read_checkpoint(str(tmp_path / "out" / "qat_kd.ckpt"))
    for head in ("fc.weight", "aux1.weight", "aux2.weight"):
        assert np.abs(before[head] - after[head]).max() > 0, f"{head} was not trained"
    code, out, err = msqkd("plan", tmp_path / "branches.yaml")
    assert code == 0, err
    assert "training only" in out


LOADED = {
    "model": {**BRANCHES["model"], "target": "own.py:loaded"},
    "pretrain": None,
    "train": {},
}


def test_a_factory_may_load_its_weights(own: Write, msqkd: Command, tmp_path: Path) -> None:
    recipe = own(BRANCHES, **LOADED)
    code, _, err = msqkd("calibrate", recipe, "-o", "out")
    assert code == 0, err
    text = " ".join(err.split())
    assert "'own.py:loaded' gives random weights: 'aux2.weight' differs between two calls (1 of 6 weights" in text
    held = read_checkpoint(str(tmp_path / "out" / "float.ckpt"))
    expected = np.random.default_rng(1).uniform(0.1, 0.9, held["stem.weight"].shape).astype(np.float32)
    np.testing.assert_array_equal(held["stem.weight"], expected)


def refused(msqkd: Command, recipe: Path, verb: str = "run") -> str:
    """The sentence with which a run is refused."""
    code, _, err = msqkd(verb, recipe, "-o", "out")
    assert code == 2, err
    assert "Traceback" not in err
    (text,) = [line for line in err.splitlines() if line.startswith("msqkd: ")]
    left = {child.name for child in Path("out").iterdir()} if Path("out").is_dir() else set()
    assert left <= {"state.json", "recipe.yaml"}, f"{left} half-written"
    return text


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a loss that is not there": (
        DETECTOR,
        {"train": {"loss": "own.py:DetectionLos"}},
        "train.loss: own.py has no 'DetectionLos'; did you mean 'DetectionLoss'",
    ),
    "an argument it does not take": (
        DETECTOR,
        {"train": {"loss": "own.py:DetectionLoss", "loss_args": {"box": 1}}},
        "train.loss: 'own.py:DetectionLoss' takes no argument 'box'; allowed: box_weight",
    ),
    "a loss that is no cell": (
        DETECTOR,
        {"train": {"loss": "own.py:no_loss"}},
        "train.loss: 'own.py:no_loss' gave a str; a mindspore.nn.Cell is needed",
    ),
    "a loss that is no scalar": (
        DETECTOR,
        {"train": {"loss": "own.py:Vector", "loss_args": {}}},
        "train.loss: 'own.py:Vector' gives a Float32 Tensor of shape (2,); a scalar of type float32 is needed",
    ),
    "a loss that raises": (
        DETECTOR,
        {"train": {"loss": "own.py:Raising", "loss_args": {}}},
        "'own.py:Raising' fails on 2 outputs and 2 labels of shapes (2, 1, 4, 4), (2, 2, 4, 4), (2, 1, 4, 4), (2, ",
    ),
    "a metric that is not there": (
        DETECTOR,
        {"evaluation": {"metric": "own.py:mean_eror"}},
        "evaluation.metric: own.py has no 'mean_eror'; did you mean 'mean_error'",
    ),
    "a metric that is not a number": (
        DETECTOR,
        {"evaluation": {"metric": "own.py:nothing", "name": "mAP"}},
        "evaluation.metric 'mAP': it is nan on the 10 samples of scenes test; a finite number is needed",
    ),
    "no metric for a detector": (
        DETECTOR,
        {"evaluation": {}},
        "output 0 has shape (-1, 1, 4, 4); top-1 accuracy is for classifiers (N, classes); name another metric",
    ),
    "a soft loss of an output that is not there": (
        DETECTOR,
        {"distillation": {"outputs": [2]}},
        "distillation.outputs: found 2, allowed: 0 to 1, the outputs of Detector",
    ),
    "too few inputs": (
        ENCODER,
        {"model": {**ENCODER["model"], "inputs": ENCODER["model"]["inputs"][:2]}},
        "Encoder: MindSpore cannot compile the network for input shape (batch, 6) of int32, (batch, 6) of int32",
    ),
    "inputs in another order": (
        ENCODER,
        {"model": {**ENCODER["model"], "inputs": [ENCODER["model"]["inputs"][index] for index in (1, 0, 2)]}},
        "model.inputs[0].name: found 'mask', allowed: 'ids', since Encoder takes ids, mask, kinds",
    ),
    "a factory that loads nothing": (
        BRANCHES,
        {"pretrain": None},
        "model.checkpoint: is missing, and 'own.py:Branches' gives random weights: 'stem.weight' differs between two",
    ),
    "an operation without a gradient": (
        BRANCHES,
        {
            "model": {"source": "python", "target": "own.py:Shuffled", "input_shape": [1, 8, 8]},
            "train": {"loss": None},
            "export": {"formats": ["portable_mindir"]},
        },
        "'channel_shuffle' (ChannelShuffle) cannot be trained on CPU",
    ),
    "labels that are no classes": (
        ENCODER,
        {"data": {"name": "python", "target": "own.py:wrong_classes"}},
        "wrong_classes train: 16 of 48 labels are outside 0 to 2",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_sentence(own: Write, msqkd: Command, case: str) -> None:
    base, changes, said = WRONG[case]
    # A pretraining without a loss of its own takes that of train.
    assert said in refused(msqkd, own(base, **changes)).replace("pretrain.loss", "train.loss")
