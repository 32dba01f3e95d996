"""The stages of a run: each is done once, told, and remembered in the run's folder."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Callable, Optional

import mindspore as ms

from msqkd import parallel
from msqkd.graph.cell import to_cell
from msqkd.graph.ir import Graph
from msqkd.pipeline.checks import check_run
from msqkd.pipeline.objects import Objects
from msqkd.pipeline.rundir import RunDirectory
from msqkd.pipeline.trainings import pretrain
from msqkd.progress import Reporter
from msqkd.quant.plan import QuantPlan
from msqkd.recipe import Recipe


@contextmanager
def opened(
    recipe: Recipe, output: Path, verb: str, reporter: Optional[Reporter] = None, fresh: bool = False
) -> Iterator[Objects]:
    """The objects of a command that exports nothing by itself, and holds its folder meanwhile.

    Args:
        recipe: what it is about.
        output: the folder; created when it does not exist.
        verb: of the command.
        reporter: where progress is told.
        fresh: forget what the folder holds.

    Raises:
        MsqkdError: the folder belongs to another recipe or command, or cannot be written.
    """
    ms.set_context(mode=ms.GRAPH_MODE)
    ms.set_seed(recipe.seed)
    with RunDirectory(output, recipe, fresh, verb=verb) as folder:
        yield Objects(recipe, folder, reporter or Reporter(), train=False)


class Stages:
    """Base of what works through stages.

    Attributes:
        objects, recipe, folder, reporter: of the run.
        warnings: what was said to the user beside the recipe's and the plan's own warnings.
        started: when this run, or its last continuation, began.
    """

    def __init__(self, objects: Objects) -> None:
        self.objects = objects
        self.recipe, self.folder, self.reporter = objects.recipe, objects.folder, objects.reporter
        self.warnings: list[str] = []
        self.started = datetime.now(timezone.utc)

    def begin(self, stages: int) -> tuple[Graph, Graph, QuantPlan]:
        """Say what the recipe warns of, and refuse what cannot be done, before so many stages.

        Returns:
            As `check_run`.

        Raises:
            MsqkdError: whatever the user can mend.
        """
        self.reporter.stages = stages
        for warning in self.recipe.warnings():
            self.reporter.warn(warning)
        if self.folder.unlocked is not None:
            self.reporter.warn(self.folder.unlocked)
        return check_run(self.objects)

    def stage(self, name: str, title: str, work: Callable[[], Any], tell: Callable[[Any], str]) -> Any:
        """Do a stage, unless the folder has its result.

        Args:
            name: in the folder's state.
            title: for people.
            work: does it; a dictionary it returns gets the ``seconds`` it took.
            tell: what to say of the result.
        """
        self.reporter.stage(title)
        if self.folder.done(name):
            result = self.folder.result(name)
            self.reporter.say(f"{tell(result)} (done before)")
            return result
        begin = time.monotonic()
        result = work()
        if isinstance(result, dict):
            result.setdefault("seconds", time.monotonic() - begin)
        result = parallel.from_first(result)
        self.folder.finish(name, result)
        self.reporter.say(tell(result))
        return result

    def float_network(self) -> dict[str, Any]:
        """Get the float network, trained from scratch where the recipe says so; returns its metric."""
        objects = self.objects
        self.reporter.say(objects.bundle.describe())

        def work() -> dict[str, Any]:
            history = pretrain(objects) if self.recipe.pretrain is not None else None
            graph = objects.captured
            if history is None:
                objects.save_graph(graph, "float.ckpt")
            for name, report in objects.loaded.items():
                self.reporter.say(f"{name}: {report.words()}")
            loaded = {name: report.to_dict() for name, report in objects.loaded.items()}
            return {"accuracy": objects.measured(to_cell(graph)), "history": history, "checkpoints": loaded}

        title = "Float network: training from scratch" if self.recipe.pretrain else "Float network"
        found: dict[str, Any] = self.stage(
            "float", title, work, lambda r: f"float {objects.metric.words(r['accuracy'])}"
        )
        return found
