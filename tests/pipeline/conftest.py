from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Callable

import numpy as np
import pytest
import yaml

NETS = '''
from mindspore import nn, ops


class Block(nn.Cell):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(channels, channels, 3), nn.BatchNorm2d(channels), nn.ReLU()

    def construct(self, x):
        return self.relu(self.bn(self.conv(x)) + x)


class Tiny(nn.Cell):
    def __init__(self, classes=3):
        super().__init__()
        self.stem, self.block, self.relu = nn.Conv2d(1, 4, 3), Block(4), nn.ReLU()
        self.fc = nn.Dense(4, classes)

    def construct(self, x):
        return self.fc(ops.mean(self.block(self.relu(self.stem(x))), (2, 3)))


class Other(nn.Cell):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 2, 3), nn.Dense(2, 3)

    def construct(self, x):
        return self.fc(ops.mean(self.conv(x), (2, 3)))


class Branching(Tiny):
    def construct(self, x):
        y = self.relu(self.stem(x))
        if y.sum() > 0:
            y = self.block(y)
        return self.fc(ops.mean(y, (2, 3)))


class Floats(nn.Cell):
    def __init__(self):
        super().__init__()
        self.tanh = nn.Tanh()

    def construct(self, x):
        return ops.mean(self.tanh(x), (1, 2))


class Wide(nn.Cell):
    """Takes inputs of 5 channels."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(5, 2, 3), nn.Dense(2, 3)

    def construct(self, x):
        return self.fc(ops.mean(self.conv(x), (2, 3)))
'''


def write_data(file: Path, labels: int = 3, test: int = 30) -> Path:
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for part, count in (("train", 72), ("test", test)):
        kind = np.arange(count) % labels
        images = rng.integers(0, 60, (count, 8, 8, 1)) + (kind * 90).reshape(-1, 1, 1, 1) % 190
        arrays |= {f"{part}_images": images.astype(np.uint8), f"{part}_labels": kind.astype(np.int32)}
    np.savez(file, **arrays)
    return file


@pytest.fixture(autouse=True)
def _rehearsal_is_left_out(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rehearsal takes two seconds of a small run; tests that need it are marked `rehearsal`."""
    if not request.node.get_closest_marker("rehearsal"):
        from msqkd.pipeline import run

        monkeypatch.setattr(run, "rehearse", lambda *arguments: None)


@pytest.fixture(autouse=True)
def _no_converter_is_at_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs do the same on every machine; the vendor's converter is tested in tests/deploy."""
    monkeypatch.setenv("MSLITE_HOME", str(tmp_path / "none"))


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a recipe that is done in seconds; keyword arguments take the place of its sections."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    write_data(tmp_path / "data.npz")

    def write(name: str = "tiny", **sections: Any) -> Path:
        recipe = {
            "apiversion": "msqkd/v1",
            "name": "tiny",
            "model": {"source": "python", "target": "nets.py:Tiny", "input_shape": [1, 8, 8]},
            "data": {"name": "arrays", "root": "data.npz", "eval_batch_size": 15},
            "pretrain": {"epoch_size": 2, "batch_size": 12, "lr": 0.05},
            "quantization": {"activation": {"delay": 3}},
            "distillation": {"soft_loss": "mse"},  # compiled in a second less than the default, kl
            "train": {"epoch_size": 2, "batch_size": 12, "lr": 0.01},
            "compare": [],
            "calibration": {"samples": 24, "batch_size": 12},
        }
        recipe.update(sections)
        recipe = {key: value for key, value in recipe.items() if value is not None}
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(recipe, sort_keys=False))
        return file

    return write


@pytest.fixture
def msqkd(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process: (exit code, standard output, standard error)."""
    import signal

    from msqkd import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["msqkd", *map(str, arguments)])
        before = signal.getsignal(signal.SIGTERM)
        try:
            code = cli.guarded(cli.app)
        finally:
            signal.signal(signal.SIGTERM, before)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="session")
def _finished_folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where the folder of a finished command is kept for the tests that ask for the same one again."""
    root = tmp_path_factory.mktemp("finished")
    numbers: dict[str, int] = {}
    return lambda key: root / str(numbers.setdefault(key, len(numbers)))


@pytest.fixture
def finished(
    tiny: Callable[..., Path],
    msqkd: Callable[..., tuple[int, str, str]],
    _finished_folders: Callable[[str], Path],
) -> Callable[..., Path]:
    """Gives the output folder `out` of a finished command; it runs once, and every test gets a copy of its own."""

    def folder(command: str = "run", **sections: Any) -> Path:
        recipe = tiny(**sections)
        kept, out = _finished_folders(json.dumps([command, sections], sort_keys=True)), Path("out")
        if kept.exists():
            shutil.copytree(kept, out)
            return out
        code, _, err = msqkd(command, recipe, "-o", "out")
        assert code == 0, err
        shutil.copytree(out, kept)
        return out

    return folder
