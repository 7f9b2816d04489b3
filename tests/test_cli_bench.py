"""`pocketvlm bench` and `pocketvlm report` as a user has them."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evals import results as contract
from evals.bench import bench, bench_grid, bench_process, bench_results, bench_summary
from evals.bench.bench_results import BenchResults
from evals.command import MANIFEST_NAME, without_searches
from runtime import bundle, conformance, files
from runtime.errors import BundleError, InputError
from tests.cli import call, refusal
from tests.evals import bench_data, synthetic

SHORT = (
    *("--rounds", "1", "--repeats", "2", "--warmup", "0", "--tokens", "3", "--threads", "1"),
    *("--bandwidth", "0", "--energy", "0"),
)


@pytest.fixture
def two(tiny_bundle: Path, tmp_path: Path) -> list[Path]:
    return [Path(shutil.copytree(tiny_bundle, tmp_path / name)) for name in ("before", "after")]


def test_bench_as_json_is_what_the_contract_holds(two: list[Path]) -> None:
    found = BenchResults.model_validate_json(
        call("bench", *two, *SHORT, "--question", "what?", "--json").stdout
    )
    assert [bundle.name for bundle in found.bundles] == ["before", "after"]
    assert {ratio.metric for ratio in found.ratios} == set(bench_summary.RATIOS)
    assert found.ratios[0].low is None  # one process each
    (asked,) = found.grid
    assert asked.image == conformance.read(two[0])[0].image.path.split("/")[-1] and asked.question == "what?"
    policy = found.policy
    assert (policy.rounds, policy.repeats, policy.warmup, policy.decode_tokens, policy.threads) == (
        1,
        2,
        0,
        3,
        1,
    )
    assert not found.emulated and found.source == "local"


def test_bench_prints_tables_and_the_conditions(two: list[Path]) -> None:
    done = call("bench", *two, *SHORT)
    for label in [label for label, _ in (*bench.STAGES, *bench.FIGURES)]:
        assert label in done.stdout
    assert "time over before's" in done.stdout
    assert "1 threads" in done.stdout and "1 process of 0 + 2 answers of 3 tokens" in done.stdout
    assert "not measured: sustained run: not asked for" in done.stdout
    assert "bench: after, round 1 of 1" in done.stderr


def test_with_out_the_file_is_written_and_its_path_is_the_result(two: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "results" / "bench.json"
    done = call("bench", two[0], *SHORT, "--images", "32,48x24", "--prompts", "2", "--out", out)
    assert done.stdout == f"{out}\n" and "48x24, 2-tokens" in done.stderr
    found = bench_results.read(out)
    assert [(point.width, point.height, point.scaled) for point in found.grid] == [
        (32, 32, True),
        (48, 24, True),
    ]
    assert [point.point for point in found.bundles[0].points] == ["32x32, 2-tokens", "48x24, 2-tokens"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["bench.json"]
    again = tmp_path / "again.json"
    assert call("bench", two[0], "--import", out, "--out", again).stdout == f"{again}\n"
    assert bench_results.read(again) == found


def cells(table: Any) -> dict[str, list[str]]:
    columns = [list(column.cells) for column in table.columns]
    return dict(zip(columns[0], zip(*columns[1:], strict=True), strict=True))


def test_results_that_cannot_be_written_are_not_lost(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk after the last process: with room again the same bench measures nothing anew."""
    out = tmp_path / "bench.json"
    image, question = bench_grid.subject(tiny_bundle, None, None)
    options = bench.Options(
        (tiny_bundle,), image, question, rounds=1, warmup=0, repeats=1, tokens=1, threads=1, bandwidth_s=0.0
    )

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as broken, pytest.raises(InputError, match="No space left"):
        broken.setattr(bench_results.files, "write_text", replaced(full, out))
        bench.measure(options, out, lambda step: None)
    assert not out.exists()
    monkeypatch.setattr(bench_process, "run", lambda task: pytest.fail("measured again"))
    found = bench.measure(options, out, lambda step: None)
    assert bench_results.read(out) == found
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def replaced(instead: Callable[[Path, str], None], place: Path) -> Callable[[Path, str], None]:
    """`files.write_text`, but for one place."""
    write = files.write_text
    return lambda path, text: (instead if path == place else write)(path, text)


def test_a_place_for_results_is_asked_for_before_a_device_measures(tiny_bundle: Path, tmp_path: Path) -> None:
    """Nothing listens at that address: the folder is told first."""
    far = ("bench", tiny_bundle, "--on", "ssh://nobody@127.0.0.1:1")
    assert "is a directory; give the name of a file" in refusal(*far, "--out", tmp_path)


def test_the_table_shows_each_bundles_own_figures() -> None:
    rows = cells(bench.times(bench_data.results((12.5, 250))))
    assert rows["first text (TTFT)"] == ("12.5 / 12.5", "250 / 250")
    assert rows["one token"][0] == "2.00 / 2.00" and rows["decode tok/s"][0] == "500"
    assert rows["encode image"] == ("\u2013", "\u2013")
    assert set(rows) == {label for label, _ in (*bench.STAGES, *bench.FIGURES)}


def test_ratios_are_shown_only_where_there_are_two() -> None:
    assert bench.ratios(bench_data.results((12.5,))) is None
    table = bench.ratios(bench_data.results((12.5, 250)))
    assert table is not None and cells(table)["first text (TTFT)"] == ("20.00 (20.00-20.00)",)


def test_an_interval_that_says_nothing_is_not_shown() -> None:
    assert bench._ratio(0.5, 0.25, 1.0) == "0.50 (0.25-1.00)"
    assert bench._ratio(0.5, None, None) == "0.50"
    assert bench._ratio(0.21, 1e-9, 3.5e7) == "0.21 (unknown: more --rounds)"


def test_the_picture_and_the_question_come_from_the_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    case = conformance.read(tiny_bundle)[0]
    picture = (tiny_bundle / case.image.path).resolve()
    assert bench_grid.subject(tiny_bundle, None, None) == (picture, case.question)
    assert bench_grid.subject(tiny_bundle, None, "what?") == (picture, "what?")
    assert bench_grid.subject(tiny_bundle, picture, None) == (picture, case.question)
    assert bench_grid.subject(tmp_path, picture, "what?") == (picture, "what?")
    with pytest.raises(InputError, match=r"absent\.png: is no file"):
        bench_grid.subject(tiny_bundle, tmp_path / "absent.png", None)
    with pytest.raises(BundleError, match=r"no manifest\.json"):
        bench_grid.subject(tmp_path, None, None)


def test_bad_input_of_bench_is_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    assert "no manifest.json" in refusal("bench", tmp_path)
    assert "got no bundle" in refusal("bench")
    assert "absent.png: is no file" in refusal("bench", tiny_bundle, "--image", "absent.png")
    line = refusal("bench", tiny_bundle, "--image", "pyproject.toml", *SHORT)
    assert "is not an image that can be read" in line
    assert "none.json: cannot be read" in refusal("bench", "--import", tmp_path / "none.json")
    too_long = refusal("bench", tiny_bundle, *SHORT[:6], "--tokens", "100000", *SHORT[8:])
    assert "needs 100066 tokens" in too_long
    call("bench", tiny_bundle, "--repeats", "0", code=2)
    assert "is a directory" in refusal("bench", tiny_bundle, "--out", tmp_path)
    (tmp_path / "file").touch()
    assert "cannot be written there" in refusal("bench", tiny_bundle, "--out", tmp_path / "file" / "b.json")
    refusal("bench", tiny_bundle, "--image", "pyproject.toml", *SHORT, "--out", tmp_path / "b.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_options_of_a_device_want_the_device(tiny_bundle: Path) -> None:
    assert "--on-dir: wanted --on, the device, too" in refusal("bench", tiny_bundle, "--on-dir", "x")
    line = refusal("bench", tiny_bundle, "--on-runner", "r", "--on-clean")
    assert "--on-runner, --on-clean: wanted --on" in line
    there = ("bench", tiny_bundle, "--on", "adb://")
    line = refusal(*there, "--on-clean", "--on-dir", "x", "--on-runner", "r")
    assert "--on-dir, --on-clean: not for adb://; leave it out" in line
    assert "--on-runner: not for ssh://a" in refusal(*there[:3], "ssh://a", "--on-runner", "r")
    assert "--on-python: not for browser://" in refusal(*there[:3], "browser://", "--on-python", "p")


def test_a_search_beside_a_bundle_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`bundles/*` names it, too. Where there is no such bundle, it is told as what it is: no bundle."""
    for name in ("student-onnx-auto", "old.auto", "lone.auto", "student-onnx-auto.auto"):
        (tmp_path / name).mkdir()
    for name in ("student-onnx-auto", "old.auto"):
        (tmp_path / name / "manifest.json").touch()
    given = sorted(tmp_path.iterdir())
    assert [path.name for path in without_searches(given)] == ["lone.auto", "old.auto", "student-onnx-auto"]
    said = capsys.readouterr().err
    assert "student-onnx-auto.auto: is what the search for student-onnx-auto keeps, no bundle" in said
    assert len(said.splitlines()) == 1
    assert MANIFEST_NAME == bundle.MANIFEST_NAME
    assert without_searches([Path(), Path("..")]) == [Path(), Path("..")]  # here, in a bundle


@pytest.mark.parametrize("given", ["0x5", "224x", "axb", "99999", "-1"])
def test_sizes_that_are_none_are_refused(given: str) -> None:
    with pytest.raises(InputError, match=f"--images {given}"):
        bench_grid.sizes_of(f"64,{given}")


@pytest.mark.parametrize("given", ["0", "many", "1.5", "-2", "9000000"])
def test_lengths_that_are_none_are_refused(given: str) -> None:
    with pytest.raises(InputError, match=f"--prompts {given}"):
        bench_grid.lengths_of(f"16,{given}")


def test_sizes_lengths_and_times_are_read() -> None:
    assert bench_grid.sizes_of(" 224, 640x480,224") == [(224, 224), (640, 480)]
    assert bench_grid.lengths_of("16, 128,16") == [16, 128]
    assert bench_grid.sizes_of(None) == bench_grid.lengths_of("") == []
    assert [bench.seconds_of(given) for given in (None, "90", "1.5s", "10m", "1h")] == [0, 90, 1.5, 600, 3600]
    for given in ("soon", "0", "-5s", "5 d"):
        with pytest.raises(InputError, match=f"--sustained {given}"):
            bench.seconds_of(given)


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


def test_a_file_is_no_place_for_a_report(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    stored = contract.write(synthetic.results(), tmp_path / "results.json")
    line = refusal("report", stored, "--out", tmp_path / "file")
    assert "file: is a file, wanted a directory; choose another place" in line


def test_help_has_examples() -> None:
    for verb in ("bench", "report"):
        assert f"pocketvlm {verb} " in call(verb, "--help").stdout
