"""Whatever the user gets wrong: one sentence on standard error, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest

Command = Callable[..., tuple[int, str, str]]
Recipe = Callable[..., Path]

CHECKPOINT = {"pretrain": None}


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
    assert "checkpoint of another network" in refused(msqkd, recipe)


def test_data_folder_without_images(tiny: Recipe, msqkd: Command, tmp_path: Path) -> None:
    (tmp_path / "images" / "train" / "cat").mkdir(parents=True)
    assert "images" in refused(msqkd, tiny(data={"name": "image_folder", "root": "images"}))
    assert "nowhere" in refused(msqkd, tiny(data={"name": "image_folder", "root": "nowhere"}))


def test_labels_out_of_range(tiny: Recipe, msqkd: Command) -> None:
    text = refused(msqkd, tiny(model=model(args={"classes": 2})))
    assert "labels are outside 0 to 1" in text


def test_control_flow_on_values(tiny: Recipe, msqkd: Command) -> None:
    text = refused(msqkd, tiny(model=model(target="nets.py:Branching")))
    assert "branches or loops on tensor values" in text


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
