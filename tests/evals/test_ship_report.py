"""The ship report: files joined, the page, Markdown, the command line, and Chromium where it is installed."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from evals.bench import bench_results
from evals.ship import ship_charts, ship_load, ship_markdown, ship_page, ship_report, ship_results
from evals.ship.ship_charts import Candidate
from evals.ship.ship_gate import Gate, Rule
from evals.ship.ship_results import Report
from runtime.errors import InputError, PocketError
from tests.cli import call, refusal
from tests.evals import ship_data as data
from tests.evals.test_report import Page

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]
TWELVE = {
    f"student-{form}-{precision}": factor * times
    for form, factor in (("onnx", 1.0), ("gguf", 1.2), ("coreml", 0.8), ("static", 1.1))
    for precision, times in (("fp32", 1.0), ("int8", 0.7), ("int4", 0.6))
}
LOSSES = {
    name: {"fp32": (0.0, 0.0), "int8": (0.006, 0.004), "int4": (0.05, 0.01)}[data.precision(name)]
    for name in TWELVE
}
NOISE = [{"name": f"noise-{i}", "family": "noise", "severity": i} for i in (1, 3, 5)]
GATE = Gate(
    name="spring",
    devices=("Board A", "Board B"),
    rules=(
        Rule(quantity="accuracy_drop_points", max=2),
        Rule(quantity="ttft_ms", max=300, point="small"),
        Rule(quantity="download_mb", max=50),
    ),
)
EMULATED = {"source": "evaluator", "emulated": True, "emulated_why": "numerics only, not device speed"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve bundles on two boards and an emulated phone, two tasks, changed questions, pictures, parity."""
    coreml = {name: times for name, times in TWELVE.items() if "coreml" in name}
    long = {
        "asked_s": 600, "measured_s": 601, "tokens_per_answer": 4, "answer_at_s": [1, 2],
        "answer_ms": [100, 120], "ratio": 1.2, "low": 1.15, "high": 1.25, "throttled": True,
        "throttle_evidence": "frequency fell",
        "windows": [
            {"start_s": 60 * i, "end_s": 60 * i + 60, "answers": 9, "end_to_end_ms": 100 + 5 * i}
            for i in range(5)
        ],
    }  # fmt: skip
    board = json.loads(bench_results.dumps(data.bench("Board B", TWELVE, scale=3, seed=4)))
    board["bundles"][0]["points"][0] |= {
        "sustained": long,
        "energy": {
            "source": "rapl", "scope": "package-0", "seconds": 9, "joule": 12, "answers": 4,
            "joule_per_answer": 3, "millijoule_per_token": 250,
        },
        "roofline": {"bytes_per_token": 1000, "counted": "weights", "context_tokens": 90},
    }  # fmt: skip
    target = data.save(
        tmp_path_factory.mktemp("found"),
        a=data.bench("Board A", TWELVE, grid=("small", "large")),
        b=bench_results.BenchResults.model_validate(board),
        phone=data.bench("Phone C", coreml, seed=5, **EMULATED),
        shapes=data.evaluation(LOSSES, n=800, pictures=800, variants=[*data.VARIANTS, *NOISE]),
        charts=data.evaluation(LOSSES, task="charts", n=300, per_image=3, seed=2),
        parity=data.parity(list(TWELVE)),
    )
    (target / "other.json").write_text('{"schema": "somebody.else@1"}')
    return target


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    return ship_report.make([folder], GATE, version="0.1.0")


@pytest.fixture(scope="module")
def written(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ship_report.write(report, tmp_path_factory.mktemp("out"), markdown=True)


@pytest.fixture(scope="module")
def page(written: Path) -> Page:
    return Page(written.read_text())


# --- joining files ----------------------------------------------------


def test_files_are_joined_by_bundle_device_and_task(report: Report) -> None:
    evidence = report.evidence
    assert [one.name for one in evidence.bundles] == list(TWELVE)
    assert [one.name for one in evidence.devices] == ["Board A", "Board B", "Phone C"]
    assert len(evidence.timings) == 24 + 12 + 3 and len(evidence.parity) == 12
    assert [one.name for one in evidence.tasks] == ["charts", "shapes"]
    assert len(evidence.sources) == 6 and {one.file for one in evidence.sources} >= {"a.json", "parity.json"}
    assert {reason.what for reason in evidence.missing} >= {
        "energy",
        "parity: another dtype of the checkpoint",
    }


def test_figures_are_those_of_the_raw_times(folder: Path, report: Report) -> None:
    raw = json.loads((folder / "a.json").read_text())["bundles"][1]["points"][0]["runs"]
    values = sorted(value for run in raw for value in run["times"]["ttft_ms"])
    timing = report.evidence.timing("Board A", "student-onnx-int8", "small")
    assert timing is not None
    measure = timing.measure("ttft_ms")
    assert measure is not None and measure.spread.n == 200 and len(measure.process_p50) == 10
    assert measure.spread.p50 == pytest.approx((values[99] + values[100]) / 2)
    first = sorted(raw[0]["times"]["ttft_ms"])
    assert measure.process_p50[0] == pytest.approx((first[9] + first[10]) / 2)
    decode = timing.measure("decode_ms")
    assert decode is not None and decode.spread.n == 800
    assert timing.decode_tok_s == pytest.approx(1000 / decode.spread.p50)


def test_one_task_may_be_answered_in_several_files(tmp_path: Path) -> None:
    first = data.evaluation({"student-fp32": (0.0, 0.0)})
    second = data.evaluation({"student-int8": (0.05, 0.0)}, teacher=False)
    bundle = second.subject("student-int8")
    alone = second.model_copy(update={"subjects": [bundle], "summaries": [second.summaries[-1]]})
    evidence = ship_load.load([data.save(tmp_path, one=first, two=alone)])
    (task,) = evidence.tasks
    assert {one.name for one in task.subjects} == {"student", "teacher", "student-fp32", "student-int8"}
    found = ship_report.make([tmp_path], Gate(rules=(Rule(quantity="accuracy_drop_points", max=1),)))
    states = {one.bundle: one.state for one in found.verdict.checks}
    assert states == {"student-fp32": "passed", "student-int8": "failed"}


def test_a_bundle_under_another_name_is_known_by_its_hash(tmp_path: Path) -> None:
    there = data.parity(["student-int8"]).model_dump(by_alias=True, mode="json")
    there["candidates"][0]["name"] = "model"
    (tmp_path / "parity.json").write_text(json.dumps(there))
    evidence = ship_load.load([data.save(tmp_path, bench=data.bench())])
    assert [one.name for one in evidence.bundles] == list(data.BUNDLES)
    assert evidence.parity[0].bundle == "student-int8"


def _bench(**changed: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bench_results.dumps(data.bench()))
    return found | changed


def test_what_contradicts_itself_is_refused(tmp_path: Path) -> None:
    def told(second: dict[str, Any]) -> str:
        data.save(tmp_path, a=data.bench())
        (tmp_path / "b.json").write_text(json.dumps(second))
        with pytest.raises(InputError) as caught:
            ship_load.load([tmp_path])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    other = _bench()
    other["device"]["name"] = "Board B"
    other["bundles"][1]["sha256"] = data.sha("another build")
    assert "two builds of one name" in told(other)
    assert "is also in a.json; give one of both, or their devices two names (--device-name)" in told(_bench())
    faster = _bench()
    faster["device"]["cpu"] = "another chip"
    assert "cpu differs: CPU of Board A before, another chip now; two devices" in told(faster)
    saving = _bench()
    saving["device"]["power_mode"] = "15W"
    assert "power mode differs: MAXN before, 15W now" in told(saving)
    assert "emulated in one file and real in another" in told(_bench(**EMULATED))


def test_one_task_with_two_sets_of_questions_is_refused(tmp_path: Path) -> None:
    data.save(tmp_path, a=data.evaluation(n=50), b=data.evaluation(n=60))
    with pytest.raises(InputError, match=r"other questions or rules than in a.json"):
        ship_load.load([tmp_path])
    data.save(tmp_path, a=data.evaluation(n=60))
    with pytest.raises(InputError, match=r"is also in a.json; give one"):
        ship_load.load([tmp_path])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is no JSON"),
        ("[]", "schema is None; wanted one of pocketvlm.bench@1"),
        ('{"schema": "pocketvlm.bench@2"}', "schema is 'pocketvlm.bench@2'"),
        ('{"schema": "pocketvlm.eval@1"}', "Field required"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "bench.json"
    path.write_text(content)
    with pytest.raises(PocketError) as caught:
        ship_load.load([path])
    assert told in str(caught.value) and str(path) in str(caught.value)


def test_an_empty_directory_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no bench.json, eval.json or parity.json; write them with"):
        ship_load.load([tmp_path])
    with pytest.raises(InputError, match="no such file or directory"):
        ship_load.load([tmp_path / "absent"])


# --- report.json ------------------------------------------------------


def test_the_published_schema_is_the_code_s() -> None:
    published = (ROOT / "docs" / "report.schema.json").read_text()
    assert published == ship_results.json_schema(), (
        "run: python -m evals.ship.ship_results > docs/report.schema.json"
    )


def test_a_report_reads_back_and_gives_the_same_page(report: Report, written: Path, tmp_path: Path) -> None:
    stored = written.parent / "report.json"
    assert ship_results.read(stored) == report
    again = ship_report.make([stored], version="0.1.0")
    assert again.verdict == report.verdict and again.gate == GATE and again.gate_given
    stricter = ship_report.make([stored], GATE.model_copy(update={"missing": "ignore", "devices": ()}))
    assert set(stricter.verdict.devices) == {"Board A", "Board B", "Phone C"}
    (tmp_path / "report.json").write_text(stored.read_text().replace('"ship":true', '"ship":"perhaps"'))
    with pytest.raises(InputError, match=r"report.json: verdict.ship"):
        ship_results.read(tmp_path / "report.json")


# --- the page ---------------------------------------------------------


@pytest.mark.parametrize(
    "shown",
    [
        "Ship student-coreml-int8", "it is the smallest of", "spring",
        "Phone C is emulated: numerics only, not device speed", "these are not its times",
        "accuracy lost against student, 800 questions", "at most 2 points", "not kept", "at most 300 ms",
        "Not beaten on Board A", "too large for a store", "fits all 1", "50.0 MB its manual",
        "300 questions about 100 pictures, from charts.jsonl", "Lost / gained", "p < 0.001",
        "Percent right against the severity", "noise-3", "blur-5",
        "what colour is <shape> 1", "Reference: red", "small: photo.png, 512 x 384",
        "10 fresh processes of 3 warm-ups and 20 repeats, 2 threads, bundles in turn",
        "3.00 J an answer, 250 mJ a token (rapl, package-0)",
        "Energy was not measured: this board has no meter.",
        "Of the bandwidth",
        "Board B, sustained", "1.200 (1.150 to 1.250)", "throttled frequency fell",
        "50 of 50", "1.005 (1.001 to 1.009)", "onnxruntime 1.31.1, against student on shapes, test",
        "CPU of Board A, aarch64, 4 cores", "MAXN", "cpu 48 °C", "12.5 GB/s measured",
        "the process is the unit", "pocketvlm.bench@1", "another dtype of the checkpoint",
    ],
)  # fmt: skip
def test_every_class_of_figure_is_shown(page: Page, shown: str) -> None:
    assert shown in page.text


def test_the_page_stands_alone_and_is_small(written: Path, page: Page) -> None:
    text = written.read_text()
    assert written.stat().st_size <= 5_000_000
    for value in page.values("src", "href", "xlink:href", "action", "poster", "srcset"):
        assert value.startswith(("#", "data:")), value
    assert not re.search(r"@import|url\(\s*[\"']?(?!#)", text)
    assert "script" not in {tag for tag, _ in page.elements}
    assert "<shape>" not in html.unescape(text.replace("&lt;", "")), "text from data is escaped"


def test_the_page_is_made_for_keyboards_and_readers(page: Page) -> None:
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    inside = [value for value in page.values("href", "xlink:href", "aria-labelledby") if value[:5] != "data:"]
    assert {value.lstrip("#") for value in inside} <= set(ids)
    for tag, attrs in page.elements:
        assert tag != "img" or attrs["alt"]
        assert tag != "svg" or attrs.get("aria-hidden") or (attrs["role"] == "img" and attrs["aria-label"])
        assert tag != "th" or attrs["scope"] in ("row", "col", "rowgroup")
        if attrs.get("class") == "scroll":
            assert attrs["tabindex"] == "0" and attrs["aria-label"]
    names = [attrs["aria-label"] for _, attrs in page.elements if attrs.get("role") == "region"]
    assert len(names) == len(set(names)), "every table has a name of its own"
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_a_state_is_never_told_by_colour_alone(written: Path) -> None:
    states = re.findall(r'<span class="state (\w+)">([^<]+)<', written.read_text())
    assert states
    words = {"passed": ("kept", "passes"), "failed": ("not kept",), "unproven": ("unproven",)}
    for name, text in states:
        assert any(word in text for word in words.get(name, ("not measured",))), (name, text)


def test_pictures_are_kept_within_their_room(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    from evals.ship import ship_page

    monkeypatch.setattr(ship_page, "MOST_PICTURE_BYTES", 3_000)
    small = ship_page.render(report)
    assert 1 <= small.count("<img") <= 12


@pytest.mark.parametrize("kept", [("bench",), ("shapes",), ("parity",), ("bench", "parity")])
def test_whatever_is_there_makes_a_page(tmp_path: Path, kept: tuple[str, ...]) -> None:
    found = {"bench": data.bench(processes=1), "shapes": data.evaluation(n=30), "parity": data.parity()}
    data.save(tmp_path, **{name: found[name] for name in kept})
    made = ship_report.make([tmp_path])
    text = Page(ship_report.write(made, tmp_path / "out").read_text()).text
    assert "No gate.yaml was given" in text and "Not measured" in text
    assert made.verdict.ship == ("shapes" in kept and made.verdict.checks[0].state == "passed")
    assert ("#fleet" in text) is False


# --- pictures ---------------------------------------------------------


def test_the_front_holds_what_nothing_beats() -> None:
    def one(number: int, size: float | None, ms: float | None, right: float | None) -> Candidate:
        return Candidate(number, str(number), "passed", size, ms, right)

    found = [
        one(1, 10, 10, 90),
        one(2, 5, 20, 90),
        one(3, 11, 11, 90),
        one(4, 9, 9, 80),
        one(5, None, 10, 90),
    ]
    assert ship_charts.front(found) == {1, 2, 4, 5}
    assert ship_charts.front([one(1, 10, None, 90), one(2, None, 3, None)]) == {1, 2}
    assert ship_charts.tradeoff([one(1, 10, None, None)], "A") is None


def test_numbers_in_the_picture_do_not_lie_on_each_other() -> None:
    placed: list[tuple[float, float]] = []
    for _ in range(12):
        dx, dy = ship_charts._free((50.0, 50.0), placed)
        placed.append((50 + dx, 50 + dy))
    apart = [((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) ** 0.5 for a, b in pairwise(sorted(placed))]
    assert min(apart) > 5 and len(set(placed)) == 12


# --- Markdown ---------------------------------------------------------


def test_markdown_tells_the_verdict_and_survives_names(report: Report, written: Path) -> None:
    text = (written.parent / "report.md").read_text()
    assert text == ship_markdown.report(report) and text.startswith("## ✅ Ship student-coreml-int8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows[:14]}) == 1 and "**chosen**" in text
    assert ship_markdown.table(["a|b"], [["c\n<d>"]]) == ["| a\\|b |", "| --- |", "| c \\<d> |"]


# --- the command ------------------------------------------------------


def test_the_command_decides_and_compares(tmp_path: Path) -> None:
    """Exit codes 0, 1 and 2; the page's path alone on stdout."""
    (found := tmp_path / "new").mkdir()
    data.save(found, bench=data.bench(), shapes=data.evaluation(n=300))
    gate = tmp_path / "gate.yaml"
    gate.write_text("candidates: [student-fp32]\nrules: [{quantity: accuracy_drop_points, max: 2}]\n")
    done = call("report", found, "--gate", gate, "--markdown")
    assert done.stdout == f"{found}/report/index.html\n{found}/report/report.md\n"
    assert done.stderr.startswith("Ship student-fp32\n")
    gate.write_text("rules: [{quantity: ttft_ms, max: 1}]\n")
    done = call("report", found / "bench.json", "--gate", gate, "--out", tmp_path / "no", "--json", code=1)
    assert json.loads(done.stdout)["ship"] is False
    stored = found / "report" / "report.json"
    assert "No regression" in call("report", "--compare", stored, found).stdout
    slow = tmp_path / "slow"
    slow.mkdir()
    data.save(slow, bench=data.bench(scale=1.5))
    done = call("report", "--compare", stored, slow, "--out", tmp_path / "cmp", "--markdown", code=1)
    assert done.stdout == f"{tmp_path}/cmp/index.html\n{tmp_path}/cmp/compare.md\n"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--compare", "one"], "--compare: got 1 paths; wanted two"),
        (["--compare", "one", "two", "--pair", "a"], "--pair a: wanted OLD=NEW"),
        (["one", "--pair", "a=b"], "--pair: is for --compare"),
        (["one", "--gate", "absent.yaml"], "absent.yaml: cannot be read as YAML"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(tmp_path: Path, arguments: list[str], told: str) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        data.save(tmp_path / name, parity=data.parity())
    given = [str(tmp_path / a) if a in ("one", "two", "absent.yaml") else a for a in arguments]
    assert told in refusal("report", *given)


# --- a browser --------------------------------------------------------

CHROMIUM = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [360, 1200])
def test_chromium_lays_the_page_out_without_a_sideways_scroll(
    written: Path, tmp_path: Path, width: int
) -> None:
    """In a frame, for a window of Chromium's own is never narrower than 500 pixels."""
    probe = (
        "<script>addEventListener('load',()=>{const d=frames[0].document,e=d.documentElement;"
        "document.title=JSON.stringify({width:e.clientWidth,beyond:e.scrollWidth-e.clientWidth,"
        "named:[...d.images].every(i=>i.alt),charts:[...d.querySelectorAll('.chart svg')]"
        ".filter(i=>i.checkVisibility()).every(i=>i.getBoundingClientRect().right<=e.clientWidth)})})</script>"
    )
    frame = (
        f'<iframe width="{width}" height="2400" style="border:0" srcdoc="{html.escape(written.read_text())}">'
    )
    copy = tmp_path / "page.html"
    copy.write_text(f"<!doctype html><title></title>{frame}</iframe>{probe}")
    command = [
        str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1300,2500",
        "--dump-dom", f"file://{copy}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    found = json.loads(html.unescape(title[1]))
    assert width - 20 <= found["width"] <= width
    assert found["beyond"] <= 0 and found["named"] and found["charts"]


# --- a fleet of many kinds --------------------------------------------


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """What a product has: each kind of device takes a bundle of its own, so most of the matrix is empty."""
    place = data.save(
        tmp_path_factory.mktemp("fleet"),
        board=data.bench("Jetson", {"student-onnx-int4": 1.0, "student-onnx-int8": 1.2}, seed=1),
        chrome=data.bench("Chrome", {"student-browser-int4": 0.5}, processes=1, source="browser", seed=2),
        phone=data.bench("iPhone", {"student-coreml-int8": 0.5}, source="swift", seed=3),
    )
    rules = (Rule(quantity="ttft_ms", max=60), Rule(quantity="decode_tok_s", min=150))
    return ship_report.make([place], Gate(rules=rules), version="0.1.0")


def test_the_nearest_candidate_is_one_that_was_measured_there(fleet: Report) -> None:
    """Not one that never ran there, for which no limit is broken."""
    assert fleet.verdict.chosen == {"Jetson": None, "Chrome": None, "iPhone": "student-coreml-int8"}
    reasons = [line for line in fleet.verdict.sentences if ": " in line]
    assert [line.partition(":")[0] for line in reasons] == ["student-onnx-int4", "student-browser-int4"]
    assert not any("not measured" in line for line in reasons)


def test_what_was_not_measured_is_told_once_a_limit(fleet: Report) -> None:
    group = ship_page._group(fleet, "student-coreml-int8")
    absent = [row for row in group["checks"] if row["check"].state == "missing"]
    assert [(row["what"], row["where"]) for row in absent] == [
        ("time to first text", "Jetson; Chrome"),
        ("decode speed", "Jetson; Chrome"),
    ]
    assert group["counts"]["missing"] == 4
    browser = ship_page._group(fleet, "student-browser-int4")["checks"]
    unproven = [row for row in browser if row["check"].state == "unproven"]
    assert [row["more"] for row in unproven] == ["", ""], "too few processes are told once"
    assert all("needs 3 processes" in row["check"].basis for row in unproven)


def test_a_bundle_for_other_devices_is_no_row_of_repeated_words(fleet: Report) -> None:
    matrix = ship_page.render(fleet).partition('<table class="fleet">')[2].partition("</table>")[0]
    assert matrix.count("2 not measured") == 8, "four bundles on three devices, four were measured"
    assert "not timed here" not in matrix
