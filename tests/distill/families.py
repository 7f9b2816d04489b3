"""Rows of every shape for tests over families: sizes, several images, text alone, other image counts."""

from __future__ import annotations

import inspect
import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from distill.forward.features import accepted
from distill.forward.tree import Group, Row
from distill.inputs.data import ImageSource, Sample
from distill.inputs.encoding import Encoder, Prompt

SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "square": ((64, 64),), "wide": ((96, 40),), "two": ((40, 100), (130, 130)), "text": (),
}  # fmt: skip


def picture(width: int, height: int, seed: int = 0) -> ImageSource:
    """Blocks of random colours: an image that differs from others also after resizing."""
    colours = np.random.default_rng([seed, width, height]).integers(0, 255, (3, 4, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(colours).resize((width, height), Image.Resampling.NEAREST).save(out, "PNG")
    return ImageSource(data=out.getvalue())


def sample(shape: str, text: str = "what color is the circle?", seed: int = 0) -> Sample:
    images = tuple(picture(*size, seed) for size in SHAPES[shape])
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    return Sample(f"{shape}: {text}", ({"role": "user", "content": content},), images)


def rows(encoder: Encoder) -> list[Row]:
    """Four rows of different images; 0 to 3 responses of 1 to 6 tokens; a question asked twice."""

    def ask(shape: str, text: str, *responses: tuple[int, ...]) -> Group:
        return Group(encoder.encode(sample(shape, text)), responses)

    return [
        [
            ask("square", "what is it", (50, 60, 70), (50, 90), (80,)),
            ask("square", "is there a red circle?", (100, 110, 12, 130, 14, 21)),
            ask("square", "no red?"),
            ask("square", "what is it", (40, 41)),
        ],
        [ask("wide", "what is", (70, 70, 20, 30))],
        [ask("two", "what color? blue", (20, 21), (90, 90, 90, 22, 23))],
        [ask("text", "what color? black", (30, 40), (31,))],
    ]


def inputs(model: Any, prompt: Prompt, response: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """What the model alone is called with: the processor's own tensors and the whole sequence."""
    ids = torch.tensor([[*prompt.ids, *response]])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **accepted(model.forward, prompt)}
    assert set(given) >= set(prompt.vision)
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        given["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    return given


def alone(model: Any, rows: list[Row]) -> torch.Tensor:
    """(T, vocabulary) log-probs of every response token, each sequence with its images by itself."""
    found = []
    for row in rows:
        for group in row:
            for response in group.responses:
                logits = model(**inputs(model, group.prompt, response), use_cache=False).logits[0]
                found.append(logits[len(group.prompt.ids) - 1 : -1].log_softmax(-1))
    return torch.cat(found)
