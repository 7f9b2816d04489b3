"""The comparison by its definitions, and the reference session against transformers' own generate."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from evals.parity.parity import ParityCase, compare, greedy_forced, kl_rows
from evals.torch_session import TorchSession
from runtime.errors import CheckpointError, InputError
from runtime.generation import GenerationOptions
from runtime.image import ImageFeatures


class Table:
    """A session whose logits are a fixed table, one row per step."""

    def __init__(
        self, rows: Sequence[Sequence[float]], features: Sequence[float] = (1.0, 2.0), pixel: float = 0.5
    ) -> None:
        self.rows = np.array(rows, np.float32)
        self.features = ImageFeatures(np.array([features], np.float32), ((1, 1),))
        self.pixels = (np.full((1, 3, 2, 2), pixel, np.float32),)
        self.step = 0

    def prepare(self, source: object) -> Table:
        return self

    def encode_image(self, prepared: object) -> ImageFeatures:
        return self.features

    def prompt_ids(self, question: str, images: object) -> np.ndarray:
        return np.array([1, 2, 3])

    def prefill(self, ids: object, features: object) -> np.ndarray:
        self.step = 0
        return self.rows[0]

    def decode(self, token_id: int) -> np.ndarray:
        self.step += 1
        return self.rows[self.step]


CASE = ParityCase("one", "what?", b"picture", forced=(1, 0))
ROWS = [[1.0, 0.0, -1.0], [0.0, 2.0, 0.0], [3.0, 0.0, 1.0]]


def test_a_session_equals_itself() -> None:
    result = compare(Table(ROWS), Table(ROWS), [CASE])
    assert (result.cases, result.positions, result.top1_agreement) == (1, 3, 1.0)
    assert result.logit_max_diff == result.kl_mean == result.feature_rms_error == result.pixel_max_diff == 0.0
    assert result.pixels_equal and result.ids_equal and result.near_ties == 0


def test_figures_by_hand() -> None:
    other = [row[:] for row in ROWS]
    other[1][0] = 2.5  # now the best token of the second position
    result = compare(Table(ROWS), Table(other, features=(1.0, 2.5), pixel=0.25), [CASE])
    assert result.logit_max_diff == 2.5 and result.logit_rel_diff == 1.25
    assert result.top1_agreement == pytest.approx(2 / 3) and result.near_ties == 0
    assert result.feature_max_diff == 0.25
    assert result.feature_rms_error == pytest.approx(np.sqrt(0.125) / np.sqrt(2.5))
    assert result.pixel_max_diff == 0.25 and not result.pixels_equal
    p, q = (np.exp(row) / np.exp(row).sum() for row in (np.array(ROWS[1]), np.array(other[1])))
    assert result.kl_mean == pytest.approx((p * np.log(p / q)).sum() / 3)
    assert result.kl_median == 0.0


def test_a_tie_is_counted_as_such() -> None:
    left, right = [[1.0, 1.00005, 0.0]] * 3, [[1.0, 0.99995, 0.0]] * 3
    result = compare(Table(left), Table(right), [CASE])
    assert result.top1_agreement == 0.0 and result.near_ties == 3


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_number_is_the_worst_number(bad: float) -> None:
    other = [row[:] for row in ROWS]
    other[2][2] = bad
    with np.errstate(all="ignore"):
        result = compare(Table(ROWS), Table(other), [CASE])
    assert result.logit_max_diff == float("inf") and not result.logit_rel_diff <= 1e9


def test_the_judge_sees_each_case_and_may_stop() -> None:
    seen: list[str] = []

    def judge(case: ParityCase, result: object) -> None:
        seen.append(case.name)
        if case.name == "second":
            raise ValueError("stop")

    cases = [ParityCase(name, "?", forced=(1,)) for name in ("first", "second", "third")]
    with pytest.raises(ValueError, match="stop"):
        compare(Table(ROWS), Table(ROWS), cases, judge)
    assert seen == ["first", "second"]


def test_forced_tokens_alternate_between_greedy_and_given() -> None:
    forced = greedy_forced(Table(ROWS), ParityCase("one", "?"), 2, [2]).forced
    assert forced == (0, 2)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-50, 50), min_size=3, max_size=3), st.lists(st.floats(-50, 50), min_size=3, max_size=3)
)
def test_kl_is_torch_s_and_never_negative(p: list[float], q: list[float]) -> None:
    left, right = (torch.tensor([row], dtype=torch.float64).log_softmax(-1) for row in (p, q))
    wanted = torch.nn.functional.kl_div(right, left, log_target=True, reduction="sum").item()
    got = float(kl_rows(np.array([p]), np.array([q]))[0])
    assert got >= 0 and got == pytest.approx(max(wanted, 0.0), abs=1e-9)


# --- the reference session --------------------------------------------


@pytest.fixture(scope="module")
def session(tiny_checkpoint: Path) -> TorchSession:
    return TorchSession(tiny_checkpoint)


def _picture() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_steps_give_the_text_of_generate(session: TorchSession) -> None:
    for source, question in ((_picture(), "what color?"), (None, "yes or no?")):
        wanted = session.generate(source, question, 16)
        answer = session.ask(source, question, GenerationOptions(max_new_tokens=16))
        assert answer.token_ids == wanted
        assert answer.text == session.processor.tokenizer.decode(wanted, skip_special_tokens=True)
        assert answer.stats.new_tokens == len(wanted) and answer.stats.ttft_ms > 0


def test_a_path_and_its_bytes_are_the_same_file(session: TorchSession, tmp_path: Path) -> None:
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    _picture().save(out, "PNG", exif=exif)
    path = tmp_path / "picture.png"
    path.write_bytes(out.getvalue())
    from_path, from_bytes = session.prepare(path), session.prepare(out.getvalue())
    in_memory = session.prepare(Image.open(path))  # not rotated
    assert np.array_equal(from_path.pixels[0], from_bytes.pixels[0])
    assert not np.array_equal(from_path.pixels[0], in_memory.pixels[0])
    assert from_path.tokens == 16 and from_path.pixels[0].shape == (1, 1, 3, 64, 64)


def test_complete_answers_from_features(session: TorchSession) -> None:
    prepared = session.prepare(_picture())
    ids = session.prompt_ids("what color?", [prepared])
    options = GenerationOptions(max_new_tokens=6)
    answer = session.complete(ids, [session.encode_image(prepared)], options)
    assert answer.token_ids == session.ask(_picture(), "what color?", options).token_ids


def test_margins_are_the_leads_of_the_best_tokens(session: TorchSession) -> None:
    tokens, margins = session.greedy(_picture(), "what color?", 3)
    prepared = session.prepare(_picture())
    logits = session.prefill(session.prompt_ids("what color?", [prepared]), [session.encode_image(prepared)])
    for token, margin in zip(tokens, margins, strict=True):
        low, high = np.sort(logits)[-2:]
        assert np.argmax(logits) == token and abs(high - low - margin) < 1e-5
        logits = session.decode(token)


def test_wrong_use_gives_one_line(session: TorchSession, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="refuses"):
        session.prompt_ids("an <image> too many", [session.prepare(_picture())])
    session.close()
    with pytest.raises(InputError, match="prefill"):
        session.decode(3)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        TorchSession(tmp_path)
