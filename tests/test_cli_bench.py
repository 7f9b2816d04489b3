"""`pocketvlm bench` and `pocketvlm report` as a user has them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from evals import bench, latency
from evals import results as contract
from runtime import conformance
from runtime.errors import BundleError, InputError
from tests.cli import call, refusal
from tests.evals import synthetic

SHORT = ("--rounds", "1", "--repeats", "2", "--warmup", "0", "--tokens", "3", "--threads", "1")


@pytest.fixture
def two(tiny_bundle: Path, tmp_path: Path) -> list[Path]:
    return [Path(shutil.copytree(tiny_bundle, tmp_path / name)) for name in ("before", "after")]


def test_bench_as_json_is_what_the_contract_holds(two: list[Path]) -> None:
    found = json.loads(call("bench", *two, *SHORT, "--question", "what?", "--json").stdout)
    measured = [latency.Measured.model_validate(one) for one in found["bundles"]]
    assert [one.bundle for one in measured] == ["before", "after"]
    assert [len(one.ratios) for one in measured] == [0, len(latency.RATIOS)]
    assert Path(found["image"]) == two[0] / conformance.read(two[0])[0].image.path
    assert found["question"] == "what?"
    first = measured[0].latency
    assert (first.rounds, first.repeats, first.warmup, first.decode_tokens, first.threads) == (1, 2, 0, 3, 1)
    assert first.ttft_ms.p50 > 0


def test_bench_prints_tables_and_the_conditions(two: list[Path]) -> None:
    done = call("bench", *two, *SHORT)
    for label in [label for label, _ in (*bench.STAGES, *bench.FIGURES)]:
        assert label in done.stdout
    assert "time over before's" in done.stdout
    assert "1 threads; 1 processes of 0 + 2 repeats" in done.stdout
    assert "bench: after, round 1 of 1" in done.stderr


def measured(*ttft_ms: float) -> list[latency.Measured]:
    """One bundle per time to first text; everything else as in the report's test data."""
    timing = synthetic.results().bundles[0].latency
    assert timing is not None
    spread = contract.Percentiles
    return [
        latency.Measured(
            bundle=f"b{i}",
            latency=timing.model_copy(update={"ttft_ms": spread(p50=value, p90=value, p99=2 * value, n=3)}),
            ratios=[contract.LatencyRatio(metric="ttft_ms", reference="b0", ratio=0.5, low=0.25, high=0.75)][
                :i
            ],
        )
        for i, value in enumerate(ttft_ms)
    ]


def cells(table: Any) -> dict[str, list[str]]:
    columns = [list(column.cells) for column in table.columns]
    return dict(zip(columns[0], zip(*columns[1:], strict=True), strict=True))


def test_the_table_shows_each_bundles_own_figures() -> None:
    rows = cells(bench.times(measured(12.5, 250)))
    assert rows["first text (TTFT)"] == ("12.5 / 25.0", "250 / 500")
    assert set(rows) == {label for label, _ in (*bench.STAGES, *bench.FIGURES)}


def test_ratios_are_shown_only_where_there_are_two() -> None:
    assert bench.ratios(measured(12.5)) is None
    table = bench.ratios(measured(12.5, 250))
    assert table is not None and cells(table) == {"first text (TTFT)": ("0.50 (0.25-0.75)",)}


def test_the_picture_and_the_question_come_from_the_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    case = conformance.read(tiny_bundle)[0]
    picture = (tiny_bundle / case.image.path).resolve()
    assert bench.subject(tiny_bundle, None, None) == (picture, case.question)
    assert bench.subject(tiny_bundle, None, "what?") == (picture, "what?")
    assert bench.subject(tiny_bundle, picture, None) == (picture, case.question)
    assert bench.subject(tmp_path, picture, "what?") == (picture, "what?")
    with pytest.raises(InputError, match=r"absent\.png: is no file"):
        bench.subject(tiny_bundle, tmp_path / "absent.png", None)
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        bench.subject(tmp_path, None, None)


def test_bad_input_of_bench_is_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    assert "no manifest.json" in refusal("bench", tmp_path)
    assert "absent.png: is no file" in refusal("bench", tiny_bundle, "--image", "absent.png")
    line = refusal("bench", tiny_bundle, "--image", "pyproject.toml", *SHORT)
    assert "is not an image that can be read" in line
    call("bench", tiny_bundle, "--repeats", "0", code=2)


def test_report_draws_the_page_again(tmp_path: Path) -> None:
    results = synthetic.results()
    stored = contract.write(results, tmp_path / "run" / "results.json")
    page = stored.parent / "index.html"
    assert call("report", stored).stdout == f"{page}\n"
    assert contract.read(stored).model_copy(update={"verdict": []}) == results
    again = call("report", stored, "--out", tmp_path / "page").stdout
    assert Path(again.strip()).read_text() == page.read_text()
    assert results.run.name in page.read_text()


def test_bad_input_of_report_is_one_line(tmp_path: Path) -> None:
    assert "absent.json: cannot be read" in refusal("report", tmp_path / "absent.json")
    other = tmp_path / "results.json"
    other.write_text('{"schema_version": 1, "colour": 1}')
    assert "results.json" in refusal("report", other)
    assert not (tmp_path / "index.html").exists()


def test_help_has_examples() -> None:
    for verb in ("bench", "report"):
        assert f"pocketvlm {verb} " in call(verb, "--help").stdout
