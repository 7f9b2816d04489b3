"""Stages: the steps of a long command that are done once, with their seconds in a ledger.

In: named stages made of jobs. Out: progress on stderr, one ledger line a finished stage.
Not here: what the stages do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from distill.jobs import Job, Tick, Workers, resident_mib
from evals import stage_bar
from runtime.files import Ledger

SHOWN = ("loss", "divergence", "r_acc")


class Stages:
    """Runs stages in order. A stage that the ledger lists as finished is not run again."""

    def __init__(self, out: Path, console: Console, workers: Workers) -> None:
        self.out, self.console, self.workers = out, console, workers
        self.ledger = Ledger(out / "ledger.jsonl")
        self.resumed = {entry["stage"] for entry in self.ledger.entries()}
        self._peak = 0.0

    def run(self, name: str, what: str, work: Callable[[Callable[[Sequence[Job]], list[Any]]], Any]) -> None:
        """Run `work` unless the stage is finished. `work` gets a function that runs jobs side by side."""
        for entry in self.ledger.entries():
            if entry["stage"] == name:
                self.console.print(f"[dim]{name:8} finished before ({entry['seconds']:.0f} s)[/dim]")
                return
        self._peak = resident_mib()
        started = time.monotonic()
        with stage_bar.progress(self.console) as progress:
            overall = progress.add_task(f"[bold]{name:8}[/bold] {what}", total=None, figures="")
            work(lambda jobs: self._run_jobs(jobs, progress))
            progress.remove_task(overall)
        seconds = time.monotonic() - started
        self.ledger.add({"stage": name, "seconds": round(seconds, 2), "peak_rss_mib": round(self._peak, 1)})
        self.console.print(f"[green]{name:8}[/green] {what} [dim]{seconds:.0f} s[/dim]")

    def _run_jobs(self, jobs: Sequence[Job], progress: Progress) -> list[Any]:
        lines: dict[str, Any] = {}
        quiet_until = time.monotonic() + stage_bar.LOG_SECONDS

        def on_tick(tick: Tick) -> None:
            if tick.job not in lines:
                lines[tick.job] = progress.add_task(f"  {tick.job}", total=tick.total, figures="")
            nonlocal quiet_until
            figures = "  ".join(f"{k} {tick.figures[k]:.3f}" for k in SHOWN if k in tick.figures)
            progress.update(lines[tick.job], completed=tick.done, total=tick.total, figures=figures)
            if not self.console.is_terminal and time.monotonic() > quiet_until:
                quiet_until = time.monotonic() + stage_bar.LOG_SECONDS
                self.console.print(f"  {tick.job} {tick.done}/{tick.total}  {figures}")
            if tick.done >= tick.total:
                progress.update(lines[tick.job], visible=False)

        def on_memory(mib: float) -> None:
            self._peak = max(self._peak, mib)

        try:
            return self.workers.run(jobs, on_tick, on_memory)
        finally:
            for line in lines.values():
                progress.remove_task(line)
