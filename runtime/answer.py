"""What goes into a question and what comes out: pictures, earlier turns, the answer, its cost.

In and out: data. Not here: making an answer (`runtime/answering.py`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from runtime.errors import InputError
from runtime.generation import FinishReason
from runtime.image import ImageInput, PreparedImage

Source = ImageInput | PreparedImage
Sources = Source | Sequence[Source] | None
"""The pictures of a question: one, several in their order, or none."""

Cancel = threading.Event | Callable[[], bool] | None
"""Set, or true when called: the answer ends there."""


@dataclass(frozen=True)
class Turn:
    """A question that was answered: with text, or better with the ids that were generated."""

    question: str
    answer: str | tuple[int, ...]
    images: tuple[PreparedImage, ...] = ()


History = Sequence[Turn | tuple[str, str]]
"""Earlier turns, the oldest first. With plain pairs, a question's pictures belong to the oldest one."""


@dataclass
class GenerationStats:
    """What an answer cost. `ttft_ms` is one measurement, from the picture's bytes to the first text.

    `reused_tokens`: how many of the prompt were still in the state. `encoded_images`: pictures that the
    vision part ran for. With choices, `ttft_ms` is when the choice was known. In a batch, `prefill_ms` and
    `decode_ms` are those of all rows together; `one_by_one` says why there was none.
    """

    prepare_ms: float = 0.0
    encode_ms: float = 0.0
    prefill_ms: float = 0.0
    ttft_ms: float = 0.0
    decode_ms: list[float] = field(default_factory=list)  # per token after the first
    prompt_tokens: int = 0
    image_tokens: int = 0
    reused_tokens: int = 0
    encoded_images: int = 0
    new_tokens: int = 0
    batch_rows: int = 1
    one_by_one: str = ""

    @property
    def prefill_tok_s(self) -> float:
        computed = self.prompt_tokens - self.reused_tokens
        return computed / self.prefill_ms * 1e3 if self.prefill_ms else 0.0

    @property
    def decode_tok_s(self) -> float:
        total = sum(self.decode_ms)
        return len(self.decode_ms) / total * 1e3 if total else 0.0


@dataclass(frozen=True)
class ChoiceScores:
    """How likely each of the allowed answers was: natural logarithm of its probability, its end included."""

    choices: tuple[str, ...]
    log_probabilities: tuple[float, ...]

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Among the choices: they sum to 1."""
        best = max(self.log_probabilities)
        weights = [math.exp(value - best) for value in self.log_probabilities]
        return tuple(weight / sum(weights) for weight in weights)


@dataclass(frozen=True)
class Answer:
    """`token_ids` are those that were generated, a stop id included, as `generate` returns them.

    `scores`: of the allowed answers, where choices were given; `token_ids` are then the choice's.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    stats: GenerationStats
    scores: ChoiceScores | None = None


def sources_of(given: Sources) -> list[Source]:
    """As a list."""
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]  # type: ignore[list-item]


def turns_of(
    history: History, images: Sequence[PreparedImage]
) -> tuple[tuple[Turn, ...], tuple[PreparedImage, ...]]:
    """(earlier turns, pictures of the question itself) of a conversation with these pictures.

    Raises InputError when an earlier turn is no pair of texts.
    """
    if any(isinstance(turn, Turn) for turn in history) or not history:
        return tuple(_turn(turn) for turn in history), tuple(images)
    first, *rest = (_turn(turn) for turn in history)
    return (Turn(first.question, first.answer, tuple(images)), *rest), ()


def cancel_check(cancel: Cancel) -> Callable[[], bool]:
    """As a function."""
    if cancel is None:
        return lambda: False
    return cancel.is_set if isinstance(cancel, threading.Event) else cancel


def _turn(given: Turn | tuple[str, str]) -> Turn:
    if isinstance(given, Turn):
        return given
    if len(given) != 2 or not all(isinstance(text, str) for text in given):
        raise InputError("history: expected pairs of a question and its answer")
    return Turn(*given)
