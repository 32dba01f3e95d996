"""The command line: `msqkd VERB`."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Callable, Optional

import typer
from rich.console import Console
from rich.table import Table

from msqkd.errors import MsqkdError, PlanError, did_you_mean
from msqkd.platform import leave_quietly, without_kernel
from msqkd.progress import Reporter, terminal
from msqkd.version import __version__
from msqkd.words import of_hundred, percent, shell_command

app = typer.Typer(
    name="msqkd", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help texts have brackets, which are no markup
    help="From a trained MindSpore network to an INT8 model: quantisation-aware training, distillation, calibration, "
    "export.",
)  # fmt: skip

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a built-in one (see `msqkd recipes`).")
]
SetOption = Annotated[
    Optional[list[str]], typer.Option(
        "--set", metavar="KEY=VALUE", help="Change one setting of the recipe, such as data.root=/data. May be repeated."
    )
]  # fmt: skip
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def _overrides(given: Optional[list[str]], rest: Optional[list[str]]) -> list[str]:
    """`--set a=1 b=2` and `--set a=1 --set b=2` say the same."""
    extra = list(rest or [])
    if extra and not given:
        raise typer.BadParameter(f"'{extra[0]}' is not expected here; settings follow --set")
    return [*(given or []), *extra]


RestArgument = Annotated[
    Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...", help="More settings after --set.")
]
OutputOption = Annotated[
    Optional[Path], typer.Option("--output", "-o", help="Folder for everything that is written [runs/NAME].")
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Forget an earlier run in the folder.")]


@app.command()
def run(
    recipe: RecipeArgument,
    rest: RestArgument = None,
    output: OutputOption = None,
    settings: SetOption = None,
    fresh: FreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Do the whole way: float network, QAT with distillation, calibration, export, report."""
    _run(recipe, _overrides(settings, rest), output, fresh, as_json, train=True)


@app.command()
def train(
    recipe: RecipeArgument,
    rest: RestArgument = None,
    output: OutputOption = None,
    settings: SetOption = None,
    fresh: FreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Do the trainings of a recipe alone: float where asked, then QAT, with distillation where asked.

    Nothing is calibrated or exported; `msqkd run` with the same recipe and folder goes on from there.
    """
    from msqkd.recipe import load_recipe

    loaded = load_recipe(recipe, _overrides(settings, rest))
    folder = output or Path("runs") / loaded.name
    from msqkd.pipeline.run import train_recipe

    with _resumable(folder):
        result = train_recipe(loaded, folder, Reporter(), fresh)
    if not result:
        return  # of several workers the first tells
    if as_json:
        print(json.dumps(result, indent=2))
        return
    console = terminal()
    console.print(_accuracies(result))
    console.print(
        f"checkpoints: {folder}; go on with: {shell_command('run', recipe, _overrides(settings, rest), output)}",
        soft_wrap=True,
    )


@app.command()
def calibrate(
    recipe: RecipeArgument,
    rest: RestArgument = None,
    output: OutputOption = None,
    settings: SetOption = None,
    fresh: FreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Calibrate the float network on unlabelled samples (PTQ), export and report, without quantised training."""
    _run(recipe, _overrides(settings, rest), output, fresh, as_json, train=False)


def _run(recipe: str, overrides: list[str], output: Optional[Path], fresh: bool, as_json: bool, train: bool) -> None:
    result, folder = _chain(recipe, overrides, output, fresh, train)
    if not result:
        return  # of several workers the first tells
    from msqkd.pipeline.export import failures

    failed = failures(result["export"], result["parity"])
    if as_json:
        keys = ("metric", "accuracy", "size_bytes", "int8_share", "seed", "versions", "sha256")
        found = {key: result[key] for key in keys}
        print(json.dumps({**found, "failed": failed, "parity": _without_values(result["parity"])}, indent=2))
    else:
        _summary(result, folder)
    if failed or result["parity"]["exceeded"]:
        raise typer.Exit(1)


def _chain(
    recipe: str, overrides: list[str], output: Optional[Path], fresh: bool, train: bool
) -> tuple[dict[str, Any], Path]:
    """Run a recipe; returns the report's data, and the folder."""
    from msqkd.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    folder = output or Path("runs") / (loaded.name if train else f"{loaded.name}_ptq")
    from msqkd.pipeline.run import run_recipe

    with _resumable(folder):
        return run_recipe(loaded, folder, Reporter(), fresh, train=train), folder


@contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Ctrl-C ends the command with 130 and says where everything is."""
    # While it runs a network MindSpore answers Ctrl-C itself, by sending SIGTERM to the process.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        text = f"\nstopped; everything so far is in {folder}: run the same command again to go on"
        terminal(stderr=True).print(text, soft_wrap=True)
        raise typer.Exit(130) from None


def _without_values(parity: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in parity.items() if key != "values"}


def _accuracies(result: dict[str, Any]) -> Table:
    """What every network of a result reached."""
    from msqkd.train.metric import Scale

    scale = Scale.of(result["metric"])
    what = "top-1 accuracy in percent" if scale.unit else scale.name
    table = Table(title=f"{result['name']}: {what}", title_justify="left")
    table.add_column("network")
    table.add_column(scale.name, justify="right")
    table.add_column("to float", justify="right")
    names = {
        "float": "float", "float_ft": "float, fine-tuned with the same budget",
        "float_kd": "float, with the same distillation",
        "ptq": "PTQ only", "qat": "QAT", "qat_kd": "QAT + distillation", "exported": "exported INT8 file",
        "integer": "on the device (integers, simulated)",
    }  # fmt: skip
    base = result["accuracy"]["float"]
    for key, title in names.items():
        value = result["accuracy"].get(key)
        if value is not None:
            delta = "" if key == "float" else f"{value - base:+.{scale.digits}f}"
            table.add_row(title, scale.number(value), delta)
    return table


def _summary(result: dict[str, Any], folder: Path) -> None:
    console = terminal()
    console.print(_accuracies(result))
    sizes = result["size_bytes"]
    if sizes.get("int8") and sizes.get("float"):
        console.print(
            f"size: float {sizes['float']:,} bytes, int8 {sizes['int8']:,} bytes "
            f"({sizes['int8'] / sizes['float']:.2f}×)"
        )
    _failures(result["export"], console)
    _deviation(result["parity"], console)
    console.print(f"files and report: {folder}", soft_wrap=True)


def _failures(exports: dict[str, Any], console: Console) -> None:
    for name, entry in exports.items():
        if entry.get("failed"):
            console.print(f"failed: {name}: {entry['failed']}", style="red", markup=False, soft_wrap=True)


def _deviation(parity: dict[str, Any], console: Console) -> None:
    from msqkd.pipeline.export import deviation_words

    text = deviation_words(parity)
    if parity["exceeded"]:
        console.print(f"warning: {text}", style="yellow", soft_wrap=True)
    else:
        console.print(text, soft_wrap=True)


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="Folder for verify.html and verify.json [RUN].")
    ] = None,
    samples: Annotated[
        Optional[int], typer.Option(min=1, help="Test samples to compute, at most [the recipe's verify.samples].")
    ] = None,
    machine: Annotated[
        Optional[str], typer.Option(help="x86 or arm64, whose arithmetic is computed [the recipe's verify.machine].")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a run's files, and compare what the device computes with what training promised, on the test set.

    Ends with 1 where the device is beyond a bound of the recipe's verify section.
    """
    from msqkd.pipeline.verify import verify_run

    result = verify_run(run, output, samples=samples, machine=machine)
    parity = result["parity"]
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        _verified(result, output or run)
    if parity["exceeded"]:
        raise typer.Exit(1)


def _verified(result: dict[str, Any], folder: Path) -> None:
    from msqkd.train.metric import Scale

    parity = result["parity"]
    scale = Scale.of(parity["metric"])
    machine = f" ({parity['machine']})" if parity["machine"] else ""
    unit = ", in percent" if scale.unit else ""
    title = f"{result['name']} on {result['target']}{machine}: {parity['samples']} test samples{unit}"
    table = Table(title=title, title_justify="left")
    table.add_column("execution")
    same = {key: of_hundred(value) for key, value in parity["agreement"].items()}
    columns = ("equal answers to float", "to fake-quantised") if same else ()
    for column in (scale.name, *columns):
        table.add_column(column, justify="right")
    rows = {
        "float": ("float", ("", "fake_quantised_float")),
        "fake_quantised": ("fake-quantised", ("fake_quantised_float", "")),
        "integer": ("integer", ("integer_float", "integer_fake_quantised")),
    }
    for key, (name, pairs) in rows.items():
        reached = parity["accuracy"][key]
        shares = [same.get(pair, "") for pair in pairs] if same else []
        table.add_row(name, "" if reached is None else scale.number(reached), *shares)
    console = terminal()
    console.print(table)
    for entry in result["export"].values():
        if entry["file"] is None:
            continue
        words = "checksum as exported"
        if "compared_values" in entry:
            words += f"; {entry['differing_values']} of {entry['compared_values']:,} integers unlike the simulated"
        console.print(f"{entry['file']}: {words}", soft_wrap=True)
    _failures(result["export"], console)
    _deviation(parity, console)
    console.print(f"report: {folder / 'verify.html'}", soft_wrap=True)


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(metavar="RUN|FILE.mindir", help="The folder of a finished run, or a marked MindIR.")
    ],
    converter: Annotated[
        str,
        typer.Option(
            metavar="PATH",
            help="converter_lite, the unpacked package, an environment with mindspore-lite, its wheel; or auto: that "
            "of MSLITE_HOME, or on the PATH.",
        ),
    ] = "auto",
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="Folder for NAME_converter.ms and convert.json [beside].")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples that both files compute, at most.")] = 16,
    time_limit: Annotated[float, typer.Option(min=1.0, help="Seconds after which the converter is ended.")] = 600.0,
    as_json: JsonOption = False,
) -> None:
    """Let the vendor's converter make a .ms file of the marked MindIR, and compare it with msqkd's own.

    Ends with 1 where an int8 node is not as planned, or outputs differ in the vendor's runtime.
    """
    from msqkd.pipeline.convert import convert_file, convert_run

    work = convert_run if source.is_dir() else convert_file
    result = work(source, converter, output, samples=samples, limit=time_limit, reporter=Reporter())
    if as_json:
        print(json.dumps(result, indent=2))
    elif result["compared"]:
        terminal().print(_conversion(result))
    if not result.get("as_planned"):
        raise typer.Exit(1)


def _conversion(result: dict[str, Any]) -> Table:
    from msqkd.analysis.conversion import conversion_rows

    table = Table(title=f"{result['name']}: {result['file']}", title_justify="left")
    for column in ("", "found"):
        table.add_column(column, overflow="fold")
    for row in conversion_rows(result):
        table.add_row(*row)
    return table


runtime = typer.Typer(no_args_is_help=True, help="MindSpore Lite's own package: its converter and its runtime.")
app.add_typer(runtime, name="runtime")


@runtime.command()
def install(
    wheel: Annotated[
        Optional[Path], typer.Argument(metavar="[WHEEL]", help="The wheel; fetched from the package index without it.")
    ] = None,
    home: Annotated[
        Optional[Path], typer.Option(help="Folder of its environment [MSLITE_HOME, or ~/.cache/mslite-2.0.0].")
    ] = None,
) -> None:
    """Set MindSpore Lite's Python package up in an environment of its own (2.0.0 needs CPython 3.7)."""
    from msqkd.deploy.vendor_install import install as set_up

    terminal().print(f"mindspore-lite: {set_up(wheel, home)}", soft_wrap=True)


@app.command()
def analyze(
    run: Annotated[
        str,
        typer.Argument(
            metavar="RUN|RECIPE", help="The folder of a run that was calibrated at least, or a recipe to be calibrated."
        ),
    ],
    rest: RestArgument = None,
    output: Annotated[
        Optional[Path],
        typer.Option("--output", "-o", help="Folder for analysis.html and analysis.json [RUN, runs/NAME_ptq]."),
    ] = None,
    settings: SetOption = None,
    samples: Annotated[int, typer.Option(min=1, help="Training samples to look at, at most.")] = 1000,
    layer_samples: Annotated[
        Optional[int], typer.Option(min=1, help="Of these, computed layer by layer [200, or what takes 90 seconds].")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find the layers that quantisation harms most, say why, and what to write into the recipe against it."""
    from msqkd.analysis.analysis_report import analysis_table, diagnosis_lines
    from msqkd.pipeline.analyze import REPORT, analyze_run

    folder = _calibrated(run, _overrides(settings, rest), output)
    result = analyze_run(folder, output, samples=samples, sensitivity_samples=layer_samples)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    console = terminal(width=160)
    console.print(analysis_table(result))
    for line in diagnosis_lines(result):
        console.print(line, soft_wrap=True)
    console.print(f"report: {(output or folder) / REPORT}.html", soft_wrap=True)


def _calibrated(run: str, overrides: list[str], output: Optional[Path]) -> Path:
    """The folder of a run; a recipe is calibrated first."""
    from msqkd.recipe import list_builtin

    is_recipe = run.endswith((".yaml", ".yml")) or run in {recipe.name for recipe in list_builtin()}
    if Path(run).is_dir() or not is_recipe:
        if overrides:
            raise PlanError(f"{run} is the folder of a run, whose recipe is fixed; --set is for a recipe")
        return Path(run)
    return _chain(run, overrides, output, fresh=False, train=False)[1]


@app.command()
def teachers(
    recipe: RecipeArgument,
    rest: RestArgument = None,
    output: OutputOption = None,
    settings: SetOption = None,
    samples: Annotated[int, typer.Option(min=1, help="Training samples that teachers are asked about.")] = 2000,
    fresh: FreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compare the teachers of a recipe with its network: what they know more, and what asking them costs."""
    from msqkd.recipe import load_recipe

    loaded = load_recipe(recipe, _overrides(settings, rest))
    folder = output or Path("runs") / f"{loaded.name}_teachers"
    from msqkd.analysis.teachers import teachers_table
    from msqkd.pipeline.teachers import compare_teachers

    with _resumable(folder):
        result = compare_teachers(loaded, folder, samples, Reporter(), fresh)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    console = terminal(width=160)
    console.print(teachers_table(result))
    console.print(result["verdict"], soft_wrap=True)


@app.command()
def tune(
    recipe: RecipeArgument,
    rest: RestArgument = None,
    output: OutputOption = None,
    settings: SetOption = None,
    max_drop: Annotated[
        float, typer.Option(min=0.0, help="Most the metric may lose to float, in its own unit (points of accuracy).")
    ] = 0.5,
    trials: Annotated[Optional[int], typer.Option(min=1, help="Most networks tried.")] = None,
    minutes: Annotated[Optional[float], typer.Option(min=0.0, help="Begin no trial after so many minutes.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Labelled training samples that trials are ranked on.")] = 2000,
    fresh: FreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Try cures, the cheap ones first, until the quantised network has lost little enough; ends with its recipe.

    Ends with 1 where the goal was not reached; the best recipe found is written all the same.
    """
    from msqkd.recipe import load_recipe

    loaded = load_recipe(recipe, _overrides(settings, rest))
    folder = output or Path("runs") / f"{loaded.name}_tune"
    from msqkd.analysis.tune_report import verdict
    from msqkd.pipeline.tune import TUNED, Goal, tune_recipe

    with _resumable(folder):
        result = tune_recipe(loaded, folder, Goal(max_drop, trials, minutes, samples), Reporter(), fresh)
    if as_json:
        print(json.dumps(result, indent=2))
    else:
        console = terminal()
        console.print(verdict(result), soft_wrap=True)
        console.print(f"recipe: {folder / TUNED}; story: {folder / 'tune.html'}", soft_wrap=True)
    if not result["reached"]:
        raise typer.Exit(1)


@app.command()
def search(
    recipe: RecipeArgument,
    rest: RestArgument = None,
    output: OutputOption = None,
    settings: SetOption = None,
    budget: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of what the float network takes, above 0.")
    ] = 0.25,
    by: Annotated[
        str, typer.Option(help="What the budget is of: size (of weights), bops (bit operations) or latency.")
    ] = "size",
    times: Annotated[
        Optional[Path],
        typer.Option(
            help="With --by latency: a JSON or YAML table {layer: {precision: µs a sample}} from a device [measured "
            "here with onnxruntime]."
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Labelled training samples that networks are measured on.")
    ] = 2000,
    fresh: FreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Choose the bits of every layer so that the network loses least within a budget; ends with its recipe."""
    from msqkd.recipe import load_recipe

    loaded = load_recipe(recipe, _overrides(settings, rest))
    folder = output or Path("runs") / f"{loaded.name}_search"
    from msqkd.analysis.precisions import COSTS
    from msqkd.analysis.search_report import verdict
    from msqkd.pipeline.search import FOUND, Budget, search_recipe

    if by not in COSTS:
        raise PlanError(f"--by: found '{by}', allowed: {', '.join(COSTS)}{did_you_mean(by, COSTS)}")
    with _resumable(folder):
        result = search_recipe(loaded, folder, Budget(budget, by, samples=samples, times=times), Reporter(), fresh)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    console = terminal()
    console.print(verdict(result), soft_wrap=True)
    console.print(f"recipe: {folder / FOUND}; the front: {folder / 'search.html'}", soft_wrap=True)


@app.command()
def bench(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    batch: Annotated[
        Optional[list[int]], typer.Option(min=1, help="Samples a call; may be repeated [1 and 32].")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of one operation.")] = 1,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time for each measurement.")] = 5.0,
    layers: Annotated[
        bool, typer.Option("--layers", help="Measure layer by layer, for `msqkd search --by latency --times`.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure the float and the int8 network of a run with onnxruntime, and write the table.

    Needs the extra onnx.
    """
    from msqkd.pipeline.latency import LAYERS, REPORT, bench_run, bench_run_layers

    if layers:
        from msqkd.bench import times_table

        if batch and len(batch) > 1:
            raise PlanError(f"--batch: found {len(batch)} sizes, allowed with --layers: one")
        times = bench_run_layers(run, batch=batch[0] if batch else 1, threads=threads, seconds=seconds)
        if as_json:
            print(json.dumps(times.to_dict(), indent=2))
        else:
            print(times_table(times), end="")
            terminal().print(f"\ntimes: {run / LAYERS}", soft_wrap=True)
        return
    results = bench_run(run, batches=batch or [1, 32], threads=threads, seconds=seconds)
    if as_json:
        print(json.dumps(results, indent=2))
    else:
        print((run / f"{REPORT}.md").read_text(encoding="utf-8"), end="")


@app.command()
def plan(
    recipe: RecipeArgument,
    rest: Annotated[
        Optional[list[str]], typer.Argument(metavar="[KEY=VALUE]...", help="More settings after --set.")
    ] = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show, layer by layer, what is quantised and why, before anything runs. Needs neither data nor weights."""
    from msqkd.recipe import load_recipe

    loaded = load_recipe(recipe, _overrides(settings, rest), require_weights=False)
    from msqkd.pipeline.build import plan_recipe
    from msqkd.pipeline.result import training_only_rows
    from msqkd.pipeline.teaching import Teaching
    from msqkd.quant.qat import deployment_graph

    graph, made = plan_recipe(loaded)
    told = Teaching(loaded, {}).words(graph) if loaded.distillation is not None else []
    if as_json:
        data = {
            "recipe": loaded.name,
            **made.to_dict(),
            "training_only": training_only_rows(graph),
            "distillation": told,
        }
        print(json.dumps(data, indent=2))
        return
    table = Table(title=f"{made.network} on {made.target}", title_justify="left")
    for column in ("layer", "operation", "precision", "weight", "activation", "rule", "why"):
        table.add_column(column, overflow="fold")
    outputs = {node.name: node.output for node in deployment_graph(graph).nodes}
    for node in made.nodes:
        weight = made.weights.get(node.name)
        how = f"{weight.bits} bit per {'tensor' if weight.axis is None else 'channel'}" if weight else ""
        output = outputs.get(node.name)
        group = made.group_of(output) if output in made.activations else None
        what = f"{group.bits} bit {'symmetric' if group.symmetric else 'asymmetric'}" if group else ""
        table.add_row(node.name, node.op, node.precision, how, what, node.rule, node.reason)
    for row in training_only_rows(graph):
        table.add_row(row["name"], row["op"], "training only", "", "", "", "not deployed (model.outputs)")
    console = terminal(width=200)
    console.print(table)
    console.print(f"{percent(made.int8_share())} of {len(made.nodes)} operations run in int8")
    for text in told:
        console.print(f"distillation: {text}", soft_wrap=True)
    for defect in made.avoided():
        text = f"avoided: {defect['what']}; {defect['instead']} ({', '.join(defect['nodes'])})"
        console.print(text)
    for warning in made.warnings:
        console.print(f"warning: {warning}", style="yellow")


@app.command()
def recipes(as_json: JsonOption = False) -> None:
    """List the built-in recipes."""
    from msqkd.recipe import list_builtin

    found = list_builtin()
    if as_json:
        print(
            json.dumps(
                [
                    {"name": r.name, "description": r.description, "path": str(r.path), "result": r.result}
                    for r in found
                ],
                indent=2,
            )
        )
        return
    table = Table()
    table.add_column("recipe")
    table.add_column("what it is")
    for item in found:
        table.add_row(item.name, item.description)
    terminal().print(table)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Look at the environment and say what is wrong with it, and the cure."""
    from msqkd.environment import PROBLEM, examine

    findings = examine()
    if as_json:
        print(json.dumps([finding.to_dict() for finding in findings], indent=2))
    else:
        table = Table()
        for column in ("what", "status", "found", "cure"):
            table.add_column(column, overflow="fold")
        for finding in findings:
            table.add_row(finding.name, finding.status, finding.found, finding.cure)
        terminal().print(table)
    if any(finding.status == PROBLEM for finding in findings):
        raise typer.Exit(1)


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit()


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    quiet_compiler()


def quiet_compiler() -> None:
    """MindSpore's own account of a network that does not compile: the sentence of a MsqkdError tells it better."""
    os.environ.setdefault("GLOG_v", "4")
    if "MS_OM_PATH" not in os.environ:
        folder = tempfile.mkdtemp(prefix="msqkd_compiler_")
        os.environ["MS_OM_PATH"] = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def main() -> None:
    """Entry point of the console script: errors the user can mend are one sentence and exit code 2."""
    code = guarded(app)
    leave_quietly()
    sys.exit(code)


def _worker() -> str:
    """Which worker speaks, where msrun has started several."""
    if "MS_ROLE" not in os.environ:
        return ""
    return f"worker {os.environ.get('RANK_ID', '?')}: " if os.environ["MS_ROLE"] == "MS_WORKER" else "scheduler: "


def guarded(command: Callable[[], Any]) -> int:
    """Run `command`; what the user can mend is told in one sentence. Returns the exit code."""
    try:
        command()
    except MsqkdError as error:
        terminal(stderr=True).print(f"msqkd: {_worker()}{error}", soft_wrap=True)
        return 2
    except OSError as error:  # a full disk, a folder that went away
        place = f"{error.filename}: " if error.filename else ""
        terminal(stderr=True).print(f"msqkd: {place}{error.strerror or error}", soft_wrap=True)
        return 2
    except RuntimeError as error:
        operation = without_kernel(error)
        if operation is None:
            raise
        terminal(stderr=True).print(
            f"msqkd: MindSpore has no kernel for {operation} on this device, so the network cannot be computed here; "
            "write it with other operations in the network's construct", soft_wrap=True,
        )  # fmt: skip
        return 2
    except KeyboardInterrupt:
        return 130
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
