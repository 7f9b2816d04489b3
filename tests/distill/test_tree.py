"""Shared prefixes compute what separate sequences compute: log-probs, gradients, sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import tree
from distill.tree import Group, Sampling
from distill.vqa import VqaData

QUESTIONS = ("what color is the circle?", "is there a red circle in the image?", "what is it")


@pytest.fixture
def ids(data: VqaData) -> dict[str, int]:
    return {"pad_id": data.tokenizer.pad_token_id, "eos_id": data.tokenizer.eos_token_id}


@pytest.fixture
def rows(data: VqaData) -> list[list[Group]]:
    """Three images; 1 to 3 questions; 0 to 3 responses of 1 to 6 tokens; a question asked twice."""
    first, second, third = map(data.prompt, QUESTIONS)
    return [
        [Group(first, ((50, 60, 70), (50, 90), (80,))), Group(second, ((100, 110, 12, 130, 14, 2),))],
        [Group(third, ((70, 70), (20, 21, 22, 23)))],
        [Group(second, ((90,), (90, 90, 90))), Group(first), Group(second, ((30, 40),))],
    ]


def naive(model: Any, data: VqaData, rows: list[list[Group]]) -> torch.Tensor:
    """(T, V) log-probs: the image encoded and the whole sequence run for every response by itself."""
    found = []
    for image, row in enumerate(rows):
        for group in row:
            for response in group.responses:
                logits = model(
                    input_ids=torch.tensor([[*group.prompt, *response]]),
                    pixel_values=data.pixels([image])[:, None],
                ).logits[0]
                start = len(group.prompt) - 1
                found.append(logits[start : start + len(response)].log_softmax(-1))
    return torch.cat(found)


def packed(model: Any, data: VqaData, rows: list[list[Group]]) -> tuple[tree.Tree, torch.Tensor]:
    batch = tree.pack(rows, data.tokenizer.pad_token_id)
    features = tree.encode_images(model, data.pixels(list(range(len(rows)))))
    return batch, tree.log_probs(model, batch, features)


# --- layout -----------------------------------------------------------


def test_layout_by_hand() -> None:
    """Prefix 1 2; question 3 with responses (4 5) and (6); question 7 8 with response (9 9 9)."""
    rows = [
        [Group((1, 2, 3), ((4, 5), (6,))), Group((1, 2, 7, 8), ((9, 9, 9),))],
        [Group((1, 2), ((4,),))],
    ]
    batch = tree.pack(rows, 0)
    assert batch.ids_bl.tolist() == [[1, 2, 3, 4, 7, 8, 9, 9], [1, 2, 0, 0, 0, 0, 0, 0]]
    assert batch.positions_bl[0].tolist() == [0, 1, 2, 3, 2, 3, 4, 5]
    assert batch.question_bl[0].tolist() == [-1, -1, 0, 0, 1, 1, 1, 1]
    assert batch.response_bl[0].tolist() == [-1, -1, -1, 0, -1, -1, 0, 0]
    assert batch.question_bl[1].tolist() == [-1, 0, *[tree.PADDING] * 6]
    assert batch.row_t.tolist() == [0] * 6 + [1]
    assert batch.place_t.tolist() == [2, 3, 2, 5, 6, 7, 1]
    assert batch.target_t.tolist() == [4, 5, 6, 9, 9, 9, 4]
    assert batch.response_t.tolist() == [0, 0, 1, 2, 2, 2, 3]
    assert batch.group_r.tolist() == [0, 0, 1, 2] and batch.length_r.tolist() == [2, 1, 3, 1]


@st.composite
def random_rows(draw: st.DrawFn) -> list[list[Group]]:
    token = st.integers(1, 3)
    response = st.lists(token, min_size=1, max_size=3).map(tuple)
    group = st.builds(
        Group,
        st.lists(token, min_size=1, max_size=4).map(lambda tail: (9, *tail)),
        st.lists(response, max_size=3).map(tuple),
    )
    return draw(st.lists(st.lists(group, min_size=1, max_size=3), min_size=1, max_size=3))


@settings(max_examples=60, deadline=None)
@given(random_rows())
def test_every_path_is_its_sequence(rows: list[list[Group]]) -> None:
    """From any predicting place, the tokens it may see, in order of position, are prompt and response."""
    batch = tree.pack(rows, 0)
    seen = batch.mask[:, 0] == 0
    expected = [(g, r, k) for row in rows for g in row for r in g.responses for k in range(len(r))]
    assert len(expected) == len(batch.target_t)
    for t, (group, response, k) in enumerate(expected):
        row, place = int(batch.row_t[t]), int(batch.place_t[t])
        visible = seen[row, place].nonzero()[:, 0]
        assert batch.ids_bl[row, visible].tolist() == [*group.prompt, *response[:k]]
        assert batch.positions_bl[row, visible].tolist() == list(range(len(group.prompt) + k))
        assert int(batch.target_t[t]) == response[k]


def test_the_token_count_is_p_plus_r_g(data: VqaData) -> None:
    """One question, 8 responses of 7 tokens: prompt + 8 x 6 (a last token feeds nothing)."""
    prompt = data.prompt(QUESTIONS[0])
    batch = tree.pack([[Group(prompt, tuple((n,) * 7 for n in range(8)))]], 0)
    assert batch.ids_bl.shape == (1, len(prompt) + 8 * 6)


# --- log-probs and gradients ------------------------------------------


def test_log_probs_equal_separate_sequences(tiny_model: Any, data: VqaData, rows: list[list[Group]]) -> None:
    """fp32: the sums are the same, in another order."""
    with torch.no_grad():
        _, found = packed(tiny_model, data, rows)
        expected = naive(tiny_model, data, rows)
    assert found.shape == expected.shape == (sum(found.shape[:1]), tiny_model.config.text_config.vocab_size)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_each_image_reaches_its_own_row(tiny_model: Any, data: VqaData, rows: list[list[Group]]) -> None:
    """Another image in row 1 changes the log-probs of row 1 and of no other."""
    batch = tree.pack(rows, 0)
    with torch.no_grad():
        one, other = (
            tree.log_probs(tiny_model, batch, tree.encode_images(tiny_model, data.pixels(images)))
            for images in ([0, 1, 2], [0, 5, 2])
        )
    changed = ((one - other).abs().amax(-1) > 1e-4).tolist()
    assert changed == (batch.row_t == 1).tolist()


def test_gradients_equal_separate_sequences(tiny_model: Any, data: VqaData, rows: list[list[Group]]) -> None:
    """Of every parameter, the vision encoder's too."""
    _, found = packed(tiny_model, data, rows)
    weight_tv = torch.randn(found.shape, generator=torch.Generator().manual_seed(3)) / len(found)
    names = [name for name, _ in tiny_model.named_parameters()]
    parameters = list(tiny_model.parameters())
    shared = torch.autograd.grad((found * weight_tv).sum(), parameters, allow_unused=True)
    separate = torch.autograd.grad(
        (naive(tiny_model, data, rows) * weight_tv).sum(), parameters, allow_unused=True
    )
    assert any("vision" in name and g is not None for name, g in zip(names, shared, strict=True))
    largest = max(float(g.norm()) for g in separate if g is not None)
    for name, one, other in zip(names, shared, separate, strict=True):
        assert (one is None) == (other is None), name
        if one is not None and other is not None:  # a key's bias has gradient 0 up to rounding
            assert (one - other).norm() <= 1e-4 * other.norm() + 1e-6 * largest, name


# --- sampling ---------------------------------------------------------


def generated(model: Any, data: VqaData, prompt: tuple[int, ...], image: int, **options: Any) -> Any:
    return model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        pixel_values=data.pixels([image])[:, None],
        return_dict_in_generate=True,
        **options,
    )


def draw(model: Any, data: VqaData, rows: list[list[Group]], count: int, **options: Any) -> Any:
    seed = options.pop("seed", 0)
    end = options.pop("eos_id", data.tokenizer.eos_token_id)
    return tree.sample(
        model,
        rows,
        tree.encode_images(model, data.pixels(list(range(len(rows))))).detach(),
        count,
        Sampling(**options),
        torch.Generator().manual_seed(seed),
        pad_id=data.tokenizer.pad_token_id,
        eos_id=end,
    )


def test_greedy_equals_generate(tiny_model: Any, data: VqaData, rows: list[list[Group]]) -> None:
    drawn = iter(draw(tiny_model, data, rows, 1, greedy=True, max_new_tokens=8))
    for image, row in enumerate(rows):
        for group in row:
            expected = generated(tiny_model, data, group.prompt, image, max_new_tokens=8, do_sample=False)
            assert list(next(drawn)[0].ids) == expected.sequences[0, len(group.prompt) :].tolist()


def test_recorded_log_probs_are_raw_and_right(
    tiny_model: Any, data: VqaData, rows: list[list[Group]]
) -> None:
    """What sampling records equals a new scoring at T = 1 without any processing (METHOD 5: mu)."""
    drawn = draw(tiny_model, data, rows, 4, max_new_tokens=6, temperature=0.7, repetition_penalty=1.3)
    answers = iter(drawn)
    again = [[Group(g.prompt, tuple(s.ids for s in next(answers))) for g in row] for row in rows]
    with torch.no_grad():
        batch, found = packed(tiny_model, data, again)
    chosen = found.gather(-1, batch.target_t[:, None])[:, 0]
    recorded = torch.tensor([value for answer in drawn for s in answer for value in s.log_probs])
    torch.testing.assert_close(recorded, chosen, atol=2e-5, rtol=1e-5)


def full(drawer: tree._Drawer, logits: torch.Tensor) -> torch.Tensor:
    """The drawer's processed scores over the whole vocabulary, as transformers' processors give them."""
    scores, ids = drawer.candidates(logits)
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, scores)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.05},
        {"temperature": 0.6, "top_k": 5, "top_p": 0.7, "repetition_penalty": 1.5},
        {"temperature": 1.4, "top_k": 0, "top_p": 0.5, "repetition_penalty": 1.0},
        {"temperature": 1.0, "top_k": 3, "top_p": 1.0, "repetition_penalty": 0.8},
    ],
    ids=["paper", "sharp", "no top-k", "no top-p"],
)
def test_the_distribution_is_generates(
    tiny_model: Any, data: VqaData, ids: dict[str, int], options: dict[str, float]
) -> None:
    """At every step of a sequence that transformers sampled, our processed scores are its own."""
    prompt = data.prompt(QUESTIONS[0])
    torch.manual_seed(1)
    found = generated(
        tiny_model, data, prompt, 0, do_sample=True, max_new_tokens=5, output_scores=True, output_logits=True,
        **options,
    )  # fmt: skip
    drawer = tree._Drawer(
        [[Group(prompt)]],
        1,
        Sampling(**options),
        torch.Generator(),
        **ids,  # type: ignore[arg-type]
    )
    for step, (raw, processed) in enumerate(zip(found.logits, found.scores, strict=True)):
        drawer.ids_sl = found.sequences[:, : len(prompt) + step]
        ours = full(drawer, raw)
        torch.testing.assert_close(ours.softmax(-1), processed.softmax(-1), atol=1e-6, rtol=1e-5)
        assert torch.equal(ours.isfinite(), processed.isfinite())


def test_frequencies(tiny_model: Any, data: VqaData) -> None:
    """4,000 first tokens fall as the processed distribution says: total variation within 4 sigma."""
    prompt, count = data.prompt(QUESTIONS[0]), 4000
    options: dict[str, Any] = {"top_k": 20, "top_p": 0.9, "repetition_penalty": 1.05}
    scores = generated(
        tiny_model, data, prompt, 0, do_sample=True, max_new_tokens=1, output_scores=True, **options
    ).scores
    expected = scores[0][0].softmax(-1)
    assert (expected > 0).sum() >= 3
    drawn = draw(tiny_model, data, [[Group(prompt)]], count, max_new_tokens=1, **options)
    found = torch.bincount(torch.tensor([s.ids[0] for s in drawn[0]]), minlength=len(expected)) / count
    assert found[expected == 0].sum() == 0
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt() + 1e-6).all()


def test_an_end_token_only_where_generated(tiny_model: Any, data: VqaData, rows: list[list[Group]]) -> None:
    first = draw(tiny_model, data, rows, 6, max_new_tokens=4)
    seen = [token for answer in first for s in answer for token in s.ids[1:3]]
    end = max(set(seen), key=seen.count)
    drawn = [s for answer in draw(tiny_model, data, rows, 6, max_new_tokens=4, eos_id=end) for s in answer]
    ended = [s for s in drawn if s.ids[-1] == end]
    cut = [s for s in drawn if s.ids[-1] != end]
    assert ended and cut, "the case needs both"
    assert any(len(s.ids) < 4 for s in ended)
    assert all(end not in s.ids[:-1] for s in drawn)
    assert all(len(s.ids) == 4 for s in cut)
    assert all(len(s.ids) == len(s.log_probs) for s in drawn)


def test_the_seed_decides(tiny_model: Any, data: VqaData, rows: list[list[Group]]) -> None:
    state = torch.get_rng_state()
    first = draw(tiny_model, data, rows, 3, seed=1)
    assert draw(tiny_model, data, rows, 3, seed=1) == first
    assert draw(tiny_model, data, rows, 3, seed=2) != first
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"


def test_an_image_token_is_never_drawn(tiny_model: Any, data: VqaData) -> None:
    """It stands for a part of the picture: in a response it would claim an image that is not there.
    At this temperature every token is about equally likely: 8,000 draws from 310."""
    rows = [[Group(data.prompt(question)) for question in QUESTIONS[:2]]]
    options: dict[str, Any] = {"temperature": 1e4, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    drawn = draw(tiny_model, data, rows, 400, max_new_tokens=10, **options)
    found = {token for answer in drawn for s in answer for token in s.ids}
    assert set(range(tiny_model.config.text_config.vocab_size)) - found == {tiny_model.config.image_token_id}


def test_company_changes_nothing(tiny_model: Any, data: VqaData, ids: dict[str, int]) -> None:
    """A question's distribution is the same beside a longer one: filling is no token of the prompt."""
    short, long = Group(data.prompt("what")), Group(data.prompt(QUESTIONS[1]))
    sampling = Sampling(repetition_penalty=2.0, top_k=0, top_p=1.0)
    logits = torch.linspace(-3, 3, len(data.tokenizer))[None]
    alone = full(tree._Drawer([[short]], 1, sampling, torch.Generator(), **ids), logits)
    beside = full(tree._Drawer([[short, long]], 1, sampling, torch.Generator(), **ids), logits.repeat(2, 1))
    assert torch.equal(alone[0], beside[0])
