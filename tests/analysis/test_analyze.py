from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from broken_layers import BATCH, X, prepared, samples, with_spread_channels, with_weight_bits
from rich.console import Console

from msqkd.analysis.analysis_report import analysis_html, analysis_table, diagnosis_lines, write_analysis
from msqkd.analysis.analyze import API_VERSION, Analysis, analyze
from msqkd.analysis.layers import layer_table
from msqkd.analysis.statistics import Distribution
from msqkd.data import ArraySplit
from msqkd.errors import DataError, PlanError
from msqkd.quant.config import FLOAT, Rule
from msqkd.quant.placement import make_plan
from msqkd.quant.ptq import calibrate

pytestmark = pytest.mark.usefixtures("graph_mode")


@pytest.fixture(scope="module")
def analysis() -> Analysis:
    graph, plan = prepared()
    return analyze(graph, with_weight_bits(plan, "left", 2), graph, samples(), batch=BATCH)


@pytest.fixture(scope="module")
def data(analysis: Analysis) -> dict[str, Any]:
    return json.loads(json.dumps(analysis.to_dict(), allow_nan=False))


def shown(data: dict[str, Any]) -> str:
    """The table as a terminal shows it."""
    file = io.StringIO()
    Console(file=file, width=200).print(analysis_table(data))
    return file.getvalue()


def test_the_broken_layer_comes_first_everywhere(analysis: Analysis, data: dict[str, Any]) -> None:
    assert data["ranking"][0] == "left"
    assert data["diagnoses"][0]["layer"] == "left"
    assert next(row for row in data["layers"] if row["rank"] == 1)["name"] == "left"
    lines = [line for line in shown(data).splitlines() if line.startswith(("│ 1 ", "│ 2 "))]
    assert "left" in lines[0]
    assert "accuracy alone" in shown(data)
    assert diagnosis_lines(data)[0].startswith("1. left (Conv2D): quantised alone it costs a KL divergence of ")


def test_every_layer_has_its_numbers(data: dict[str, Any]) -> None:
    graph, plan = prepared()
    assert data["apiversion"] == API_VERSION
    assert data["samples"] == {"split": "noise test", "statistics": 24, "sensitivity": 24}
    rows = {row["name"]: row for row in data["layers"]}
    table = layer_table(graph, with_weight_bits(plan, "left", 2), graph, [X[:BATCH], X[BATCH:]])
    for held in table:
        assert rows[held["name"]]["cumulative_sqnr_db"] == pytest.approx(held["sqnr_db"], abs=1e-6)
    assert rows["left"]["weight"]["bits"] == 2
    assert rows["left"]["weight"]["per_channel"] is True
    assert rows["left"]["weight"]["statistics"]["channels"] == 8
    inputs = rows[graph.inputs[0]]
    exact = Distribution(1)
    exact.update(X)
    found, wanted = dict(inputs["activation"]["statistics"]), exact.to_dict()
    assert found.pop("mean") == pytest.approx(wanted.pop("mean"), rel=1e-6)
    assert found.pop("std") == pytest.approx(wanted.pop("std"), rel=1e-6)
    assert found.pop("kurtosis") == pytest.approx(wanted.pop("kurtosis"), rel=1e-6)
    assert found == wanted
    assert (inputs["border"], rows["fc"]["border"], rows["left"]["border"]) == ("input", "output", None)
    assert inputs["weight"] is None


def test_outputs_are_compared_before_and_after(data: dict[str, Any]) -> None:
    outputs = data["outputs"]
    assert outputs["metric"] == {"float": data["sensitivity"]["float_metric"], "quantised": pytest.approx(0, abs=100)}
    assert outputs["loss"] == pytest.approx(data["sensitivity"]["quantised_loss"], rel=1e-5)
    (values,) = outputs["values"]
    assert sum(values["histogram"]["float"]) == sum(values["histogram"]["quantised"]) == 24 * 5
    assert values["float"]["mean"] + values["mean_diff"] == pytest.approx(values["quantised"]["mean"], abs=1e-5)
    assert 0 <= outputs["agreement"] <= 100


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self.loads += [str(v) for k, v in attrs if k in ("src", "href", "xlink:href") and not str(v).startswith("#")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_loads_nothing_and_shows_the_diagnosis_and_the_plots(tmp_path: Path, data: dict[str, Any]) -> None:
    hostile = '<script>alert("1")</script>'
    paths = write_analysis({**data, "name": hostile, "warnings": ["careful"]}, tmp_path)
    page, text = Page(), paths["html"].read_text()
    page.feed(text)
    assert page.loads == []
    assert hostile not in text
    assert hostile in page.text
    assert "careful" in page.text
    assert len(text) < 5e6
    for remedy in data["diagnoses"][0]["remedies"]:
        assert remedy["text"] in page.text
        assert remedy["yaml"].strip() in page.text
    assert text.count("<svg") >= 7
    assert json.loads(paths["json"].read_text())["ranking"] == data["ranking"]
    assert "Undefined" not in page.text


def test_without_labels_there_is_no_metric_and_a_healthy_network_has_no_diagnosis() -> None:
    graph, plan = prepared()
    split = ArraySplit(X, None, [], name="unlabelled")
    found = analyze(graph, plan, graph, split, batch=7, sensitivity_samples=10)
    assert found.samples == {"split": "unlabelled", "statistics": 21, "sensitivity": 7}
    assert found.sensitivity.float_metric is None
    assert [row for row in found.diagnoses if row.layer == "left"] == []
    page = Page()
    page.feed(analysis_html({**found.to_dict(), "diagnoses": []}))
    assert "No layer stands out" in page.text
    assert "accuracy" not in shown(found.to_dict())


def test_a_slow_network_is_computed_layer_by_layer_with_fewer_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msqkd.analysis.analyze.SENSITIVITY_SECONDS", 1e-9)
    graph, plan = prepared()
    found = analyze(graph, plan, graph, samples(), batch=BATCH)
    assert found.samples == {"split": "noise test", "statistics": 24, "sensitivity": 12}


def test_equalisation_is_tried_where_methods_are_possible() -> None:
    graph = with_spread_channels(30)
    plan = with_weight_bits(calibrate(graph, prepared(per_channel=False)[1], [X]), "left", 4)
    weights = {name: parameter.data.copy() for name, parameter in graph.params.items()}
    first = analyze(graph, plan, graph, samples(), batch=BATCH, methods=True).diagnoses[0]
    assert first.layer == "left"
    (remedy,) = (remedy for remedy in first.remedies if "equalisation" in remedy.text)
    assert remedy.fragment == {"ptq": {"methods": ["equalize"]}}
    assert all(np.array_equal(weights[name], parameter.data) for name, parameter in graph.params.items())


def test_nothing_to_analyse_is_one_sentence() -> None:
    graph, plan = prepared()
    kept = make_plan(graph, None, [Rule("path", "*", FLOAT)])
    with pytest.raises(PlanError, match="no layer of Net is quantised: there is nothing to analyse"):
        analyze(graph, kept, graph, samples())
    with pytest.raises(PlanError, match="has no range yet"):
        analyze(graph, make_plan(graph), graph, samples())
    with pytest.raises(DataError, match="holds no sample"):
        analyze(graph, plan, graph, samples(), sensitivity_samples=0)
    broken = ArraySplit(np.full_like(X, 3e38), None, [], name="huge")
    with pytest.raises(PlanError, match="not finite"):
        analyze(graph, plan, graph, broken)
