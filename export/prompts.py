"""Pre-rendered prompt segments, cut out of the checkpoint's chat template.

In: a checkpoint's processor. Out: a `PromptSpec` in token ids, and a reason where it leaves something out.
Not here: the proof that the segments equal the template (`proof.py`), assembling a prompt on the device
(`runtime/prompt.py`), what stands for a picture (`families/`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from export.checkpoint import Checkpoint
from runtime.errors import CheckpointError
from runtime.prompt_spec import (
    Ids,
    ImageSlot,
    ImageTokens,
    LaterTurn,
    PromptSpec,
    QuestionSlot,
    Segment,
    TiledTokens,
)

_MARK = "\ue000Q\ue001"  # private-use characters: no template and no tokenizer gives them a meaning
_ANSWER = "\ue000A\ue001"
_CLOCK = "strftime_now("
_SEVERAL = 2  # pictures in the turn that shows what stands between two


class _Uncut(Exception):
    """The template has no fixed text where one was looked for; its text is the reason."""


@dataclass(frozen=True)
class TiledText:
    """What is written for a picture of tiles: `cells[row][column]` before each tile's tokens, and the rest.

    As `TiledTokens`, in text. Texts that are tokenised together (a line's end and the next) belong together.
    """

    before: str
    cells: tuple[tuple[str, ...], ...]
    row_end: str
    whole: str
    after: str


@dataclass(frozen=True)
class Message:
    """One message of a conversation: a question about `images`, or (with `answer`) what was answered."""

    text: str
    images: tuple[Any, ...] = ()
    answer: bool = False


def conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As the chat template takes it, pictures first; a picture that is None is only a placeholder."""
    found = []
    for message in messages:
        content: list[dict[str, Any]] = [
            {"type": "image"} if image is None else {"type": "image", "image": image}
            for image in message.images
        ]
        content.append({"type": "text", "text": message.text})
        found.append({"role": "assistant" if message.answer else "user", "content": content})
    return found


def render(
    checkpoint: Checkpoint, messages: Sequence[Message], *, generate: bool, template: str | None = None
) -> str:
    """The text of the chat template, or of `template`; with `generate` the opening of an answer follows.

    Raises CheckpointError with what the template raised.
    """
    try:
        text = checkpoint.processor.apply_chat_template(
            conversation(messages), chat_template=template, add_generation_prompt=generate, tokenize=False
        )
    except Exception as error:  # jinja2's, those that a template raises, Python's from inside of it
        raise CheckpointError(
            f"{checkpoint.path}: the chat template cannot be rendered: {error}; it must take a message's "
            "content as a list of parts, pictures and text"
        ) from error
    if "'type': 'text'" in text:
        raise CheckpointError(
            f"{checkpoint.path}: the chat template writes the parts of a message as a Python list: it is one "
            "for text alone; copy that of the model it was trained from"
        )
    return str(text)


def day_note(checkpoint: Checkpoint) -> tuple[str, ...]:
    """That the chat template writes the day, if it does: segments keep that of the export."""
    template = checkpoint.processor.chat_template
    if not isinstance(template, str) or _CLOCK not in template:
        return ()
    marked = template.replace(_CLOCK, f"('{_MARK}' ~ ")
    if _MARK not in render(checkpoint, [Message("?", (None,))], generate=True, template=marked):
        return ()
    return ("the chat template writes the day (strftime_now); this bundle's prompts keep that of the export",)


def segments(
    checkpoint: Checkpoint,
    *,
    placeholder: str,
    before: str,
    token: str,
    after: str,
    refused: tuple[str, ...],
    tiled: TiledText | None = None,
) -> PromptSpec:
    """Cut the rendered chat template into token-id segments.

    `placeholder` is what the template writes for a picture; on the device it becomes
    `before + token x N + after`, or `tiled` if it was cut into tiles. `later` is None where a further turn
    cannot be cut. Raises CheckpointError when the first turn has no such shape.
    """
    return _Template(checkpoint, placeholder, before, token, after, tiled).spec(refused)


def later_reason(checkpoint: Checkpoint) -> str | None:
    """Why `segments` gave no `later`, None when a further turn can be cut."""
    template = _Template(checkpoint, "", "", "", "", None)
    try:
        template.turn_end()
    except _Uncut as reason:
        return str(reason)
    return None


class _Template:
    """One chat template and what its processor writes for a picture."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        placeholder: str,
        before: str,
        token: str,
        after: str,
        tiled: TiledText | None,
    ) -> None:
        self.checkpoint, self.placeholder, self.token = checkpoint, placeholder, token
        self.lead, self.before, self.after, self.trail = "", before, after, ""
        self.tiled = tiled
        if tiled is None:  # text beyond the outer special tokens is tokenised with what is around the picture
            self.lead, self.before = self._split_before(before)
            self.after, self.trail = self._split_after(after)

    # --- texts --------------------------------------------------------

    @cached_property
    def _trims(self) -> bool:
        """Whether the template cuts white space off the ends of a question."""
        texts = (_MARK, f" {_MARK}\n")
        plain, blanks = (render(self.checkpoint, [Message(text, (None,))], generate=False) for text in texts)
        return plain == blanks

    @cached_property
    def _added(self) -> re.Pattern[str]:
        known = self.checkpoint.tokenizer.added_tokens_decoder.values()
        # blanks that are a token of their own (two line breaks) join with blanks beside them
        found = [token.content for token in known if token.special or token.content.strip()]
        return re.compile("|".join(map(re.escape, sorted(found, key=len, reverse=True))) or r"(?!)")

    def _split_before(self, text: str) -> tuple[str, str]:
        first = self._added.search(text)
        cut = first.start() if first else len(text)
        return text[:cut], text[cut:]

    def _split_after(self, text: str) -> tuple[str, str]:
        ends = [match.end() for match in self._added.finditer(text)]
        cut = ends[-1] if ends else 0
        return text[:cut], text[cut:]

    def opening(self, images: int) -> tuple[str, str, str]:
        """(opening of a conversation, user turn with the mark as its question, opening of the answer)."""
        turn, reply = Message(_MARK, (None,) * images), Message("yes", answer=True)
        first = render(self.checkpoint, [turn], generate=False)
        full = render(self.checkpoint, [turn], generate=True)
        if not full.startswith(first) or first.count(_MARK) != 1:
            raise CheckpointError(
                f"{self.checkpoint.path}: the chat template changes the question or the turn before an answer"
            )
        shorter = render(self.checkpoint, [turn, reply], generate=False)
        again = render(self.checkpoint, [turn, reply, turn], generate=False).removeprefix(shorter)
        opening = first.removesuffix(again) if again and first.endswith(again) else ""
        return opening, first.removeprefix(opening), full.removeprefix(first)

    def turn_end(self, first_images: int = 0, images: int = 0) -> tuple[str, str, str]:
        """(before the answer's text, the token that ends it, the user turn after it) of a further turn.

        Before the text there often is nothing, or a space, which a generated answer begins with.

        Raises _Uncut when there is no such fixed text.
        """
        first = Message(_MARK.replace("Q", "F"), (None,) * first_images)
        turns = [first, Message(_ANSWER, answer=True), Message(_MARK, (None,) * images)]
        start = render(self.checkpoint, [first], generate=True)
        whole = render(self.checkpoint, turns, generate=True)
        closing = start.removeprefix(render(self.checkpoint, [first], generate=False))
        rest = whole.removeprefix(start)
        if not whole.startswith(start) or not rest.endswith(closing):
            raise _Uncut("the chat template writes an earlier turn in another way than an open one")
        rest = rest.removesuffix(closing)
        if rest.count(_ANSWER) != 1 or rest.count(_MARK) != 1:
            raise _Uncut("the chat template changes an earlier answer or a later question")
        opening, user = rest.split(_ANSWER)
        end = self._added.match(user)
        if end is None or self.checkpoint.tokenizer.convert_tokens_to_ids(end[0]) not in self._stop_ids():
            raise _Uncut("the chat template closes an answer with no token that ends a generated one")
        return opening, end[0], user[end.end() :]

    def _stop_ids(self) -> set[int]:
        stop = self.checkpoint.model.generation_config.eos_token_id
        return set(stop) if isinstance(stop, (list, tuple)) else {stop}

    # --- segments -----------------------------------------------------

    def spec(self, refused: tuple[str, ...]) -> PromptSpec:
        """The whole prompt section."""
        system, user, assistant = self.opening(1)
        bare_system, bare_user, bare_assistant = self.opening(0)
        without = None
        if (bare_system, bare_assistant) == (system, assistant):
            without = self._segments(bare_user)
        return PromptSpec(
            image=ImageTokens(
                before=self._ids(self.before),
                token=self._single(),
                after=self._ids(self.after),
                tiled=self._tiled(),
            ),
            system=self._ids(system),
            user=self._with_image(user, self.opening(_SEVERAL)[1]),
            user_without_image=without,
            assistant=self._ids(assistant),
            later=self._later(without is not None),
            refused_text=refused,
        )

    def _later(self, text_only: bool) -> LaterTurn | None:
        """A further turn, the same whether or not the first had a picture; None where it is not.

        Its pictures are left out where only they depend on the turn before.
        """
        firsts = (1, 0) if text_only else (1,)
        try:
            found = [[self.turn_end(first, n) for n in (0, 1, _SEVERAL)] for first in firsts]
        except _Uncut:
            return None
        bare, one, two = found[0]
        if any(other[0] != bare for other in found) or len({(o, e) for o, e, _ in found[0]}) != 1:
            return None
        shown = all(other[1:] == found[0][1:] for other in found)
        return LaterTurn(
            answer_before=bare[0],
            turn_end=self._ids(bare[1]),
            user=self._with_image(one[2], two[2]) if shown else None,
            user_without_image=self._segments(bare[2]),
        )

    def _with_image(self, one: str, two: str) -> tuple[Segment, ...]:
        """Segments of a turn with pictures, from its text with one and with two of them."""
        path = self.checkpoint.path
        pieces = one.split(self.placeholder)
        if len(pieces) != 2:
            raise CheckpointError(
                f"{path}: the chat template writes no single {self.placeholder} for a picture"
            )
        head, tail = pieces[0] + self.lead, self.trail + pieces[1]
        if _MARK in head:
            raise CheckpointError(f"{path}: the chat template puts the question before the picture")
        several = two.split(self.placeholder)
        between = several[1] if len(several) == _SEVERAL + 1 else ""  # the proof of two pictures tells if not
        slot = ImageSlot(between=self._ids(self.trail + between + self.lead))
        return (*self._fixed(head), slot, *self._segments(tail))

    def _segments(self, text: str) -> tuple[Segment, ...]:
        """The mark with the plain text around it, up to the nearest added tokens, is the question slot."""
        left, right = text.split(_MARK)
        cut_left, before = self._split_after(left)
        after, cut_right = self._split_before(right)
        slot = QuestionSlot(before=before, after=after, trim=self._trims)
        return (*self._fixed(cut_left), slot, *self._fixed(cut_right))

    def _fixed(self, text: str) -> tuple[Segment, ...]:
        return (Ids(ids=self._ids(text)),) if text else ()

    def _tiled(self) -> TiledTokens | None:
        if self.tiled is None:
            return None
        ids = self._ids
        return TiledTokens(
            before=ids(self.tiled.before),
            cells=tuple(tuple(ids(cell) for cell in row) for row in self.tiled.cells),
            row_end=ids(self.tiled.row_end),
            whole=ids(self.tiled.whole),
            after=ids(self.tiled.after),
        )

    def _ids(self, text: str) -> tuple[int, ...]:
        return encode(self.checkpoint, text)

    def _single(self) -> int:
        ids = self._ids(self.token)
        if len(ids) != 1:
            raise CheckpointError(
                f"{self.checkpoint.path}: image token {self.token!r} is {len(ids)} ids, expected 1"
            )
        return ids[0]


def encode(checkpoint: Checkpoint, text: str) -> tuple[int, ...]:
    """Text to ids without added begin or end tokens."""
    if not text:
        return ()
    return tuple(int(i) for i in checkpoint.tokenizer(text, add_special_tokens=False).input_ids)
