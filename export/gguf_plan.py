"""What a GGUF file of a family holds, before anything is read or written.

In: nothing. Out: the types with which `families/gguf*.py` describe a file. Not here: any family, any file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Keep = Literal["f32", "f16", "half", None]
Change = Callable[[Any], Any]
"""A torch tensor in, a torch tensor out; only one tensor is in memory at a time."""


@dataclass(frozen=True)
class Piece:
    """One tensor of a GGUF file: made from the checkpoint's tensor `source` by `change`.

    `keep`: a type that no precision goes below, because llama.cpp reads it only so or loses too much; `f16`
    is that in a float16 file and float32 in any other, `half` float32 in a float32 file, else float16.
    """

    name: str
    source: str
    change: Change | None = None
    keep: Keep = None


@dataclass(frozen=True)
class Plan:
    """One GGUF file. `values` writes its key-value pairs; `model` says `text` or `vision` in messages.

    `tools_need`: texts that llama.cpp's own tools put around a picture as one token each; where the tokenizer
    has no such token they stop (a session here does not).
    """

    architecture: str
    model: Literal["text", "vision"]
    pieces: tuple[Piece, ...]
    values: Callable[[Any], None]
    has_tokenizer: bool
    tools_need: tuple[str, ...] = ()


class GgufFamily(Protocol):
    """How a family's checkpoint is laid out in llama.cpp's two files."""

    @property
    def model_types(self) -> tuple[str, ...]:
        """`model_type` values of config.json."""

    def text(self, config: Mapping[str, Any], names: Sequence[str]) -> Plan:
        """The text model's file, from config.json and the names of the checkpoint's tensors."""

    def vision(
        self, config: Mapping[str, Any], preprocessor: Mapping[str, Any], names: Sequence[str]
    ) -> Plan:
        """The mmproj file: vision encoder and projector."""
