"""Samples as a checkpoint's own processor prepares them, and text to and from token ids.

In: a processor, samples. Out: prompts (ids and vision tensors), response ids, text. Knows no model family:
whatever the processor returns beside ids and masks is kept under its own name.
Not here: batches, features (`distill/forward/features.py`), reading data.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import AutoProcessor, GenerationConfig, ProcessorMixin
from transformers.utils import cached_file

from evals.torch_session import TOKENIZER, take_template, take_tokenizer
from runtime.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from distill.inputs.data import Sample

TEXT_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
"""What a processor returns for the text; everything else is vision."""


@dataclass(frozen=True)
class Prompt:
    """One conversation up to the assistant's turn.

    `ids` with the image placeholders expanded; `vision` the processor's other tensors of this one sample
    (`pixel_values`, grids, ...), {} for text alone; `key` a hash of the images, "" without: prompts of equal
    key show the same images in the same order.
    """

    ids: tuple[int, ...]
    vision: Mapping[str, torch.Tensor] = field(default_factory=dict, compare=False)
    key: str = ""


class Encoder:
    """Samples to prompts by a processor's chat template; responses to ids and back.

    `max_prompt_tokens`: a longer prompt is an InputError. `max_pixels`: a larger image is scaled down before
    the processor sees it. `eos_ids`: every id that ends a response; default, the tokenizer's own.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        *,
        max_prompt_tokens: int | None = None,
        max_pixels: int | None = None,
        eos_ids: Sequence[int] = (),
    ) -> None:
        self.processor = processor
        self.tokenizer: Any = processor.tokenizer
        self.max_prompt_tokens, self.max_pixels = max_prompt_tokens, max_pixels
        self.eos_ids: tuple[int, ...] = tuple(eos_ids) or (self.tokenizer.eos_token_id,)
        if None in self.eos_ids:
            raise CheckpointError(f"{self.tokenizer.name_or_path}: the tokenizer names no end token")
        pad = self.tokenizer.pad_token_id
        self.pad_id: int = self.eos_ids[0] if pad is None else pad

    @classmethod
    def load(cls, checkpoint: str, *, revision: str | None = None, **limits: Any) -> Encoder:
        """Processor and end ids of a checkpoint (its generation config may list several of them).

        Raises CheckpointError where it has no chat template.
        """
        where: dict[str, Any] = {} if revision is None else {"revision": revision}
        processor = AutoProcessor.from_pretrained(checkpoint, **where)
        if not take_template(processor):
            raise CheckpointError(
                f"{checkpoint}: no chat template in chat_template.jinja, chat_template.json or "
                "tokenizer_config.json; copy that of the model it was trained from"
            )
        missing = {"_raise_exceptions_for_missing_entries": False}
        if file := cached_file(checkpoint, TOKENIZER, **missing, **where):
            take_tokenizer(Path(file), processor)
        try:
            eos = GenerationConfig.from_pretrained(checkpoint, **where).eos_token_id
        except OSError:  # no generation_config.json
            eos = None
        ids = () if eos is None else tuple(eos) if isinstance(eos, (list, tuple)) else (eos,)
        return cls(processor, eos_ids=ids, **limits)

    def encode(self, sample: Sample) -> Prompt:
        """The sample's conversation with the generation prompt, as `processor.apply_chat_template` gives it.

        Raises InputError where images and placeholders differ in number, the processor refuses the sample
        or the prompt is too long.
        """
        images = [self._fit(image) for image in sample.open_images()]
        encoded = self._apply(sample, _with_images(sample, images))
        ids = tuple(encoded["input_ids"][0].tolist())
        if self.max_prompt_tokens is not None and len(ids) > self.max_prompt_tokens:
            raise InputError(
                f"sample {sample.id}: a prompt of {len(ids)} tokens, {self.max_prompt_tokens} are allowed; "
                "raise data.max_prompt_tokens, lower data.max_pixels, or leave the sample out"
            )
        if not images:
            self._refuse_placeholder(ids, f"sample {sample.id}")
        vision = {name: value for name, value in encoded.items() if name not in TEXT_INPUTS}
        return Prompt(ids, vision, _hash(images))

    def _apply(self, sample: Sample, messages: list[dict[str, Any]]) -> Any:
        try:
            return self.processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        except (ValueError, TypeError, LookupError, RuntimeError) as error:
            reason = str(error).split("\n")[0] or type(error).__name__
            raise InputError(f"sample {sample.id}: the processor cannot prepare it: {reason}") from error

    def _refuse_placeholder(self, ids: Sequence[int], where: str) -> None:
        placeholder = getattr(self.processor, "image_token_id", None)
        if placeholder is not None and placeholder in ids:
            token = self.tokenizer.convert_ids_to_tokens(placeholder)
            raise InputError(f"{where}: its text holds the image placeholder {token} but no image; remove it")

    def response_ids(self, text: str, *, end: bool = True) -> tuple[int, ...]:
        """Ids of an assistant's turn that says `text`; with `end`, the template's end token closes it."""
        lead, last = self._turn
        ids = self.tokenizer(lead + text, add_special_tokens=False)["input_ids"]
        self._refuse_placeholder(ids, f"answer {text[:40]!r}")
        return (*ids, last) if end else tuple(ids)

    def text(self, ids: Sequence[int]) -> str:
        """The text of response ids, without special tokens and surrounding space."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    @cached_property
    def _turn(self) -> tuple[str, int]:
        """What the chat template puts between generation prompt and answer, and the id that ends it."""
        mark = "answer"
        asked: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": "question"}]}]
        said = [*asked, {"role": "assistant", "content": [{"type": "text", "text": mark}]}]
        start: Any = self.processor.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        whole: Any = self.processor.apply_chat_template(said, tokenize=False)
        lead, found, tail = whole.removeprefix(start).partition(mark)
        if not whole.startswith(start) or not found or lead.strip():
            return "", self.eos_ids[
                0
            ]  # the template writes past turns in another way than it asks for new ones
        first = self.tokenizer(tail, add_special_tokens=False)["input_ids"][:1]
        return lead, first[0] if first and first[0] in self.eos_ids else self.eos_ids[0]

    def _fit(self, image: Image.Image) -> Image.Image:
        pixels = image.width * image.height
        if self.max_pixels is None or pixels <= self.max_pixels:
            return image
        scale = math.sqrt(self.max_pixels / pixels)
        size = max(1, math.floor(image.width * scale)), max(1, math.floor(image.height * scale))
        return image.resize(size, Image.Resampling.BICUBIC)


def _with_images(sample: Sample, images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """The sample's messages with a picture in every image placeholder."""
    left = iter(images)
    messages, placeholders = [], 0
    for message in sample.messages:
        content = message["content"]
        if not isinstance(content, str):
            parts = []
            for part in content:
                if part["type"] == "image":
                    placeholders += 1
                    part = {"type": "image", "image": next(left, None)}
                parts.append(dict(part))
            content = parts
        messages.append({"role": message["role"], "content": content})
    if placeholders != len(images):
        raise InputError(
            f"sample {sample.id}: {placeholders} image places in its messages, {len(images)} images"
        )
    return messages


def _hash(images: Sequence[Image.Image]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for image in images:
        digest.update(f"{image.mode}{image.size}".encode())
        digest.update(image.tobytes())
    return digest.hexdigest() if images else ""
