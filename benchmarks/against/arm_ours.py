"""Our arm of `benchmarks/distill.py`: `PoolSteps` under `loop.fit`, prompts encoded beforehand.

python arm_ours.py WORK [--steps N] [--tokens BUDGET] [--sharing MODE] [--gradient FILE]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers import AutoModelForImageTextToText

from benchmarks.against import common
from benchmarks.against.common import Asked, Record
from distill.forward import tree
from distill.inputs.encoding import Prompt
from distill.losses.objective import Objective
from distill.masks.teachers import Phase
from distill.training import loop, processes
from distill.training.batches import Question, Scored
from distill.training.learner import Context, FrozenModel
from distill.training.optim import Optimizing
from distill.training.steps import PoolSteps

# The mean over response tokens of the JSD, as TRL's trainer with beta 0.5: nothing else.
SWITCHES = Objective(rl=0.0, kl_beta=0.0, distill_weight=0.0, normaliser="token")


class Encoded:
    """The encoder's part in training: prompts are there already, as TRL's are."""

    pad_id = 0

    def __init__(self, batch: list[Asked]) -> None:
        self.prompts = {
            str(n): Prompt(
                asked.ids,
                {"pixel_values": asked.pixel_values, "image_grid_thw": asked.image_grid_thw},
                key=str(n),
            )
            for n, asked in enumerate(batch)
        }

    def encode(self, sample: Any) -> Prompt:
        return self.prompts[sample.id]


def questions(batch: list[Asked], merge: bool) -> list[Question]:
    """Duplicates are merged by count, as the pool does; or not, to see what that brings."""
    found = []
    for number, asked in enumerate(batch):
        counts = Counter(asked.responses) if merge else None
        drawn = counts.items() if counts else [(ids, 1) for ids in asked.responses]
        scored = tuple(Scored(ids, float(count), 1.0, (0.0,) * len(ids)) for ids, count in drawn)
        found.append(Question(SimpleNamespace(id=str(number), images=()), scored))  # type: ignore[arg-type]
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--sharing", default=tree.TREE, choices=tree.MODES)
    parser.add_argument("--apart", action="store_true", help="do not merge duplicates")
    parser.add_argument("--gradient", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    batch = common.read(options.work)
    student, teacher = (
        AutoModelForImageTextToText.from_pretrained(options.work / name, dtype=torch.float32)
        for name in (common.STUDENT, common.TEACHER)
    )
    accelerator = processes.accelerator()
    frozen = FrozenModel(processes.hold(accelerator, teacher), sharing=options.sharing)
    context = Context(Encoded(batch), SWITCHES, sharing=options.sharing)  # type: ignore[arg-type]
    asked = questions(batch, merge=not options.apart)
    record = Record(options.warmup)
    with tempfile.TemporaryDirectory() as directory:
        steps = PoolSteps(
            [Phase("bench", 0, 0.0, len(batch))],  # type: ignore[list-item]
            lambda phase, model: asked,
            lambda phase: frozen,
            context,
            Path(directory),
            questions_per_step=len(batch),
            tokens_per_device=options.tokens,
            passes=options.warmup + options.steps,
        )
        if options.gradient:
            gradient(student, steps, options.gradient)
            return
        record.start()
        loop.fit(
            student,
            steps,
            Optimizing(lr=common.LR, clip=common.CLIP),
            Path(directory),
            save_every=10**9,
            progress=lambda done, total, entry: record.step(entry["loss"]),
        )
    record.finish(arm="ours", tokens=options.tokens, sharing=options.sharing)


def gradient(student: Any, steps: PoolSteps, out: Path) -> None:
    """The gradient of one whole step."""
    steps.prepare(student, 0)
    for part in steps.parts(0):
        loss, _ = part(student)
        loss.backward()
    common.save_gradient(out, student.named_parameters())


if __name__ == "__main__":
    main()
