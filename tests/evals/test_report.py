from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from evals import results as contract
from evals.report import render, write_report
from evals.results import Data, Model, Results, Score, TrainingCurve
from runtime.errors import MissingExtra
from tests.evals import synthetic

VOID = {"meta", "link", "img", "br", "input", "hr"}


class Page(HTMLParser):
    """Collects elements and the document's text, and fails on tags that do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""  # white space of any kind becomes one plain space
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += " " + " ".join(data.split())

    def values(self, *names: str) -> list[str]:
        return [
            value for _, attrs in self.elements for name, value in attrs.items() if name in names and value
        ]


@pytest.fixture(scope="module")
def html() -> str:
    return render(synthetic.results())


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_both_files_are_written_whole(tmp_path: Path) -> None:
    results = synthetic.results()
    path = write_report(results, tmp_path / "report")
    assert path == tmp_path / "report/index.html"
    assert sorted(file.name for file in path.parent.iterdir()) == ["index.html", "results.json"]
    stored = contract.read(path.parent / "results.json")
    assert len(stored.verdict) == 2
    assert stored.model_copy(update={"verdict": []}) == results
    assert path.stat().st_size <= 2_000_000
    for sentence in stored.verdict:
        assert " ".join(sentence.split()) in Page(path.read_text()).text


def test_nothing_is_loaded_from_elsewhere(html: str, page: Page) -> None:
    for value in page.values("src", "href", "xlink:href", "action", "data", "poster", "srcset"):
        assert value.startswith(("#", "data:")), value
    assert not re.search(r"@import|url\(\s*[\"']?(?!#)", html)
    assert "script" not in {tag for tag, _ in page.elements}


def test_text_from_data_is_escaped(html: str) -> None:
    assert "<script>alert" not in html and "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<b>teal" not in html


@pytest.mark.parametrize(
    "shown",
    [
        "98.3 %", "98.0–98.5", "99.9 %", "97.9 %", "89.5 %",  # accuracy with interval
        "0.0005: 97.2 %", "diverged", "1,240,000",  # grid, student tokens
        "+0.4", "−0.1 to +0.9", "95 / 60", "p = 0.21", "noise", "better",  # comparisons
        "59.9 %", "97.5 %", "the largest r that loses at most 3 points", "Masking is inert",
        "48,000 responses", "2.31 distinct", "Teacher, r = 0.6", "4,000 questions have no label",  # pool
        "Share of the gradient norm", "Groups without reward variance", "15.6 %", "81.4 %",
        "402 kB", "1.01 MB", "997 of 1,000", "39 / 2", "−3.7 points", "p < 0.001",  # bundles
        "student-int4", "1.0e−5", "32.0 bits", "passed",  # parity, parts
        "9.58 ms", "0.803", "12,400", "118 MiB", "61 MiB", "0.71× (0.64–0.79)",  # latency
        "gray circle: no", "4.1e−5", "near tie", "what is the color of the circle?",  # flips, examples
        "6 min 12 s", "1,272 MiB", "13 min 31 s", "1,483 MiB",  # ledger
        "Example CPU 9000, 2 cores", "onnxruntime 1.31.1", "not readable",  # device
        "GGUF bundle", "not built yet", "This machine is shared", "34,575", "211,072",
        "seed 7", "abababababab",
    ],
)  # fmt: skip
def test_every_class_of_number_is_shown(page: Page, shown: str) -> None:
    assert shown in page.text


def test_links_stay_inside_and_ids_are_unique(page: Page) -> None:
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    targets = page.values("href", "xlink:href", "aria-labelledby")
    assert {value.lstrip("#") for value in targets if not value.startswith("data:")} <= set(ids)


def test_pictures_have_words_and_tables_have_headers(page: Page) -> None:
    for tag, attrs in page.elements:
        if tag == "img":
            assert attrs["alt"]
        if tag == "svg":
            assert attrs["role"] == "img" and attrs["aria-label"] and attrs["viewbox"]
        if tag == "th":
            assert attrs["scope"] in ("row", "col", "rowgroup")
        if attrs.get("class") == "scroll":
            assert attrs["tabindex"] == "0" and attrs["aria-label"]
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_charts_follow_the_page(html: str, page: Page) -> None:
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.S)
    assert (
        len(drawings) == 12
    )  # accuracy, mask, two students' training, bundles, stages; wide and narrow each
    for drawing in drawings:
        assert not re.search(r"#[0-9a-fA-F]{6}\b", drawing), "a colour that dark mode cannot change"
        assert "<style" not in drawing and "<text" in drawing
    assert "Share of the gradient norm" in page.text  # text in charts is text


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_every_text_colour_is_readable_on_its_ground(html: str, theme: int) -> None:
    block = re.findall(r":root \{(.*?)\}", html, flags=re.S)[theme]
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block))
    for ground in ("page", "card", "soft"):
        for text in ("ink", "muted", "warmup", "sft", "kd", "masters", "teacher", "good", "bad"):
            assert _contrast(colours[text], colours[ground]) >= 4.5, f"{text} on {ground}"
    assert _contrast(colours["note-ink"], colours["note"]) >= 4.5


def test_a_run_without_most_stages_still_makes_a_page() -> None:
    least = Results(
        run=synthetic.results().run.model_copy(update={"smoke": True}),
        data=Data(name="easy-VQA", source="PyPI", splits=[]),
        models=[Model(name="teacher", role="teacher", path="teacher", parameters=1, bytes=1, ratio=1)],
        device=synthetic.DEVICE,
    )
    found = Page(render(least))
    assert "No distilled student in this run" in found.text and "Smoke run." in found.text
    assert {"#data", "#method"} <= set(found.values("href"))
    assert "#accuracy" not in {
        v for t, a in found.elements if t == "a" and not a.get("class") for v in a.values()
    }


def test_bundles_without_figures_are_shown_with_dashes() -> None:
    results = synthetic.results()
    bare = {"parity": None, "test": None, "agreement": None, "latency": None, "ratios": [], "parts": []}
    bundles = [bundle.model_copy(update=bare) for bundle in results.bundles]
    found = Page(render(results.model_copy(update={"bundles": bundles, "examples": []})))
    assert "student-int4" in found.text and "Where the time goes" not in found.text


def test_the_shortest_curves_and_extreme_scores_are_drawn() -> None:
    results = synthetic.results()
    point = results.mask_curve.points[0] if results.mask_curve else None
    assert results.mask_curve is not None and point is not None
    perfect = {"test": Score.of(10, 10)}
    extreme = results.model_copy(
        update={
            "mask_curve": results.mask_curve.model_copy(update={"points": [point], "r_max": 0.3}),
            "training": [
                TrainingCurve(student="S", method="kd", steps=[1], loss=[0.0], divergence_nats=[None]),
                TrainingCurve(student="XS", method="sft", steps=[1, 2], loss=[None, None]),
            ],
            "methods": [m.model_copy(update=perfect) for m in results.methods],
            "bundles": [b.model_copy(update=perfect) for b in results.bundles[:1]],
            "ledger": [row.model_copy(update={"seconds": 0.0}) for row in results.ledger],
        }
    )
    found = Page(render(extreme))
    assert "r_max = 0.3" in found.text and "100.0 %" in found.text and "nan" not in found.text.lower().split()


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_extra_names_the_command_and_writes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, package: str
) -> None:
    for name in [n for n in sys.modules if n == package or n.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=rf"{package}.*pip install 'pocketvlm\[report\]'"):
        write_report(synthetic.results(), tmp_path / "report")
    assert not (tmp_path / "report").exists()
