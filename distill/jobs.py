"""Jobs in worker processes: one thread each, as many as there are cores, gone when the parent goes.

In: functions of this project and their arguments. Out: their results, their progress as it happens.
Not here: what a job does, or whether it is needed.

Tiny models gain nothing from a second thread, so two jobs on two cores run nearly twice as fast as one
job on both. A worker dies with its parent, so a kill -9 leaves nobody writing behind the next run's back.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import psutil

from runtime.errors import StateError

PR_SET_PDEATHSIG = 1
MEMORY_SECONDS = 2.0


@dataclass(frozen=True)
class Job:
    """A call `function(**arguments)`, named for people."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tick:
    """Progress of a running job: `done` of `total` units, with a few figures."""

    job: str
    done: int
    total: int
    figures: dict[str, float]


_ticks: Any = None
_job = ""


def report(done: int, total: int, figures: dict[str, float] | None = None) -> None:
    """Called by a job to tell how far it is. Cheap; most calls are dropped."""
    global _last
    now = time.monotonic()
    if _ticks is not None and (now - _last > 0.2 or done == total):
        _last = now
        _ticks.put(Tick(_job, done, total, figures or {}))


_last = 0.0


class Workers:
    """A pool of worker processes that lives over several stages, so that imports are paid once."""

    def __init__(self, count: int | None = None) -> None:
        self.count = count or max(1, (psutil.cpu_count(logical=False) or os.cpu_count() or 1))
        context = multiprocessing.get_context("spawn")
        self._ticks = context.SimpleQueue()  # put returns when it is written: no tick comes after its result
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self._pool = ProcessPoolExecutor(
            self.count, mp_context=context, initializer=_start, initargs=(self._ticks, os.getpid())
        )

    def run(
        self, jobs: Sequence[Job], on_tick: Callable[[Tick], None], on_memory: Callable[[float], None]
    ) -> list[Any]:
        """Results in the order of `jobs`. The first error stops the stage: jobs not begun are dropped.

        `on_memory` gets the resident memory of this process and its workers together, in MiB.
        """
        futures = [self._pool.submit(_call, job) for job in jobs]
        try:
            measure_at = 0.0
            while not all(future.done() for future in futures):
                wait(futures, timeout=0.2, return_when=FIRST_EXCEPTION)
                for tick in _drain(self._ticks):
                    on_tick(tick)
                if time.monotonic() >= measure_at:  # reading it costs a few milliseconds a process
                    on_memory(resident_mib())
                    measure_at = time.monotonic() + MEMORY_SECONDS
                _raise_first(futures)
            for tick in _drain(self._ticks):
                on_tick(tick)
            _raise_first(futures)
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def close(self, *, kill: bool = False) -> None:
        """End the workers; with `kill`, without waiting for what they are doing."""
        processes = list(self._pool._processes.values()) if kill else []
        self._pool.shutdown(wait=not kill, cancel_futures=True)
        for process in processes:
            with contextlib.suppress(Exception):
                process.kill()


def resident_mib() -> float:
    """Resident memory of this process and all its children together, MiB.

    Pages that they share (the libraries' code) count once: the sum of proportional set sizes, where the
    platform gives them, else of resident sizes.
    """
    total = 0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            found = process.memory_full_info()
            total += getattr(found, "pss", found.rss)
    return total / 2**20


def _drain(ticks: Any) -> Iterator[Tick]:
    while not ticks.empty():
        yield ticks.get()


def _raise_first(futures: Sequence[Future[Any]]) -> None:
    for future in futures:
        error = future.exception() if future.done() and not future.cancelled() else None
        if isinstance(error, BrokenProcessPool):
            raise StateError(
                "a worker process was ended from outside (too little memory?); "
                "run the same command again, it goes on where it was"
            ) from error
        if error is not None:
            raise error


def _start(ticks: Any, parent: int) -> None:
    """Set up a worker: die with the parent, leave Ctrl-C to it, one thread, quiet libraries."""
    global _ticks
    _ticks = ticks
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _call(job: Job) -> Any:
    global _job, _last
    _job, _last = job.name, 0.0
    return job.function(**job.arguments)
