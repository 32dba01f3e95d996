"""A recipe whose networks are MindIR files: the same run as with the Python code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import numpy as np

from msqkd.recipe import make_recipe

Command = Callable[..., tuple[int, str, str]]
Recipe = Callable[..., Path]


def trained(folder: Path) -> None:
    """``net.mindir`` and ``net.ckpt`` of one network."""
    import mindspore as ms

    from msqkd.models import build_model

    net = build_model("python", "nets.py:Tiny", {})
    net.set_train(False)
    ms.export(net, ms.Tensor(np.zeros((1, 1, 8, 8), np.float32)), file_name=str(folder / "net"), file_format="MINDIR")
    ms.save_checkpoint(net, str(folder / "net.ckpt"))


def test_a_run_from_a_file_is_the_run_from_the_code(tiny: Recipe, msqkd: Command, tmp_path: Path) -> None:
    rules = [{"match": {"path": "block.*"}, "weight": {"bits": 6}}, {"match": {"type": "Tiny"}, "precision": "int8"}]
    common: dict[str, Any] = {
        "quantization": {"activation": {"delay": 3}, "rules": rules},
        "train": {"epoch_size": 1, "batch_size": 12, "lr": 0.01},
        "pretrain": None,
        "export": {"formats": ["portable_mindir"]},
    }
    tiny()
    trained(tmp_path)
    file = {"source": "mindir", "file": "net.mindir"}
    code = {"source": "python", "target": "nets.py:Tiny", "checkpoint": "net.ckpt"}
    found = {}
    for name, section in (("file", file), ("code", code)):
        shape = {} if name == "file" else {"input_shape": [1, 8, 8]}
        recipe = tiny(name, model={**section, **shape}, teacher=section, **common)
        exit_code, out, err = msqkd("run", recipe, "-o", name)
        assert exit_code in (0, 1), err
        assert ("model: 8 of 8 parameters loaded from net.ckpt" in out + err) == (name == "code")
        found[name] = json.loads((tmp_path / name / "report.json").read_text())
    assert found["file"]["accuracy"] == found["code"]["accuracy"]
    assert found["file"]["plan"] == found["code"]["plan"]
    assert found["file"]["checkpoints"] == {}
    assert set(found["code"]["checkpoints"]) == {"model", "teacher"}
    loaded = found["code"]["checkpoints"]["model"]
    assert (loaded["file"], len(loaded["loaded"]), loaded["missing"], loaded["unused"]) == ("net.ckpt", 8, [], [])
    state = json.loads((tmp_path / "code" / "state.json").read_text())
    assert state["stages"]["float"]["checkpoints"] == found["code"]["checkpoints"]
    assert 'id="weights"' in (tmp_path / "code" / "report.html").read_text()
    assert msqkd("verify", "file")[0] in (0, 1)


def test_files_are_found_beside_the_recipe(tmp_path: Path) -> None:
    for name in ("net.mindir", "names.json"):
        (tmp_path / name).write_bytes(b"")
    values = {
        "apiversion": "msqkd/v1",
        "name": "x",
        "model": {"source": "mindir", "file": "net.mindir"},
        "teacher": {"source": "msqkd", "name": "lenet5", "checkpoint": "c.ckpt", "name_map": "names.json"},
        "data": {"name": "digits"},
        "distillation": {},
    }
    recipe = make_recipe(values, folder=tmp_path)
    assert recipe.model.file == str(tmp_path / "net.mindir")
    assert recipe.teacher.name_map == str(tmp_path / "names.json")
