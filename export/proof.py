"""The proof that a bundle's prompt segments equal the checkpoint's chat template.

In: a checkpoint and what assembles ids from a bundle's segments. Out: a count of comparisons, or a
ParityError with the first place that differs. Not here: cutting the segments (`prompts.py`).

Three claims, each with its own function, because a bundle may make only the first: one turn with a picture of
any tiling or without one; several pictures in a turn; further turns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from evals.torch_session import quiet_transformers
from export import prompts
from export.checkpoint import Checkpoint
from export.prompts import Message
from runtime.errors import ParityError
from runtime.image import PreparedImage
from runtime.image import prepare as prepare_image
from runtime.image_spec import ImageSpec
from runtime.prompt import render, render_later
from runtime.prompt_spec import LaterTurn, PromptSpec

QUESTIONS = (
    "what color is the circle?",
    "Is there a red shape in the image?",
    "",
    " leading space, trailing space ",
    "two\nlines\n\nand a tab\t.",
    "naïve 漢字 🙂 12345 -- (x=1.5)!",
    "Assistant: User: system",
    "0",
)
"""Questions on which segments and chat template are compared at every export."""

ANSWERS = ("red", "Yes, there is: a small one.", "two\nlines")
"""Answers between the turns; without spaces at their ends, which many templates trim."""

SIZES = (
    (32, 24), (64, 64), (96, 32), (32, 96), (200, 25), (25, 200), (640, 200),
    (1024, 768), (768, 1024), (1024, 1024),
)  # fmt: skip
"""Width and height of the pictures; between them they reach most grids of tiles that a processor knows."""


@dataclass(frozen=True)
class Turn:
    """A question about pictures; its answer, as text and as the ids it has there, if it is not the last."""

    question: str
    images: tuple[Image.Image, ...] = ()
    answer: str | None = None
    answer_ids: tuple[int, ...] = ()

    def messages(self) -> list[Message]:
        reply = [] if self.answer is None else [Message(self.answer, answer=True)]
        return [Message(self.question, self.images), *reply]


Assemble = Callable[[Sequence[Turn]], Sequence[int]]
"""Turns, the last one open, to the ids of the whole conversation."""


def assembler(
    prompt: PromptSpec, tokenizer: Tokenizer, prepare: Callable[[Image.Image], PreparedImage]
) -> Assemble:
    """What a reader of `prompt` makes of a conversation. Each picture is prepared once."""
    known: dict[int, PreparedImage] = {}

    def views(image: Image.Image) -> PreparedImage:
        if id(image) not in known:
            known[id(image)] = prepare(image)
        return known[id(image)]

    def assemble(turns: Sequence[Turn]) -> list[int]:
        ids: list[int] = []
        for turn in turns:
            prepared = [views(image) for image in turn.images]
            if ids:
                ids += render_later(prompt, tokenizer, turn.question, prepared, ids[-1]).tolist()
            else:
                ids += render(prompt, tokenizer, turn.question, prepared).tolist()
            ids += turn.answer_ids
        return ids

    return assemble


@functools.cache
def picture(number: int) -> Image.Image:
    """A picture of SIZES; the same object at every call, so that a caller may remember its views."""
    return Image.new("RGB", SIZES[number % len(SIZES)], "gray")


def reference_ids(checkpoint: Checkpoint, messages: Sequence[Message]) -> list[int]:
    """What the checkpoint's processor makes of a conversation."""
    with quiet_transformers():
        found = checkpoint.processor.apply_chat_template(
            prompts.conversation(messages), add_generation_prompt=True, tokenize=True, return_dict=True
        )
    return [int(i) for i in np.asarray(found["input_ids"]).reshape(-1)]


def first_turn(checkpoint: Checkpoint, assemble: Assemble, *, text_only: bool) -> int:
    """One turn: every question with a picture (and without one), and pictures of other tilings."""
    cases = [Turn(question, (picture(0),)) for question in QUESTIONS]
    cases += [Turn(QUESTIONS[n % 2], (picture(n),)) for n in range(1, len(SIZES))]
    cases += [Turn(question) for question in QUESTIONS] if text_only else []
    return _compare(checkpoint, assemble, [[case] for case in cases], "one turn")


def several_pictures(checkpoint: Checkpoint, assemble: Assemble, images: int) -> int:
    """Turns with up to `images` pictures, alike and of different tilings."""
    cases = [(0, 0), (7, 2), (3, 5), (1, 4, 9)]
    turns = [
        Turn(QUESTIONS[index], tuple(picture(n) for n in numbers))
        for index, numbers in enumerate(cases)
        if len(numbers) <= images
    ]
    return _compare(checkpoint, assemble, [[turn] for turn in turns], "several pictures")


def later_turns(
    checkpoint: Checkpoint, assemble: Assemble, later: LaterTurn, images: int, *, text_only: bool
) -> int:
    """Conversations of two and three turns, `images` pictures at most in all of them."""
    one, other = (picture(0),), (picture(7),)
    shapes: list[tuple[tuple[Image.Image, ...], ...]] = [(one, ()), (one, (), ())]
    if text_only:
        shapes += [((), ())]
    if later.user is not None:
        shapes += [((), one)] if text_only else []
        shapes += [(one, other), (one, (), other)] if images > 1 else []
        shapes += [(other, (picture(1), picture(3)), ())] if images > 2 else []
    conversations = [
        answered(checkpoint, later, [_turn(index, n, each) for n, each in enumerate(shape)])
        for index, shape in enumerate(shapes)
    ]
    return _compare(checkpoint, assemble, conversations, "further turns")


def _turn(index: int, n: int, pictures: tuple[Image.Image, ...]) -> Turn:
    """Turn n of conversation `index`, with a question and an answer of its own."""
    question = QUESTIONS[(index + 3 * n) % len(QUESTIONS)]
    return Turn(question, pictures, ANSWERS[(index + n) % len(ANSWERS)])


def answered(checkpoint: Checkpoint, later: LaterTurn, turns: Sequence[Turn]) -> list[Turn]:
    """The turns with their answers' ids as a conversation has them; the last is left open."""
    found = [
        replace(turn, answer_ids=prompts.encode(checkpoint, f"{later.answer_before}{turn.answer}"))
        for turn in turns[:-1]
    ]
    return [*found, replace(turns[-1], answer=None, answer_ids=())]


def _compare(
    checkpoint: Checkpoint, assemble: Assemble, conversations: Sequence[Sequence[Turn]], what: str
) -> int:
    """Raises ParityError at the first conversation whose ids differ."""
    for turns in conversations:
        wanted = reference_ids(checkpoint, [message for turn in turns for message in turn.messages()])
        got = [int(i) for i in assemble(turns)]
        if got == wanted:
            continue
        place = next(
            (i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b),
            min(len(got), len(wanted)),
        )
        pictures = "+".join(str(len(turn.images)) for turn in turns)
        raise ParityError(
            f"prompt of {turns[-1].question!r} with {pictures} picture(s): {len(got)} ids, not "
            f"{len(wanted)}, first difference at {place}; the chat template cannot be cut into fixed "
            f"segments for {what}"
        )
    return len(conversations)


# --- what a bundle may claim ------------------------------------------


@dataclass(frozen=True)
class Claims:
    """A prompt section that was proved, pictures in a conversation, and why anything was left out."""

    prompt: PromptSpec
    images: int
    notes: tuple[str, ...] = ()


def settle(checkpoint: Checkpoint, prompt: PromptSpec, image: ImageSpec, images: int) -> Claims:
    """Prove the first turn, then keep several pictures and further turns only where they can be proved too.

    Raises ParityError when the first turn does not equal the chat template.
    """
    text_only = prompt.user_without_image is not None
    tokenizer = checkpoint.tokenizer.backend_tokenizer
    known: dict[int, PreparedImage] = {}

    def prepare(source: Image.Image) -> PreparedImage:
        if id(source) not in known:
            known[id(source)] = prepare_image(source, image)
        return known[id(source)]

    assemble = assembler(prompt, tokenizer, prepare)
    first_turn(checkpoint, assemble, text_only=text_only)
    notes = []
    if images > 1:
        try:
            several_pictures(checkpoint, assemble, images)
        except ParityError as error:
            images = 1
            notes.append(f"one picture in a conversation: {error}")
    if prompt.later is None:
        reason = prompts.later_reason(checkpoint) or "it depends on the turn before it"
        notes.append(f"one turn: a further one cannot be cut from the chat template: {reason}")
        return Claims(prompt, images, tuple(notes))
    if prompt.later.user is None:
        notes.append("no pictures in a further turn: the chat template writes them by the turns before")
    for later in (prompt.later, prompt.later.model_copy(update={"user": None}), None):
        prompt = prompt.model_copy(update={"later": later})
        if later is None:
            break
        assemble = assembler(prompt, tokenizer, prepare)
        try:
            later_turns(checkpoint, assemble, later, images, text_only=text_only)
            break
        except ParityError as error:
            what = "further turns" if later.user is None else "pictures in a further turn"
            notes.append(f"no {what}: {error}")
    return Claims(prompt, images, tuple(notes))


def prove(
    checkpoint: Checkpoint,
    prompt: PromptSpec,
    tokenizer: Tokenizer,
    prepare: Callable[[Image.Image], PreparedImage],
    images: int,
) -> int:
    """Prove everything that a prompt section claims; returns the number of comparisons."""
    text_only = prompt.user_without_image is not None
    assemble = assembler(prompt, tokenizer, prepare)
    count = first_turn(checkpoint, assemble, text_only=text_only)
    if images > 1:
        count += several_pictures(checkpoint, assemble, images)
    if prompt.later is not None:
        count += later_turns(checkpoint, assemble, prompt.later, images, text_only=text_only)
    return count
