from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from evals.bench import bench_import, bench_results
from evals.bench.bench_results import BenchResults
from runtime.errors import InputError

ROOT = Path(__file__).parents[2]
SMALLEST: dict[str, Any] = {
    "schema": "pocketvlm.bench@1",
    "created": "2026-11-22T09:00:00Z",
    "tool": {"name": "some harness", "version": "1"},
    "source": "swift",
    "device": {"name": "phone", "cpu": "chip", "architecture": "arm64", "cores": 6, "os": "iOS 18.2"},
    "policy": {"rounds": 1, "warmup": 0, "repeats": 2, "decode_tokens": 2},
    "grid": [{"id": "a", "question": "what is this?"}],
    "bundles": [
        {
            "name": "b",
            "format": "coreml",
            "precision": "int8",
            "points": [
                {
                    "point": "a",
                    "prompt_tokens": 9,
                    "image_tokens": 4,
                    "decode_tokens": 2,
                    "runs": [
                        {
                            "round": 0,
                            "order": 0,
                            "times": {"ttft_ms": [3, 4.5], "decode_ms": [[1, 2], [1.5, 2]]},
                        }
                    ],
                }
            ],
        }
    ],
}
"""What a harness in another language writes at the least."""


def changed(*path: str | int, to: Any) -> dict[str, Any]:
    found = copy.deepcopy(SMALLEST)
    *way, last = path
    place: Any = found
    for step in way:
        place = place[step]
    place[last] = to
    return found


def test_the_published_schema_is_the_code_s() -> None:
    published = (ROOT / "docs" / "bench.schema.json").read_text()
    assert published == bench_results.json_schema(), (
        "run: python -m evals.bench.bench_results > docs/bench.schema.json"
    )


def test_the_smallest_file_of_another_language_is_read_and_written_back(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(json.dumps(SMALLEST))
    found = bench_results.read(tmp_path / "in.json")
    assert found.bundles[0].points[0].runs[0].times.decode_ms == ((1, 2), (1.5, 2))
    again = bench_results.write(found, tmp_path / "out.json")
    assert json.loads(again.read_text())["schema"] == "pocketvlm.bench@1"
    assert bench_results.read(again) == found


def test_the_example_of_the_docs_is_read(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "bench.md").read_text()
    (tmp_path / "bench.json").write_text(text.split("```json\n")[1].split("```")[0])
    found = bench_import.read(tmp_path / "bench.json")
    (point,) = found.bundles[0].points
    assert point.summary is not None and point.summary.ttft_ms is not None
    assert point.summary.ttft_ms.p50 == 31.2 and point.summary.decode_by_position[1].p50_ms == 7.95


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (changed("schema", to="pocketvlm.bench@2"), "schema is 'pocketvlm.bench@2'"),
        (changed("bundles", 0, "pionts", to=[]), r"bundles\.0\.pionts"),
        (changed("bundles", 0, "points", 0, "point", to="z"), "must be different ids of the grid"),
        (changed("source", to="evaluator"), "emulated_why"),
        (changed("emulated", to=True), "emulated_why"),
        (changed("bundles", 0, "points", 0, "runs", 0, "times", "ttft_ms", to=[-1]), r"ttft_ms\.0"),
        (changed("bundles", 0, "points", 0, "energy", to={}), "source or why_not"),
        (changed("grid", to=[{"id": "a", "question": ""}] * 2), "grid ids must differ"),
        ([1], "schema is None"),
    ],
)
def test_a_faulty_file_is_told_in_one_line(tmp_path: Path, given: Any, told: str) -> None:
    (tmp_path / "bench.json").write_text(json.dumps(given))
    with pytest.raises(InputError, match=told) as caught:
        bench_results.read(tmp_path / "bench.json")
    assert str(tmp_path / "bench.json") in str(caught.value)


def test_no_file_and_no_json_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        bench_results.read(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"schema": ')
    with pytest.raises(InputError, match="is no JSON"):
        bench_results.read(tmp_path / "half.json")


def test_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        BenchResults.model_validate(
            changed("bundles", 0, "points", 0, "runs", 0, "times", "ttft_ms", to=[float("inf")])
        )
