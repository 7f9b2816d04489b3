"""Engines: a model of this process, and the same model behind a server, draw from the same distribution."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image

from distill.answers import probe
from distill.answers.engines import Drawn, HfEngine, OpenAIEngine
from distill.forward.sampling import Sampling
from distill.inputs.data import Sample
from distill.inputs.encoding import Encoder
from evals.client import Choice, Client, ServerError
from evals.tasks.images import ImageSource
from runtime.errors import InputError
from tests.distill.model_server import vllm_answers
from tests.faults import FaultServer, completion

SAMPLING = Sampling(max_new_tokens=6, top_k=8)


def picture(number: int) -> ImageSource:
    stream = io.BytesIO()
    probe.image(number, 64).save(stream, "PNG")
    return ImageSource(data=stream.getvalue())


def sample(number: int, image: int, text: str) -> Sample:
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return Sample(f"s{number}", ({"role": "user", "content": content},), (picture(image),), index=number)


def samples() -> list[Sample]:
    """Five questions, four of them about image 0, in an order that mixes images."""
    texts = ("what color?", "is there a red circle?", "what is it", "blue?", "what color?")
    return [
        sample(i, image, text) for i, (image, text) in enumerate(zip((0, 1, 0, 0, 0), texts, strict=True))
    ]


@pytest.fixture(scope="session")
def encoder(processor: Any) -> Encoder:
    return Encoder(processor)


@pytest.fixture
def engine(tiny_model: Any, encoder: Encoder) -> HfEngine:
    return HfEngine(tiny_model, encoder, rows_per_batch=2)


@pytest.fixture
def served(tiny_model: Any, processor: Any) -> Iterator[FaultServer]:
    with FaultServer(vllm_answers(tiny_model, processor)) as server:
        yield server


@pytest.fixture
def client(served: FaultServer) -> Iterator[Client]:
    with Client(served.url, "m", retries=3, pause_seconds=0.01, concurrency=1, timeout_seconds=60) as client:
        yield client


def chat_of(one: Sample) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": one.open_images()[0]}, {"type": "text", "text": one.question}]
    return [{"role": "user", "content": content}]


# --- in this process --------------------------------------------------


def test_every_response_is_scored_as_the_model_scores_it(engine: HfEngine, processor: Any) -> None:
    found = engine.draw(samples(), 3, SAMPLING, seed=1)
    assert [len(some) for some in found] == [3] * 5
    for one, some in zip(samples(), found, strict=True):
        for drawn in some:
            assert drawn.log_probs is not None and not drawn.retokenised
            log_prob_t, _ = probe.score(engine.model, processor, chat_of(one), drawn.ids)
            assert drawn.log_probs == pytest.approx(log_prob_t.tolist(), abs=1e-4)
            assert drawn.finished == (drawn.ids[-1] in engine.encoder.eos_ids)


def test_samples_with_an_image_share_a_row(engine: HfEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    original = HfEngine._draw_batch

    def spy(self: HfEngine, batch: Any, *rest: Any) -> Any:
        seen.append([len(row) for row in batch])
        return original(self, batch, *rest)

    monkeypatch.setattr(HfEngine, "_draw_batch", spy)
    engine.draw(samples(), 1, SAMPLING, seed=1)
    assert sorted(seen[0]) == [1, 4]
    engine.questions_per_row, seen[:] = 2, []
    engine.draw(samples(), 1, SAMPLING, seed=1)
    assert sorted(size for sizes in seen for size in sizes) == [1, 2, 2]


def test_draws_follow_from_the_seed_and_the_samples(engine: HfEngine) -> None:
    first = engine.draw(samples(), 2, SAMPLING, seed=1)
    engine.draw(samples()[:2], 1, SAMPLING, seed=9)
    assert engine.draw(samples(), 2, SAMPLING, seed=1) == first
    assert engine.draw(samples(), 2, SAMPLING, seed=2) != first


def test_training_mode_comes_back(engine: HfEngine) -> None:
    engine.model.train()
    engine.draw(samples()[:1], 1, SAMPLING, seed=1)
    assert engine.model.training


def test_a_sample_that_cannot_be_asked(engine: HfEngine, processor: Any) -> None:
    broken = [
        samples()[0],
        Sample("s9", samples()[0].messages, (ImageSource(data=b"no picture"),)),
        samples()[1],
    ]
    with pytest.raises(InputError):
        engine.draw(broken, 2, SAMPLING, seed=1)
    refused: list[int] = []
    found = engine.draw(broken, 2, SAMPLING, seed=1, refuse=lambda place, error: refused.append(place))
    assert refused == [1] and [len(some) for some in found] == [2, 0, 2]


# --- behind a server --------------------------------------------------


def test_ids_and_log_probs_of_a_server(
    engine: HfEngine, client: Client, encoder: Encoder, processor: Any
) -> None:
    """The images are really sent: the log-probs that come back are the model's for this very image."""
    found = OpenAIEngine(client, encoder).draw(samples(), 3, SAMPLING, seed=1)
    assert client.dialect == "vllm" and client.usage.requests == 5, "one request a sample"
    for place, one in enumerate(samples()):
        assert len(found[place]) == 3
        for drawn in found[place]:
            assert drawn.log_probs is not None and not drawn.retokenised
            mine, _ = probe.score(engine.model, processor, chat_of(one), drawn.ids)
            other, _ = probe.score(engine.model, processor, chat_of(sample(0, 5, one.question)), drawn.ids)
            assert drawn.log_probs == pytest.approx(mine.tolist(), abs=1e-4)
            assert (mine - other).abs().max() > 1e-2, "another image gives other numbers"


def test_greedy_answers_are_the_same(engine: HfEngine, client: Client, encoder: Encoder) -> None:
    greedy = Sampling(max_new_tokens=6, greedy=True)
    found = OpenAIEngine(client, encoder).draw(samples(), 2, greedy, seed=1)
    expected = engine.draw(samples(), 1, greedy, seed=1)
    assert [[d.ids for d in some] for some in found] == [[d.ids for d in some] * 2 for some in expected]
    assert client.usage.requests == 5


def test_every_draw_has_a_seed_of_its_own(served: FaultServer, client: Client, encoder: Encoder) -> None:
    engine = OpenAIEngine(client, encoder)
    first = engine.draw(samples(), 2, SAMPLING, seed=1)
    assert engine.draw(samples(), 2, SAMPLING, seed=1) == first, "this server honours seeds"
    seeds = [body["seed"] for body in served.bodies]
    assert seeds[:5] == seeds[5:] and len(set(seeds)) == 5
    again = engine.draw(samples()[:1], 4, SAMPLING, seed=1, kept={0: {0, 2}})
    assert [body["n"] for body in served.bodies[10:]] == [1, 1]
    assert len(again[0]) == 2 and len({body["seed"] for body in served.bodies[10:]} | set(seeds)) == 7


def test_a_server_that_ignores_n(encoder: Encoder) -> None:
    """The rest is asked for, and from then on one by one."""

    def one(body: dict[str, Any]) -> dict[str, Any]:
        return completion([f"no {body['seed']}"])

    with FaultServer(one) as server, Client(server.url, "m", concurrency=1) as client:
        engine = OpenAIEngine(client, encoder)
        kept: list[tuple[int, int, int]] = []
        engine.draw(
            samples(), 3, SAMPLING, 1, keep=lambda place, first, some: kept.append((place, first, len(some)))
        )
        assert sorted(kept) == [(place, first, 1) for place in range(5) for first in range(3)]
        assert [body["n"] for body in server.bodies] == [3] + [1] * 14
        assert len({body["seed"] for body in server.bodies}) == 15


def test_text_becomes_ids_and_is_marked(encoder: Encoder) -> None:
    def said(text: str, finish: str) -> Drawn:
        return OpenAIEngine(Client("http://x/v1", "m"), encoder)._drawn(Choice(text, finish))

    end = encoder.response_ids("", end=True)[-1]
    plain = encoder.tokenizer(" red circle", add_special_tokens=False)["input_ids"]
    assert said(" red circle", "stop") == Drawn((*plain, end), None, True, True)
    assert said(" red circle", "length") == Drawn(tuple(plain), None, False, True)
    assert said("", "stop") == Drawn((end,), None, True, True)
    special = encoder.tokenizer.convert_ids_to_tokens([end])[0]
    assert end not in said(f"say {special} or <image>", "length").ids, "names of special tokens are text"
    assert encoder.text(said(f"say {special}", "length").ids) == f"say {special}"


def test_ids_without_the_end_token(encoder: Encoder) -> None:
    engine = OpenAIEngine(Client("http://x/v1", "m"), encoder)
    end = encoder.eos_ids[0]
    assert engine._drawn(Choice("a", "stop", (5, end), (-1.0, -2.0))) == Drawn((5, end), (-1.0, -2.0), True)
    assert engine._drawn(Choice("a", "length", (5, 6), (-1.0, -2.0))) == Drawn((5, 6), (-1.0, -2.0), False)
    told_less = engine._drawn(Choice("a", "stop", (5,), (-1.0,)))
    assert told_less == Drawn((5, end), None, True), "its log-prob is not known, so mu is not"
    engine.keep_log_probs = False
    assert engine._drawn(Choice("a", "length", (5,), (-1.0,))).log_probs is None


def test_an_image_placeholder_that_a_server_drew(encoder: Encoder) -> None:
    engine = OpenAIEngine(Client("http://x/v1", "m"), encoder)
    image, end = encoder.processor.image_token_id, encoder.eos_ids[0]
    drawn = engine._drawn(Choice("a", "stop", (5, 6, image, end), (-1.0, -2.0, -3.0, -4.0)))
    assert drawn == Drawn((5, 6), (-1.0, -2.0), False)
    assert image not in engine._drawn(Choice("", "stop", (image, end), (-1.0, -2.0))).ids


def test_questions_without_images(engine: HfEngine, client: Client, encoder: Encoder) -> None:
    texts = [
        Sample(f"t{i}", ({"role": "user", "content": [{"type": "text", "text": t}]},))
        for i, t in enumerate("ab")
    ]
    greedy = Sampling(max_new_tokens=4, greedy=True)
    found = engine.draw([texts[0], *samples()[:1], texts[1]], 2, greedy, seed=1)
    assert [len(some) for some in found] == [2, 2, 2]
    assert OpenAIEngine(client, encoder).draw(texts, 1, greedy, seed=1)[1][0].ids == found[2][0].ids


def test_a_sample_that_a_server_refuses(served: FaultServer, client: Client, encoder: Encoder) -> None:
    engine = OpenAIEngine(client, encoder)
    engine.draw(samples()[:1], 1, SAMPLING, 1)
    served.plan.extend(["", "400"])
    refused: list[tuple[int, str]] = []
    found = engine.draw(
        samples(), 1, SAMPLING, 1, refuse=lambda place, error: refused.append((place, str(error)))
    )
    assert [len(some) for some in found] == [1, 0, 1, 1, 1]
    assert refused[0][0] == 1 and "refuses the request" in refused[0][1]


def test_images_are_scaled_as_in_this_process(served: FaultServer, client: Client, processor: Any) -> None:
    small = Encoder(processor, max_pixels=400)
    OpenAIEngine(client, small).draw(samples()[:1], 1, SAMPLING, 1)
    sent = served.bodies[0]["messages"][0]["content"][0]["image_url"]["url"]
    from base64 import b64decode

    assert Image.open(io.BytesIO(b64decode(sent.partition(",")[2]))).size == (20, 20)


# --- the proof of the weights -----------------------------------------


def test_the_right_weights_are_proved_by_log_probs(client: Client, tiny_model: Any, processor: Any) -> None:
    proof = probe.prove(client, tiny_model, processor)
    assert proof.by == "log-probs" and proof.gap_nats < 1e-3 and len(proof.answers) == 3


def test_a_server_of_text_alone(client: Client, served: FaultServer, tiny_model: Any, processor: Any) -> None:
    tiny_model.train()
    assert probe.prove(client, tiny_model, processor, images=False).gap_nats < 1e-3
    assert tiny_model.training
    sent = [part for body in served.bodies for part in body["messages"][0]["content"]]
    assert {part["type"] for part in sent} == {"text"}


def test_a_model_of_another_vocabulary_is_caught(
    client: Client, served: FaultServer, tiny_model: Any, processor: Any
) -> None:
    served.answer = lambda body: completion(["x"], token_ids=[10**6])
    with pytest.raises(ServerError, match=r"compared by token ids"):
        probe.prove(client, tiny_model, processor)


def test_a_record_of_text_alone_forgives_one_tipped_answer(tmp_path: Any) -> None:
    def said(*texts: str) -> list[Choice]:
        return [Choice(text, "stop") for text in texts]

    assert probe._against_record(said("a", "b", "c"), said("a", "b", "x")) == 0.0
    assert probe._against_record(said("a", "b", "c"), said("a", "y", "x")) == float("inf")


def test_weights_that_differ_a_little_are_caught(client: Client, tiny_model: Any, processor: Any) -> None:
    """A teacher with 5 % of its smallest weights masked answers nearly the same; its log-probs tell."""
    other = copy.deepcopy(tiny_model)
    with torch.no_grad():
        for parameter in other.model.text_model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(parameter.abs() >= parameter.abs().flatten().quantile(0.05))
    with pytest.raises(ServerError, match=r"not those of the teacher.*compared by log-probs.*at most 0\.001"):
        probe.prove(client, other, processor, checkpoint="the teacher", tolerance_nats=1e-3)


def test_a_record_holds_a_server_to_what_it_was(
    client: Client, served: FaultServer, processor: Any, teacher: Any, tmp_path: Any
) -> None:
    from transformers import AutoModelForImageTextToText

    record = tmp_path / "probe.json"
    assert probe.prove(client, record=record).by == "first record"
    assert probe.prove(client, record=record).by == "record"
    served.answer = vllm_answers(AutoModelForImageTextToText.from_pretrained(teacher), processor)
    with pytest.raises(ServerError, match=r"differ from .*probe\.json by"):
        probe.prove(client, record=record, checkpoint="the teacher")


def test_a_server_that_does_not_see_images_is_caught(
    client: Client, served: FaultServer, tiny_model: Any, processor: Any
) -> None:
    """It answers every chat as if the first image were in it."""
    answer = vllm_answers(tiny_model, processor)
    fixed = probe.questions()[0][0]["content"][0]["image"]
    from evals.chats import data_url

    def blind(body: dict[str, Any]) -> dict[str, Any]:
        body["messages"][0]["content"][0]["image_url"]["url"] = data_url(fixed)
        return answer(body)

    served.answer = blind
    with pytest.raises(ServerError, match="does not see them"):
        probe.prove(client)
