from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from msqkd import parallel
from msqkd.errors import DataError, ExportError
from msqkd.pipeline.rundir import RunDirectory
from msqkd.train.loop import steps_per_epoch

sys.path.insert(0, str(Path(__file__).parent))
import parallel_worker as alone

pytestmark = pytest.mark.usefixtures("graph_mode")

MSRUN = shutil.which("msrun") or shutil.which("msrun", path=str(Path(sys.executable).parent))
ROOT = Path(__file__).parents[1]


def launch(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Two workers on this machine; their logs are in `folder`/log."""
    if MSRUN is None:
        pytest.skip("msrun is not installed")
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    except OSError as error:
        pytest.skip(f"no port can be opened here ({error})")
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    python = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    # The scheduler waits so long for a worker that is gone.
    environment = {**os.environ, "PATH": paths, "PYTHONPATH": python, "MS_NODE_TIMEOUT": "5", "OMP_NUM_THREADS": "1"}
    command = [MSRUN, "--worker_num=2", "--local_worker_num=2", f"--master_port={port}", f"--log_dir={folder / 'log'}"]
    return subprocess.run(
        [*command, "--join=True", "python", *map(str, arguments)],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, np.ndarray]]:
    """What each of two workers found."""
    folder = tmp_path_factory.mktemp("workers")
    done = launch(folder, ROOT / "tests" / "parallel_worker.py", folder)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    found = []
    for rank in range(2):
        with np.load(folder / f"worker{rank}.npz") as file:
            found.append({name: file[name] for name in file.files})
    return found


def of(kind: str, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name[len(kind) + 1 :]: array for name, array in found.items() if name.startswith(kind + "/")}


@pytest.mark.slow
def test_both_workers_end_equal_to_the_bit(workers: list[dict[str, np.ndarray]]) -> None:
    assert workers[0].keys() == workers[1].keys()
    for name, array in workers[0].items():
        if "/gathered." not in name and "loss_sum" not in name:  # sums over a step are each worker's own
            np.testing.assert_array_equal(array, workers[1][name], err_msg=name)


@pytest.mark.slow
def test_two_workers_train_as_one_does_with_the_doubled_batch(
    workers: list[dict[str, np.ndarray]], tmp_path: Path
) -> None:
    expected = alone.quantised(tmp_path, 2 * alone.BATCH, alone.FOLLOWED)
    found = of("quantised", workers[0])
    assert found.keys() == expected.keys()
    assert expected["history/skipped"] == found["history/skipped"]
    assert 1 <= found["history/skipped"][0] <= 3  # the epochs that have the spoilt sample, for one worker or the other
    assert found["history/accuracy"].tolist() == expected["history/accuracy"].tolist()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=2e-5, atol=2e-6, err_msg=name)
    ranges = [name for name in expected if "range_m" in name]
    assert len(ranges) >= 4
    assert all(expected[name].any() for name in ranges if name.endswith("max"))


@pytest.mark.slow
def test_a_live_batchnorm_has_one_statistic(workers: list[dict[str, np.ndarray]]) -> None:
    found = of("floating", workers[0])
    assert len(found["history/accuracy"]) == 1
    assert not np.array_equal(found["bn.moving_mean"], np.zeros(4))
    assert {"average.bn.moving_mean", "average.conv.weight"} <= found.keys()


@pytest.mark.slow
def test_what_workers_tell_each_other(workers: list[dict[str, np.ndarray]]) -> None:
    found = of("exchanged", workers[1])
    assert found["gathered"].tolist() == [0, 10]
    assert found["rows"].tolist() == [[0, 1.5], [0, -0.25], [1, 1.5], [1, -0.25]]
    assert found["any"].tolist() == [False, True]
    assert found["said"] == "é" * 2000


@pytest.mark.slow
def test_cells_see_the_whole_batch(workers: list[dict[str, np.ndarray]]) -> None:
    expected, found = alone.parts(alone.ROWS), of("parts", workers[0])
    np.testing.assert_allclose(found["balance"], expected["balance"], rtol=1e-6)
    np.testing.assert_array_equal(found["dropout"], expected["dropout"])
    assert (expected["dropout"] == 0).any()
    assert (expected["dropout"] != 0).any()


@pytest.mark.slow
def test_a_failing_worker_ends_the_others(tmp_path: Path) -> None:
    """Worker 0 waits for an answer that never comes."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import sys\nfrom msqkd import cli, parallel\nfrom msqkd.errors import DataError\n\n"
        "def work():\n    parallel.join()\n    if parallel.rank():\n        raise DataError('the disk is full')\n"
        "    parallel.wait()\n\nsys.exit(cli.guarded(work))\n"
    )
    done = launch(tmp_path, script)
    assert done.returncode != 0
    lines = (tmp_path / "log" / "worker_1.log").read_text().splitlines()
    assert "msqkd: worker 1: the disk is full" in lines


def two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(parallel, "rank", lambda: 1)


def test_each_worker_has_its_part_of_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parallel.share_of_batch(np.arange(6), 3).tolist() == [0, 1, 2, 3, 4, 5]
    two(monkeypatch)
    assert parallel.share_of_batch(np.arange(6)).tolist() == [3, 4, 5]
    assert parallel.share_of_batch(np.arange(12), 3).tolist() == [2, 3, 6, 7, 10, 11]


def test_too_few_samples_for_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    two(monkeypatch)
    assert steps_per_epoch(alone.split(), 6) == 2
    with pytest.raises(
        DataError, match="toy train has 26 samples, fewer than one batch of 14 for each of 2 workers; choose a smaller"
    ):
        steps_per_epoch(alone.split(), 14)


def test_a_folder_only_one_worker_sees_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"is not the first worker's, whose state.json is not there; all workers need"
    ):
        RunDirectory.of_other_worker(tmp_path, {"stages": {}})


def test_one_process_is_one_worker() -> None:
    assert (parallel.size(), parallel.rank(), parallel.is_first()) == (1, 0, True)
    assert parallel.from_first({"a": 1}) == {"a": 1}
    assert parallel.gathered(7) == [7]
    assert parallel.any_worker(True)
    parallel.join()
    assert parallel.size() == 1
