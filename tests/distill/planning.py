"""Cases in which the plan's memory is compared with a measured run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from distill.inputs.data import Sample
from distill.inputs.encoding import Encoder, Prompt
from distill.planning.plan_data import blank_prompt
from distill.recipe import Recipe


@dataclass(frozen=True)
class Case:
    """Two checkpoint directories of one family, the shape of a micro-batch, settings of training."""

    student: str
    teacher: str
    train: dict[str, Any] = field(default_factory=dict)
    teacher_dtype: str = "float32"
    r_max: float = 0.0
    rows: int = 4
    prompt_tokens: int = 96
    responses: int = 4
    response_tokens: int = 24
    pixels: int = 64 * 64

    def recipe(self, directory: Path) -> Recipe:
        """The recipe whose training step this is; without data, so that lengths are the stated ones."""
        width = self.prompt_tokens + self.responses * (self.response_tokens - 1)
        mask = {"r_max": self.r_max, "gate": None} if self.r_max else None
        return Recipe.model_validate(
            {
                "name": "case",
                "student": {"checkpoint": self.student},
                "teachers": [{"checkpoint": self.teacher, "dtype": self.teacher_dtype, "mask": mask}],
                "data": {"train": [{"format": "conversations", "path": str(directory / "none.jsonl")}]},
                "pool": {"teacher_responses": self.responses, "student_responses": 0},
                "train": {
                    **self.train,
                    "questions_per_step": 2 * self.rows,
                    "tokens_per_device": self.rows * width,
                },
                "throughput": {
                    "mean_prompt_tokens": self.prompt_tokens,
                    "mean_response_tokens": self.response_tokens,
                    "pixels_per_image": self.pixels,
                },
            }
        )


def sample() -> Sample:
    return Sample("0", ({"role": "user", "content": [{"type": "text", "text": "?"}]},))


def prompt(case: Case) -> Prompt:
    """A picture and as much text as the case asks for."""
    encoder = Encoder(AutoProcessor.from_pretrained(case.student))
    return blank_prompt(encoder, images=1, pixels=case.pixels, tokens=case.prompt_tokens)
