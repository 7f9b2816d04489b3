"""Progress of long work: the bar that every command shows, and one for a single long stage.

In: how far a stage is. Out: a rich console, usually on stderr; without a terminal, a line now and then.
Not here: the rates of training (`distill/training/bar.py`).
"""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

LOG_SECONDS = 30
"""Where the output is no terminal, a line this often."""


def progress(console: Console, *more: ProgressColumn) -> Progress:
    """The columns of every bar: what, how far, how long, `more`, and the task's `figures`."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        *more,
        TextColumn("[dim]{task.fields[figures]}[/dim]"),
        console=console,
        transient=True,
    )


class StageBar:
    """Called with (done, total)."""

    def __init__(self, console: Console, title: str) -> None:
        self.console, self.title = console, title
        self._progress: Progress | None = None
        self._task: Any = None
        self._quiet_until = time.monotonic() + LOG_SECONDS

    def __call__(self, done: int, total: int) -> None:
        if not self.console.is_terminal:
            if time.monotonic() > self._quiet_until or done == total:
                self._quiet_until = time.monotonic() + LOG_SECONDS
                self.console.print(f"  {self.title} {done}/{total}", highlight=False)
            return
        if self._progress is None:
            self._progress = progress(self.console)
            self._progress.start()
            self._task = self._progress.add_task(self.title, total=total, figures="")
        self._progress.update(self._task, completed=done, total=total)
        if done >= total:
            self._progress.stop()
