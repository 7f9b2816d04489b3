"""The GGUF benchmark goes its whole way on a tiny model: both arms choose the same tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from benchmarks import gguf as benchmark

ROOT = Path(benchmark.__file__).parents[1]


@pytest.mark.slow
def test_from_nothing_to_tables(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gguf.py", "--quick", "--rounds", "2", "--threads", "1"]
    done = subprocess.run(
        [*command, "--work", tmp_path / "work"], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.split("```json\n")[1].removesuffix("\n```\n"))
    assert [(run["threads"], run["spin"]) for run in found["decode"]] == [(1, False), (1, True)]
    for run in found["decode"]:
        assert [len(steps) for steps in run["session"] + run["bare"]] == 4 * [benchmark.QUICK_STEPS]
    assert set(found["convert"]) == set(benchmark.TYPES)
    assert found["convert"]["q8_0"]["bytes"] < found["convert"]["f16"]["bytes"]
    assert sum("session / bare" in line for line in benchmark.table(found)) == 1
