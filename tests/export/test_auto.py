"""The automatic search: what it chooses, what it keeps, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import export
from evals.accuracy import AccuracyResult
from evals.easy_vqa import Question
from export import auto, auto_data, auto_report
from export.auto import AXES, auto_quantize, policy_of
from export.auto_data import Split
from export.quantize_policy import Policy
from runtime import bundle
from runtime.errors import InputError, StateError
from tests.export.conftest import Exported

EXACT = {axis.name: "keep" for axis in AXES}


def questions(count: int) -> tuple[Question, ...]:
    return tuple(Question(n, n // 2, Path("none.png"), f"q{n}?", "yes") for n in range(count))


class Judged(auto._Search):
    """A search whose answers are given: `wrong(setting)` of 200 questions, bytes by the schemes' bits."""

    def __init__(self, work: Path, max_drop: float, wrong: Callable[[dict[str, str]], int]) -> None:
        nodes = [SimpleNamespace(op_type=kind) for kind in ("MatMul", "Gather", "GroupQueryAttention")]
        facts = SimpleNamespace(graphs={axis.part: SimpleNamespace(graph=nodes) for axis in AXES})
        super().__init__(facts, Split(questions(200), ()), work, work, max_drop, lambda _: None)
        self.wrong, self.asked = wrong, 0

    def _ask(self, policy: Policy, asked: Sequence[Any]) -> tuple[dict[str, int], AccuracyResult]:
        self.asked += 1
        setting = {axis.name: rule.scheme for axis, rule in zip(AXES, policy.rules, strict=False)}
        few = self.wrong(setting)
        texts = ["no" if n < few else "yes" for n in range(len(asked))]
        places = [axis.schemes.index(setting[axis.name]) for axis in AXES]
        return {"bytes": 100 + sum(places), "cache_bytes": 10}, AccuracyResult.of(asked, texts)


def test_without_loss_everything_is_the_smallest(tmp_path: Path) -> None:
    search = Judged(tmp_path, 0.5, lambda _: 0)
    assert search.run().setting == {axis.name: axis.schemes[0] for axis in AXES}
    assert search.asked == len(AXES) + 2  # float32, each axis alone, all together


def test_an_axis_that_loses_too_much_alone_takes_its_next_scheme(tmp_path: Path) -> None:
    found = Judged(tmp_path, 0.5, lambda s: 20 if s["decoder"].startswith("int4") else 0).run()
    assert found.setting["decoder"] == "int8-block32"
    assert {name: s for name, s in found.setting.items() if name != "decoder"} == {
        axis.name: axis.schemes[0] for axis in AXES if axis.name != "decoder"
    }


def test_what_fits_alone_and_not_together_gives_way_where_it_lost_most(tmp_path: Path) -> None:
    """Budget 1 point of 200 questions = 2 answers; 2 and 1 alone, 3 together."""

    def wrong(setting: dict[str, str]) -> int:
        return 2 * setting["decoder"].startswith("int4") + (setting["vision"] == "int8-dynamic")

    search = Judged(tmp_path, 1.0, wrong)
    found = search.run()
    assert found.setting["decoder"] == "int8-block32" and found.setting["vision"] == "int8-dynamic"
    assert found.fits and found.drop == pytest.approx(0.5)
    front = auto_report.frontier(search.seen.values())
    assert [each.total_bytes for each in front] == sorted(each.total_bytes for each in front)
    drops = [each.drop for each in front]
    assert drops == sorted(drops, reverse=True) and len(set(drops)) == len(drops)


def test_when_nothing_fits_float32_remains(tmp_path: Path) -> None:
    found = Judged(tmp_path, 0.0, lambda s: 0 if set(s.values()) == {"keep"} else 5).run()
    assert found.setting == EXACT and found.drop == 0.0


def test_measured_candidates_are_not_asked_again(tmp_path: Path) -> None:
    first = Judged(tmp_path, 0.5, lambda _: 0)
    chosen = first.run()
    again = Judged(tmp_path, 0.5, lambda _: 0)
    assert again.run() == chosen and again.asked == 0
    broken = next((tmp_path / "candidates").iterdir())
    broken.write_bytes(broken.read_bytes()[:-20])
    with pytest.raises(StateError, match="seal does not match"):
        Judged(tmp_path, 0.5, lambda _: 0).run()


def test_a_checkpoint_that_knows_no_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of 200 questions right"):
        Judged(tmp_path, 0.5, lambda _: 200).run()


def test_rules_of_a_setting_are_in_an_order_that_keeps_cache_and_head_apart() -> None:
    rules = policy_of({**EXACT, "decoder": "fp16", "cache": "int8-kv"}).rules
    assert [(rule.node, rule.scheme) for rule in rules[:3]] == [
        ("GroupQueryAttention:*", "int8-kv"),
        ("MatMul:head", "keep"),
        ("*", "fp16"),
    ]


# --- questions --------------------------------------------------------


def test_halves_share_no_picture() -> None:
    split = auto_data.load(None)
    images = [{q.image_id for q in part} for part in (split.validation, split.held_out)]
    assert not images[0] & images[1] and len(images[0]) == len(images[1]) == 500
    assert len(auto_data.load(None, 30).validation) == 30
    chosen = auto_data.examples(split.validation, 32)
    assert len(chosen) == 32 and len({image for image, _ in chosen}) > 25


def write_rows(folder: Path, rows: Sequence[dict[str, str]]) -> Path:
    for name in {row["image"] for row in rows if row.get("image", "x.png").endswith(".png")}:
        number = int(name[1:-4])
        pixels = np.random.default_rng(number).integers(0, 255, (40, 50, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "rows.jsonl:2: no JSON"),
        ("[]", "rows.jsonl:2: got list, wanted image, question and answer"),
        ('{"image": "p0.png", "question": "q"}', r"got \['image', 'question'\]"),
        ('{"image": "p0.png", "question": "q", "answer": 3}', "each a text"),
        ('{"image": "none.png", "question": "q", "answer": "a"}', "none.png is not there"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = write_rows(tmp_path, [{"image": "p0.png", "question": "q", "answer": "a"}])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match=said):
        auto_data.load(path)


def test_too_little_to_choose_by(tmp_path: Path) -> None:
    path = write_rows(tmp_path, [{"image": "p0.png", "question": "q", "answer": "a"}] * 3)
    with pytest.raises(InputError, match="1 picture, wanted at least 2"):
        auto_data.load(path)
    path.write_text("\n")
    with pytest.raises(InputError, match="has no questions"):
        auto_data.load(path)
    with pytest.raises(InputError, match="cannot be read"):
        auto_data.load(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="limit: got 0"):
        auto_data.load(None, 0)


@pytest.mark.parametrize("budget", [-1.0, 100.0, float("nan")])
def test_a_budget_that_is_none(tmp_path: Path, budget: float) -> None:
    with pytest.raises(InputError, match="max_drop: got"):
        auto_quantize(tmp_path, tmp_path / "out", max_drop=budget)


# --- the whole way ----------------------------------------------------


def test_from_checkpoint_to_confirmed_bundle(
    exported: Exported, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Labels are float32's own answers, so that random weights are right at the start."""
    asked = [(f"p{n}.png", f"what is it, {n % 3}?") for n in range(8) for _ in range(1 + n % 2)]
    write_rows(tmp_path, [{"image": image} for image, _ in asked])
    from runtime import open_bundle
    from runtime.generation import GenerationOptions

    with open_bundle(exported.bundles["fp32"], threads=1) as session:
        options = GenerationOptions(max_new_tokens=32)
        rows = [
            {"image": i, "question": q, "answer": session.ask(tmp_path / i, q, options).text}
            for i, q in asked
        ]
    data = write_rows(tmp_path, rows)
    out, lines = tmp_path / "out" / "small", []
    result = auto_quantize(tiny_checkpoint, out, max_drop=60.0, data=data, limit=5, progress=lines.append)
    manifest = bundle.read(out)
    assert manifest.precision == "auto" and manifest.name == "small"
    assert result.chosen.score.n == 5 and result.held_out.n == 5
    assert result.chosen.total_bytes == min(c.total_bytes for c in result.candidates if c.fits)
    work = out.with_name("small.auto")
    assert auto_report.Result.model_validate_json((work / "frontier.json").read_text()) == result
    assert "Held out, 5 questions" in (work / "frontier.md").read_text()
    assert sum(part.bytes for part in manifest.parts) == result.chosen.bytes
    assert any(line.startswith("trying") for line in lines)

    data.write_text(data.read_text().replace("what is it, 0?", "what is it, 9?"))
    with pytest.raises(StateError, match="another checkpoint or other questions"):
        auto_quantize(tiny_checkpoint, out, max_drop=60.0, data=data, limit=5)


@pytest.mark.slow
def test_calibrated_precisions_look_at_given_pictures(tiny_checkpoint: Path, tmp_path: Path) -> None:
    write_rows(tmp_path, [{"image": f"p{n}.png"} for n in range(3)])
    lines: list[str] = []
    given = [(tmp_path / f"p{n}.png", f"what is {n}?") for n in range(3)]
    out = export.export_checkpoint(
        tiny_checkpoint, tmp_path / "b", precision="fp32-kv8", examples=given, progress=lines.append
    )
    assert "fp32-kv8: calibrating on 3 prompts" in lines
    assert {state.dtype for state in bundle.read(out).state} == {"int8"}
