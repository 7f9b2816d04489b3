"""The command line as a user has it: in a process of its own, with its exit codes and its two streams."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pocketvlm

ROOT = Path(pocketvlm.__file__).parent
PROGRESS = ("export: ", "bench: ", "plan: ")


def call(*arguments: str | Path, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "pocketvlm", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def refusal(*arguments: str | Path, **options: Any) -> str:
    """The one line on stderr, but for progress, of a call that ends with code 2."""
    done = call(*arguments, code=2, **options)
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith(PROGRESS)]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("pocketvlm: ")
    return lines[0]
