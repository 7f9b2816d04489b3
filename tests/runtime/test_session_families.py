"""Reuse, batches and choices over real exports of every family: slow, since each is exported first."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals.torch_session import TorchSession
from runtime.generation import GenerationOptions
from runtime.session import Session, open_bundle
from tests.checkpoints import FAMILIES, VARIANTS
from tests.runtime.test_session import png

pytestmark = pytest.mark.slow

MAKERS = {**FAMILIES, **{name: VARIANTS[name] for name in ("gemma3", "qwen2_vl", "smolvlm_tiles")}}
SHORT = GenerationOptions(max_new_tokens=8)
PICTURES = [png(1, (100, 60)), png(2, (64, 150)), png(3, (40, 40))]


@pytest.fixture(scope="module", params=sorted(MAKERS))
def sides(
    request: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Session, Session, TorchSession]]:
    """(a session that reuses, one that does not, the checkpoint itself)."""
    from export import export_checkpoint

    home: Path = tmp_path_factory.mktemp(request.param)
    checkpoint = MAKERS[request.param](home / "checkpoint")
    bundle = export_checkpoint(checkpoint, home / "bundle")
    with (
        open_bundle(bundle, threads=1) as reusing,
        open_bundle(bundle, threads=1, reuse=False) as plain,
        TorchSession(checkpoint) as reference,
    ):
        yield reusing, plain, reference


def test_answers_after_other_answers(sides: tuple[Session, Session, TorchSession]) -> None:
    reusing, plain, reference = sides
    asked: list[tuple[Any, str]] = [
        (PICTURES[0], "what?"),
        (PICTURES[0], "is it red?"),
        (PICTURES[1], "is it red?"),
        (PICTURES[::2], "is it?"),
        (None, "hello?"),
    ]
    for source, question in asked:
        answers = [each.ask(source, question, SHORT) for each in (reusing, plain, reference)]
        assert answers[0].token_ids == answers[1].token_ids == answers[2].token_ids
    prepared = reusing.prepare(PICTURES[1])
    ids, features = reusing.prompt_ids("is it?", [prepared]), [reusing.encode_image(prepared)]
    wanted = plain.prefill(ids, features)
    np.testing.assert_allclose(reusing.prefill(ids, features, reuse=True), wanted, atol=1e-4)


def test_conversations(sides: tuple[Session, Session, TorchSession]) -> None:
    reusing, plain, reference = sides
    chats = [each.chat(PICTURES[0]) for each in (reusing, plain)]
    held = 0
    for question in ("what?", "and red?", "why so?"):
        answer, wanted = (chat.ask(question, SHORT) for chat in chats)
        assert answer.token_ids == wanted.token_ids
        assert answer.stats.reused_tokens >= held
        held = answer.stats.prompt_tokens + answer.stats.new_tokens - 1
    history = [("what?", "red")]
    answer = reusing.ask(PICTURES[0], "and?", SHORT, history=history)
    assert answer.token_ids == reference.generate(PICTURES[0], "and?", 8, history=history)


def test_batches_and_choices(sides: tuple[Session, Session, TorchSession]) -> None:
    reusing, plain, _ = sides
    asked: list[tuple[Any, str]] = [
        (PICTURES[0], "what?"),
        (PICTURES[1], "is there a red circle in it?"),
        (None, "hello?"),
        (PICTURES[:2], "no"),
    ]
    found = reusing.ask_batch(asked, SHORT)
    assert [each.token_ids for each in found] == [plain.ask(*each, SHORT).token_ids for each in asked]
    names = ["red", "red circle", "blue"]
    scores = [each.ask(PICTURES[0], "what?", choices=names).scores for each in (reusing, plain)]
    assert scores[0] is not None
    assert scores[1] is not None
    np.testing.assert_allclose(scores[0].log_probabilities, scores[1].log_probabilities, atol=1e-3)
