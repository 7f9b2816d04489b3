"""The decoder's token ids for a question about pictures, first or later, from a manifest's prompt section.

In: a question and the pictures' views. Out: ids equal to the checkpoint's chat template.
Not here: jinja, pictures, answers.

As in transformers, a special token written in a question is that special token; strings that the checkpoint's
processor refuses (an image placeholder) are refused here as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from runtime.errors import BundleError, InputError
from runtime.image import PreparedImage
from runtime.prompt_spec import Ids, ImageSlot, ImageTokens, PromptSpec, Segment


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, with padding and truncation off."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception
        raise BundleError(f"{path}: is no tokenizer.json ({error}); re-export") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def render(
    prompt: PromptSpec, tokenizer: Tokenizer, question: str, images: Sequence[PreparedImage]
) -> NDArray[np.int64]:
    """Token ids (prompt,) of the first turn.

    Raises InputError when a picture is missing or too many, or the question holds a refused string.
    """
    if not images and prompt.user_without_image is None:
        raise InputError("question: has no image, but this bundle answers questions about one; add an image")
    user = prompt.user if images else prompt.user_without_image
    turn = _turn(prompt, tokenizer, user or (), question, images)
    return np.array([*prompt.system, *turn, *prompt.assistant], dtype=np.int64)


def render_later(
    prompt: PromptSpec,
    tokenizer: Tokenizer,
    question: str,
    images: Sequence[PreparedImage],
    ended_with: int | None,
) -> NDArray[np.int64]:
    """Token ids (prompt,) of a further turn, which follow an answer that is part of the sequence.

    `ended_with`: the sequence's last id if it ended the answer; it is not repeated. Raises InputError as
    `render` does, and when the bundle takes one turn only.
    """
    if prompt.later is None:
        raise InputError("question: this bundle answers one question at a time; start a new conversation")
    if images and prompt.later.user is None:
        raise InputError("question: has an image, but later questions of this bundle take none; start anew")
    user = prompt.later.user if images else prompt.later.user_without_image
    end = prompt.later.turn_end
    closed = end[1:] if end and end[0] == ended_with else end
    turn = _turn(prompt, tokenizer, user or (), question, images)
    return np.array([*closed, *turn, *prompt.assistant], dtype=np.int64)


def _turn(
    prompt: PromptSpec,
    tokenizer: Tokenizer,
    segments: Sequence[Segment],
    question: str,
    images: Sequence[PreparedImage],
) -> list[int]:
    """Ids of a user's turn."""
    for refused in prompt.refused_text:
        if refused in question:
            raise InputError(f"question: contains {refused!r}, which stands for a picture; leave it out")
    ids: list[int] = []
    for segment in segments:
        if isinstance(segment, Ids):
            ids += segment.ids
        elif isinstance(segment, ImageSlot):
            for number, image in enumerate(images):
                ids += [*(segment.between if number else ()), *picture_ids(prompt.image, image)]
        else:
            asked = question.strip() if segment.trim else question
            ids += encode(tokenizer, segment.before + asked + segment.after)
    return ids


def picture_ids(spec: ImageTokens, image: PreparedImage) -> list[int]:
    """Ids that stand for one picture. Raises BundleError when the prompt names fewer tiles than it has."""
    rows, columns = image.tiles
    if spec.tiled is None or not rows * columns:
        return [*spec.before, *[spec.token] * image.tokens, *spec.after]
    tiled, counts = spec.tiled, [view.tokens for view in image.views]
    if rows > len(tiled.cells) or columns > min(map(len, tiled.cells)):
        raise BundleError(
            f"manifest.json: prompt.image.tiled has no ids for {rows} x {columns} tiles, which "
            "image.operations make; re-export"
        )
    ids = list(tiled.before)
    for row in range(rows):
        ids += tiled.row_end if row else ()
        for column in range(columns):
            ids += [*tiled.cells[row][column], *[spec.token] * counts[row * columns + column]]
    if len(counts) > rows * columns:
        ids += [*tiled.whole, *[spec.token] * counts[-1]]
    return [*ids, *tiled.after]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text as the chat template's text is tokenised: special tokens recognised, none added."""
    try:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    except (TypeError, UnicodeError) as error:  # lone surrogates, as from bytes that were no UTF-8
        raise InputError(f"question: is no valid Unicode text ({error}); give it as UTF-8") from error
