"""A conversation: later questions go on from the state that earlier ones left.

In: a session, pictures, questions. Out: answers, and the turns so far. Not here: what of the state a prompt
shares with the last one (`runtime/sequence.py`): two conversations over one session may take turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from runtime.answer import Answer, Sources, Turn, sources_of
from runtime.image import PreparedImage

if TYPE_CHECKING:
    from runtime.answering import Answering
    from runtime.generation import GenerationOptions


class Chat:
    """Turns about a picture, several or none. A cancelled answer is part of it as far as it came."""

    def __init__(self, session: Answering, source: Sources = None) -> None:
        """Raises InputError when a picture is none."""
        self._session = session
        self._pending: tuple[PreparedImage, ...] = ()  # pictures of the next question
        self.turns: list[Turn] = []
        self.show(source)

    def show(self, source: Sources) -> None:
        """Further pictures, for the next question; all of them, or with an InputError none."""
        self._pending += tuple(
            each if isinstance(each, PreparedImage) else self._session.prepare(each)
            for each in sources_of(source)
        )

    def stream(self, question: str, options: GenerationOptions | None = None, **more: Any) -> Iterator[str]:
        """Text pieces of the answer; `more` as for the session's `stream`."""
        images, before = self._pending, self._session.last_answer
        try:
            yield from self._session.stream(images, question, options, history=self.turns, **more)
        finally:
            answer = self._session.last_answer
            if answer is not None and answer is not before:
                self._keep(question, images, answer)

    def ask(self, question: str, options: GenerationOptions | None = None, **more: Any) -> Answer:
        """The whole answer; `more` as for the session's `ask`."""
        images = self._pending
        answer = self._session.ask(images, question, options, history=self.turns, **more)
        self._keep(question, images, answer)
        return answer

    def undo(self) -> None:
        """Forget the last turn; its pictures are those of the next question."""
        if self.turns:
            self._pending = (*self.turns.pop().images, *self._pending)

    def _keep(self, question: str, images: tuple[PreparedImage, ...], answer: Answer) -> None:
        """The turn, unless it was cancelled before its first token: then it can be asked again."""
        if answer.token_ids:
            self.turns.append(Turn(question, tuple(answer.token_ids), images))
            self._pending = ()
