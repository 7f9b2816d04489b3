"""The reference session: its own stream is what transformers' `generate` gives, for every family."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evals.torch_session import TorchSession
from runtime.errors import CheckpointError, InputError
from runtime.generation import GenerationOptions
from runtime.image import ImageFeatures
from tests.checkpoints import FAMILIES, VARIANTS

MAKERS = {**FAMILIES, **{name: VARIANTS[name] for name in ("gemma3", "qwen2_vl", "smolvlm_tiles")}}

QUESTION = "what color is the shape?"
NEW = 8


def picture(seed: int, size: tuple[int, int] = (70, 50)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.fixture(scope="module", params=sorted(MAKERS))
def reference(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchSession]:
    with TorchSession(MAKERS[request.param](tmp_path_factory.mktemp(request.param) / "tiny")) as opened:
        yield opened


def test_its_stream_is_what_generate_gives(reference: TorchSession) -> None:
    options = GenerationOptions(max_new_tokens=NEW)
    for source in (picture(1), picture(2, (150, 64)), [picture(1), picture(3, (40, 90))], None):
        answer = reference.ask(source, QUESTION, options)
        assert answer.token_ids == reference.generate(source, QUESTION, NEW)


def test_a_follow_up_turn_is_what_generate_gives(reference: TorchSession) -> None:
    history = [(QUESTION, "red")]
    answer = reference.ask(picture(1), "is it big?", GenerationOptions(max_new_tokens=NEW), history=history)
    assert answer.token_ids == reference.generate(picture(1), "is it big?", NEW, history=history)
    first = reference.prompt_ids(QUESTION, [reference.prepare(picture(1))])
    assert answer.stats.prompt_tokens > len(first)


def test_a_chat_keeps_its_turns(reference: TorchSession) -> None:
    chat = reference.chat(picture(4))
    first = chat.ask(QUESTION, GenerationOptions(max_new_tokens=3))
    second = chat.ask("is it big?", GenerationOptions(max_new_tokens=3))
    assert [turn.answer for turn in chat.turns] == [tuple(first.token_ids), tuple(second.token_ids)]
    assert second.stats.prompt_tokens > first.stats.prompt_tokens
    assert second.stats.image_tokens == first.stats.image_tokens


def test_features_of_another_session_are_refused(reference: TorchSession) -> None:
    prepared = reference.prepare(picture(1))
    ids = reference.prompt_ids(QUESTION, [prepared])
    features = reference.encode_image(prepared)
    foreign = ImageFeatures(features.tokens, features.grids, features.deepstack)
    with pytest.raises(InputError, match="encode_image gave"):
        reference.prefill(ids, [foreign])


def test_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        TorchSession(tmp_path)
