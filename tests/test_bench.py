from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msqkd import bench
from msqkd.analysis.layer_times import LayerTimes
from msqkd.bench import (
    MIN_ROUNDS,
    Comparison,
    Environment,
    Latency,
    bench_layers,
    bench_onnx,
    int8_instructions,
    layers_of_operations,
    markdown,
    times_table,
)
from msqkd.errors import DataError, ExportError, MissingDependencyError
from msqkd.exporters.onnx import export_onnx, export_onnx_float
from msqkd.exporters.onnx.profile import Profile, middle_mean
from msqkd.exporters.onnx.qdq import onnx_owners
from msqkd.graph.ir import Graph, Node, TensorType, Value
from msqkd.quant.config import INT8
from msqkd.quant.plan import ActivationQuant, Group, NodePlan, QuantPlan, WeightQuant

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

X = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    graph, plan = one_layer()
    return export_onnx_float(graph, tmp_path / "float.onnx"), export_onnx(graph, plan, tmp_path / "int8.onnx")


def one_layer() -> tuple[Graph, QuantPlan]:
    """One dense layer in float and in int8."""
    graph = Graph("Net")
    graph.inputs = [graph.add_value(Value("x", "input", TensorType((-1, 16))))]
    graph.add_param("w", np.random.default_rng(1).normal(size=(8, 16)).astype(np.float32))
    graph.nodes = [Node("fc", "Dense", ["x", "w"], [graph.add_value(Value("y", "node", TensorType((-1, 8))))])]
    graph.outputs = ["y"]
    plan = QuantPlan("lite_arm", "Net", [NodePlan("fc", "Dense", "", (), INT8, "", "test")])
    plan.weights["fc"] = WeightQuant("fc", 8, 0, "minmax", "test")
    for name in ("x", "y"):
        plan.groups[name] = Group(name, 8, False, "minmax", 100.0, 0, "test", (-4.0, 4.0))
        plan.activations[name] = ActivationQuant(name, name)
    return graph, plan


class Clock:
    """A clock that only the calls move."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def pretend(monkeypatch: pytest.MonkeyPatch, durations: dict[str, list[float]]) -> list[str]:
    """Let each call of a file take the next of its durations (the last one from then on); returns the calls made."""
    clock, calls = Clock(), []

    def load(file: Path, threads: int) -> Any:
        def run(x: np.ndarray) -> None:
            calls.append(file.stem)
            mine = durations[file.stem]
            clock.now += mine.pop(0) if len(mine) > 1 else mine[0]

        return run

    monkeypatch.setattr("msqkd.exporters.onnx.load_onnx", load)
    monkeypatch.setattr(bench.time, "perf_counter", clock)
    return calls


def test_both_files_are_measured(files: tuple[Path, Path]) -> None:
    found = bench_onnx(*files, X, threads=1, rounds=5)
    assert (found.batch, found.rounds, found.environment.threads) == (4, 5, 1)
    assert (found.float32.file, found.int8.file) == ("float.onnx", "int8.onnx")
    assert [found.float32.size, found.int8.size] == [file.stat().st_size for file in files]
    for latency in (found.float32, found.int8):
        assert 0 < latency.lower <= latency.median <= latency.upper
    assert found.kernels["QGemm"] == 1
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["int8"]["iqr"] == pytest.approx(found.int8.iqr)
    assert data["speed_up"] == found.speed_up == found.float32.median / found.int8.median
    assert set(data["environment"]) == {"cpu", "int8_instructions", "threads", "onnxruntime", "system"}


def test_files_take_turns_and_medians_count(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pretend(monkeypatch, {"float": [9.0] * 3 + [0.4, 0.4, 90.0, 0.4, 0.4], "int8": [9.0] * 3 + [0.1] * 5})
    found = bench_onnx(*files, X, rounds=5)
    assert calls[-10:] == ["float", "int8"] * 5
    assert (found.float32.median, found.int8.median) == pytest.approx((400.0, 100.0))
    assert (found.speed_up, found.float32.iqr) == pytest.approx((4.0, 0.0), abs=1e-9)


@pytest.mark.parametrize(("seconds", "rounds"), [(30.0, 60), (0.1, MIN_ROUNDS)])
def test_rounds_fill_the_time(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, seconds: float, rounds: int
) -> None:
    pretend(monkeypatch, {"float": [0.25], "int8": [0.25]})
    assert bench_onnx(*files, X, seconds=seconds).rounds == rounds


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"threads": 0}, "threads is 0; allowed: 1 or more"),
        ({"rounds": 0}, "rounds is 0; allowed: 1 or more"),
        ({"inputs": X[:, :3]}, "float.onnx does not take the input: "),
        ({"inputs": []}, "there is no input to measure with"),
    ],
)
def test_what_makes_no_measurement(files: tuple[Path, Path], options: dict[str, Any], text: str) -> None:
    arguments = {"inputs": X, "rounds": 1, **options}
    with pytest.raises(DataError) as caught:
        bench_onnx(*files, **arguments)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"^onnxruntime cannot load .*none\.onnx"):
        bench_onnx(tmp_path / "none.onnx", files[1], X, rounds=1)


def test_without_onnxruntime(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'msqkd\[onnx\]'$"):
        bench_onnx(*files, X, rounds=1)


# -- layer by layer ----------------------------------------------------------------------------------------------------
def chain(*ops: str) -> tuple[Graph, QuantPlan]:
    """Operations one after the other; those called Dense have a weight, and are quantised."""
    graph = Graph("Net")
    value = graph.add_value(Value("x", "input", TensorType((-1, 16))))
    graph.inputs, plan = [value], QuantPlan("lite_arm", "Net")
    for number, op in enumerate(ops):
        name, inputs = f"{op.lower()}{number}", [value]
        if op == "Dense":
            inputs.append(graph.add_param(f"{name}.weight", np.full((16, 16), 0.1, np.float32)))
            plan.weights[name] = WeightQuant(name, 8, None, "minmax", "test")
        value = graph.add_value(Value(f"{name}_value", "node", TensorType((-1, 16))))
        graph.nodes.append(Node(name, op, inputs, [value]))
        plan.nodes.append(NodePlan(name, op, "", (), INT8 if op == "Dense" else "float", "", "test"))
    graph.outputs = [value]
    return graph, plan


def test_activations_are_measured_with_the_layer_before_them() -> None:
    graph, plan = chain("Dense", "ReLU", "Tanh", "Dense", "Softmax", "Sigmoid")
    plan.nodes[2] = replace(plan.nodes[2], fused_into="dense0")
    assert layers_of_operations(graph, plan) == {
        "dense0": "dense0", "relu1": "dense0", "tanh2": "dense0", "dense3": "dense3",
    }  # fmt: skip
    graph.outputs.append("dense0_value")  # the ReLU cannot be computed in the kernel before it
    assert "relu1" not in layers_of_operations(graph, plan)


def test_every_kernel_is_that_of_an_operation(files: tuple[Path, Path], tmp_path: Path) -> None:
    graph, plan = one_layer()
    owners = onnx_owners(graph, plan)
    assert {owners[name] for name in ("fc", "x.QuantizeLinear", "y.DequantizeLinear", "y")} == {"fc"}
    profile = Profile(files[1], 1, tmp_path)
    for _ in range(3):
        profile.run(X)
    found = profile.times(owners, 3)
    assert set(found) == {"fc"}, "what quantises the input is the layer's, too"
    assert found["fc"] >= 0


def test_layers_are_measured_in_both_files() -> None:
    graph, plan = one_layer()
    times = bench_layers(graph, plan, X, rounds=4)
    assert times.precisions == ["float", "8"]
    assert set(times.layers) == {"fc"}
    assert set(times.rest) == {"float", "8"}
    assert LayerTimes.of(times.to_dict()) == times
    with pytest.raises(DataError, match="rounds is 0"):
        bench_layers(graph, plan, X, rounds=0)


def test_times_are_a_sample_and_disturbances_hardly_count(monkeypatch: pytest.MonkeyPatch) -> None:
    assert middle_mean([1, 2, 2, 3, 3, 3, 4, 900]) == 2.75
    assert middle_mean([5]) == 5
    graph, plan = one_layer()
    monkeypatch.setattr(Profile, "times", lambda self, owners, rounds: {"fc": 40.0, "": 8.0})
    times = bench_layers(graph, plan, X, rounds=1)
    assert times == LayerTimes({"fc": {"float": 10.0, "8": 10.0}}, {"float": 2.0, "8": 2.0})
    assert times_table(times).splitlines() == [
        "| layer | float µs | 8 µs |",
        "|---|---:|---:|",
        "| fc | 10.00 | 10.00 |",
        "| the rest | 2.00 | 2.00 |",
        "| all | 12.00 | 12.00 |",
    ]


def test_layers_without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'msqkd\[onnx\]'$"):
        bench_layers(*one_layer(), X)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"fpu", "avx2", "avx512_vnni", "avx_vnni"}, "AVX512-VNNI, AVX-VNNI"),
        ({"fp", "asimd", "asimddp"}, "SDOT/UDOT"),
        ({"fpu", "avx2"}, "none"),
        (set(), "unknown"),
    ],
)
def test_int8_instructions(flags: set[str], expected: str) -> None:
    assert int8_instructions(flags) == expected


def test_the_table_has_a_line_for_each_measurement_and_one_for_the_machine() -> None:
    def measured(batch: int, threads: int) -> Comparison:
        machine = Environment("A processor", "none", threads, "1.2.3", "Linux x86_64")
        slow, fast = (
            Latency("float32", "f.onnx", 4_000_000, 4.0, 3.5, 5.0),
            Latency("int8", "q.onnx", 1_040_000, 2, 2, 2),
        )
        return Comparison(slow, fast, batch, 10, {}, machine)

    lines = markdown([measured(1, 1), measured(16, 2)]).splitlines()
    assert lines[2] == "| 1 | 1 | 4.000 (1.500) | 2.000 (0.000) | 2.00× | 4.00 | 1.04 |"
    assert lines[3].startswith("| 16 | 2 |")
    assert {line.count("|") for line in lines[:4]} == {8}
    assert lines[4:] == ["", "onnxruntime 1.2.3 on A processor; int8 instructions: none."]
