"""Drawing from a shared prefill: transformers' distribution and greedy tokens, raw log-probs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distill.demo.vqa import VqaData
from distill.forward import tree
from distill.forward.sampling import Drawer, Sampling, sample
from distill.forward.tree import Group, Row
from distill.inputs.encoding import Prompt
from tests.distill.asking import QUESTIONS, ask


@pytest.fixture
def rows(data: VqaData) -> list[Row]:
    """Three images; 1 to 3 questions each, one of them twice."""
    first, second, third = QUESTIONS
    asked = ((0, (first, second)), (1, (third,)), (2, (second, first, second)))
    return [[ask(data, image, question) for question in questions] for image, questions in asked]


def generated(model: Any, prompt: Prompt, **options: Any) -> Any:
    return model.generate(
        input_ids=torch.tensor([prompt.ids]),
        attention_mask=torch.ones(1, len(prompt.ids), dtype=torch.long),
        **prompt.vision,
        return_dict_in_generate=True,
        **options,
    )


def draw(model: Any, data: VqaData, rows: list[Row], count: int, **options: Any) -> Any:
    seed = options.pop("seed", 0)
    ends = options.pop("eos_ids", [data.tokenizer.eos_token_id])
    sharing = options.pop("sharing", "tree")
    return sample(
        model,
        rows,
        tree.encode_images(model, [row[0].prompt for row in rows]).detach(),
        count,
        Sampling(**options),
        torch.Generator().manual_seed(seed),
        pad_id=data.tokenizer.pad_token_id,
        eos_ids=ends,
        sharing=sharing,
    )


@pytest.mark.parametrize("sharing", tree.MODES)
def test_greedy_equals_generate(tiny_model: Any, data: VqaData, rows: list[Row], sharing: str) -> None:
    drawn = iter(draw(tiny_model, data, rows, 1, greedy=True, max_new_tokens=8, sharing=sharing))
    for row in rows:
        for group in row:
            expected = generated(tiny_model, group.prompt, max_new_tokens=8, do_sample=False)
            assert list(next(drawn)[0].ids) == expected.sequences[0, len(group.prompt.ids) :].tolist()


@pytest.mark.parametrize("sharing", tree.MODES)
def test_recorded_log_probs_are_raw_and_right(
    tiny_model: Any, data: VqaData, rows: list[Row], sharing: str
) -> None:
    """What sampling records equals a new scoring at T = 1 without any processing (METHOD 5: mu).
    Three ends in 352 make responses end at different steps, so living ones move in the cache."""
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 2.0, "repetition_penalty": 1.3}
    every = draw(tiny_model, data, rows, 4, **options, sharing=sharing)
    ends = sorted({s.ids[i] for i, answer in enumerate(every) for s in answer[: 1 + i % 3]})
    drawn = draw(tiny_model, data, rows, 4, **options, sharing=sharing, eos_ids=ends)
    assert len({len(s.ids) for answer in drawn for s in answer}) > 3
    answers = iter(drawn)
    again = [[Group(g.prompt, tuple(s.ids for s in next(answers))) for g in row] for row in rows]
    with torch.no_grad():
        batch = tree.pack(tiny_model, again, 0)
        found = tree.log_probs(tiny_model, batch, sharing="naive")
    chosen = found.gather(-1, batch.target_t[:, None])[:, 0]
    recorded = torch.tensor([value for answer in drawn for s in answer for value in s.log_probs])
    torch.testing.assert_close(recorded, chosen, atol=2e-5, rtol=1e-5)


def full(drawer: Drawer, logits: torch.Tensor) -> torch.Tensor:
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
def test_the_distribution_is_generates(tiny_model: Any, data: VqaData, options: dict[str, float]) -> None:
    """At every step of a sequence that transformers sampled, our processed scores are its own."""
    prompt = ask(data, 0, QUESTIONS[0]).prompt
    torch.manual_seed(1)
    found = generated(
        tiny_model,
        prompt,
        do_sample=True,
        max_new_tokens=5,
        output_scores=True,
        output_logits=True,
        **options,
    )
    drawer = Drawer([prompt.ids], Sampling(**options), torch.Generator(), 0, [])  # type: ignore[arg-type]
    for step, (raw, processed) in enumerate(zip(found.logits, found.scores, strict=True)):
        drawer.ids_sl = found.sequences[:, : len(prompt.ids) + step]
        ours = full(drawer, raw)
        torch.testing.assert_close(ours.softmax(-1), processed.softmax(-1), atol=1e-6, rtol=1e-5)
        assert torch.equal(ours.isfinite(), processed.isfinite())


def test_frequencies(tiny_model: Any, data: VqaData) -> None:
    """4,000 first tokens fall as the processed distribution says: total variation within 4 sigma."""
    asked, count = ask(data, 0, QUESTIONS[0]), 4000
    options: dict[str, Any] = {"top_k": 20, "top_p": 0.9, "repetition_penalty": 1.05}
    scores = generated(
        tiny_model, asked.prompt, do_sample=True, max_new_tokens=1, output_scores=True, **options
    ).scores
    expected = scores[0][0].softmax(-1)
    assert (expected > 0).sum() >= 3
    drawn = draw(tiny_model, data, [[asked]], count, max_new_tokens=1, **options)
    found = torch.bincount(torch.tensor([s.ids[0] for s in drawn[0]]), minlength=len(expected)) / count
    assert found[expected == 0].sum() == 0
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt() + 1e-6).all()


@pytest.mark.parametrize("ends", [1, 3])
def test_an_end_token_only_where_generated(
    tiny_model: Any, data: VqaData, rows: list[Row], ends: int
) -> None:
    """A checkpoint may have several end tokens: any of them ends a response and is its last token."""
    first = draw(tiny_model, data, rows, 6, max_new_tokens=4)
    seen = [token for answer in first for s in answer for token in s.ids[1:3]]
    eos = sorted(set(seen), key=seen.count)[-ends:]
    drawn = [s for answer in draw(tiny_model, data, rows, 6, max_new_tokens=4, eos_ids=eos) for s in answer]
    ended = [s for s in drawn if s.finished]
    cut = [s for s in drawn if not s.finished]
    assert ended and cut, "the case needs both"
    assert {s.ids[-1] for s in ended} == set(eos)
    assert any(len(s.ids) < 4 for s in ended)
    assert all(not set(eos) & set(s.ids[:-1]) for s in ended)
    assert all(len(s.ids) == 4 and not set(eos) & set(s.ids) for s in cut)
    assert all(len(s.ids) == len(s.log_probs) for s in drawn)


def test_the_seed_decides(tiny_model: Any, data: VqaData, rows: list[Row]) -> None:
    state = torch.get_rng_state()
    first = draw(tiny_model, data, rows, 3, seed=1)
    assert draw(tiny_model, data, rows, 3, seed=1) == first
    assert draw(tiny_model, data, rows, 3, seed=2) != first
    assert torch.equal(torch.get_rng_state(), state), "the global generator is left alone"


def test_an_image_token_is_never_drawn(tiny_model: Any, data: VqaData) -> None:
    """It stands for a part of the picture: in a response it would claim an image that is not there.
    At this temperature every token is about equally likely: 8,000 draws from 310."""
    rows: list[Row] = [[ask(data, 0, question) for question in QUESTIONS[:2]]]
    options: dict[str, Any] = {"temperature": 1e4, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
    drawn = draw(tiny_model, data, rows, 400, max_new_tokens=10, **options)
    found = {token for answer in drawn for s in answer for token in s.ids}
    assert set(range(tiny_model.config.text_config.vocab_size)) - found == {tiny_model.config.image_token_id}


def test_company_changes_nothing(data: VqaData) -> None:
    """A question's distribution is the same beside a longer one: filling is no token of the prompt."""
    short, long = data.prompt("what"), data.prompt(QUESTIONS[1])
    sampling = Sampling(repetition_penalty=2.0, top_k=0, top_p=1.0)
    logits = torch.linspace(-3, 3, len(data.tokenizer))[None]
    alone = full(Drawer([short], sampling, torch.Generator(), 0, []), logits)
    beside = full(Drawer([short, long], sampling, torch.Generator(), 0, []), logits.repeat(2, 1))
    assert torch.equal(alone[0], beside[0])


def test_a_greedy_placeholder_is_passed_over(data: VqaData) -> None:
    drawer = Drawer([(1, 2)], Sampling(greedy=True), torch.Generator(), 0, [9], never=[4])
    drawer.step(torch.arange(5.0)[None])
    assert drawer.result(1)[0][0].ids == (3,)
