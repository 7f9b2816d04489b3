"""Figures of positions by hand, and pixels of formats laid side by side."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.parity import parity_figures as figures
from evals.parity.parity import kl_rows
from evals.parity.parity_pixels import NO_NORM, Pixels, diff, with_pixels
from evals.parity.parity_side import positions
from runtime.errors import InputError
from runtime.image import PreparedImage, View

REFERENCE = np.array([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0], [3.0, 0.0, 1.0]], np.float32)


class Letters:
    """A tokenizer of one letter an id."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join("abc"[i] for i in ids)


def row(candidate: np.ndarray, forced: list[int], reference: np.ndarray = REFERENCE) -> dict[str, Any]:
    return positions(reference, candidate, np.array(forced), Letters())


def test_figures_by_hand() -> None:
    candidate = REFERENCE.copy()
    candidate[1] = [1.5, 1.0, 0.0]
    found = row(candidate, [0, 1, 0])
    assert found["agree"] == [True, False, True] and found["near_tie"] == [False] * 3
    assert found["kl"][0] == found["kl"][2] == 0
    p, q = (np.exp(x) / np.exp(x).sum() for x in (REFERENCE[1].astype(float), candidate[1].astype(float)))
    assert found["kl"][1] == pytest.approx((p * np.log(p / q)).sum())
    assert found["nll"][1] == pytest.approx(-math.log(q[1]))
    assert found["worst"] == {
        "position": 1, "before": "a", "reference_token": "b", "candidate_token": "a",
        "reference_probability": pytest.approx(p[1]), "candidate_probability": pytest.approx(q[0]),
    }  # fmt: skip
    shown = figures.numerics("reference-greedy", [found], ["one"])
    assert (
        shown.positions == 3 and shown.top1_differ == 1 and shown.top1_agreement.value == pytest.approx(2 / 3)
    )
    assert shown.kl_mean.value == pytest.approx(found["kl"][1] / 3) and shown.kl_max == found["kl"][1]
    assert shown.kl_median == 0
    ratio = math.exp((found["nll"][1] - found["nll_reference"][1]) / 3)
    assert shown.perplexity / shown.perplexity_reference == pytest.approx(ratio)
    assert shown.perplexity_ratio.value == pytest.approx(ratio)
    greedy = figures.greedy([found], ["one"])
    assert greedy.prefix_mean.value == 1 and greedy.whole_equal.value == 0
    assert greedy.prefix_share.value == pytest.approx(1 / 3)
    assert [place.position for place in figures.worst([("id", "what?", found)])] == [1]


def test_a_near_tie_is_told_from_another_answer() -> None:
    tie = np.array([[1.0, 1.0 + 5e-5, 0.0]], np.float32)
    found = row(tie[:, [1, 0, 2]], [0], tie)
    assert found["agree"] == [False] and found["near_tie"] == [True]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_no_number_is_counted_and_never_agrees(bad: float) -> None:
    candidate = REFERENCE.copy()
    candidate[2, 1] = bad
    found = row(candidate, [0, 1, 0])
    assert found["kl"][2] is None and found["agree"] == [True, True, False]
    shown = figures.numerics("label", [found], ["one"])
    assert shown.not_finite == 1 and shown.kl_mean.value == 0 and shown.top1_differ == 1
    with pytest.raises(InputError, match="no logit of 3 positions is a number"):
        figures.numerics("label", [row(np.full_like(REFERENCE, bad), [0, 1, 0])], ["one"])


def test_another_vocabulary_is_refused() -> None:
    with pytest.raises(InputError, match="vocabulary of 2 tokens, the reference's has 3"):
        row(REFERENCE[:, :2], [0, 1, 0])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.floats(-20, 20), min_size=4, max_size=4), min_size=2, max_size=6),
    st.floats(-3, 3),
    st.integers(0, 99),
)
def test_kl_is_the_gate_s_and_a_shift_of_all_logits_changes_nothing(
    rows: list[list[float]], shift: float, seed: int
) -> None:
    reference = np.array(rows)
    candidate = reference + np.random.default_rng(seed).normal(0, 1, reference.shape)
    tokens = np.zeros(len(rows), np.int64)
    found = positions(reference, candidate, tokens, Letters4())
    assert found["kl"] == pytest.approx(kl_rows(reference, candidate).tolist(), abs=1e-12)
    moved = positions(reference, candidate + shift, tokens, Letters4())
    assert moved["kl"] == pytest.approx(found["kl"], abs=1e-9) and moved["nll"] == pytest.approx(found["nll"])
    shown = figures.numerics("label", [found, found], ["one", "two"])
    assert shown.kl_mean.low <= shown.kl_mean.value <= shown.kl_mean.high
    assert 0 <= shown.top1_agreement.low <= shown.top1_agreement.high <= 1


class Letters4(Letters):
    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join("abcd"[i] for i in ids)


def test_no_fault_in_few_images_is_no_proof() -> None:
    same = row(REFERENCE, [0, 1, 0])
    few = figures.numerics("label", [same] * 4, ["one", "one", "two", "two"]).top1_agreement
    many = figures.numerics("label", [same] * 4, ["one", "two", "three", "four"]).top1_agreement
    assert few.value == many.value == 1 and few.low < many.low < 1


# --- pixels -----------------------------------------------------------


def prepared(values: np.ndarray, name: str = "pixel_values") -> PreparedImage:
    return PreparedImage((View({name: values}, (1, 1)),))


def test_bytes_are_compared_with_what_the_reference_normalised() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    mean, std = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.25, 0.3])
    chw = ((picture / 255 - mean) / std).transpose(2, 0, 1)[None].astype(np.float32)
    reference = Pixels(chw.ravel(), chw.shape, np.array([mean, std]) * 255)
    assert diff(reference, prepared(picture, "pixel_bytes")) == {
        "unit": "byte", "max": 0.0, "mean": 0.0, "share": 0.0,
    }  # fmt: skip
    other = picture.copy()
    other[0, 0, 0] ^= 4
    assert diff(reference, prepared(other, "pixel_bytes"))["max"] == 4.0
    patches = Pixels(chw.reshape(8, -1).ravel(), (8, 9), reference.norm)
    assert "patches" in diff(patches, prepared(picture, "pixel_bytes"))["why"]
    unknown = Pixels(chw.ravel(), chw.shape, NO_NORM)
    assert "why" in diff(unknown, prepared(picture, "pixel_bytes"))


def test_other_sizes_are_told_and_not_swapped() -> None:
    reference = Pixels(np.zeros(12, np.float32), (1, 3, 2, 2), NO_NORM)
    assert diff(reference, prepared(np.zeros((1, 3, 2, 3), np.float32))) == {
        "unit": "normalised", "sizes": [12, 18],
    }  # fmt: skip
    assert with_pixels(prepared(np.zeros((1, 3, 2, 3), np.float32)), reference) is None
    assert with_pixels(prepared(np.zeros((1, 3, 2, 1), np.float32)), reference) is None


def test_the_reference_s_pixels_take_the_place_of_the_candidate_s() -> None:
    values = np.arange(24, dtype=np.float32)
    reference = Pixels(values, (2, 3, 2, 2), NO_NORM)
    own = PreparedImage(
        tuple(
            View({"pixel_values": np.zeros((1, 3, 2, 2), np.float32), "grid": np.ones(2)}, (1, 1))
            for _ in "ab"
        )
    )
    found = with_pixels(own, reference)
    assert found is not None
    assert np.concatenate([view.ravel() for view in found.pixels]).tolist() == values.tolist()
    assert all("grid" in view.inputs for view in found.views)


def test_preprocessing_counts_what_differs_and_names_the_first() -> None:
    plain = {"unit": "normalised", "max": 0.0, "mean": 0.0, "share": 0.0}
    rows: list[dict[str, Any]] = [
        {"id": "a", "pictures": [plain], "image_tokens_equal": [True], "ids": None},
        {
            "id": "b", "ids": "place 3: 1 against 2", "image_tokens_equal": [False, True],
            "pictures": [
                {**plain, "max": 0.5, "mean": 0.25, "share": 0.1}, {"unit": "normalised", "sizes": [3, 4]},
            ],
        },
    ]  # fmt: skip
    found = figures.preprocessing(rows)
    assert (found.images, found.images_compared, found.images_equal, found.shapes_equal) == (3, 2, 1, 2)
    assert (found.prompts, found.prompts_equal, found.image_tokens_equal) == (2, 1, 2)
    assert found.first_pixels == "b: up to 0.5 apart, 10.0% of the values"
    assert found.first_ids == "b: place 3: 1 against 2"
    assert found.pixel_max_diff == 0.5 and found.pixel_share == 0.1
