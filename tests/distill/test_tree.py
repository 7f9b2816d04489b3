"""Shared prefixes compute what separate sequences compute: layout, log-probs, gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.demo.vqa import VqaData
from distill.forward import tree
from distill.forward.tree import Group, Row
from distill.inputs.encoding import Prompt
from tests.distill.asking import QUESTIONS, ask


@pytest.fixture
def rows(data: VqaData) -> list[Row]:
    """Three images; 1 to 3 questions; 0 to 3 responses of 1 to 6 tokens; a question asked twice."""
    first, second, third = QUESTIONS
    return [
        [
            ask(data, 0, first, (50, 60, 70), (50, 90), (80,)),
            ask(data, 0, second, (100, 110, 12, 130, 14, 2)),
        ],
        [ask(data, 1, third, (70, 70), (20, 21, 22, 23))],
        [ask(data, 2, second, (90,), (90, 90, 90)), ask(data, 2, first), ask(data, 2, second, (30, 40))],
    ]


def naive(model: Any, rows: list[Row]) -> torch.Tensor:
    """(T, V) log-probs: the image encoded and the whole sequence run for every response by itself."""
    found = []
    for row in rows:
        for group in row:
            for response in group.responses:
                logits = model(
                    input_ids=torch.tensor([[*group.prompt.ids, *response]]), **group.prompt.vision
                ).logits[0]
                start = len(group.prompt.ids) - 1
                found.append(logits[start : start + len(response)].log_softmax(-1))
    return torch.cat(found)


def shared(model: Any, rows: list[Row]) -> torch.Tensor:
    return tree.log_probs(model, tree.pack(model, rows, 0))


# --- layout -----------------------------------------------------------


def group(prompt: tuple[int, ...], responses: tuple[tuple[int, ...], ...]) -> Group:
    return Group(Prompt(prompt), responses)


def test_layout_by_hand(tiny_model: Any) -> None:
    """Prefix 1 2; question 30 with responses (4 5) and (6); question 7 8 with response (9 9 9)."""
    rows = [
        [group((1, 2, 30), ((4, 5), (6,))), group((1, 2, 7, 8), ((9, 9, 9),))],
        [group((1, 2), ((4,),))],
    ]
    batch = tree.pack(tiny_model, rows, 0)
    assert batch.ids_bl.tolist() == [[1, 2, 30, 4, 7, 8, 9, 9], [1, 2, 0, 0, 0, 0, 0, 0]]
    assert batch.positions[0].tolist() == [0, 1, 2, 3, 2, 3, 4, 5] == batch.depth_bl[0].tolist()
    assert batch.question_bl[0].tolist() == [-1, -1, 0, 0, 1, 1, 1, 1]
    assert batch.response_bl[0].tolist() == [-1, -1, -1, 0, -1, -1, 0, 0]
    assert batch.question_bl[1].tolist() == [-1, 0, *[tree.PADDING] * 6]
    assert batch.row_t.tolist() == [0] * 6 + [1]
    assert batch.place_t.tolist() == [2, 3, 2, 5, 6, 7, 1]
    assert batch.target_t.tolist() == [4, 5, 6, 9, 9, 9, 4]
    assert batch.response_t.tolist() == [0, 0, 1, 2, 2, 2, 3]
    assert batch.group_r.tolist() == [0, 0, 1, 2] and batch.length_r.tolist() == [2, 1, 3, 1]
    assert batch.groups == 3


@st.composite
def random_rows(draw: st.DrawFn) -> list[Row]:
    token = st.integers(11, 13)
    response = st.lists(token, min_size=1, max_size=3).map(tuple)
    group = st.builds(
        Group,
        st.lists(token, min_size=1, max_size=4).map(lambda tail: Prompt((9, *tail))),
        st.lists(response, max_size=3).map(tuple),
    )
    return draw(st.lists(st.lists(group, min_size=1, max_size=3), min_size=1, max_size=3))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=random_rows())
def test_every_path_is_its_sequence(tiny_model: Any, rows: list[Row]) -> None:
    """From any predicting place, the tokens it may see, in order of position, are prompt and response."""
    batch = tree.pack(tiny_model, rows, 0)
    seen = batch.visible
    expected = [(g, r, k) for row in rows for g in row for r in g.responses for k in range(len(r))]
    assert len(expected) == len(batch.target_t)
    for t, (group, response, k) in enumerate(expected):
        row, place = int(batch.row_t[t]), int(batch.place_t[t])
        visible = seen[row, place].nonzero()[:, 0]
        assert batch.ids_bl[row, visible].tolist() == [*group.prompt.ids, *response[:k]]
        assert batch.positions[row, visible].tolist() == list(range(len(group.prompt.ids) + k))
        assert int(batch.target_t[t]) == response[k]


def test_the_token_count_is_p_plus_r_g(tiny_model: Any, data: VqaData) -> None:
    """One question, 8 responses of 7 tokens: prompt + 8 x 6 (a last token feeds nothing)."""
    asked = ask(data, 0, QUESTIONS[0], *((n,) * 7 for n in range(8)))
    batch = tree.pack(tiny_model, [[asked]], 0)
    assert batch.ids_bl.shape == (1, len(asked.prompt.ids) + 8 * 6)


def test_a_row_is_about_the_same_images(tiny_model: Any, data: VqaData) -> None:
    """Questions about other images, or with words before the image that differ, cannot share a row."""
    one, other = ask(data, 0, QUESTIONS[0], (5, 6)), ask(data, 1, QUESTIONS[0], (5, 6))
    moved = Group(Prompt((7, *one.prompt.ids), one.prompt.vision, one.prompt.key), ((5, 6),))
    for wrong in (other, moved):
        with pytest.raises(ValueError, match="row_key"):
            tree.pack(tiny_model, [[one, wrong]], 0)
        assert tree.row_key(tiny_model, one.prompt) != tree.row_key(tiny_model, wrong.prompt)
    again = ask(data, 0, QUESTIONS[2])
    assert tree.row_key(tiny_model, one.prompt) == tree.row_key(tiny_model, again.prompt)


# --- log-probs and gradients ------------------------------------------


def test_log_probs_equal_separate_sequences(tiny_model: Any, rows: list[Row]) -> None:
    """fp32: the sums are the same, in another order."""
    with torch.no_grad():
        found = shared(tiny_model, rows)
        expected = naive(tiny_model, rows)
    assert found.shape == expected.shape == (sum(found.shape[:1]), tiny_model.config.text_config.vocab_size)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_each_image_reaches_its_own_row(tiny_model: Any, data: VqaData, rows: list[Row]) -> None:
    """Another image in row 1 changes the log-probs of row 1 and of no other."""
    batch = tree.pack(tiny_model, rows, 0)
    with torch.no_grad():
        one, other = (
            tree.log_probs(tiny_model, batch, data.encode(tiny_model, images))
            for images in ([0, 1, 2], [0, 5, 2])
        )
    changed = ((one - other).abs().amax(-1) > 1e-4).tolist()
    assert changed == (batch.row_t == 1).tolist()


def test_gradients_equal_separate_sequences(tiny_model: Any, rows: list[Row]) -> None:
    """Of every parameter, the vision encoder's too."""
    found = shared(tiny_model, rows)
    weight_tv = torch.randn(found.shape, generator=torch.Generator().manual_seed(3)) / len(found)
    names = [name for name, _ in tiny_model.named_parameters()]
    parameters = list(tiny_model.parameters())
    together = torch.autograd.grad((found * weight_tv).sum(), parameters, allow_unused=True)
    separate = torch.autograd.grad((naive(tiny_model, rows) * weight_tv).sum(), parameters, allow_unused=True)
    assert any("vision" in name and g is not None for name, g in zip(names, together, strict=True))
    largest = max(float(g.norm()) for g in separate if g is not None)
    for name, one, other in zip(names, together, separate, strict=True):
        assert (one is None) == (other is None), name
        if one is not None and other is not None:  # a key's bias has gradient 0 up to rounding
            assert (one - other).norm() <= 1e-4 * other.norm() + 1e-6 * largest, name


def test_cached_features_need_no_pixels(tiny_model: Any, rows: list[Row], monkeypatch: Any) -> None:
    batch = tree.pack(tiny_model, rows, 0)
    expected = tree.log_probs(tiny_model, batch)
    cached = tree.encode_images(tiny_model, [row[0].prompt for row in rows]).detach()
    monkeypatch.setattr(type(tiny_model.base_model), "get_image_features", None)
    found = tree.log_probs(tiny_model, batch, cached)
    assert torch.equal(found, expected)
    found.sum().backward()
    assert all(p.grad is None for p in tiny_model.base_model.vision_model.parameters())


def test_no_responses_no_predictions(tiny_model: Any, data: VqaData) -> None:
    batch = tree.pack(tiny_model, [[ask(data, 0, QUESTIONS[0])]], 0)
    assert tree.hidden_states(tiny_model, batch).shape == (0, 64)
