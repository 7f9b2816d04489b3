"""What a family must offer the exporter.

In: a loaded checkpoint. Out: modules of the parts, decoder dimensions, manifest facts. Not here: any family.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from export.checkpoint import Checkpoint
from export.decoder import DecoderShape
from runtime.manifest import ImageSpec, PromptSpec


@dataclass(frozen=True)
class Modules:
    """Torch modules of the parts. vision: (N, 3, H, W) -> (N, T, hidden); embed: (B, S) -> (B, S, hidden)."""

    vision: Any
    embed: Any
    text: Any
    head: Any


class Family(Protocol):
    """One architecture (or several that are cut alike). Every method may raise CheckpointError."""

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
