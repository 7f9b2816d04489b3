"""Small distillations of tiny checkpoints, built the same way in a test and in the processes it starts."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import AutoModelForImageTextToText

from distill.forward.feature_store import FeatureStore
from distill.inputs.data import ImageSource, Sample
from distill.inputs.encoding import Encoder
from distill.losses.objective import Objective
from distill.training import learner, processes
from distill.training.learner import Context, FrozenModel
from distill.training.steps import LabelSteps, Phase, PoolSteps, Question, Scored
from distill.training.student import freeze

COLOURS = ("black", "blue", "green", "red")


def load(checkpoint: Path) -> Any:
    torch.set_num_threads(1)
    return AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()


def picture(number: int) -> ImageSource:
    """Noise, another one for each number."""
    pixels = np.random.default_rng([3, number]).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return ImageSource(data=buffer.getvalue())


def sample(number: int, *, text_only: bool = False) -> Sample:
    """Question `number`: three questions share an image."""
    asked = {"type": "text", "text": f"is there a {COLOURS[number % 4]} circle in the image? {number}"}
    images = () if text_only else (picture(number // 3),)
    content = [*({"type": "image"} for _ in images), asked]
    message = {"role": "user", "content": content}
    return Sample(f"s{number}", (message,), images, answer=("yes", "no")[number % 2])


def questions(
    encoder: Encoder, count: int, *, seed: int = 0, text_only: Sequence[int] = ()
) -> list[Question]:
    """Questions with two to four distinct responses of 1 to 6 tokens, some drawn several times."""
    draw = np.random.default_rng([seed, 5])
    words = [encoder.response_ids(word)[:-1] for word in ("yes", "no", *COLOURS)]
    found = []
    for number in range(count):
        responses: dict[tuple[int, ...], Scored] = {}
        for _ in range(int(draw.integers(2, 5))):
            picked = draw.integers(0, len(words), int(draw.integers(1, 4)))
            ids = (*(i for word in picked for i in words[word]), *encoder.eos_ids[:1])
            mu = tuple((-draw.random(len(ids)) * 4).tolist())
            drawn = int(draw.integers(1, 4))
            teacher = int(draw.integers(0, drawn + 1))
            responses[ids] = Scored(ids, drawn, float(draw.integers(0, 2)), mu, teacher)
        found.append(Question(sample(number, text_only=number in text_only), tuple(responses.values())))
    return found


class Pool:
    """A student, a teacher, a reference and their steps on made-up questions."""

    def __init__(
        self,
        student: Path,
        teacher: Path,
        directory: Path,
        *,
        accelerator: Accelerator | None = None,
        count: int = 12,
        per_step: int = 6,
        tokens: int = 4096,
        switches: Objective | None = None,
        frozen: Sequence[str] = (),
        sharing: str = "tree",
        text_only: Sequence[int] = (),
        phases: int = 2,
        unknown_mu: bool = False,
    ) -> None:
        accelerator = accelerator or processes.accelerator()
        self.model = load(student)
        freeze(self.model, frozen)
        self.encoder = Encoder.load(str(student))
        reference = FrozenModel(processes.hold(accelerator, load(student)), sharing=sharing)
        self.teacher = FrozenModel(
            processes.hold(accelerator, load(teacher)), sharing=sharing, cache=FeatureStore()
        )
        self.context = Context(
            self.encoder,
            switches or Objective(),
            sharing=sharing,
            chunk_tokens=16,
            reference=reference,
            cache=FeatureStore() if "vision" in frozen else None,
        )
        pool = questions(self.encoder, count * phases, text_only=text_only)
        if unknown_mu:
            pool = [_without_mu(question) for question in pool]
        self.steps = PoolSteps(
            [Phase(f"phase {i}", 0, 0.0, count) for i in range(phases)],
            lambda phase, model: pool[count * phase : count * (phase + 1)],
            lambda phase: self.teacher,
            self.context,
            directory,
            questions_per_step=per_step,
            tokens_per_device=tokens,
            seed=4,
            accelerator=accelerator,
        )


def _without_mu(question: Question) -> Question:
    responses = tuple(Scored(r.ids, r.count, r.correct, None, r.teacher) for r in question.responses)
    return Question(question.sample, responses)


def label_steps(
    encoder: Encoder, accelerator: Accelerator | None = None, *, tokens: int = 4096
) -> LabelSteps:
    context = Context(encoder, Objective())
    data = [sample(number) for number in range(12)]
    return LabelSteps(
        data, context, questions_per_step=5, tokens_per_device=tokens, seed=2, accelerator=accelerator
    )


def gradients(model: Any, steps: Any, step: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """One process's sum over its parts: gradients by name, figures."""
    wrapped = learner.Learner(model)
    total: dict[str, float] = {}
    for part in steps.parts(step):
        loss, figures = wrapped(part)
        loss.backward()
        for name, value in {"loss": loss.item(), **figures}.items():
            total[name] = total.get(name, 0.0) + float(value)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found, total
