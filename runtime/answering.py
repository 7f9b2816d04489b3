"""From a question to its answer, over the steps of a session: the loop that every session shares.

In: pictures and a question. Out: pieces of text, an `Answer`. Not here: the steps (`runtime/session.py`, and
the reference in `evals/`), choosing tokens (`runtime/generation.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from runtime.answer import (
    Answer,
    Cancel,
    ChoiceScores,
    GenerationStats,
    History,
    Sources,
    Turn,
    cancel_check,
    sources_of,
    turns_of,
)
from runtime.generation import GenerationOptions, Writer
from runtime.image import ImageFeatures, ImageInput, PreparedImage

if TYPE_CHECKING:
    from runtime.chat import Chat

Floats = NDArray[np.float32]
TokenIds = NDArray[np.int64]


class Run:
    """One answer in the making: what was asked for, what it cost so far, whether somebody gave up on it."""

    def __init__(self, options: GenerationOptions | None, cancel: Cancel = None) -> None:
        self.options = options or GenerationOptions()
        self.stats = GenerationStats()
        self.cancelled: Callable[[], bool] = cancel_check(cancel)
        self.writer: Writer | None = None
        self.start = time.perf_counter()

    def first_text(self) -> None:
        """The time to the first text is now, unless it was before."""
        self.stats.ttft_ms = self.stats.ttft_ms or ms_since(self.start)

    def answer(self, scores: ChoiceScores | None = None) -> Answer:
        """What came of it; without a reason to end, it was given up."""
        if self.writer is None:
            return Answer("", [], "cancelled", self.stats, scores)
        reason = self.writer.reason or "cancelled"
        return Answer(self.writer.text, self.writer.tokens, reason, self.stats, scores)


class Answering:
    """Answers from a subclass's steps: `prepare`, `encode_image`, `prompt_ids`, `prefill`, `decode`."""

    def __init__(self) -> None:
        self.last_stats = GenerationStats()
        self.last_answer: Answer | None = None

    # --- what a subclass has ------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """Text to ids and back."""
        raise NotImplementedError

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        raise NotImplementedError

    def prepare(self, source: ImageInput) -> PreparedImage:
        """The views of a path, a file's bytes or a PIL image."""
        raise NotImplementedError

    def encode_image(self, prepared: PreparedImage) -> ImageFeatures:
        """Features of all views, joined."""
        raise NotImplementedError

    def prompt_ids(
        self, question: str, images: Sequence[PreparedImage], history: Sequence[Turn] = ()
    ) -> TokenIds:
        """Ids (prompt,) of a conversation whose open question has these pictures."""
        raise NotImplementedError

    def prefill(self, ids: TokenIds, images: Sequence[ImageFeatures] = ()) -> Floats:
        """Start a new sequence; logits (vocab,) of its last position."""
        raise NotImplementedError

    def decode(self, token_id: int) -> Floats:
        """Logits (vocab,) after one more token."""
        raise NotImplementedError

    def check_length(self, ids: TokenIds, new_tokens: int = 0) -> None:
        """Raise InputError when a prompt and so many tokens after it cannot be held."""

    def room(self) -> int | None:
        """How many tokens the running sequence still takes; None: unlimited."""
        return None

    def _features(self, prepared: PreparedImage) -> tuple[ImageFeatures, bool]:
        """Features of a picture, and whether the vision part ran for them."""
        return self.encode_image(prepared), True

    def _begin(self, ids: TokenIds, images: Sequence[ImageFeatures], run: Run) -> Floats:
        """The prefill of an answer, which may go on from what is there."""
        return self.prefill(ids, images)

    # --- answers ------------------------------------------------------

    def stream(
        self,
        source: Sources,
        question: str,
        options: GenerationOptions | None = None,
        *,
        history: History = (),
        cancel: Cancel = None,
    ) -> Iterator[str]:
        """Text pieces of the answer as they come; afterwards `last_stats` and `last_answer` are set.

        `history`: earlier turns. `cancel`: an event, or a function that tells; it is looked at before every
        picture, the prefill and every token. Closing the iterator early is a cancelled answer, too.
        """
        run = Run(options, cancel)

        def pieces() -> Iterator[str]:
            if (prompt := self._prompt(run, source, question, history)) is not None:
                yield from self._generate(*prompt, run)

        yield from self._kept(pieces(), run)

    def ask(
        self,
        source: Sources,
        question: str,
        options: GenerationOptions | None = None,
        *,
        history: History = (),
        cancel: Cancel = None,
    ) -> Answer:
        """The whole answer to a question about a picture, several or none; arguments as `stream`."""
        return self._collect(self.stream(source, question, options, history=history, cancel=cancel))

    def complete(
        self, ids: TokenIds, images: Sequence[ImageFeatures] = (), options: GenerationOptions | None = None
    ) -> Answer:
        """The answer to a prompt whose pictures are encoded already, in a fresh sequence.

        It does not depend on what was asked before; its stats have no prepare and encode.
        """
        run = Run(options)
        return self._collect(self._kept(self._generate(ids, images, run, fresh=True), run))

    def chat(self, source: Sources = None) -> Chat:
        """A conversation about a picture, several or none."""
        from runtime.chat import Chat

        return Chat(self, source)

    # --- inside -------------------------------------------------------

    def _prompt(
        self, run: Run, source: Sources, question: str, history: History, new_tokens: int = 0
    ) -> tuple[TokenIds, list[ImageFeatures]] | None:
        """Ids and features of a question; None when it was cancelled on the way."""
        stats, mark = run.stats, time.perf_counter()
        prepared = []
        for each in sources_of(source):
            if run.cancelled():
                return None
            prepared.append(each if isinstance(each, PreparedImage) else self.prepare(each))
        stats.prepare_ms = ms_since(mark)
        turns, images = turns_of(history, prepared)
        # before the costly step: a question that cannot be asked fails here
        ids = self.prompt_ids(question, images, turns)
        self.check_length(ids, new_tokens)
        mark, features = time.perf_counter(), []
        for each_image in [*(image for turn in turns for image in turn.images), *images]:
            if run.cancelled():
                return None
            found, encoded = self._features(each_image)
            features.append(found)
            stats.encoded_images += encoded
        stats.encode_ms = ms_since(mark) if features else 0.0
        return ids, features

    def _prefilled(
        self, ids: TokenIds, images: Sequence[ImageFeatures], run: Run, fresh: bool = False
    ) -> Floats:
        """Logits (vocab,) after the prompt, timed."""
        run.stats.prompt_tokens, run.stats.image_tokens = len(ids), sum(map(len, images))
        mark = time.perf_counter()
        logits = self.prefill(ids, images) if fresh else self._begin(ids, images, run)
        run.stats.prefill_ms = ms_since(mark)
        return logits

    def _generate(
        self, ids: TokenIds, images: Sequence[ImageFeatures], run: Run, fresh: bool = False
    ) -> Iterator[str]:
        """Pieces of text until the answer ends."""
        if run.cancelled():
            return
        writer = run.writer = Writer(run.options, ids, self.tokenizer, self.stop_ids)
        logits = self._prefilled(ids, images, run, fresh)
        while True:
            piece = writer.take(logits, self.room())
            run.stats.new_tokens = len(writer.tokens)
            if piece or writer.reason:
                run.first_text()  # an answer without text: when that was known
            if piece:
                yield piece
            if writer.reason is None and run.cancelled() and (rest := writer.cancel()):
                yield rest
            if writer.reason is not None:
                return
            mark = time.perf_counter()
            logits = self.decode(writer.tokens[-1])
            run.stats.decode_ms.append(ms_since(mark))

    def _kept(self, pieces: Iterator[str], run: Run) -> Iterator[str]:
        """The pieces; then, or when nobody wants more of them, the answer is kept."""
        try:
            yield from pieces
        except GeneratorExit:
            self._keep(run.answer())
            raise
        self._keep(run.answer())

    def _keep(self, answer: Answer) -> Answer:
        self.last_stats, self.last_answer = answer.stats, answer
        return answer

    def _collect(self, pieces: Iterator[Any]) -> Answer:
        for _ in pieces:
            pass
        assert self.last_answer is not None
        return self.last_answer


def ms_since(start: float) -> float:
    """Milliseconds since a `time.perf_counter()`."""
    return (time.perf_counter() - start) * 1e3
