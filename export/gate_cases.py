"""What the gate shows to the parts: pictures that exercise the preprocessing, questions, forced tokens.

In: the checkpoint's reference session and the user's pictures. Out: cases. Not here: comparing.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from evals.parity.parity import ParityCase, greedy_forced
from evals.torch_session import TorchSession
from export import proof
from runtime.errors import InputError
from runtime.image import ImageInput, load
from runtime.manifest import Limits

FORCED_STEPS = 8


class Once:
    """In front of a session's class: each picture (an object) is prepared and encoded once."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._pictures: dict[int, tuple[Any, Any]] = {}  # the object is kept, so that its id stays its own
        self._encoded: dict[int, tuple[Any, Any]] = {}

    def prepare(self, source: ImageInput) -> Any:
        if id(source) not in self._pictures:
            self._pictures[id(source)] = source, super().prepare(source)  # type: ignore[misc]
        return self._pictures[id(source)][1]

    def encode_image(self, prepared: Any) -> Any:
        if id(prepared) not in self._encoded:
            self._encoded[id(prepared)] = prepared, super().encode_image(prepared)  # type: ignore[misc]
        return self._encoded[id(prepared)][1]


class GateReference(Once, TorchSession):
    """The checkpoint's reference session, shared by every precision."""


def pictures() -> list[tuple[str, ImageInput]]:
    """Pictures that exercise the preprocessing: large, tall, EXIF-rotated, alpha as file and in memory."""
    rotated = drawn(96, 160, seed=3)
    exif = rotated.getexif()
    exif[0x0112] = 6
    clear = drawn(120, 90, seed=4).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    return [
        ("large", drawn(1024, 768, seed=1)),
        ("tall", drawn(333, 777, seed=2)),
        ("rotated-file", _png(rotated, exif=exif)),
        ("alpha-file", _png(clear)),
        ("alpha", clear),
    ]


def drawn(width: int, height: int, seed: int) -> Image.Image:
    """Smooth colours, blocks and noise: every resampling error shows."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (7 + 5 * c) + seed) * np.cos(y / (11 + 3 * c)) for c in range(3)]
    blocks = random.integers(0, 160, (height // 16 + 1, width // 16 + 1, 3)).repeat(16, 0).repeat(16, 1)
    values = (
        48 * np.stack(waves, -1) + blocks[:height, :width] + random.integers(0, 48, (height, width, 3)) + 48
    )
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def _png(picture: Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG", **options)
    return out.getvalue()


def make_cases(
    reference: TorchSession,
    samples: Sequence[ImageInput],
    *,
    text_only: bool,
    images: int = 1,
) -> list[ParityCase]:
    """Cases over our own pictures and the user's, two in one turn and none, each with forced tokens."""
    for sample in samples:
        load(sample, Limits.model_fields["source_pixels"].default)  # one clear line for what is no picture
    own = [(name, image) for name, image in pictures() if name != "alpha" or _taken(reference, image)]
    found = [*own, *((f"sample-{index}", sample) for index, sample in enumerate(samples))]
    questions = [question for question in proof.QUESTIONS if question.strip()]
    cases = [
        ParityCase(name, questions[index % len(questions)], image)
        for index, (name, image) in enumerate(found)
    ]
    if images > 1:
        cases.append(ParityCase("two-pictures", questions[1], [found[1][1], found[0][1]]))
    if text_only:
        cases.append(ParityCase("no-picture", questions[0]))
    vocab = int(reference.model.config.text_config.vocab_size)
    image_token = int(reference.model.config.image_token_id)
    random = np.random.default_rng(0)
    done = []
    for case in cases:
        drawn_ids = [int(i) for i in random.integers(0, vocab, FORCED_STEPS) if i != image_token]
        # rows that only fill the table up to a round number: no text has them
        extra = [i for i in drawn_ids if reference.tokenizer.id_to_token(i) is not None]
        made = greedy_forced(reference, case, FORCED_STEPS, extra)
        # an untrained model may choose the image token, which transformers takes for one more picture
        forced = tuple(extra[0] if token == image_token else token for token in made.forced)
        done.append(replace(made, forced=forced))
    return done


def _taken(reference: TorchSession, image: ImageInput) -> bool:
    """Whether the checkpoint's processor takes it: some refuse transparency in memory, a bundle need not."""
    try:
        reference.prepare(image)
    except InputError:
        return False
    return True
