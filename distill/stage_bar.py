"""A progress bar for one long stage; without a terminal, a line now and then.

In: how far a stage is. Out: a rich console, usually on stderr. Not here: training's rates (training/bar.py).
"""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from distill.training.bar import rates


class StageBar:
    """Called with (done, total)."""

    SECONDS = 30.0

    def __init__(self, console: Console, title: str) -> None:
        self.console, self.title = console, title
        self._progress: Progress | None = None
        self._task: Any = None
        self._quiet_until = time.monotonic() + self.SECONDS

    def __call__(self, done: int, total: int, shown: str = "") -> None:
        if not self.console.is_terminal:
            if time.monotonic() > self._quiet_until or done == total:
                self._quiet_until = time.monotonic() + self.SECONDS
                self.console.print(f"  {self.title} {done}/{total}  {shown}", highlight=False)
            return
        if self._progress is None:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("[dim]{task.fields[figures]}[/dim]"),
                console=self.console,
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task(self.title, total=total, figures="")
        self._progress.update(self._task, completed=done, total=total, figures=shown)
        if done >= total:
            self._progress.stop()

    def figures(self, done: int, total: int, entry: dict[str, float]) -> None:
        """For training: a step's figures beside the bar."""
        wanted = ("loss", "r_acc", "divergence", "validation")
        shown = [f"{name} {entry[name]:.4g}" for name in wanted if name in entry]
        self(done, total, "  ".join(filter(None, [*shown, rates(entry)])))
