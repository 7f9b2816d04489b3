"""Training as a person sees it: a progress bar with rates, warnings above it, one line at the end.

In: the loop's progress. Out: a rich console, usually on stderr. Not here: trackers.
"""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import TimeRemainingColumn

from distill.training.warnings import Sign
from evals.stage_bar import LOG_SECONDS, progress

SHOWN = ("loss", "divergence", "r_acc", "validation")


class Bar:
    """A context manager; `progress` and `warn` are what `loop.fit` takes."""

    def __init__(self, console: Console, name: str = "train") -> None:
        self.console, self.name = console, name
        self._progress = progress(console, TimeRemainingColumn())
        self._task = self._progress.add_task(name, total=None, figures="")
        self._quiet_until = time.monotonic() + LOG_SECONDS
        self._last = ""

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if error is None and self._last:
            self.console.print(f"{escape(self.name)} {self._last}", soft_wrap=True)

    def progress(self, done: int, total: int, figures: dict[str, float]) -> None:
        """A step is done."""
        shown = [f"{name} {figures[name]:.4g}" for name in SHOWN if name in figures]
        shown.append(rates(figures))
        self._last = f"{done}/{total}  " + "  ".join(filter(None, shown))
        self._progress.update(self._task, completed=done, total=total, figures="  ".join(shown))
        if not self.console.is_terminal and time.monotonic() > self._quiet_until:
            self._quiet_until = time.monotonic() + LOG_SECONDS
            self.console.print(f"  {escape(self.name)} {self._last}", soft_wrap=True)

    def warn(self, sign: Sign) -> None:
        """A sign of failure, above the bar."""
        self.console.print(f"[yellow]warning[/yellow] {escape(str(sign))}", soft_wrap=True)


def rates(figures: dict[str, float]) -> str:
    """Tokens a second per device and MFU, `unknown` where the device's peak is."""
    if "tokens_per_s_device" not in figures:
        return ""
    share = f"{figures['mfu']:.0%}" if "mfu" in figures else "unknown"
    return f"{figures['tokens_per_s_device']:,.0f} tokens/s per device, MFU {share}"
