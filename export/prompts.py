"""Pre-rendered prompt segments, and the proof that they equal the chat template.

In: a checkpoint's processor. Out: a `PromptSpec` in token ids. Not here: assembling a prompt on the device
(`runtime/prompt.py`), the image token layout (`families/`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image

from export.checkpoint import Checkpoint
from runtime.errors import CheckpointError, ParityError
from runtime.prompt_spec import Ids, ImageSlot, ImageTokens, PromptSpec, QuestionSlot, Segment

_MARK = "\ue000Q\ue001"  # private-use characters: no template and no tokenizer gives them a meaning

PROOF_QUESTIONS = (
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


def messages(question: str, images: Sequence[Any] = ()) -> list[dict[str, Any]]:
    """One user turn, pictures first."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def template_ids(checkpoint: Checkpoint, question: str, images: Sequence[Any] = ()) -> list[int]:
    """What the checkpoint's processor makes of the question: the reference."""
    found = checkpoint.processor.apply_chat_template(
        messages(question, images), add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return [int(i) for i in found["input_ids"][0]]


def segments(
    checkpoint: Checkpoint,
    *,
    placeholder: str,
    before: str,
    token: str,
    after: str,
    refused: tuple[str, ...],
) -> PromptSpec:
    """Cut the rendered chat template into token-id segments.

    `placeholder` is what the template writes for a picture; on the device it becomes
    `before + token x N + after`. Raises CheckpointError when the template has no such shape.
    """
    system, user, assistant = _rendered_parts(checkpoint, with_image=True)
    if user.count(placeholder) != 1:
        raise CheckpointError(
            f"{checkpoint.path}: the chat template writes no single {placeholder} for a picture"
        )
    head, tail = user.split(placeholder)
    if _MARK in head:
        raise CheckpointError(f"{checkpoint.path}: the chat template puts the question before the picture")
    bare_system, bare_user, bare_assistant = _rendered_parts(checkpoint, with_image=False)
    ids = _encode(checkpoint)
    without = None
    if (bare_system, bare_assistant) == (system, assistant):
        without = tuple(_question_segments(checkpoint, bare_user))
    return PromptSpec(
        image=ImageTokens(before=ids(before), token=_single(checkpoint, token), after=ids(after)),
        system=ids(system),
        user=(Ids(ids=ids(head)), ImageSlot(), *_question_segments(checkpoint, tail)),
        user_without_image=without,
        assistant=ids(assistant),
        refused_text=refused,
    )


def _rendered_parts(checkpoint: Checkpoint, *, with_image: bool) -> tuple[str, str, str]:
    """(opening of a conversation, user turn with the mark as its question, opening of the answer)."""

    def render(turns: list[dict[str, Any]], generate: bool) -> str:
        text = checkpoint.processor.apply_chat_template(turns, add_generation_prompt=generate, tokenize=False)
        return str(text)

    turn = messages(_MARK)
    if with_image:
        turn[0]["content"].insert(0, {"type": "image"})
    reply = {"role": "assistant", "content": [{"type": "text", "text": "yes"}]}
    first, full = render(turn, False), render(turn, True)
    if not full.startswith(first) or first.count(_MARK) != 1:
        raise CheckpointError(
            f"{checkpoint.path}: the chat template changes the question or the turn before an answer"
        )
    again = render([*turn, reply, *turn], False).removeprefix(render([*turn, reply], False))
    opening = first.removesuffix(again) if again and first.endswith(again) else ""
    return opening, first.removeprefix(opening), full.removeprefix(first)


def _question_segments(checkpoint: Checkpoint, text: str) -> list[Segment]:
    """The mark with the plain text around it (up to the nearest added tokens) becomes the question slot."""
    left, right = text.split(_MARK)
    added = [token.content for token in checkpoint.tokenizer.added_tokens_decoder.values()]
    pattern = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)")
    ends = [match.end() for match in pattern.finditer(left)]
    start = pattern.search(right)
    cut_left, cut_right = (ends[-1] if ends else 0), (start.start() if start else len(right))
    ids = _encode(checkpoint)
    pieces: list[Segment] = [
        Ids(ids=ids(left[:cut_left])),
        QuestionSlot(before=left[cut_left:], after=right[:cut_right]),
        Ids(ids=ids(right[cut_right:])),
    ]
    return [piece for piece in pieces if not isinstance(piece, Ids) or piece.ids]


def _encode(checkpoint: Checkpoint) -> Callable[[str], tuple[int, ...]]:
    """Text to ids without added begin or end tokens."""

    def encode(text: str) -> tuple[int, ...]:
        return tuple(int(i) for i in checkpoint.tokenizer(text, add_special_tokens=False).input_ids)

    return encode


def _single(checkpoint: Checkpoint, token: str) -> int:
    ids = _encode(checkpoint)(token)
    if len(ids) != 1:
        raise CheckpointError(f"{checkpoint.path}: image token {token!r} is {len(ids)} ids, expected 1")
    return ids[0]


def prove(
    checkpoint: Checkpoint, assembled: Callable[[str, Sequence[Any]], Sequence[int]], pictures: Sequence[int]
) -> int:
    """Compare `assembled(question, images)` with the chat template; returns the number of comparisons.

    Raises ParityError with the first differing place.
    """
    count = 0
    for number in pictures:
        images = [Image.new("RGB", (32, 24), "gray")] * number
        for question in PROOF_QUESTIONS:
            wanted = template_ids(checkpoint, question, images)
            got = [int(i) for i in assembled(question, images)]
            if got != wanted:
                place = next(
                    (i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b),
                    min(len(got), len(wanted)),
                )
                raise ParityError(
                    f"prompt of {question!r} with {number} picture(s): {len(got)} ids, not {len(wanted)}, "
                    f"first difference at {place}; the chat template cannot be cut into fixed segments"
                )
            count += 1
    return count
