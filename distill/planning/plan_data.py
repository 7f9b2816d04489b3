"""What a plan is about: how many questions, how long prompts and responses, models without values.

In: a recipe, its data where it is there, configurations. Out: `Asked`, `Models`. Not here: memory
(`distill/planning/plan_memory.py`), disk and time (`distill/planning/plan.py`).
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict

from distill import checks
from distill.checks import Checkpoint
from distill.inputs.data import Dataset, Sample, SampleError, open_data
from distill.inputs.encoding import Encoder, Prompt
from distill.masks.masking import maskable
from distill.planning import symbolic
from distill.recipe import Recipe, Teacher
from distill.training.optim import Optimizing, build, parts
from evals.tasks.images import ImageSource
from runtime.errors import InputError

FP32 = 4
LOOKED_AT = 16
"""Samples of the data whose prompts stand for all of them."""


class Result(BaseModel):
    """Base of what a plan says."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSize(Result):
    role: str
    name: str
    parameters: int
    trainable: int
    dtype: str


# --- what is asked ----------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """How many questions there are, how many without a label, how long prompts and responses are."""

    questions: int
    unlabelled: int
    known: bool
    prompt: Prompt  # of mean length
    longest: Prompt
    response_tokens: int
    notes: tuple[str, ...]

    @classmethod
    def of(cls, recipe: Recipe) -> Asked:
        stated, notes = recipe.throughput, []
        encoder = Encoder.load(
            recipe.student.checkpoint, revision=recipe.student.revision, max_pixels=recipe.data.max_pixels
        )
        length = stated.mean_response_tokens or recipe.pool.sampling.max_new_tokens
        if stated.mean_response_tokens is None:
            notes.append(
                f"responses are reckoned with {length} tokens, the longest allowed; "
                "set throughput.mean_response_tokens"
            )
        try:
            data = open_data(recipe.data.train, seed=recipe.seed)
            prompts = _looked_at(data, encoder)
            count, known = len(data), True
            sizes = [len(part) for part in data.parts]
        except InputError as error:
            prompts, known, count = [], False, stated.questions or 1000
            sizes = [count // len(recipe.data.train)] * len(recipe.data.train)
            notes.append(f"the data cannot be read yet ({error}); reckoned with {count} questions")
        if not prompts:
            notes.append("prompts are reckoned with throughput.mean_prompt_tokens and pixels_per_image")
            prompts = [
                blank_prompt(
                    encoder, stated.images_per_row, stated.pixels_per_image, stated.mean_prompt_tokens
                )
            ]
        prompts.sort(key=lambda prompt: len(prompt.ids))
        labels = [source.labels for source in recipe.data.train]
        hidden = sum(
            0 if kept == "all" else size if kept == "none" else max(0, size - int(kept))
            for kept, size in zip(labels, sizes, strict=True)
        )
        return cls(count, hidden, known, prompts[len(prompts) // 2], prompts[-1], length, tuple(notes))


def _looked_at(data: Dataset, encoder: Encoder) -> list[Prompt]:
    """Prompts of a few samples, spread over the data; those that fail are reported by the run."""
    found = []
    for place in range(0, len(data), max(1, len(data) // LOOKED_AT)):
        try:
            found.append(encoder.encode(data[place]))
        except (SampleError, InputError):
            continue
    return found


def blank_prompt(encoder: Encoder, images: int, pixels: int, tokens: int) -> Prompt:
    """A prompt with `images` empty pictures of `pixels`, filled up with text to `tokens` ids (never cut)."""
    side = max(1, round(pixels**0.5))
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (127, 127, 127)).save(buffer, "PNG")
    content: list[dict[str, str]] = [{"type": "image"}] * images + [{"type": "text", "text": "?"}]
    source = ImageSource(data=buffer.getvalue())
    prompt = encoder.encode(Sample("blank", ({"role": "user", "content": content},), (source,) * images))
    return Prompt(prompt.ids + prompt.ids[-1:] * max(0, tokens - len(prompt.ids)), prompt.vision, prompt.key)


def text_start(prompt: Prompt, placeholder: int) -> int:
    """Where the text after the last picture begins."""
    return len(prompt.ids) - prompt.ids[::-1].index(placeholder) if placeholder in prompt.ids else 0


def variant(prompt: Prompt, placeholder: int, number: int) -> Prompt:
    """Another question about the same pictures: the first id after them differs."""
    if not number:
        return prompt
    place = text_start(prompt, placeholder)
    other = [n for n in range(number + 3) if n not in (placeholder, prompt.ids[place])][number]
    return Prompt((*prompt.ids[:place], other, *prompt.ids[place + 1 :]), prompt.vision, prompt.key)


# --- models -----------------------------------------------------------


class Models:
    """The recipe's models without values, and the bytes that they take."""

    def __init__(self, recipe: Recipe, found: checks.Checkpoints) -> None:
        self.recipe = recipe
        self.student = symbolic.trainee(symbolic.empty_model(found.student.config), recipe.train)
        self.teachers = [
            symbolic.empty_model(each.config, _dtype(settings, each))
            for settings, each in zip(recipe.teachers, found.teachers, strict=True)
        ]
        needed = recipe.objective.switches.needs_reference
        self.reference_by_adapters = needed and recipe.train.lora is not None
        self.reference = (
            symbolic.empty_model(found.student.config) if needed and recipe.train.lora is None else None
        )

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.student.parameters() if p.requires_grad]

    @property
    def state_bytes(self) -> int:
        """Of the optimizer: two fp32 numbers a weight (AdamW), one for the matrices of Muon."""
        optimizer = build(self.student, Optimizing(optimizer=self.recipe.train.optimizer))
        return sum(
            (1 if isinstance(part, torch.optim.Muon) else 2) * p.numel() * FP32
            for part in parts(optimizer)
            for group in part.param_groups
            for p in group["params"]
        )

    def kept_bytes(self, number: int) -> int:
        """What a mask keeps aside: the values up to r_max, and a bit a weight (METHOD 1)."""
        mask = self.recipe.teachers[number].mask
        if mask is None or not mask.asked:
            return 0
        touched = [each.values() for each in maskable(self.teachers[number], mask.tensors).values()]
        return sum(int(mask.asked * v.numel()) * v.element_size() + -(-v.numel() // 8) for v in touched)

    def sizes(self) -> tuple[ModelSize, ...]:
        recipe = self.recipe
        rows: list[tuple[str, str, Any, int]] = [
            ("student", recipe.student.checkpoint, self.student, sum(p.numel() for p in self.trained))
        ]
        for number, (settings, model) in enumerate(zip(recipe.teachers, self.teachers, strict=True)):
            role = "teacher" if len(self.teachers) == 1 else f"teacher {number}"
            rows.append((role, settings.checkpoint, model, 0))
        if self.reference is not None:
            rows.append(("reference", recipe.student.checkpoint, self.reference, 0))
        return tuple(
            ModelSize(
                role=role,
                name=name,
                parameters=sum(p.numel() for p in model.parameters()),
                trainable=trainable,
                dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            )
            for role, name, model, trainable in rows
        )


def _dtype(settings: Teacher, checkpoint: Checkpoint) -> torch.dtype:
    """The type of a teacher's weights: as the recipe says, or as the checkpoint was written."""
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    stated = getattr(checkpoint.config, "dtype", None) or getattr(
        checkpoint.config.get_text_config(), "dtype", None
    )
    return getattr(torch, stated) if isinstance(stated, str) else stated or torch.float32
