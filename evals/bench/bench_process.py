"""Starts measuring processes, each a fresh one; keeps what they found, so that a bench can go on.

In: a `Task`. Out: its `Outcome`. Not here: what a process measures (`bench/bench_child.py`), in which order
(`evals/bench/bench_run.py`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from evals.bench.bench_task import Outcome, Task
from runtime import files
from runtime.errors import PocketError, StateError

LONGEST_S = 3600
"""How long one process may take, beside the time it was told to run for."""

ENVIRONMENT = {"bandwidth": {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}}
"""By kind of task: reading memory has its own threads, BLAS must not add some."""

ROOT = Path(__file__).resolve().parents[2]


def run(task: Task, longest_s: float = LONGEST_S) -> Outcome:
    """Carry a task out in a fresh process. Raises PocketError naming the bundle and the child's last line."""
    where = task.bundle or task.kind
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory(prefix="pocketvlm-bench-") as directory:
        given, wanted = Path(directory) / "task.json", Path(directory) / "outcome.json"
        given.write_text(task.model_dump_json())
        try:
            done = subprocess.run(
                [sys.executable, "-m", "evals.bench.bench_child", str(given), str(wanted)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                timeout=longest_s + task.seconds,
                env={**os.environ, "PYTHONPATH": path, **ENVIRONMENT.get(task.kind, {})},
            )
        except subprocess.TimeoutExpired:
            raise PocketError(
                f"{where}: measuring took more than {longest_s + task.seconds:.0f} s; lower repeats or tokens"
            ) from None
        if done.returncode:
            raise PocketError(f"{where}: the measuring process failed: {_reason(done)}")
        return Outcome.model_validate_json(wanted.read_bytes())


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        number = -done.returncode
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        memory = "; the system may have run out of memory" if number == signal.SIGKILL else ""
        return f"killed by {name}{memory}"
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"


class Kept:
    """Outcomes that are on disk already, by their key: what was measured is not measured again.

    `directory` None keeps nothing.
    """

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory

    def get(self, key: str) -> Outcome | None:
        """None when there is none, or when it was damaged: then it is measured again."""
        if self._directory is None or not (path := self._path(key)).is_file():
            return None
        try:
            (row,) = files.read_shard(path)
            return Outcome.model_validate(row)
        except (StateError, ValueError):
            path.unlink(missing_ok=True)
            return None

    def put(self, key: str, outcome: Outcome) -> None:
        if self._directory is not None:
            files.write_shard(self._path(key), [outcome.model_dump(mode="json")])

    def _path(self, key: str) -> Path:
        assert self._directory is not None
        return self._directory / f"{key[:32]}.jsonl"
