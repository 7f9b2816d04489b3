"""The Core ML benchmark goes its whole way on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("coremltools")

from benchmarks import coreml as benchmark

ROOT = Path(benchmark.__file__).parents[1]


@pytest.mark.slow
def test_from_nothing_to_tables(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/coreml.py", "--quick", "--precisions", "fp16", "int4"]
    done = subprocess.run(
        [*command, "--work", tmp_path / "work"], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.split("```json\n")[1].removesuffix("\n```\n"))
    assert len(found["convert"]) == 5 and all(run["peak_mib"] > 0 for run in found["convert"].values())
    half, four = found["precisions"]["fp16"], found["precisions"]["int4"]
    assert four["bytes"]["embed_tokens"] < half["bytes"]["embed_tokens"]
    assert half["differences"]["decoder"] < 0.02 < four["differences"]["decoder"]
    assert half["evaluate"]["prefill_ms"] > 0
    assert sum(line.startswith("| fp16 |") for line in benchmark.table(found)) == 1
