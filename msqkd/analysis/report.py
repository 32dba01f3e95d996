"""The report of a run: `report.json` for programs, `report.html` for people (one page that loads nothing)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Callable, Optional

from msqkd.analysis import plots
from msqkd.analysis.conversion import conversion_rows
from msqkd.analysis.heatmap import heat_map
from msqkd.files import PathLike, write_json, write_text
from msqkd.quant.config import STORING
from msqkd.train.metric import Scale
from msqkd.words import of_hundred, percent

API_VERSION = "msqkd/report/v1"
VERIFY_API_VERSION = "msqkd/verify/v1"

_ACCURACY = {  # key: (words in a sentence and a table, label of the bar, colour)
    "float": ("float", "float", "float"),
    "ptq": ("calibration only (PTQ)", "PTQ only", "int8"),
    "qat": ("QAT", "QAT", "int8"),
    "qat_kd": ("QAT + distillation", "QAT +\ndistillation", "int8"),
    "exported": ("exported model", "exported", "exported"),
    "integer": ("on the device (integers, simulated)", "device", "exported"),
    "float_ft": ("float, fine-tuned", "float\nfine-tuned", "control"),
    "float_kd": ("float, distilled", "float\ndistilled", "control"),
}
_CONTROLS = ("float_kd", "float_ft")
_DEPLOYED = ("exported", "qat_kd", "qat", "ptq")
_EXECUTIONS = {
    "float": "float, nothing rounded",
    "fake_quantised": "fake-quantised, as trained",
    "integer": "integers of the device",
}
_PAIRS = {
    "integer_fake_quantised": "integers and fake-quantised",
    "integer_float": "integers and float",
    "fake_quantised_float": "fake-quantised and float",
}
_TRAINING = {
    "qat_kd": "QAT + distillation",
    "qat": "QAT",
    "float_kd": "Float, distilled",
    "float_ft": "Float, fine-tuned",
    "pretrain": "Float, from scratch",
}
_COLOURS = {
    **plots.COLOURS,
    "ink": plots.INK,
    "muted": plots.MUTED,
    "highlight": plots.HIGHLIGHT,
    "range": plots.RANGE,
    "narrow": plots.NARROW,
    **{f"lsb{step}": colour for step, colour in enumerate(plots.LSB_COLOURS, start=1)},
}
_CELLS = {
    **{f"bad{step}": colour for step, colour in enumerate(plots.BAD_COLOURS)},
    **{f"much{step}": colour for step, colour in enumerate(plots.MUCH_COLOURS)},
}
_TITLES = {"heatmap": "Heat map"}
_WAITED = 0.05  # the part of a training's time spent waiting for data from which it is told
_FILES = {
    "float": "float",
    "int8": "int8",
    "lite_mindir": "MindIR for MindSpore Lite",
    "portable_mindir": "portable MindIR",
    "ascend_mindir": "MindIR for Ascend",
    "lite_ms": "MindSpore Lite (.ms)",
    "ms": "MindSpore Lite (.ms)",
    "ms_weight": "MindSpore Lite (.ms), int8 weights",
    "ms_float": "MindSpore Lite (.ms), float",
    "onnx": "ONNX",
}


def write_report(result: Mapping[str, Any], folder: PathLike, name: str = "report") -> dict[str, Path]:
    """Write `report.json` and `report.html` into `folder` (made when needed), each whole or not at all.

    Args:
        result: the result of a run. Parts that are missing or None are left out of the page; NaN and infinities become
            null in the JSON. Accuracies and agreements are percent, shares 0–1, sizes bytes, times seconds,
            signal-to-noise ratios dB.
        folder: where to write.
        name: of the files, without their suffixes.

    Returns:
        The two paths, under ``json`` and ``html``.
    """
    return write_pages({"apiversion": API_VERSION, **result}, folder, name, render_html)


def write_pages(
    result: Mapping[str, Any], folder: PathLike, name: str, page: Callable[[Mapping[str, Any]], str]
) -> dict[str, Path]:
    """Write a result as JSON, and the page that `page` makes of it, into `folder`; each whole or not at all.

    Returns:
        The two paths, under ``json`` and ``html``.
    """
    data = plain(result)
    paths = {suffix: Path(folder) / f"{name}.{suffix}" for suffix in ("json", "html")}
    write_json(paths["json"], data)
    write_text(paths["html"], page(data))
    return paths


def render_html(result: Mapping[str, Any]) -> str:
    """The page for `result` (see `write_report`); every text of it is escaped."""
    return rendered("report.html.j2", _view(plain(result)))


def rendered(template: str, view: Mapping[str, Any]) -> str:
    """The page that a template beside this module makes of `view`, in the colours of the plots; texts are escaped."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render({"colour": _COLOURS, "cell_colours": _CELLS, **view})


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numpy numbers and arrays unpacked, paths as text, NaN and infinities as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return plain(value.tolist()) if hasattr(value, "tolist") else value


# -- what the page shows -----------------------------------------------------------------------------------------------
def _view(result: dict[str, Any]) -> dict[str, Any]:
    layers = result.get("layers") or []
    plan = result.get("plan") or {}
    scale = Scale.of(result.get("metric"))
    parity, latency = result.get("parity") or {}, _latency(result.get("latency") or [])
    sections = {
        "advice": result.get("advice") or [],
        "accuracy": _accuracy(result.get("accuracy") or {}, scale),
        "size": _size(result.get("size_bytes") or {}),
        "latency": latency,
        "heatmap": heat_map(layers, parity.get("values") or [], result.get("analysis")),
        "layers": _layers(layers),
        "distributions": _distributions(result.get("distributions") or []),
        "device": _device(parity, scale, result.get("avoided") or plan.get("avoided") or []),
        "converter": conversion_rows(result.get("converter") or {}),
        "training": _training(result.get("training") or {}, scale, result.get("distillation") or []),
        "plan": _plan(plan, layers),
        "calibration": _calibration(result.get("calibration") or {}),
        "weights": _weights(result.get("checkpoints") or {}),
        "files": _files(result.get("export") or {}, result.get("sha256") or {}, scale),
        "run": _run(result),
    }
    return {
        "name": result.get("name") or plan.get("network") or "msqkd",
        "description": result.get("description"),
        "facts": " · ".join(_facts(result)),
        "verdict": _verdict(result),
        "tiles": _tiles(result),
        "warnings": list(dict.fromkeys([*(result.get("warnings") or []), *(plan.get("warnings") or [])])),
        "metric": scale,
        "contents": [
            (anchor, scale.title if anchor == "accuracy" else _TITLES.get(anchor, anchor.capitalize()))
            for anchor, section in sections.items()
            if section
        ],
        **sections,
    }


def _facts(result: dict[str, Any]) -> list[str]:
    facts = []
    if result.get("target"):
        facts.append(f"target {result['target']}")
    if result.get("started"):
        facts.append(f"started {str(result['started']).replace('T', ' ')}")
    if result.get("seconds") is not None:
        facts.append(f"took {_duration(result['seconds'])}")
    return facts


def _deployed(accuracy: dict[str, Any]) -> Optional[str]:
    """The key of the accuracy that stands for the INT8 model: the exported one where it was measured."""
    return next((key for key in _DEPLOYED if accuracy.get(key) is not None), None)


def _verdict(result: dict[str, Any]) -> list[str]:
    """One sentence on what was reached, and one on the same against the float network with the same training."""
    accuracy, scale = result.get("accuracy") or {}, Scale.of(result.get("metric"))
    key, base = _deployed(accuracy), accuracy.get("float")
    parts = []
    if key is not None:
        how = "" if key == "exported" else f" ({_ACCURACY[key][0]}, not exported)"
        text = f"INT8{how} {scale.words(accuracy[key])}"
        if base is not None:
            text += f" vs float {scale.show(base)}: {_gap(accuracy[key], base, scale)}{scale.points}"
        parts.append(text)
    ratio = _ratio(result.get("size_bytes") or {}, "int8")
    if ratio is not None:
        parts.append(f"{ratio:.2f} × the size")
    share = _share(result)
    if share is not None:
        target = f" on {result['target']}" if result.get("target") else ""
        parts.append(f"{_share_words(share)} of the operations run in int8{target}")
    nodes = (result.get("plan") or {}).get("nodes") or []
    stored = sum(node.get("precision") in STORING for node in nodes)
    if stored:
        parts.append(f"{stored} of {len(nodes)} compute in float with weights stored as integers")
    sentences = ["; ".join(parts) + "."] if parts else []
    control = next((name for name in _CONTROLS if accuracy.get(name) is not None), None)
    if key is not None and control is not None:
        how, reached = "distilled" if control == "float_kd" else "fine-tuned", accuracy[control]
        gap = _gap(accuracy[key], reached, scale) + scale.points
        sentences.append(f"Against the float network {how} with the same budget ({scale.show(reached)}): {gap}.")
    parity = result.get("parity") or {}
    return [*sentences, _deviation(parity, scale)] if parity.get("samples") else sentences


def _gap(value: float, base: float, scale: Scale) -> str:
    return plots.difference(value, base, scale.digits)


def _deviation(parity: dict[str, Any], scale: Scale) -> str:
    """In a sentence, how far the device is from the fake-quantised network."""
    reached = {name: value for name, value in (parity.get("accuracy") or {}).items() if value is not None}
    samples = f"{parity['samples']} {parity.get('split') or ''} samples".replace("  ", " ")
    if {"integer", "fake_quantised"} <= reached.keys():
        exact = scale.show(reached["fake_quantised"])
        found = f"{scale.words(reached['integer'])} in the device's integers, {exact} fake-quantised"
    else:
        same = (parity.get("agreement") or {}).get("integer_fake_quantised", 0.0)
        found = f"{of_hundred(same)} % equal answers in the device's integers and fake-quantised"
    bound, deviation = parity.get("max_deviation"), parity.get("deviation")
    if bound is None or deviation is None:
        return f"On {samples}: {found}."
    if parity.get("excess"):
        return f"On {samples}: {found}; beyond the bounds: {'; '.join(parity['excess'])}."
    state = "is more than" if parity.get("exceeded") else "is within"
    few = " or what chance explains" if not parity.get("exceeded") and deviation > bound else ""
    size = scale.number(deviation) + scale.points
    return f"On {samples}: {found}; a deviation of {size} {state} the bound of {bound:g}{few}."


def _tiles(result: dict[str, Any]) -> list[dict[str, str]]:
    """The few figures at the top of the page."""
    accuracy, sizes = result.get("accuracy") or {}, result.get("size_bytes") or {}
    scale = Scale.of(result.get("metric"))
    tiles = []
    key = _deployed(accuracy)
    if key is not None:
        note = f"float {scale.show(accuracy['float'])}" if accuracy.get("float") is not None else ""
        tiles.append(_tile(scale.show(accuracy[key]), f"{scale.name}, {_ACCURACY[key][0]}", note))
    ratio = _ratio(sizes, "int8")
    if ratio is not None:
        tiles.append(_tile(f"{ratio:.2f} ×", "size", f"{_bytes(sizes['int8'])} of {_bytes(sizes['float'])}"))
    share, nodes = _share(result), (result.get("plan") or {}).get("nodes") or []
    if share is not None:
        int8 = sum(node.get("precision") == "int8" for node in nodes)
        note = f"{int8} of {len(nodes)} operations" if nodes else ""
        tiles.append(_tile(_share_words(share), "in int8", note))
    noise = _noise(result.get("layers") or [])
    if noise:
        name, lowest = min(noise, key=lambda pair: pair[1])
        tiles.append(_tile(f"{_decibel(lowest)} dB", "lowest layer SQNR", name))
    return tiles


def _tile(value: str, label: str, note: str) -> dict[str, str]:
    return {"value": value, "label": label, "note": note}


def _accuracy(accuracy: dict[str, Any], scale: Scale) -> Optional[dict[str, Any]]:
    base = accuracy.get("float")
    steps, rows = [], []
    for key, (words, label, kind) in _ACCURACY.items():
        if accuracy.get(key) is not None:
            delta = "" if base is None or key == "float" else _gap(accuracy[key], base, scale)
            rows.append({"label": words, "value": scale.number(accuracy[key]), "delta": delta, "kind": kind})
            steps.append(plots.Step(label, accuracy[key], kind))
    if not steps:
        return None
    floor = plots.staircase_floor([step.value for step in steps], scale)
    main, controls = [s for s in steps if s.kind != "control"], [s for s in steps if s.kind == "control"]
    return {
        "plot": inline(plots.staircase(main, controls, scale)),
        "rows": rows,
        "floor": f"{floor:.1f} %" if scale.unit and floor > 0 else "",
        "controls": bool(controls),
        "compared": base is not None and len(rows) > 1,
    }


def _size(sizes: dict[str, Any]) -> Optional[dict[str, Any]]:
    rows = []
    for key, size in sizes.items():
        if size is not None:
            ratio = _ratio(sizes, key)
            text = _bytes(size) + (f"  ({ratio:.2f} ×)" if ratio is not None and key != "float" else "")
            kind = "float" if key == "float" else "int8"
            rows.append((_file_words(key), text, float(size), kind))
    return {"plot": inline(plots.sizes(rows))} if rows else None


def _latency(measured: list[dict[str, Any]]) -> Optional[dict[str, Any]]:
    """The bars of each measurement, its numbers, and the machines they were taken on."""
    bars, rows, machines = [], [], []
    for item in measured:
        both = [(item.get(name) or {}, kind) for name, kind in (("float32", "float"), ("int8", "int8"))]
        if any(times.get("median") is None for times, _ in both):
            continue
        facts, batch = item.get("environment") or {}, item.get("batch")
        threads = facts.get("threads")
        for times, kind in both:
            middle = times["median"]
            quartiles = times.get("lower") or middle, middle, times.get("upper") or middle
            bars.append((f"{kind}, batch {batch}", *quartiles, kind))
        rows.append(
            {
                "batch": batch,
                "threads": threads,
                "times": [_milliseconds(times) for times, _ in both],
                "ratio": f"{both[0][0]['median'] / both[1][0]['median']:.2f} ×" if both[1][0]["median"] else "",
            }
        )
        machines.append(
            f"onnxruntime {facts.get('onnxruntime') or ''} on {facts.get('cpu') or 'an unknown CPU'}"
            f" ({facts.get('system') or 'unknown system'}); int8 instructions: "
            f"{facts.get('int8_instructions') or 'unknown'}"
        )
    if not rows:
        return None
    return {"plot": inline(plots.latencies(bars)), "rows": rows, "machines": list(dict.fromkeys(machines))}


def _milliseconds(times: dict[str, Any]) -> str:
    spread = [plots.number(times[key]) for key in ("lower", "upper") if times.get(key) is not None]
    return plots.number(times["median"]) + (f" ({' … '.join(spread)})" if spread else "")


# -- layers ------------------------------------------------------------------------------------------------------------
def _layers(layers: list[dict[str, Any]]) -> Optional[dict[str, Any]]:
    if not layers:
        return None
    noise = _noise(layers)
    lowest = sorted((noise[i] for i in plots.worst([value for _, value in noise])), key=lambda pair: pair[1])
    weights = [row for layer in layers if (row := _weight_range(layer["name"], layer.get("weight") or {}))]
    activations = [row for layer in layers if (row := _activation_range(layer["name"], layer.get("activation") or {}))]
    return {
        "sqnr": [inline(svg) for svg in plots.sqnr(noise)],
        "worst": [f"{name} ({_decibel(value)} dB)" for name, value in lowest],
        "weights": [inline(svg) for svg in plots.ranges(weights, "weights")],
        "per_channel": any(row.narrow is not None for row in weights),
        "activations": [inline(svg) for svg in plots.ranges(activations, "activations")],
        "clipped": {
            "weights": any(any(row.clipped) for row in weights),
            "activations": any(any(row.clipped) for row in activations),
        },
        "rows": [_layer_row(layer) for layer in layers],
    }


def _distributions(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each layer the histograms of its weight and of its values."""
    found = []
    for i, item in enumerate(items):
        drawn = [
            inline(svg)
            for key, words in (("weight", "weight"), ("activation", "values"))
            if (svg := _distribution(item.get(key) or {}, f"{key}{i}", words))
        ]
        if drawn:
            found.append({"layer": item.get("layer") or "", "op": item.get("op") or "", "charts": drawn})
    return found


def _distribution(data: dict[str, Any], mark: str, words: str) -> str:
    histogram, span = data.get("histogram") or {}, data.get("span")
    low, high, counts = histogram.get("lo"), histogram.get("hi"), histogram.get("counts") or []
    if low is None or high is None or not low < high or not counts:
        return ""
    edges = [low + (high - low) * i / len(counts) for i in range(len(counts) + 1)]
    usual = data.get("percentile") or 0.0
    marks = [x for x in (-usual, usual) if low < x < high and x]
    title = f"{words}, {_interval(low, high)}"
    return plots.distribution(edges, [counts], mark, title, (span[0], span[1]) if span else None, marks)


def _noise(layers: list[dict[str, Any]]) -> list[tuple[str, float]]:
    return [(layer["name"], layer["sqnr_db"]) for layer in layers if layer.get("sqnr_db") is not None]


def _weight_range(name: str, weight: dict[str, Any]) -> Optional[plots.RangeRow]:
    low, high = weight.get("scale_min"), weight.get("scale_max")
    if high is None or weight.get("bits") is None:
        return None
    levels = 2 ** (weight["bits"] - 1) - 1
    narrow = levels * low if low is not None and weight.get("per_channel") else None
    return plots.RangeRow(name, -levels * high, levels * high, weight.get("min"), weight.get("max"), narrow)


def _activation_range(name: str, activation: dict[str, Any]) -> Optional[plots.RangeRow]:
    if activation.get("lo") is None or activation.get("hi") is None:
        return None
    seen = activation.get("observed_min"), activation.get("observed_max")
    return plots.RangeRow(name, activation["lo"], activation["hi"], *seen)


def _layer_row(layer: dict[str, Any]) -> dict[str, str]:
    weight, activation = layer.get("weight") or {}, layer.get("activation") or {}
    scales = [v for v in dict.fromkeys((weight.get("scale_min"), weight.get("scale_max"))) if v is not None]
    return {
        "name": layer["name"],
        "op": layer.get("op") or "",
        "sqnr": "" if layer.get("sqnr_db") is None else _decibel(layer["sqnr_db"]),
        "weight_seen": _interval(weight.get("min"), weight.get("max")),
        "weight_scale": " … ".join(f"{v:.3g}" for v in scales),
        "scales": str(weight.get("scales") or ""),
        "seen": _interval(activation.get("observed_min"), activation.get("observed_max")),
        "range": _interval(activation.get("lo"), activation.get("hi")),
        "scale": "" if activation.get("scale") is None else f"{activation['scale']:.3g}",
        "zero_point": "" if activation.get("zero_point") is None else plots.number(activation["zero_point"], 6),
    }


# -- the device --------------------------------------------------------------------------------------------------------
def _device(parity: dict[str, Any], scale: Scale, avoided: list[dict[str, Any]]) -> Optional[dict[str, Any]]:
    values = parity.get("values") or []
    if not parity.get("samples") and not avoided:
        return None
    names = _distinct([value.get("layer") or value.get("value") or "" for value in values])
    pairs = [value.get("sqnr_db") or {} for value in values]
    noise = [
        (name, pair.get("fake_quantised"), pair.get("integer"))
        for name, pair in zip(names, pairs)
        if any(ratio is not None for ratio in pair.values())
    ]
    integers = [(name, value) for name, value in zip(names, values) if value.get("histogram")]
    return {
        "samples": parity.get("samples"),
        "split": parity.get("split") or "",
        "machine": parity.get("machine"),
        "rows": _executions(parity, scale),
        "agreement": [
            (words, f"{of_hundred(parity['agreement'][key])} %")
            for key, words in _PAIRS.items()
            if (parity.get("agreement") or {}).get(key) is not None
        ],
        "outputs": []
        if scale.unit
        else [
            (words, _output_words(parity["outputs"][key]))
            for key, words in _PAIRS.items()
            if (parity.get("outputs") or {}).get(key)
        ],
        "first": [
            (words, _place_words(parity.get(key)))
            for key, words in (
                ("first_difference", "first layer with a different integer"),
                ("first_beyond_one", "first layer with a difference of more than 1 step"),
            )
            if values
        ],
        "lsb": [inline(svg) for svg in plots.lsb([_lsb_row(name, value) for name, value in integers])],
        "noise": [inline(svg) for svg in plots.noise_pairs(noise)],
        "values": [_value_row(name, value) for name, value in zip(names, values)],
        "avoided": [
            {"what": entry.get("what") or "", "instead": entry.get("instead") or "", "nodes": entry.get("nodes") or []}
            for entry in avoided
        ],
    }


def _distinct(names: list[str]) -> list[str]:
    """`names` with a number behind one that came before, as the second result of a layer has it."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return result


def _executions(parity: dict[str, Any], scale: Scale) -> list[dict[str, str]]:
    accuracy = parity.get("accuracy") or {}
    base = accuracy.get("fake_quantised")
    rows = []
    for key, words in _EXECUTIONS.items():
        if accuracy.get(key) is not None:
            delta = "" if base is None or key == "fake_quantised" else _gap(accuracy[key], base, scale)
            rows.append({"label": words, "value": scale.number(accuracy[key]), "delta": delta})
    return rows


def _output_words(found: dict[str, Any]) -> str:
    """SQNR and cosine similarity of the outputs of two executions."""
    noise, cosine = found.get("sqnr_db"), found.get("cosine")
    words = "equal" if noise is None and found.get("relative_error") == 0 else ""
    if noise is not None:
        words = f"{_decibel(noise)} dB"
    return ", ".join(part for part in (words, "" if cosine is None else f"cosine {cosine:.4f}") if part)


def _place_words(place: Optional[dict[str, Any]]) -> str:
    if not place:
        return "none"
    return f"{place.get('layer')} ({place.get('op')}), by up to {place.get('max_lsb')}"


def _lsb_row(name: str, value: dict[str, Any]) -> tuple[str, list[float], str]:
    """The layer, the shares in percent that differ by 1, 2 and more steps, and those in words."""
    counts, total = value["histogram"], value.get("count") or 1
    shares = [
        100 * sum(count for label, count in counts.items() if label.lstrip("<>=") in (f"{step}", f"-{step}")) / total
        for step in (1, 2, 3)
    ]
    largest = f"at most {value.get('max_lsb')} step{'' if value.get('max_lsb') == 1 else 's'}"
    return name, shares, f"{plots.number(sum(shares))} %, {largest}" if any(shares) else "none"


def _value_row(name: str, value: dict[str, Any]) -> dict[str, str]:
    pairs = value.get("sqnr_db") or {}
    row = {
        key: "" if pairs.get(key) is None else _decibel(pairs[key])
        for key in ("fake_quantised", "integer", "integer_fake_quantised")
    }
    equal, error = value.get("equal"), value.get("relative_error")
    return {
        **row,
        "name": name,
        "op": value.get("op") or "",
        "equal": "" if equal is None else f"{of_hundred(100 * equal, 3)} %",
        "max_lsb": "" if value.get("max_lsb") is None else f"{value['max_lsb']}",
        "error": "" if error is None else f"{error:.2g}",
        "scale": "" if value.get("scale") is None else f"{value['scale']:.3g}",
        "histogram": " · ".join(f"{count}" for count in (value.get("histogram") or {}).values()),
    }


# -- training ----------------------------------------------------------------------------------------------------------
def _training(trainings: dict[str, Any], scale: Scale, taught: Sequence[str]) -> list[dict[str, Any]]:
    names = [*_TRAINING, *(name for name in trainings if name not in _TRAINING)]
    views = (_one_training(name, trainings.get(name) or {}, f"training{i}", scale) for i, name in enumerate(names))
    found = [view for view in views if view]
    for view in found:
        if view["distilled"]:
            view["notes"] += [f"distillation: {text}" for text in taught]
    return found


def _one_training(name: str, training: dict[str, Any], mark: str, scale: Scale) -> Optional[dict[str, Any]]:
    start = training.get("start_of_activation_quantisation")
    curves, notes = [], []
    for key, axis in (("loss", "step"), ("learning_rate", "step"), ("accuracy", "epoch")):
        points = [(x, y) for x, y in training.get(key) or [] if x is not None and y is not None]
        words, in_percent = key.replace("_", " "), key == "accuracy" and bool(scale.unit)
        words = scale.name if key == "accuracy" else words
        if len(points) > 1:
            title = f"{words}, %" if in_percent else words
            curves.append(plots.Curve(title, axis, points, in_percent, start if axis == "step" else None))
        elif points:
            x, y = points[0]
            when = "after" if axis == "epoch" else "at"
            notes.append(f"{words} {y:.4g}{' %' if in_percent else ''} {when} {axis} {x}")
    if training.get("seconds") is not None:
        notes.append(_duration(training["seconds"]))
    skipped = training.get("skipped_steps") or 0
    if skipped:
        steps = "step" if skipped == 1 else "steps"
        notes.append(f"{skipped} {steps} skipped because of a gradient that was not finite")
    overflows = training.get("overflow_steps") or 0
    if overflows:
        steps = "step" if overflows == 1 else "steps"
        notes.append(f"{overflows} {steps} skipped by the dynamic loss scale")
    if training.get("best_epoch") is not None:
        notes.append(f"ended with the weights of epoch {training['best_epoch']}, the best on the test set")
    waited = training.get("data_share") or 0.0
    if waited >= _WAITED:
        notes.append(f"{percent(waited)} of the steps' time was spent waiting for data")
    if start is not None:
        line = " (dashed line)" if any(curve.marked is not None for curve in curves) else ""
        notes.append(f"activations are quantised from step {start} on{line}")
    if not curves and not notes:
        return None
    plot = inline(plots.training(curves, mark)) if curves else ""
    distilled = name.endswith("_kd")
    return {"title": _TRAINING.get(name, name), "notes": notes, "plot": plot, "distilled": distilled}


# -- plan --------------------------------------------------------------------------------------------------------------
def _plan(plan: dict[str, Any], layers: list[dict[str, Any]]) -> Optional[dict[str, Any]]:
    nodes = plan.get("nodes") or []
    if not nodes:
        return None
    left_out = [f"{node['name']} ({node['op']})" for node in plan.get("training_only") or []]
    weights = {weight["node"]: weight for weight in plan.get("weights") or []}
    groups = {group["name"]: group for group in plan.get("groups") or []}
    owners = {value["value"]: groups.get(value["group"]) for value in plan.get("activations") or []}
    values = {layer["name"]: layer.get("value") for layer in layers}
    fused: dict[str, list[dict[str, Any]]] = {}
    for node in nodes:
        if node.get("fused_into"):
            fused.setdefault(node["fused_into"], []).append(node)
    # Where the owner of every group is known, an int8 operation that owns none has the parameters of its input.
    complete = bool(groups) and groups.keys() <= set(values.values())
    rows = []
    for node in nodes:
        if node.get("fused_into"):
            continue
        parts = [node, *fused.get(node["name"], [])]
        group = next((g for part in reversed(parts) if (g := owners.get(values.get(part["name"]) or ""))), None)
        shared = "as its input" if complete and node.get("precision") == "int8" else ""
        rows.append(
            {
                "name": node["name"],
                "op": " + ".join(part["op"] for part in parts),
                "precision": node.get("precision") or "",
                "weight": _weight_words(weights.get(node["name"])),
                "activation": _group_words(group) or shared,
                "rule": node.get("rule") or "",
                "reason": node.get("reason") or "",
            }
        )
    return {
        "rows": rows,
        "float": [row for row in rows if row["precision"] == "float"],
        "training_only": left_out,
        "fused": sum(len(parts) for parts in fused.values()),
        "weights": any(row["weight"] for row in rows),
        "activations": any(row["activation"] for row in rows),
    }


def _weight_words(weight: Optional[dict[str, Any]]) -> str:
    if not weight:
        return ""
    words = f"{weight['bits']} bit, {'per tensor' if weight.get('axis') is None else 'per channel'}"
    return words + _observer_words(weight)


def _group_words(group: Optional[dict[str, Any]]) -> str:
    if not group:
        return ""
    words = f"{group['bits']} bit, {'symmetric' if group.get('symmetric') else 'asymmetric'}" + _observer_words(group)
    return words + (f", from step {group['delay']}" if group.get("delay") else "")


def _observer_words(quant: dict[str, Any]) -> str:
    if not quant.get("observer"):
        return ""
    if quant["observer"] == "percentile" and quant.get("percentile") is not None:
        return f", percentile {quant['percentile']:g} %"
    return f", {quant['observer']}"


# -- calibration, files, run -------------------------------------------------------------------------------------------
def _calibration(calibration: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if calibration.get("samples") is not None:
        rows.append(("samples", f"{calibration['samples']}"))
    if calibration.get("observer"):
        rows.append(("observer", f"{calibration['observer']}"))
    if calibration.get("kept"):
        rows.append(("kept", f"the {calibration['kept']} ranges"))
    for name, loss in (calibration.get("loss") or {}).items():
        if loss is not None:
            rows.append((f"loss with the {name} ranges", f"{loss:.4g}"))
    return rows


def _weights(checkpoints: dict[str, Any]) -> list[dict[str, Any]]:
    """What each network took from its checkpoint, and what was left."""
    sections = []
    for role, loaded in checkpoints.items():
        count, missing = len(loaded["loaded"]), loaded["missing"]
        kinds = dict.fromkeys(f"{source} → {target}" for _, source, target in loaded["cast"])
        rows = [("file", loaded["file"]), ("loaded", f"{count} of {count + len(missing)} parameters")]
        rows += [("CRC", "checked")] if loaded["crc"] == "ok" else []
        rows += [("cast", f"{len(loaded['cast'])} parameters, {', '.join(kinds)}")] if kinds else []
        listed = {
            "renamed": [f"{old} → {new}" for old, new in loaded["renamed"]],
            "not in the file": missing,
            "not used": loaded["unused"],
        }
        rows += [(label, _counted(names)) for label, names in listed.items() if names]
        sections.append({"role": role, "rows": rows})
    return sections


def _counted(names: list[str], limit: int = 10) -> str:
    """How many, and the first of them."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{len(names)}: {', '.join(names[:limit])}{more}"


def _files(exports: dict[str, Any], checksums: dict[str, Any], scale: Scale) -> Optional[dict[str, Any]]:
    rows = []
    for form, export in exports.items():
        export = export or {}
        difference, agreement = export.get("max_abs_diff"), export.get("agreement")
        compared = export.get("compared_values")
        rows.append(
            {
                "form": _file_words(form),
                "file": Path(str(export["file"])).name if export.get("file") else "",
                "accuracy": "" if export.get("accuracy") is None else scale.show(export["accuracy"]),
                "difference": "" if difference is None else f"{difference:.2g}",
                "integers": "" if compared is None else f"{export.get('differing_values')} of {compared:,}",
                "agreement": "" if agreement is None else f"{of_hundred(agreement)} %",
                "failed": export.get("failed") or "",
            }
        )
    sums = [(name, digest) for name, digest in checksums.items() if digest]
    shown = {
        key for key in ("accuracy", "agreement", "difference", "integers", "failed") if any(row[key] for row in rows)
    }
    return {"exports": rows, "shown": shown, "checksums": sums} if rows or sums else None


def _run(result: dict[str, Any]) -> Optional[dict[str, Any]]:
    rows = []
    data = result.get("data") or {}
    counts = [f"{data[part]} {part}" for part in ("train", "test", "calibration") if data.get(part) is not None]
    words = ": ".join(part for part in (data.get("name") or "", ", ".join(counts)) if part)
    if words:
        rows.append(("data", words))
    if result.get("seed") is not None:
        rows.append(("seed", f"{result['seed']}"))
    rows += [(name, f"{version}") for name, version in (result.get("versions") or {}).items() if version is not None]
    if result.get("recipe_sha256"):
        rows.append(("recipe SHA-256", f"{result['recipe_sha256']}"))
    return {"rows": rows, "recipe": result.get("recipe")} if rows or result.get("recipe") else None


# -- words -------------------------------------------------------------------------------------------------------------
def inline(svg: str) -> Any:
    """A chart as a template takes it: not escaped."""
    from markupsafe import Markup

    return Markup(svg)  # matplotlib has escaped every text in it


def _file_words(key: str) -> str:
    return _FILES.get(key, key.replace("_", " "))


def _decibel(value: float) -> str:
    return f"{value:.1f}".replace("-", plots.MINUS)


def _share(result: dict[str, Any]) -> Optional[float]:
    share = result.get("int8_share")
    return (result.get("plan") or {}).get("int8_share") if share is None else share


def _ratio(sizes: dict[str, Any], key: str) -> Optional[float]:
    return sizes[key] / sizes["float"] if sizes.get(key) is not None and sizes.get("float") else None


def _share_words(share: float) -> str:
    return percent(share).replace("%", " %")


def _interval(low: Optional[float], high: Optional[float]) -> str:
    return "" if low is None or high is None else f"{plots.number(low)} … {plots.number(high)}"


def _bytes(size: float) -> str:
    """`size` in B, kB, MB or GB (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5 or unit == "GB":
            break
        size /= 1000
    return f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"


def _duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
