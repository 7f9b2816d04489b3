"""What a family must offer the exporter.

In: a loaded checkpoint. Out: modules of the parts, decoder dimensions, manifest facts. Not here: any family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import onnx_ir as ir

from export.checkpoint import Checkpoint
from export.decoder import DecoderShape
from runtime.image_spec import ImageSpec
from runtime.manifest import CausalAttention, Deepstack, ImageAttention, Positions1d, PositionsMrope
from runtime.prompt_spec import PromptSpec


@dataclass(frozen=True)
class VisionPart:
    """The vision module and how to trace it: example inputs by name, and which dimensions vary of each.

    `outputs`: image features (..., T, hidden) first; with deepstack its (layers, T, hidden) after them.
    `passes`: on the traced graph, after the usual ones. `dimensions`: names of the dimensions of inputs and
    outputs that the usual ones do not fit (`export/graphs.py`); None keeps what the trace found.
    """

    module: Any
    example: dict[str, Any]
    dynamic: tuple[Any, ...]
    outputs: tuple[str, ...] = ("image_features",)
    passes: tuple[Callable[[ir.Model], int], ...] = ()
    dimensions: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Modules:
    """Torch modules of the parts. embed: (B, S) -> (B, S, hidden); text and head: `export/decoder.py`.

    `passes`: on the traced decoder, after the usual ones.
    """

    vision: VisionPart
    embed: Any
    text: Any
    head: Any
    passes: tuple[Callable[[ir.Model], int], ...] = ()


class Family(Protocol):
    """One architecture (or several that are cut alike). Every method may raise CheckpointError.

    A family inherits from it: `untiled`, `positions`, `attention`, `deepstack`, `genai_type` then have the
    usual answers.
    """

    @property
    def model_types(self) -> tuple[str, ...]:
        """`model_type` values of config.json that this family handles."""

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse, naming the setting, what this family's parts cannot reproduce."""

    def decoder_shape(self, checkpoint: Checkpoint) -> DecoderShape:
        """Dimensions of the text decoder."""

    def modules(self, checkpoint: Checkpoint) -> Modules:
        """The torch modules behind the three parts."""

    def image(self, checkpoint: Checkpoint) -> ImageSpec:
        """Preprocessing as ordered operations, and the number of image tokens."""

    def prompt(self, checkpoint: Checkpoint) -> PromptSpec:
        """Prompt segments; `prompts.prove` holds them against the chat template."""

    def untiled(self) -> Mapping[str, bool | int]:
        """Settings of the image processor under which a picture is one view; none: it always is."""
        return {}

    def positions(self, checkpoint: Checkpoint) -> Positions1d | PositionsMrope:
        """How position ids count; 0, 1, 2, ... unless a family says otherwise."""
        return Positions1d()

    def attention(self, checkpoint: Checkpoint) -> CausalAttention | ImageAttention:
        """What a token of the text decoder sees; itself and all before it unless a family says otherwise."""
        return CausalAttention()

    def deepstack(self, checkpoint: Checkpoint) -> Deepstack | None:
        """Where vision features go besides the embeddings; None: nowhere."""
        return None

    def genai_type(self, checkpoint: Checkpoint) -> str | None:
        """onnxruntime-genai's `model.type` whose pipeline feeds these parts; None: it has none."""
        return None
