"""Methods of post-training quantisation in a recipe: applied, told, exported, and found again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

import numpy as np

from msqkd.checkpoints import read_checkpoint
from msqkd.exporters.verify import load_portable

METHODS = ["equalize", "weight_ranges", "adaround", "bias_correction"]


def test_calibrate_applies_the_methods_and_exports_their_result(
    tmp_path: Path, tiny: Callable[..., Path], msqkd: Callable[..., tuple[int, str, str]]
) -> None:
    sections: dict[str, Any] = {
        "quantization": {"weight": {"bits": 4}, "activation": {"delay": 3}}, "distillation": None, "train": None,
        "ptq": {"methods": METHODS, "adaround": {"iterations": 60, "batch_size": 8, "lr": 0.1}},
        "export": {"formats": ["portable_mindir", "ms"]},
    }  # fmt: skip
    recipe = tiny("improved", **sections)
    code, _, err = msqkd("calibrate", recipe, "-o", "improved")
    assert code == 0, err
    report = json.loads((tmp_path / "improved" / "report.json").read_text())
    assert list(report["calibration"]["methods"]) == METHODS
    assert "adaround: " in err
    before, after = (read_checkpoint(str(tmp_path / "improved" / name)) for name in ("ptq_reference.ckpt", "ptq.ckpt"))
    scales = {f"{weight['node']}.weight": np.float32(weight["scale"]) for weight in report["plan"]["weights"]}
    rounded = [name for name in scales if (before[name] != after[name]).any()]
    assert rounded
    for name in rounded:  # what a method rounded is what the file holds: the scale times an integer
        levels = after[name] / scales[name].reshape(-1, *[1] * (after[name].ndim - 1))
        np.testing.assert_allclose(levels, np.round(levels), atol=1e-5)
    (portable,) = (tmp_path / "improved").glob("*portable.mindir")
    assert load_portable(portable) is not None
    # The same command again finds it done, and a verification makes the same network again.
    code, _, err = msqkd("verify", "improved", "--json")
    assert code == 0, err


def test_the_same_recipe_gives_the_same_weights(
    tmp_path: Path, tiny: Callable[..., Path], msqkd: Callable[..., tuple[int, str, str]]
) -> None:
    ptq = {"methods": ["adaround"], "adaround": {"iterations": 10, "batch_size": 8}}
    recipe = tiny("twice", ptq=ptq, distillation=None, train=None, export={"formats": ["portable_mindir"]})
    for folder in ("one", "two"):
        code, _, err = msqkd("calibrate", recipe, "-o", folder)
        assert code == 0, err
    one, two = (read_checkpoint(str(tmp_path / folder / "ptq.ckpt")) for folder in ("one", "two"))
    for name, array in one.items():
        np.testing.assert_array_equal(two[name], array, err_msg=name)


def test_clustered_weights_are_exported_and_found_again(
    tmp_path: Path, tiny: Callable[..., Path], msqkd: Callable[..., tuple[int, str, str]]
) -> None:
    ptq = {"methods": ["cluster", "bias_correction"], "cluster": {"clusters": 5, "shared": True}}
    recipe = tiny("clustered", ptq=ptq, distillation=None, train=None, export={"formats": ["portable_mindir"]})
    folder = tmp_path / "clustered"
    code, _, err = msqkd("calibrate", recipe, "-o", folder)
    assert code == 0, err
    report = json.loads((folder / "report.json").read_text())
    (told,) = report["calibration"]["methods"]["cluster"]
    assert "take at most 5 integers in all, before" in told
    assert "bits a weight" in err
    weights, found = read_checkpoint(str(folder / "ptq.ckpt")), set()
    for quant in report["plan"]["weights"]:
        data = weights[f"{quant['node']}.weight"]
        scale = np.float32(quant["scale"]).reshape(-1, *[1] * (data.ndim - 1))
        np.testing.assert_allclose(data / scale, np.rint(data / scale), atol=1e-5)
        found |= set(np.rint(data / scale).astype(int).reshape(-1).tolist())
    assert len(found) == 5
    # A run that ended before its export goes on from what it saved, and writes the same file.
    (file,) = folder.glob("*portable.mindir")
    written = file.read_bytes()
    file.unlink()
    state = json.loads((folder / "state.json").read_text())
    state["stages"] = {name: stage for name, stage in state["stages"].items() if name not in ("export", "report")}
    (folder / "state.json").write_text(json.dumps(state))
    code, _, err = msqkd("calibrate", recipe, "-o", folder)
    assert code == 0, err
    assert file.read_bytes() == written
