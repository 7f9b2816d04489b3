"""The manifest's prompt section: a conversation in token ids.

In: JSON. Out: a checked `PromptSpec`. Not here: assembling a prompt (`runtime/prompt.py`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from runtime.contract import Contract

TokenTuple = tuple[int, ...]


class Ids(Contract):
    """Fixed token ids."""

    kind: Literal["ids"] = "ids"
    ids: TokenTuple


class ImageSlot(Contract):
    """Where the turn's pictures go, each as `prompt.image` says, `between` two of them."""

    kind: Literal["image"] = "image"
    between: TokenTuple = ()


class QuestionSlot(Contract):
    """`before + question + after`, tokenised as one string without special tokens added.

    `trim`: white space at the ends of the question is left out, as by Python's `str.strip`, jinja's `trim`.
    """

    kind: Literal["question"] = "question"
    before: str = ""
    after: str = ""
    trim: bool = False


Segment = Annotated[Ids | ImageSlot | QuestionSlot, Field(discriminator="kind")]


class TiledTokens(Contract):
    """A picture that became rows x columns of tiles (and a whole view after them, if there is one more view).

    `before`; for each row its tiles, each `cells[row][column]` and its tokens, `row_end` between rows;
    `whole` and the tokens of the last view if it is no tile; `after`.
    """

    before: TokenTuple
    cells: tuple[tuple[TokenTuple, ...], ...]
    row_end: TokenTuple = ()
    whole: TokenTuple = ()
    after: TokenTuple


class ImageTokens(Contract):
    """One picture in the prompt: `before`, then `token` once for each image token, then `after`.

    A picture of several tiles goes by `tiled`; null: as any other picture.
    """

    before: TokenTuple
    token: int
    after: TokenTuple
    tiled: TiledTokens | None = None


class LaterTurn(Contract):
    """A further turn after an answer: `turn_end` closes it, then the user's segments.

    A generated stop id that `turn_end` begins with is not repeated. `user` has an image slot or none at all,
    `user_without_image` is for a turn without pictures. An answer that is known as text only is tokenised as
    `answer_before + text`.
    """

    answer_before: str = ""
    turn_end: TokenTuple
    user: tuple[Segment, ...] | None
    user_without_image: tuple[Segment, ...]


class PromptSpec(Contract):
    """Token ids of a conversation; the exporter proves them equal to the chat template.

    First turn: `system` (may be empty) + `user` + `assistant`, which opens the answer.
    `user_without_image` is null when a picture is needed. `later` is null when the template cannot be cut so.
    """

    image: ImageTokens
    system: TokenTuple = ()
    user: tuple[Segment, ...]
    user_without_image: tuple[Segment, ...] | None = None
    assistant: TokenTuple
    later: LaterTurn | None = None
    refused_text: tuple[str, ...] = Field(
        default=(),
        description="strings a question must not contain (the checkpoint's processor refuses them too)",
    )

    @model_validator(mode="after")
    def _slots(self) -> PromptSpec:
        with_image = {"user": self.user, "later.user": self.later and self.later.user}
        without = {
            "user_without_image": self.user_without_image,
            "later.user_without_image": self.later and self.later.user_without_image,
        }
        for images, turns in ((1, with_image), (0, without)):
            for name, segments in turns.items():
                kinds = [segment.kind for segment in segments or ()]
                if segments is not None and (kinds.count("image"), kinds.count("question")) != (images, 1):
                    raise ValueError(
                        f"{name} must hold one question slot and {images or 'no'} image slot, got {kinds}"
                    )
        return self
