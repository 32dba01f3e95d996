"""Whatever the user gets wrong: one sentence on standard error, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

Command = Callable[..., tuple[int, str, str]]
Recipe = Callable[..., Path]

CHECKPOINT = {"pretrain": None}

ODD = """
import mindspore as ms
import numpy as np
from mindspore import nn, ops


class Complex(nn.Cell):
    def __init__(self):
        super().__init__()
        self.weight = ms.Parameter(ms.Tensor(np.ones((1, 8)), ms.complex64), name="weight")

    def construct(self, x):
        return ops.mean(ops.real(x * self.weight), (1, 2))


class Half(nn.Cell):
    def __init__(self):
        super().__init__()
        self.fc = nn.Dense(8, 3)
        for parameter in self.get_parameters():
            parameter.set_dtype(ms.float16)

    def construct(self, x):
        return ops.mean(self.fc(x), (1, 2))


class Clash(nn.Cell):
    def __init__(self):
        super().__init__(auto_prefix=False)
        self.one, self.two = nn.Dense(8, 3), nn.Dense(8, 3)

    def construct(self, x):
        return ops.mean(self.one(x) + self.two(x), (1, 2))
"""


def model(**changes: Any) -> dict[str, Any]:
    return {"source": "python", "target": "nets.py:Tiny", "input_shape": [1, 8, 8], **changes}


def refused(msqkd: Command, recipe: Path, *settings: str, output: Any = None) -> str:
    """The sentence with which a run is refused."""
    folder = output or recipe.parent / "out"
    arguments = ["--set", *settings] if settings else []
    code, _, err = msqkd("run", recipe, "-o", folder, *arguments)
    assert code == 2, err
    assert "Traceback" not in err
    (text,) = [line for line in err.splitlines() if line.startswith("msqkd: ")]
    assert err.splitlines()[-1] == text, "the sentence comes last, and alone"
    if Path(folder).is_dir():
        left = {child.name for child in Path(folder).iterdir()}
        assert left <= {"state.json", "recipe.yaml"}, f"{left} half-written"
    assert not (recipe.parent / "rank_0").exists(), "the compiler's dump is no business of the user"
    return text


def saved(net: str, file: Path) -> None:
    from msqkd.checkpoints import save_checkpoint
    from msqkd.models import build_model

    save_checkpoint({p.name: p.asnumpy() for p in build_model("python", f"nets.py:{net}", {}).get_parameters()}, file)


def test_missing_checkpoint(tiny: Recipe, msqkd: Command) -> None:
    text = refused(msqkd, tiny(model=model(checkpoint="none.ckpt"), **CHECKPOINT))
    assert "none.ckpt" in text


def test_no_checkpoint_at_all(tiny: Recipe, msqkd: Command) -> None:
    assert "--set model.checkpoint=FILE" in refused(msqkd, tiny(**CHECKPOINT))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint" * 20])
def test_corrupt_checkpoint(tiny: Recipe, msqkd: Command, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.ckpt").write_bytes(content)
    assert "bad.ckpt" in refused(msqkd, tiny(model=model(checkpoint="bad.ckpt"), **CHECKPOINT))


def test_cut_checkpoint(tiny: Recipe, msqkd: Command, tmp_path: Path) -> None:
    recipe = tiny(model=model(checkpoint="cut.ckpt"), **CHECKPOINT)
    saved("Tiny", tmp_path / "cut.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "cut.ckpt").read_bytes()[:-50])
    assert "cut.ckpt" in refused(msqkd, recipe)


def test_checkpoint_of_another_network(tiny: Recipe, msqkd: Command, tmp_path: Path) -> None:
    recipe = tiny(model=model(checkpoint="other.ckpt"), **CHECKPOINT)
    saved("Other", tmp_path / "other.ckpt")
    text = refused(msqkd, recipe)
    assert "checkpoint of another network" in text
    assert "missing stem.weight" in text
    assert "unexpected conv.weight" in text
    assert "where only the names differ, give them in a name_map" in text


def test_checkpoints_with_code_and_of_an_unknown_kind(tiny: Recipe, msqkd: Command, tmp_path: Path) -> None:
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C) + b"cos\nsystem\n(S'true'\ntR.")
    text = refused(msqkd, tiny(model=model(checkpoint="evil.pth"), **CHECKPOINT))
    assert "refused to load 'os.system', which is neither a tensor nor a plain container" in text
    (tmp_path / "net.h5").write_bytes(b"x")
    text = refused(msqkd, tiny(model=model(checkpoint="net.h5"), **CHECKPOINT))
    assert "net.h5: a checkpoint's name ends with one of .ckpt, .safetensors" in text


def test_name_maps(tiny: Recipe, msqkd: Command, tmp_path: Path) -> None:
    saved("Tiny", tmp_path / "tiny.ckpt")
    (tmp_path / "names.json").write_text('{"stemm.weight": "stem.weight"}')
    text = refused(msqkd, tiny(model=model(checkpoint="tiny.ckpt", name_map="names.json"), **CHECKPOINT))
    assert "name map names.json: tiny.ckpt has no parameter 'stemm.weight'; did you mean 'stem.weight'" in text
    assert "name_map: found 'names.json', allowed only with a checkpoint" in refused(
        msqkd, tiny(model=model(name_map="names.json"))
    )


def test_a_factory_that_fails(tiny: Recipe, msqkd: Command) -> None:
    text = refused(msqkd, tiny(model=model(args={"classes": "three"})))
    assert text.startswith("msqkd: model: 'nets.py:Tiny' could not be made: ")
    assert "nets.py:" in text.partition("could not be made")[2]


@pytest.mark.parametrize(
    ("net", "said"),
    [
        ("Complex", "'weight' has data type complex64, which is not one of float32, "),
        ("Half", "2 of its 2 parameters are float16, and quantisation starts from float32"),
        ("Clash", "the parameters at 'one.weight' and 'two.weight' are both called 'weight'; give the networks"),
    ],
)
def test_parameters_that_cannot_be_had(tiny: Recipe, msqkd: Command, tmp_path: Path, net: str, said: str) -> None:
    recipe = tiny(model=model(target=f"odd.py:{net}"))
    (tmp_path / "odd.py").write_text(ODD)
    assert said in refused(msqkd, recipe)


def test_an_input_of_another_rank(tiny: Recipe, msqkd: Command) -> None:
    inputs = [{"name": "x", "shape": [8, 8]}]
    text = refused(msqkd, tiny(model={"source": "python", "target": "nets.py:Tiny", "inputs": inputs}))
    assert "Tiny: MindSpore cannot compile the network for input shape (batch, 8, 8): " in text
    assert "model.input_shape: found [8, 8], allowed: " in refused(msqkd, tiny(model=model(input_shape=[8, 8])))


# -- MindIR files in place of code ------------------------------------------------------------------------------------
def exported(file: Path, net: str = "Tiny") -> dict[str, Any]:
    import mindspore as ms

    from msqkd.models import build_model

    cell = build_model("python", f"nets.py:{net}", {})
    cell.set_train(False)
    ms.export(cell, ms.Tensor(np.zeros((1, 1, 8, 8), np.float32)), file_name=str(file), file_format="MINDIR")
    return {"source": "mindir", "file": file.name}


def test_mindir_files_that_cannot_be_read(tiny: Recipe, msqkd: Command, tmp_path: Path) -> None:
    tiny()
    section = exported(tmp_path / "net.mindir")
    whole = (tmp_path / "net.mindir").read_bytes()
    for file, said in {
        "none.mindir": "none.mindir does not exist",
        "nets.py": "nets.py: the name of a MindIR file ends with .mindir",
        "data.npz": "a checkpoint holds weights without their network",
    }.items():
        assert said in refused(msqkd, tiny(model={**section, "file": file}, **CHECKPOINT))
    (tmp_path / "net.mindir").write_bytes(whole[: len(whole) // 2])
    assert "net.mindir is damaged or no MindIR file" in refused(msqkd, tiny(model=section, **CHECKPOINT))


def test_a_mindir_file_that_branches(tiny: Recipe, msqkd: Command, tmp_path: Path) -> None:
    tiny()
    text = refused(msqkd, tiny(model=exported(tmp_path / "net.mindir", "Branching"), **CHECKPOINT))
    assert "Branching: the network branches or loops on tensor values" in text


def test_settings_that_do_not_go_with_a_mindir_file(tiny: Recipe, msqkd: Command, tmp_path: Path) -> None:
    tiny()
    section = exported(tmp_path / "net.mindir")
    for settings, said in [
        (["model.checkpoint=a.ckpt"], "model.checkpoint=a.ckpt: found 'a.ckpt', not allowed with source: mindir"),
        (["model.name=resnet20"], "model.name=resnet20: found 'resnet20', not allowed with source: mindir"),
        (["model.file=null"], "is missing, required by source: mindir"),
        (["model.source=msqkd", "model.name=lenet5"], "found 'net.mindir', allowed only with source: mindir"),
        (["model.input_shape=[3,8,8]"], "model.input_shape: found [3, 8, 8], but net.mindir takes [1, 8, 8]"),
        (["train.dropout=true"], "found true, not allowed with model.source: mindir"),
        (["pretrain.epoch_size=1"], "two origins of the weights, training from scratch and model.file"),
    ]:
        code, _, err = msqkd("plan", tiny(model=section, **CHECKPOINT), "--set", *settings)
        assert code == 2
        assert said in err.replace("\n", " ")


def test_data_folder_without_images(tiny: Recipe, msqkd: Command, tmp_path: Path) -> None:
    (tmp_path / "images" / "train" / "cat").mkdir(parents=True)
    assert "images" in refused(msqkd, tiny(data={"name": "image_folder", "root": "images"}))
    assert "nowhere" in refused(msqkd, tiny(data={"name": "image_folder", "root": "nowhere"}))


def test_labels_out_of_range(tiny: Recipe, msqkd: Command) -> None:
    text = refused(msqkd, tiny(model=model(args={"classes": 2})))
    assert "labels are outside 0 to 1" in text


def test_control_flow_on_values(tiny: Recipe, msqkd: Command, tmp_path: Path) -> None:
    text = refused(msqkd, tiny(model=model(target="nets.py:Branching")))
    assert "Branching: the network branches or loops on tensor values (in its construct, " in text
    line = (tmp_path / "nets.py").read_text().splitlines().index("        if y.sum() > 0:") + 1
    assert f"nets.py:{line})" in text


def test_a_network_that_does_not_take_the_data(tiny: Recipe, msqkd: Command) -> None:
    text = refused(msqkd, tiny(model=model(target="nets.py:Wide")))
    assert "Wide: MindSpore cannot compile the network for input shape" in text


def test_nothing_to_quantise(tiny: Recipe, msqkd: Command) -> None:
    assert "no layer of Floats can be quantised" in refused(msqkd, tiny(model=model(target="nets.py:Floats")))


def test_calibration_of_no_samples(tiny: Recipe, msqkd: Command) -> None:
    assert "--set calibration.samples=0: found 0, but calibration needs" in refused(
        msqkd, tiny(), "calibration.samples=0"
    )
    assert "calibration.samples: found 0" in refused(msqkd, tiny(calibration={"samples": 0}))


def test_unknown_key_with_its_line(tiny: Recipe, msqkd: Command) -> None:
    text = refused(msqkd, tiny(trian={"lr": 1}))
    assert "tiny.yaml:" in text
    assert "train" in text


def test_unmatched_rule(tiny: Recipe, msqkd: Command) -> None:
    rules = [{"match": {"path": "steam"}, "precision": "float"}]
    text = refused(msqkd, tiny(quantization={"activation": {"delay": 3}, "rules": rules}))
    assert "rules[0] (path: steam)' matches nothing in Tiny; near misses: stem" in text


def test_delay_longer_than_the_training(tiny: Recipe, msqkd: Command) -> None:
    text = refused(msqkd, tiny(), "quantization.activation.delay=12")
    assert "quantization.activation.delay is 12 steps, but the training has 12" in text


@pytest.mark.parametrize("section", ["train", "pretrain"])
def test_batch_larger_than_the_split(tiny: Recipe, msqkd: Command, section: str) -> None:
    text = refused(msqkd, tiny(), f"{section}.batch_size=73")
    assert "has 72 samples, fewer than one batch of 73" in text


def test_teacher_with_other_classes(tiny: Recipe, msqkd: Command, tmp_path: Path) -> None:
    teacher = {"source": "python", "target": "nets.py:Tiny", "args": {"classes": 4}, "checkpoint": "teacher.npz"}
    recipe = tiny(teacher=teacher)
    from msqkd.models import build_model

    net = build_model("python", "nets.py:Tiny", {"classes": 4})
    np.savez(tmp_path / "teacher.npz", **{p.name: p.asnumpy() for p in net.get_parameters()})
    assert "teacher: its answers have shape (1, 4), the student's (1, 3)" in refused(msqkd, recipe)


def test_teacher_of_another_input(tiny: Recipe, msqkd: Command, tmp_path: Path) -> None:
    recipe = tiny(teacher={"source": "python", "target": "nets.py:Wide", "checkpoint": "wide.ckpt"})
    saved("Wide", tmp_path / "wide.ckpt")
    assert "teacher: it cannot take the student's input of shape (1, 1, 8, 8)" in refused(msqkd, recipe)


@pytest.mark.parametrize("place", ["/dev/null/x", "tiny.yaml", "tiny.yaml/deeper"])
def test_output_that_cannot_be_written(tiny: Recipe, msqkd: Command, place: str) -> None:
    recipe = tiny()
    before = recipe.read_bytes()
    assert f"output folder {place} cannot be created" in refused(msqkd, recipe, output=place)
    assert recipe.read_bytes() == before


def test_output_with_other_files(tiny: Recipe, msqkd: Command, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose")
    recipe = tiny()
    for fresh in ([], ["--fresh"]):
        code, _, err = msqkd("run", recipe, "-o", "mine", "--set", "train.batch_size=73", *fresh)
        assert code == 2
        assert "holds other files (thesis.txt)" in err
        assert (tmp_path / "mine" / "thesis.txt").read_text() == "do not lose"


def test_a_refused_run_does_not_claim_its_folder(tiny: Recipe, msqkd: Command, tmp_path: Path) -> None:
    refused(msqkd, tiny(), "train.batch_size=73")
    assert "fewer than one batch of 74" in refused(msqkd, tiny(), "train.batch_size=74")


def test_a_model_file_that_does_not_exist(tiny: Recipe, msqkd: Command) -> None:
    assert "did you mean 'Tiny'" in refused(msqkd, tiny(model=model(target="nets.py:Tyni")))
    assert "net.py" in refused(msqkd, tiny(model=model(target="net.py:Tiny")))


def test_missing_recipe(msqkd: Command, tmp_path: Path) -> None:
    code, _, err = msqkd("run", tmp_path / "none.yaml")
    assert code == 2
    assert "none.yaml" in err
    assert "Traceback" not in err


def test_a_full_disk_is_a_sentence(tiny: Recipe, msqkd: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from msqkd.pipeline import rundir

    def full(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(rundir, "write_json", full)
    assert "state.json: No space left on device" in refused(msqkd, tiny())


def test_plan_as_json_equals_the_plan_of_the_api(tiny: Recipe, msqkd: Command) -> None:
    from msqkd.api import QuantizationAwareTraining, plan_network
    from msqkd.models import build_model
    from msqkd.quant.config import QuantConfig, WeightQuantizer

    rules = [{"match": {"type": "Block"}, "weight": {"per_channel": True, "bits": 4}}]
    quantization = {"activation": {"delay": 3}, "rules": rules}
    code, out, err = msqkd("plan", tiny(quantization=quantization), "--json")
    assert code == 0, err
    from_recipe = json.loads(out)
    assert {"name", "op", "precision", "reason", "rule"} <= set(from_recipe["nodes"][0])

    net = build_model("python", "nets.py:Tiny", {})
    QuantizationAwareTraining(net, QuantConfig(act_quant_delay=3))
    found = [cell for _, cell in net.cells_and_names() if type(cell).__name__ == "Block"]
    assert len(found) == 1
    for cell in found:
        QuantizationAwareTraining(cell, QuantConfig(WeightQuantizer(4, True), act_quant_delay=3))
    _, plan = plan_network(net, (1, 8, 8))
    from_api = json.loads(json.dumps(plan.to_dict()))
    ruled = {node["name"] for node in from_recipe["nodes"] if node["rule"] != "default"}
    assert ruled == {node["name"] for node in from_api["nodes"] if node["rule"] != "default"}
    assert "block.conv" in ruled

    def bare(data: dict[str, Any]) -> dict[str, Any]:
        """Without the rules' names."""
        parts = {
            key: data[key] for key in ("nodes", "weights", "activations", "groups", "warnings", "int8_share", "target")
        }
        return json.loads(json.dumps(parts), object_hook=lambda item: {k: v for k, v in item.items() if k != "rule"})

    assert bare(from_recipe) == bare(from_api)


def test_plan_as_a_table_shows_rules_as_they_are_written(tiny: Recipe, msqkd: Command) -> None:
    rules = [{"match": {"path": "re:st[a-z]+"}, "precision": "float"}]
    code, out, _ = msqkd("plan", tiny(quantization={"rules": rules}, **CHECKPOINT))
    assert code == 0
    joined = "".join(out.split())
    assert "re:st[a-z]+" in joined
    assert "8bitasymmetric" in joined
    assert "operationsruninint8" in joined
