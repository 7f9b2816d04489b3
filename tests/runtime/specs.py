"""Manifest sections for the tiny checkpoint by hand: they test the runtime, not the exporter."""

from __future__ import annotations

from runtime.image_spec import (
    ExifRotate,
    ImageSpec,
    Normalise,
    ResizeExact,
    ResizeLongestEdge,
    TokenGrid,
    ToNchw,
    ToRgb,
)
from runtime.prompt_spec import Ids, ImageSlot, ImageTokens, PromptSpec, QuestionSlot

MEAN = 239.6999969482422  # float32(0.94) * 255 in float32
DEVIATION = 63.75


def image_spec(longest_edge: int = 64, side: int = 64) -> ImageSpec:
    return ImageSpec(
        operations=(
            ExifRotate(),
            ToRgb(file_alpha="drop", pixels_alpha="white"),
            ResizeLongestEdge(longest_edge=longest_edge, cap=4096, filter="lanczos"),
            ResizeExact(height=side, width=side, filter="lanczos"),
            Normalise(subtract=(MEAN,) * 3, divide=(DEVIATION,) * 3),
            ToNchw(),
        ),
        tokens=TokenGrid(patch=8, merge=2),
        max_views=1,
        max_tokens=16,
    )


def prompt_spec(ids: dict[str, list[int]]) -> PromptSpec:
    """`ids` holds the token ids of each piece of text (the test tokenises them with the real tokenizer)."""
    return PromptSpec(
        image=ImageTokens(before=tuple(ids["before"]), token=ids["image"][0], after=tuple(ids["after"])),
        system=tuple(ids["system"]),
        user=(Ids(ids=tuple(ids["user"])), ImageSlot(), QuestionSlot(), Ids(ids=tuple(ids["end"]))),
        user_without_image=(QuestionSlot(before="User: "), Ids(ids=tuple(ids["end"]))),
        assistant=tuple(ids["assistant"]),
        refused_text=("<image>", "<video>"),
    )
