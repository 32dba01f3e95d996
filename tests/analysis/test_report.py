from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest

from msqkd.analysis.report import API_VERSION, render_html, write_report

pytestmark = pytest.mark.figures

HOSTILE = '<script>alert("1")</script>'
GAPS = re.compile(r"\b(None|nan|Undefined)\b")
VOID = {"meta", "link", "br", "img", "input", "hr"}


def layer(name: str, sqnr: Optional[float] = 30.0) -> dict[str, Any]:
    return {
        "name": name,
        "op": "Conv2D",
        "value": f"{name}_out",
        "sqnr_db": sqnr,
        "weight": {
            "min": -0.5,
            "max": 0.4,
            "bits": 8,
            "per_channel": True,
            "scales": 16,
            "scale_min": 0.001,
            "scale_max": 0.004,
            "sqnr_db": 41.5,
            "count": 144,
            "max_over_percentile": 1.5,
        },
        "activation": {
            "lo": 0.0,
            "hi": 6.0,
            "observed_min": 0.0,
            "observed_max": 7.5,
            "scale": 0.0235,
            "zero_point": -128,
            "bits": 8,
            "sqnr_db": 43.5,
            "outside": 0.0021,
            "max_over_percentile": 3.5,
        },
    }


def node(name: str, op: str, precision: str = "int8", fused_into: Optional[str] = None, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "op": op,
        "cell_path": name,
        "cell_types": ["Net", op],
        "precision": precision,
        "reason": "int8 kernel Conv2DFusion",
        "rule": "default",
        "fused_into": fused_into,
        **more,
    }


def plan(names: list[str]) -> dict[str, Any]:
    nodes = [n for name in names for n in (node(name, "Conv2D"), node(f"{name}.relu", "ReLU", fused_into=name))]
    group = {
        "bits": 8,
        "symmetric": False,
        "observer": "percentile",
        "percentile": 99.9,
        "delay": 40,
        "rule": "default",
    }
    return {
        "target": "lite_arm",
        "network": "Net",
        "int8_share": 1.0,
        "nodes": nodes,
        "weights": [
            {"node": name, "bits": 8, "axis": 0, "observer": "mse", "rule": "default", "clip_ratio": 1.0}
            for name in names
        ],
        "activations": [{"value": f"{n}_out", "group": f"{n}_out", "exact": False, "edges": []} for n in names],
        "groups": [{"name": f"{name}_out", "range": [0.0, 6.0], **group} for name in names],
        "avoided": [
            {"name": "wraps", "what": "a pool wraps", "instead": "it has the same parameters", "nodes": [names[0]]}
        ],
        "warnings": ["a warning of the plan"],
    }


def training(steps: int = 50) -> dict[str, Any]:
    return {
        "loss": [[i, 2.0 / (i + 1)] for i in range(steps)],
        "learning_rate": [[i, 0.01] for i in range(steps)],
        "accuracy": [[1, 90.0], [2, 95.0]],
        "skipped_steps": 0,
        "seconds": 75.0,
        "start_of_activation_quantisation": 40,
    }


def value_parity(name: str, largest: int = 1) -> dict[str, Any]:
    histogram = {"<=-3": 0, "-2": 0, "-1": 4, "0": 990, "1": 6, "2": 0, ">=3": 0}
    return {
        "layer": name,
        "op": "Conv2D",
        "value": f"{name}_out",
        "scale": 0.0235,
        "count": 1000,
        "equal": 0.99,
        "max_lsb": largest,
        "histogram": histogram,
        "relative_error": None,
        "sqnr_db": {"fake_quantised": 35.0, "integer": 34.9, "integer_fake_quantised": 50.0},
    }


def parity(names: list[str]) -> dict[str, Any]:
    place = {"layer": names[0], "op": "Conv2D", "value": f"{names[0]}_out", "max_lsb": 1}
    return {
        "split": "calibration",
        "target": "lite_arm",
        "machine": "arm64",
        "samples": 1000,
        "accuracy": {"float": 98.5, "fake_quantised": 98.2, "integer": 98.1},
        "agreement": {"integer_fake_quantised": 99.9, "integer_float": 99.0, "fake_quantised_float": 99.1},
        "deviation": 0.1,
        "deviating_samples": 1,
        "max_deviation": 0.1,
        "exceeded": False,
        "first_difference": place,
        "first_beyond_one": None,
        "values": [value_parity(name) for name in names],
    }


def latency(batch: int) -> dict[str, Any]:
    times = {"median": 2.0 * batch, "lower": 1.9 * batch, "upper": 2.25 * batch}
    return {
        "float32": times,
        "int8": {key: value / 4 for key, value in times.items()},
        "speed_up": 4.0,
        "batch": batch,
        "environment": {
            "cpu": "A CPU", "int8_instructions": "SDOT/UDOT", "threads": 2, "onnxruntime": "1.2.3", "system": "Linux x",
        },
    }  # fmt: skip


def distribution(name: str) -> dict[str, Any]:
    counts = [(i * 37) % 101 for i in range(64)]
    values = {"histogram": {"lo": -0.5, "hi": 7.5, "counts": counts}, "span": [0.0, 6.0], "percentile": 4.0}
    weight = {"histogram": {"lo": -0.5, "hi": 0.5, "counts": counts}, "span": [-0.5, 0.5], "percentile": 0.4}
    return {"layer": name, "op": "Conv2D", "weight": weight, "activation": values}


def analysis(names: list[str]) -> dict[str, Any]:
    rows = [{"name": name, "only_loss": 0.001 * (i + 1), "float_loss": 0.25} for i, name in enumerate(names)]
    return {"loss": "kl", "samples": 200, "quantised_loss": 0.5, "layers": rows, "diagnoses": []}


def make_result(names: list[str]) -> dict[str, Any]:
    return {
        "apiversion": API_VERSION,
        "name": "tiny",
        "description": "a tiny network",
        "recipe": "apiversion: msqkd/v1\nname: tiny\n",
        "recipe_sha256": "ab" * 32,
        "started": "2026-01-02T03:04:05+00:00",
        "seconds": 12.5,
        "seed": 7,
        "target": "lite_arm",
        "versions": {"msqkd": "0.1.0", "mindspore": "2.10.0"},
        "data": {"name": "digits", "train": 100, "test": 50, "calibration": 20},
        "accuracy": {
            "float": 98.52,
            "float_ft": 98.6,
            "float_kd": None,
            "ptq": 97.1,
            "qat": 98.0,
            "qat_kd": 98.33,
            "exported": 98.33,
            "integer": 98.3,
        },
        "size_bytes": {"float": 100_000, "int8": 26_000, "lite_mindir": 27_500},
        "int8_share": 1.0,
        "sha256": {"tiny.mindir": "cd" * 32},
        "export": {
            "portable_mindir": {"file": "out/tiny.mindir", "max_abs_diff": 1e-7, "agreement": 99.999},
            "ms": {"file": "tiny_ms.ms", "differing_values": 0, "compared_values": 12345},
        },
        "calibration": {
            "samples": 20,
            "observer": "percentile",
            "kept": "trained",
            "loss": {"trained": 0.01, "calibrated": 0.02},
        },
        "training": {"qat_kd": training(), "pretrain": training()},
        "layers": [layer(name) for name in names],
        "distributions": [distribution(name) for name in names[:1]],
        "latency": [latency(1)],
        "analysis": analysis(names),
        "advice": [
            {"rule": "ship", "text": "Ship it.", "command": "", "recipe": ""},
            {"rule": "tune", "text": "More is to be had.", "command": "msqkd tune RECIPE", "recipe": "a:\n  b: 1\n"},
        ],
        "parity": parity(names),
        "plan": plan(names),
        "warnings": ["a warning of the run", "a warning of the plan"],
    }


@pytest.fixture
def summary() -> dict[str, Any]:
    """A result without the parts that take time to draw."""
    heavy = ("layers", "training", "parity", "distributions", "latency", "analysis")
    return {key: value for key, value in make_result(["conv1", "conv2", "fc"]).items() if key not in heavy}


@pytest.fixture
def result() -> dict[str, Any]:
    return make_result(["conv1", "conv2", "fc"])


class Page(HTMLParser):
    """Reads a page: fails on unbalanced tags, keeps tags, attributes, ids and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Optional[str]]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, Optional[str]]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def test_both_files_are_written_and_the_json_has_every_key(result: dict[str, Any], tmp_path: Path) -> None:
    paths = write_report(result, tmp_path / "new" / "folder")
    assert {key: path.name for key, path in paths.items()} == {"json": "report.json", "html": "report.html"}
    stored = json.loads(paths["json"].read_text())
    assert stored == result
    assert list(stored) == list(result)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["report.html", "report.json"]


def test_what_json_cannot_hold_is_converted(result: dict[str, Any], tmp_path: Path) -> None:
    result["accuracy"]["float_ft"] = float("nan")
    result["layers"][0]["sqnr_db"] = float("inf")
    result["layers"][1]["sqnr_db"] = np.float32(12.5)
    result["plan"]["weights"][0]["clip_ratio"] = np.array([0.5, np.nan])
    result["plan"]["nodes"][0]["cell_types"] = ("Net", "Conv2d")
    stored = json.loads(write_report(result, tmp_path)["json"].read_text())
    assert stored["accuracy"]["float_ft"] is None
    assert [row["sqnr_db"] for row in stored["layers"]] == [None, 12.5, 30.0]
    assert stored["plan"]["weights"][0]["clip_ratio"] == [0.5, None]
    assert stored["plan"]["nodes"][0]["cell_types"] == ["Net", "Conv2d"]


def test_the_page_is_self_contained(result: dict[str, Any]) -> None:
    html = render_html(result)
    page = Page(html)
    assert not page.tags & {"script", "link", "img", "iframe", "object"}
    links = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "data")]
    assert links
    assert all(link.startswith("#") for link in links)
    assert "@import" not in html
    assert all(url.startswith("#") for url in re.findall(r"url\(['\"]?([^)'\"]*)", html))
    assert {value for _, name, value in page.attributes if re.match("https?:", value)} == {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_ids_are_unique_and_links_lead_somewhere(result: dict[str, Any]) -> None:
    attributes = Page(render_html(result)).attributes
    ids = [value for _, name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for _, name, value in attributes if name in ("href", "xlink:href")}
    assert targets <= set(ids)
    sections = {"accuracy", "size", "layers", "device", "training", "plan", "calibration", "files", "run"}
    sections |= {"advice", "latency", "heatmap", "distributions"}
    assert sections <= targets


def test_what_was_loaded_from_checkpoints(result: dict[str, Any]) -> None:
    names = [f"layer{index}.bn" for index in range(12)]
    loaded = {
        "file": "net.pth",
        "loaded": names,
        "renamed": [(f"{name}.weight", f"{name}.gamma") for name in names],
        "cast": [(names[0], "float16", "float32")],
        "missing": [],
        "reshaped": [],
        "unused": ["epoch<b>"],
        "crc": "ok",
    }
    text = Page(render_html({**result, "checkpoints": {"teacher": loaded}})).text
    for words in ("12 of 12 parameters", "checked", "float16 → float32", "and 2 more", "1: epoch<b>"):
        assert words in text
    assert 'id="weights"' not in render_html(result)


def test_the_verdict_in_words(summary: dict[str, Any]) -> None:
    text = Page(render_html(summary)).text
    assert (
        "INT8 98.33 % vs float 98.52 %: −0.19 points; 0.26 × the size; "
        "100 % of the operations run in int8 on lite_arm." in text
    )
    assert "Against the float network fine-tuned with the same budget (98.60 %): −0.27 points." in text


def test_the_verdict_without_an_export_says_so(summary: dict[str, Any]) -> None:
    summary["accuracy"]["exported"] = None
    text = Page(render_html(summary)).text
    assert "INT8 (QAT + distillation, not exported) 98.33 % vs float 98.52 %" in text


def test_almost_all_is_never_called_all(summary: dict[str, Any]) -> None:
    summary["int8_share"] = 0.9999
    text = Page(render_html(summary)).text
    assert "99.9 % of the operations" in text
    assert "99.99 %" in text  # agreement 99.999 %
    assert "100.00 %" not in text


def test_hostile_text_is_escaped_everywhere() -> None:
    result = make_result(["conv1", HOSTILE])
    for part in ("name", "description", "recipe", "recipe_sha256", "target", "started"):
        result[part] = HOSTILE
    result["warnings"] = [HOSTILE]
    result["plan"]["nodes"][0].update(op=HOSTILE, precision="float", reason=HOSTILE, rule=HOSTILE)
    result["plan"]["avoided"][0].update(what=HOSTILE, instead=HOSTILE, nodes=[HOSTILE])
    result["parity"]["split"] = HOSTILE
    for part in ("sha256", "versions"):
        result[part] = {HOSTILE: HOSTILE}
    result["advice"][0].update(text=HOSTILE, command=HOSTILE, recipe=HOSTILE)
    result["latency"][0]["environment"].update(cpu=HOSTILE, system=HOSTILE)
    result["size_bytes"][HOSTILE] = 5
    result["training"] = {HOSTILE: training()}
    html = render_html(result)
    page = Page(html)
    assert "script" not in page.tags
    assert "<script" not in html
    assert page.text.count(HOSTILE) > 20


def test_a_tex_like_name_is_shown_as_it_is() -> None:
    name = r"$\frac{a}{b$ 层"
    assert Page(render_html(make_result(["conv1", name]))).text.count(name) >= 4


@pytest.mark.parametrize("part", [*make_result(["conv1"])])
def test_every_part_stands_alone(result: dict[str, Any], part: str, tmp_path: Path) -> None:
    alone = {key: value if key == part else None for key, value in result.items()}
    html = write_report(alone, tmp_path)["html"].read_text()
    assert not GAPS.search(Page(html).text)
    assert html == render_html({part: result[part]})  # a missing part is as one that is None


def test_empty_parts_have_no_section() -> None:
    page = Page(render_html({"name": "nothing"}))
    assert page.text == "nothing – msqkd report nothing"
    assert not page.tags & {"section", "svg", "a"}


def test_parts_of_parts_may_be_missing(result: dict[str, Any]) -> None:
    result["layers"] += [{"name": "bare"}, {"name": "pool", "op": "MaxPool", "sqnr_db": None, "weight": None}]
    result["layers"][0]["activation"].update(observed_min=None, observed_max=None)
    result["layers"][1]["weight"] = {"bits": 8}
    result["training"] = {"qat": {"loss": [[0, 1.0]], "accuracy": [[1, 97.25]]}, "qat_kd": None, "float_ft": {}}
    result["size_bytes"] = {"float": None, "int8": 5}
    result["accuracy"] = {"ptq": 50.0}
    result["export"] = {"portable_mindir": None}
    text = Page(render_html(result)).text
    assert "bare" in text
    assert "loss 1 at step 0; accuracy 97.25 % after epoch 1" in text
    assert "Float, fine-tuned" not in text
    assert "the size" not in text
    assert not GAPS.search(text)


def test_missing_accuracies_have_no_bar(summary: dict[str, Any]) -> None:
    text = Page(render_html(summary)).text
    assert "PTQ only" in text
    assert "float, fine-tuned" in text
    assert "distilled" not in text.split("Size")[0]


def test_the_plan_joins_fused_operations_and_lists_what_stays_float(result: dict[str, Any]) -> None:
    result["plan"]["nodes"] += [
        node("pool", "MaxPool"),
        node("softmax", "Softmax", "float", reason="lite_arm has no int8 kernel for Softmax"),
    ]
    text = Page(render_html(result)).text
    assert "Stays float softmax (Softmax): lite_arm has no int8 kernel for Softmax" in text
    row = "conv1 Conv2D + ReLU int8 8 bit, per channel, mse 8 bit, asymmetric, percentile 99.9 %, from step 40 default"
    assert row in text
    assert "pool MaxPool int8 as its input" in text
    assert "conv1.relu" not in text


def test_nothing_stays_float(summary: dict[str, Any]) -> None:
    assert "Stays float none" in Page(render_html(summary)).text


def test_an_operation_is_not_said_to_share_when_a_group_is_unaccounted_for(result: dict[str, Any]) -> None:
    result["plan"]["nodes"].append(node("pool", "MaxPool"))
    result["layers"].pop()
    assert "as its input" not in Page(render_html(result)).text


def test_the_worst_layer_and_clipping_are_named(result: dict[str, Any]) -> None:
    result["layers"][1]["sqnr_db"] = -3.25
    text = Page(render_html(result)).text
    assert re.search(r"lowest: conv2 \(−3\.[23] dB\)", text)
    assert "observed but clipped" in text
    for row in result["layers"]:
        row["activation"]["observed_max"] = 6.0
    assert "observed but clipped" not in Page(render_html(result)).text


def test_what_the_device_computes_is_told(result: dict[str, Any]) -> None:
    text = Page(render_html(result)).text
    assert "What the device computes" in text
    assert (
        "On 1000 calibration samples: 98.10 % in the device's integers, 98.20 % fake-quantised; "
        "a deviation of 0.10 points is within the bound of 0.1." in text
    )
    assert "integers of the device 98.10 −0.10" in text
    assert "integers and fake-quantised 99.90 %" in text
    assert "first layer with a different integer conv1 (Conv2D), by up to 1" in text
    assert "first layer with a difference of more than 1 step none" in text
    assert "1 %, at most 1 step" in text
    assert "0 · 0 · 4 · 990 · 6 · 0 · 0" in text
    assert "a pool wraps it has the same parameters conv1" in text
    assert "tiny_ms.ms" in text
    assert "0 of 12,345" in text


def test_a_deviation_beyond_the_bound_is_told(result: dict[str, Any]) -> None:
    result["parity"].update(deviation=0.4, deviating_samples=4, exceeded=True)
    assert "a deviation of 0.40 points is more than the bound of 0.1." in Page(render_html(result)).text
    result["parity"].update(deviation=0.2, deviating_samples=2, exceeded=False)
    assert (
        "a deviation of 0.20 points is within the bound of 0.1 or what chance explains."
        in Page(render_html(result)).text
    )
    result["parity"]["accuracy"] = dict.fromkeys(result["parity"]["accuracy"])
    assert "99.90 % equal answers in the device's integers and fake-quantised" in Page(render_html(result)).text


def test_values_in_float_and_values_of_one_layer_stand_in_the_table(result: dict[str, Any]) -> None:
    result["parity"]["values"][1] = {
        **value_parity("conv1"), "scale": None, "equal": None, "max_lsb": None, "histogram": None,
        "relative_error": 0.0123,
    }  # fmt: skip
    text = Page(render_html(result)).text
    assert "conv1 (2) Conv2D 0.012" in text


def test_what_slowed_a_training_is_told(summary: dict[str, Any]) -> None:
    told = {**training(), "overflow_steps": 3, "data_share": 0.25}
    page = render_html({**summary, "training": {"qat": told}})
    assert "3 steps skipped by the dynamic loss scale" in page
    assert "25% of the steps&#39; time was spent waiting for data" in page
    quiet = render_html({**summary, "training": {"qat": {**training(), "overflow_steps": 0, "data_share": 0.01}}})
    assert "loss scale" not in quiet
    assert "waiting for data" not in quiet


def test_warnings_are_shown_once(summary: dict[str, Any]) -> None:
    text = Page(render_html(summary)).text
    assert text.count("a warning of the plan") == text.count("a warning of the run") == 1


def test_advice_stands_first_with_what_is_to_be_typed(result: dict[str, Any]) -> None:
    html = render_html(result)
    assert html.index('id="advice"') < html.index('id="accuracy"')
    assert "Ship it. More is to be had. msqkd tune RECIPE In the recipe: a: b: 1 RUN is the folder" in Page(html).text


def test_latencies_name_their_machine(result: dict[str, Any]) -> None:
    text = Page(render_html(result)).text
    assert "1 2 2 (1.9 … 2.25) 0.5 (0.475 … 0.562) 4.00 ×" in text
    assert "onnxruntime 1.2.3 on A CPU (Linux x); int8 instructions: SDOT/UDOT" in text
    bare = {"float32": {"median": 1.0}, "int8": {"median": 2.0}, "batch": 1}
    text = Page(render_html({"latency": [bare, {"batch": 3}]})).text
    assert "0.50 ×" in text
    assert not GAPS.search(text)


def test_a_report_from_before_these_parts_renders(result: dict[str, Any]) -> None:
    for part in ("advice", "latency", "analysis", "distributions"):
        del result[part]
    for row in result["layers"]:
        for part, keys in (("weight", ("sqnr_db", "count")), ("activation", ("sqnr_db", "outside"))):
            for key in (*keys, "max_over_percentile"):
                del row[part][key]
    page = render_html(result)
    assert not GAPS.search(Page(page).text)
    assert not any(f'id="{part}"' in page for part in ("advice", "latency", "distributions"))
    assert "Built up" in page  # what it has is on the heat map


def test_histograms_stand_for_a_weight_and_its_values(result: dict[str, Any]) -> None:
    html = render_html(result)
    part = html[html.index('id="distributions"') : html.index('id="device"')]
    assert part.count("<svg") == 2
    assert "values, −0.5 … 7.5" in part
    result["distributions"] = [{"layer": "input", "op": "input", "weight": None, "activation": None}]
    flat = {"histogram": {"lo": 1.0, "hi": 1.0, "counts": [5]}, "span": [0.0, 2.0]}
    result["distributions"].append({"layer": "flat", "op": "ReLU", "weight": None, "activation": flat})
    assert 'id="distributions"' not in render_html(result)  # there is nothing to draw


def test_160_layers_stay_small_and_are_all_there(tmp_path: Path) -> None:
    names = [f"blocks.encoder.layers.{i // 4}.attention.projection_{i % 4}" for i in range(160)]
    result = make_result(names)
    result["training"] = {"qat_kd": training(20_000)}
    result["distributions"] = [distribution(name) for name in names[:6]]
    path = write_report(result, tmp_path)["html"]
    assert path.stat().st_size < 5_000_000
    assert path.with_suffix(".json").stat().st_size < 5_000_000
    html = path.read_text()
    assert all(name in html for name in names)


def test_the_result_is_not_changed_and_the_page_is_reproducible(result: dict[str, Any]) -> None:
    before = copy.deepcopy(result)
    assert render_html(result) == render_html(result)
    assert result == before


def test_a_failure_leaves_the_old_page(
    summary: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = write_report(summary, tmp_path)["html"].read_text()
    monkeypatch.setattr("msqkd.analysis.plots.staircase", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(summary, tmp_path)
    assert (tmp_path / "report.html").read_text() == page
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_importing_the_report_imports_nothing_heavy() -> None:
    code = "import sys, msqkd.analysis.report; print(sorted({'mindspore', 'matplotlib', 'jinja2'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
