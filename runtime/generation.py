"""Choosing tokens and turning them into text.

In: logits (vocab,) float32, one step at a time. Out: token ids, and text pieces that are whole characters.
Not here: the model that makes the logits (`runtime/session.py`).

Options have the order and the definitions of transformers' `generate`: repetition penalty, temperature,
top-k, top-p, min-p, then a draw. The random stream is numpy's: a seed repeats an answer here, not torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer

from runtime.errors import InputError

Logits = NDArray[np.float32]
FinishReason = Literal["stop", "length", "context", "cancelled"]
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class GenerationOptions(BaseModel):
    """How an answer is generated; the defaults are greedy. `temperature` 0 is greedy, above it samples."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_new_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.0, ge=0.0, le=100.0, allow_inf_nan=False)
    top_k: int = Field(default=0, ge=0, description="0: no limit; only when sampling")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="1: no limit; only when sampling")
    min_p: float = Field(
        default=0.0, ge=0.0, le=1.0, description="share of the best token's probability; only when sampling"
    )
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=100.0, allow_inf_nan=False)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), description="the answer ends before the first of these texts (special tokens are no text)"
    )
    seed: int = Field(default=0, ge=0)
    ignore_stop: bool = Field(
        default=False, description="ids that end an answer do not: every answer is as long, to measure by"
    )


class Sampler:
    """Picks the next token. One per answer: it holds the random state and the ids seen so far."""

    def __init__(self, options: GenerationOptions, prompt_ids: Sequence[int] | NDArray[np.int64]) -> None:
        self.options = options
        # numpy loads its random module at first use, which a greedy answer need not wait for
        self.random = np.random.default_rng(options.seed) if options.temperature else None
        self.seen = {int(token) for token in prompt_ids}

    def pick(self, logits: Logits) -> int:
        """The id chosen from logits (vocab,); ties go to the lowest id. InputError without a best one."""
        scores = logits
        if self.options.repetition_penalty != 1.0:
            scores = penalise(logits, sorted(self.seen), self.options.repetition_penalty)
        if self.random is None:
            token = int(np.argmax(scores))
            check_finite(scores[token])
        else:
            check_finite(scores.max())
            token = int(self.random.choice(len(scores), p=distribution(scores, self.options)))
        self.seen.add(token)
        return token


def check_finite(best: np.float32) -> None:
    """Raise InputError where the largest logit is none: what overflows in float16 would else be an answer."""
    if not np.isfinite(best):
        raise InputError(
            f"answer: the largest logit is {best}, wanted a number; the device computes this question "
            "wrongly: run `pocketvlm doctor BUNDLE`, try another provider or a bundle of another precision"
        )


def penalise(logits: Logits, seen: Sequence[int], penalty: float) -> Logits:
    """Logits (vocab,) with those of `seen` ids divided by `penalty` where positive, else multiplied by it."""
    if penalty == 1.0 or not seen:
        return logits
    scores = logits.copy()
    index = np.asarray(seen)
    old = scores[index]
    scores[index] = np.where(old < 0, old * penalty, old / penalty)
    return scores


def distribution(logits: Logits, options: GenerationOptions) -> NDArray[np.float64]:
    """Probabilities (vocab,) after temperature, top-k, top-p and min-p, in this order; they sum to 1."""
    scores = logits.astype(np.float64) / options.temperature
    if 0 < options.top_k < len(scores):
        scores = np.where(scores < np.partition(scores, -options.top_k)[-options.top_k], -np.inf, scores)
    if options.top_p < 1.0:
        order = np.argsort(
            scores, kind="stable"
        )  # ascending: the tail below 1 - top_p goes, the best one stays
        tail = np.cumsum(softmax(scores[order])) <= 1.0 - options.top_p
        tail[-1] = False
        scores = scores.copy()
        scores[order[tail]] = -np.inf
    found = softmax(scores)
    if options.min_p > 0.0:
        weak = found < options.min_p * found.max()  # never the best one
        found = softmax(np.where(weak, -np.inf, scores))
    return found


def softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities (n,) of scores (n,); -inf has probability 0."""
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


class Detokenizer:
    """Turns a stream of ids into text pieces that never split a character; special tokens are silent.

    The pieces joined with `flush()` are exactly `tokenizer.decode(all ids)`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._anchor = 0  # decoding starts here: everything before is out, with context for what follows
        self._given = 0  # characters given of the text decoded from the anchor

    def push(self, token: int) -> str:
        """The text that this id completes; empty while a character is unfinished."""
        self._ids.append(token)
        text = self._decode()
        piece = text[self._given :]
        if not piece or piece.endswith(REPLACEMENT):
            return ""
        self._advance(text)
        return piece

    def flush(self) -> str:
        """What is left at the end, an unfinished character as U+FFFD."""
        text = self._decode()
        piece = text[self._given :]
        self._given = len(text)
        return piece

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids[self._anchor :], skip_special_tokens=True)

    def _advance(self, text: str) -> None:
        """Move the anchor so that a step decodes a few ids, not the whole answer; one id stays as context."""
        anchor = len(self._ids) - 1
        context = self._tokenizer.decode(self._ids[anchor:], skip_special_tokens=True)
        if context and text.endswith(context) and REPLACEMENT not in context:
            self._anchor, self._given = anchor, len(context)
        else:
            self._given = len(text)


class StopStrings:
    """Text pieces up to the string that is complete first; what may be the beginning of one is held back."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.found = False

    def push(self, piece: str) -> str:
        """What of the text so far can be given out; nothing of a stop string, nothing after one."""
        if self.found or not self._stop:
            return "" if self.found else piece
        text = self._held + piece
        spans = [(place + len(stop), place) for stop in self._stop if (place := text.find(stop)) >= 0]
        if spans:
            self.found, self._held = True, ""
            return text[: min(spans)[1]]
        longest = max(len(stop) for stop in self._stop) - 1
        kept = next(
            (n for n in range(min(longest, len(text)), 0, -1) if self._may_begin(text[-n:])),
            0,
        )
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def flush(self) -> str:
        """What was held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self._stop)


class Writer:
    """One answer as it grows, token by token; `reason` says why it ended, None while it goes on."""

    def __init__(
        self,
        options: GenerationOptions,
        prompt_ids: Sequence[int] | NDArray[np.int64],
        tokenizer: Tokenizer,
        stop_ids: Sequence[int],
    ) -> None:
        self.tokens: list[int] = []
        self.reason: FinishReason | None = None
        self._most = options.max_new_tokens
        self._stop_ids = frozenset(() if options.ignore_stop else stop_ids)
        self._sampler = Sampler(options, prompt_ids)
        self._detokenizer, self._filter = Detokenizer(tokenizer), StopStrings(options.stop)
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """Everything given out so far."""
        return "".join(self._pieces)

    def take(self, logits: Logits, room: int | None = None) -> str:
        """Choose from logits (vocab,); the text certain now. `room`: tokens that still fit, if limited."""
        token = self._sampler.pick(logits)
        self.tokens.append(token)
        piece = ""
        if token in self._stop_ids:
            self.reason = "stop"
        else:
            piece = self._filter.push(self._detokenizer.push(token))
            if self._filter.found:
                self.reason = "stop"
            elif len(self.tokens) == self._most:
                self.reason = "length"
            elif room is not None and room < 1:
                self.reason = "context"
        return self._give(piece + (self._rest() if self.reason else ""))

    def cancel(self) -> str:
        """End it here; the text that was held back."""
        self.reason = "cancelled"
        return self._give(self._rest())

    def _rest(self) -> str:
        piece = self._filter.push(self._detokenizer.flush())
        return piece if self._filter.found else piece + self._filter.flush()

    def _give(self, piece: str) -> str:
        if piece:
            self._pieces.append(piece)
        return piece
