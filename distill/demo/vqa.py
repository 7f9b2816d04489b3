"""Questions about images as tensors and token ids, ready for training.

In: questions with image paths, a processor. Out: pixels once per image, prompt ids once per wording,
labelled / unlabelled / validation / test parts split by image. Not here: losses, files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from distill.forward import sampling
from distill.forward.features import Features, encode_images
from distill.forward.sampling import Sampling
from distill.forward.tree import Group
from distill.inputs.encoding import Prompt
from evals import easy_vqa
from evals.easy_vqa import Question


@dataclass(frozen=True)
class Split:
    """Image ids of the training split's parts; the test split is another directory altogether."""

    labelled: tuple[int, ...]
    unlabelled: tuple[int, ...]
    validation: tuple[int, ...]


def split_by_image(
    questions: Sequence[Question], *, validation_images: int, labelled_questions: int, seed: int
) -> Split:
    """Shuffle images; some are validation, then images are labelled until the question budget is used."""
    count = max(q.image_id for q in questions) + 1
    order = np.random.default_rng([seed, 1]).permutation(count).tolist()
    per_image = np.bincount([q.image_id for q in questions], minlength=count)
    rest = order[validation_images:]
    used = np.cumsum(per_image[rest])
    cut = int(np.searchsorted(used, labelled_questions, side="right"))
    return Split(tuple(rest[:cut]), tuple(rest[cut:]), tuple(order[:validation_images]))


class VqaData:
    """The questions of one split, by image, as a processor prepares them."""

    def __init__(self, questions: Sequence[Question], processor: ProcessorMixin) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.by_image: dict[int, list[Question]] = {}
        for question in questions:
            self.by_image.setdefault(question.image_id, []).append(question)
        self.question = {question.id: question for question in questions}
        self._prompts: dict[str, tuple[int, ...]] = {}
        self._responses: dict[str, tuple[int, ...]] = {}
        self._pixels: dict[int, torch.Tensor] = {}

    def pixels(self, images: Sequence[int]) -> torch.Tensor:
        """(B, 3, H, W) float pixels as the checkpoint's processor makes them, each image read once."""
        new = [image for image in images if image not in self._pixels]
        if new:
            loaded = [[Image.open(self.by_image[image][0].image_path).convert("RGB")] for image in new]
            found = self.processor.image_processor(loaded, return_tensors="pt")["pixel_values"][:, 0]
            self._pixels.update(zip(new, found, strict=True))
        return torch.stack([self._pixels[image] for image in images])

    def prompt(self, question: str) -> tuple[int, ...]:
        """Ids of the chat template with one image and the generation prompt."""
        if question not in self._prompts:
            content = [{"type": "image", "image": self._blank}, {"type": "text", "text": question}]
            message: dict[str, Any] = {"role": "user", "content": content}
            encoded: Any = self.processor.apply_chat_template(
                [message],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
            )
            self._prompts[question] = tuple(encoded["input_ids"][0])
        return self._prompts[question]

    @cached_property
    def _blank(self) -> Image.Image:
        path = next(iter(self.by_image.values()))[0].image_path
        return Image.open(path).convert("RGB")

    def group(self, question: int, responses: Sequence[tuple[int, ...]] = ()) -> Group:
        """The question about its own image, with responses to it."""
        asked = self.question[question]
        (pixels,) = self.pixels([asked.image_id])
        return Group(
            Prompt(self.prompt(asked.question), _vision(pixels), str(asked.image_id)), tuple(responses)
        )

    def encode(
        self, model: PreTrainedModel, images: Sequence[int], pixels: torch.Tensor | None = None
    ) -> Features:
        """Features of the images, in one call; `pixels` (B, 3, H, W) where they were altered."""
        found = self.pixels(images) if pixels is None else pixels
        some = self.prompt(self.by_image[images[0]][0].question)
        return encode_images(model, [Prompt(some, _vision(x)) for x in found])

    def response(self, text: str) -> tuple[int, ...]:
        """Ids of a target response, with the end token."""
        if text not in self._responses:
            ids = self.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
            self._responses[text] = (*ids, self.tokenizer.eos_token_id)
        return self._responses[text]

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def _vision(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """One image (3, H, W) as the processor's tensors."""
    return {"pixel_values": pixels[None, None]}


def shifted(pixels: torch.Tensor, generator: torch.Generator, most: int = 3) -> torch.Tensor:
    """Mirror half of the images and move each by up to `most` pixels (edges repeated): labels stay true."""
    size = pixels.shape[-1]
    mirrored = torch.rand(len(pixels), generator=generator) < 0.5
    pixels = torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)
    padded = torch.nn.functional.pad(pixels, (most,) * 4, mode="replicate")
    corners = torch.randint(0, 2 * most + 1, (len(pixels), 2), generator=generator).tolist()
    cut = [x[:, top : top + size, left : left + size] for x, (top, left) in zip(padded, corners, strict=True)]
    return torch.stack(cut)


@torch.no_grad()
def answers(
    model: PreTrainedModel, data: VqaData, images: Sequence[int], *, features: Features | None = None
) -> dict[int, str]:
    """Greedy free-text answers to every question about the images: question id -> text."""
    found: dict[int, str] = {}
    for start in range(0, len(images), 100):
        part = images[start : start + 100]
        if features is None:
            seen = data.encode(model, part)
        else:
            seen = features.select(range(start, start + len(part)))
        questions = [q.id for image in part for q in data.by_image[image]]
        drawn = sampling.sample(
            model,
            [[data.group(q.id) for q in data.by_image[image]] for image in part],
            seen,
            1,
            Sampling(greedy=True),
            torch.Generator(),
            pad_id=data.tokenizer.pad_token_id,
            eos_ids=[data.tokenizer.eos_token_id],
        )
        found.update({q: data.text(r[0].ids) for q, r in zip(questions, drawn, strict=True)})
    return found


def embedded(split: str, processor: ProcessorMixin) -> VqaData:
    """easy-VQA's `train` or `test` split."""
    return VqaData(easy_vqa.load(split), processor)
