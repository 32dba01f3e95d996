"""Long work shows itself: stages, progress with the time left, and plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_PLAIN_SECONDS = 15.0  # between two plain lines of one task


def terminal(stderr: bool = False, quiet: bool = False, width: Optional[int] = None) -> Console:
    """Make a console that prints every text as it is: brackets and colons in names and paths are no markup.

    Args:
        stderr: Print to standard error instead of standard output.
        quiet: Print nothing.
        width: Columns where standard output is no terminal.
    """
    columns = None if width is None or sys.stdout.isatty() else width
    return Console(stderr=stderr, quiet=quiet, width=columns, highlight=False, markup=False, emoji=False)


class Reporter:
    """Tells a person what is going on.

    Args:
        stages: how many stages there will be.
        console: where to; standard error by default, so that `--json` output stays clean.
        quiet: say nothing.
    """

    def __init__(self, stages: int = 0, console: Optional[Console] = None, quiet: bool = False) -> None:
        self.console = console or terminal(stderr=True, quiet=quiet)
        self.stages, self.current = stages, 0

    def stage(self, title: str) -> None:
        """Begin the next stage."""
        self.current += 1
        self.console.print(f"[{self.current}/{self.stages}] {title}", style="bold", markup=False)

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print("      " + text, markup=False)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.console.print("      warning: " + text, style="yellow", markup=False)

    @contextmanager
    def task(self, title: str, total: int, done: int = 0) -> Iterator[Task]:
        """Show the progress of `total` steps, of which `done` are behind us."""
        if not self.console.is_terminal:
            yield _PlainTask(self, title, total, done)
            return
        columns = [
            TextColumn("      {task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        ]
        with Progress(
            *columns, TextColumn("{task.fields[info]}", markup=False), console=self.console, transient=True
        ) as progress:
            yield _BarTask(progress, progress.add_task(title, total=total, completed=done, info=""))


class Task:
    """One piece of work in progress."""

    def update(self, done: int, **info: Any) -> None:
        """`done` steps are finished; `info` is shown beside."""
        raise AssertionError("a task is made by Reporter.task")


class _BarTask(Task):
    def __init__(self, progress: Progress, task: Any) -> None:
        self.progress, self.id = progress, task

    def update(self, done: int, **info: Any) -> None:
        self.progress.update(self.id, completed=done, info=_words(info))


class _PlainTask(Task):
    def __init__(self, reporter: Reporter, title: str, total: int, done: int) -> None:
        self.reporter, self.title, self.total, self.begun_at = reporter, title, total, done
        self.start = self.last = time.monotonic()

    def update(self, done: int, **info: Any) -> None:
        now = time.monotonic()
        if done < self.total and now - self.last < _PLAIN_SECONDS:
            return
        self.last = now
        fresh = max(done - self.begun_at, 1)
        left = (now - self.start) / fresh * (self.total - done)
        self.reporter.say(f"{self.title}: {done}/{self.total}, {_clock(left)} left {_words(info)}".rstrip())


def _words(info: dict[str, Any]) -> str:
    return " ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in info.items()
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
