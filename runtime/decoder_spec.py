"""What the manifest says of a decoder: how it takes images, positions, attention, and what it keeps.

In: JSON. Out: checked, frozen models. Not here: the manifest (`runtime/manifest.py`), carrying any of it out.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from runtime.contract import Contract, Dtype


class ReplaceTokens(Contract):
    """The n-th embedding whose id is `token` becomes the n-th image feature."""

    op: Literal["replace_tokens@1"] = "replace_tokens@1"
    token: int


class Deepstack(Contract):
    """The vision part's `output` (`layers`, image tokens, hidden) goes to the decoder's `input`
    (`layers`, 1, S, hidden), zero where no image token is; the decoder adds row i after its layer i."""

    op: Literal["deepstack.add@1"] = "deepstack.add@1"
    layers: int = Field(gt=0)
    output: str
    input: str


class Positions1d(Contract):
    """Position ids 0, 1, 2, ... over the whole sequence."""

    op: Literal["positions.1d@1"] = "positions.1d@1"


class PositionsMrope(Contract):
    """Three rows of position ids (time, row, column).

    Text: all three count on from the largest position so far plus one. A view of rows x columns tokens that
    starts at p: (p, p + row, p + column) for each token in reading order. `sections` and `interleaved` say
    how the decoder's rotary embedding uses them (for readers that build their own decoder).
    """

    op: Literal["positions.mrope@1"] = "positions.mrope@1"
    sections: tuple[int, int, int]
    interleaved: bool


class CausalAttention(Contract):
    """Every token sees itself and all before it."""

    op: Literal["attention.causal@1"] = "attention.causal@1"


class ImageAttention(Contract):
    """Every token sees itself and all before it, an image token also those after it in its picture.

    The decoder's `input` (batch, S) int64 is 1 at image tokens, 0 elsewhere; image tokens side by side are
    one picture. `windows`: by layer, how many tokens one sees at most, itself and before; null: all. The
    decoder does it (a reader that brings its own decoder must).
    """

    op: Literal["attention.image_bidirectional@1"] = "attention.image_bidirectional@1"
    input: str
    windows: tuple[int | None, ...]


_ITEM_BYTES: dict[str, int] = {
    "float32": 4,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


class StateTensor(Contract):
    """One tensor that the decoder hands from step to step.

    `kv`: grows along `sequence_axis`; an empty one (sequence 0) starts a sequence. `conv`: a fixed shape,
    zeros start a sequence. `rewindable`: cutting it short undoes the last tokens; what is not can only go on.
    `in_place`: input and output may be one buffer that is longer than the sequence, whose length only the
    attention mask tells.
    """

    input: str
    output: str
    kind: Literal["kv", "conv"]
    dtype: Dtype
    shape: tuple[int | str, ...]
    sequence_axis: int | None = Field(default=None, ge=0)
    rewindable: bool
    in_place: bool = False
    padding_side: Literal["left", "right"] | None = None

    @model_validator(mode="after")
    def _axis(self) -> StateTensor:
        if (self.kind == "kv") != (self.sequence_axis is not None):
            raise ValueError(f"{self.input}: kv has a sequence_axis and conv has none")
        if self.sequence_axis is not None and self.sequence_axis >= len(self.shape):
            raise ValueError(f"sequence_axis {self.sequence_axis} is outside of shape {list(self.shape)}")
        return self

    def sizes(self, length: int, rows: int = 1) -> list[int]:
        """The shape for so many sequences of `length` tokens; the other named dimensions are the rows."""
        sizes = [size if isinstance(size, int) else rows for size in self.shape]
        if self.sequence_axis is not None:
            sizes[self.sequence_axis] = length
        return sizes

    def bytes(self, length: int, rows: int = 1) -> int:
        """What it takes then."""
        return math.prod(self.sizes(length, rows)) * _ITEM_BYTES[self.dtype]


Attention = Annotated[CausalAttention | ImageAttention, Field(discriminator="op")]
Positions = Annotated[Positions1d | PositionsMrope, Field(discriminator="op")]


class StaticCache(Contract):
    """Graphs of fixed shapes: `embed_tokens` and `decoder_prefill` take `chunk` tokens, `decoder` takes one.

    Each `state` input is a buffer as long as the context on its `sequence_axis`; the output holds the new
    tokens' entries only, which the reader copies into the buffer at their place. `past_mask` (1, 1, 1,
    context) is 0 at tokens that the buffers hold, `masked` elsewhere; among the new ones the graph is causal.
    A last chunk that is not full is padded on the right, and `logits_index` (1,) names its last token.
    """

    op: Literal["cache.static@1"] = "cache.static@1"
    chunk: int = Field(gt=0)
    masked: float = Field(lt=0, allow_inf_nan=False)


class CoremlFacts(Contract):
    """ML programs with a state that the system keeps: `embed_tokens` and `decoder` have two functions each.

    Function `prefill` takes `chunk` tokens, `decode` one; `functions` names those of each part. The decoder's
    inputs: `inputs_embeds` (1, S, hidden), `position_ids` (1 or 3, S), `start` (1,): tokens that the state
    holds, `last` (1,): the place in the chunk whose logits are wanted, and deepstack's input where there is
    one. Each `state` is as long as `context` on its `sequence_axis`. What stands in it after the tokens that
    were run is never looked at, so a sequence is cut back by a smaller `start`, except in a `conv` state,
    which zeros start. A chunk that is not full is padded on the right with zeros, position ids too; where it
    would reach beyond `context`, or a state is a `conv`, its tokens go through `decode` one by one.
    """

    op: Literal["cache.stateful@1"] = "cache.stateful@1"
    chunk: int = Field(gt=1)
    context: int = Field(gt=0)
    functions: dict[str, tuple[str, ...]]
    deployment_target: str = Field(default="iOS18", description="oldest system that opens the parts")

    @model_validator(mode="after")
    def _named(self) -> CoremlFacts:
        for role in ("embed_tokens", "decoder"):
            if missing := {"prefill", "decode"} - set(self.functions.get(role, ())):
                raise ValueError(f"functions: {role} lacks {', '.join(sorted(missing))}")
        if len(self.functions.get("vision_encoder", ())) != 1:
            raise ValueError("functions: vision_encoder needs one")
        if self.chunk > self.context:
            raise ValueError(f"chunk {self.chunk} is longer than the context {self.context}")
        return self
