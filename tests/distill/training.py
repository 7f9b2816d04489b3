"""Small training runs, built the same way in a test and in the process that a test kills."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from distill.demo import plans, pool
from distill.demo.pool import Row
from distill.demo.vqa import VqaData
from distill.forward.sampling import Sampling
from distill.losses.objective import Objective
from distill.masks.masking import Masker
from distill.training import loop
from evals import easy_vqa, scorers

IMAGES = range(10)
RATIOS = (0.4, 0.2, 0.0)
ROWS = 5  # a stage's rows; two make a step, so the third step of a stage has one
SETTINGS = loop.Optimizing.muon(3e-3, warmup_steps=3)


def load(checkpoint: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(checkpoint).eval()


def load_data(checkpoint: Path) -> VqaData:
    processor = AutoProcessor.from_pretrained(checkpoint)
    return VqaData([q for q in easy_vqa.load("train") if q.image_id in IMAGES], processor)


def label_plan(data: VqaData, steps: int = 7) -> plans.LabelPlan:
    return plans.LabelPlan(
        data, IMAGES, lambda q: data.question[q].answer,
        steps=steps, images_per_step=3, questions_per_image=2, seed=1,
    )  # fmt: skip


def rows(data: VqaData) -> list[Row]:
    """Two questions about an image make a row; an image comes back in later stages with other questions."""
    found = []
    for start in (0, 2, 4):
        found += [Row(i, tuple(q.id for q in data.by_image[i][start : start + 2])) for i in IMAGES]
    return [row for row in found if row.questions][: ROWS * len(RATIOS)]


def draw_pools(checkpoint: Path, data: VqaData, directory: Path) -> dict[int, str]:
    """Every masked teacher's responses, kept under `directory`; returns the reference answers."""
    teacher, every = load(checkpoint), rows(data)
    masker = Masker(teacher, RATIOS[0])
    reference = {}
    for number, ratio in enumerate(RATIOS):
        masker.set(ratio)
        part = every[ROWS * number : ROWS * (number + 1)]
        found = pool.draw(
            teacher, data, part, 3, "teacher", directory / str(number), seed=number, sampling=sampling()
        )
        reference.update({q: pool.majority(r, data.text, scorers.last_word) for q, r in found.items()})
    return reference


def sampling() -> Sampling:
    return Sampling(max_new_tokens=4, top_k=4)


def pool_plan(
    teacher: Path,
    student: Path,
    data: VqaData,
    pools: Path,
    directory: Path,
    switches: Objective | None = None,
    *,
    student_responses: int = 2,
) -> plans.PoolPlan:
    model, every = load(teacher).requires_grad_(False), rows(data)
    stages = [
        plans.Stage(ratio, tuple(every[ROWS * i : ROWS * (i + 1)]), pools / str(i))
        for i, ratio in enumerate(RATIOS)
    ]
    return plans.PoolPlan(
        data, stages, model, Masker(model, RATIOS[0]), load(student).requires_grad_(False),
        draw_pools(teacher, data, pools), switches or Objective(), directory,
        rows_per_step=2, student_responses=student_responses, seed=5, norms_every=4,
    )  # fmt: skip


def fit_pool(
    teacher: Path, student: Path, pools: Path, directory: Path, *, save_every: int = 2, die_after: int = -1
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Train on the pool; with `die_after` the process ends itself by SIGKILL after that many steps."""
    torch.set_num_threads(1)

    def progress(done: int, *_: object) -> None:
        if done == die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    model, data = load(student), load_data(student)
    plan = pool_plan(teacher, student, data, pools, directory)
    log = loop.fit(model, plan, SETTINGS, directory, save_every=save_every, progress=progress)
    return model.state_dict(), log
