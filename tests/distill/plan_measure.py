"""Measures real training steps on the CPU: `python -m tests.distill.plan_measure CASES.json`.

Prints a line of JSON a case: the most bytes that the allocator held at once (its own count, by the profiler's
memory events), from the first weight on, over two steps of two micro-batches each through `loop.fit`.
Resident memory above what the imports took is printed beside it: it also holds what the allocator keeps for
later, and the profiler's events.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.state import AcceleratorState
from transformers import AutoConfig, AutoModelForImageTextToText

from distill.forward import tree
from distill.inputs.encoding import Prompt
from distill.losses.objective import Objective
from distill.masks.masking import Masker
from distill.settings import Train
from distill.training import loop, processes
from distill.training.batches import Item, Question, Scored
from distill.training.learner import Context, FrozenModel
from distill.training.optim import Optimizing
from distill.training.parts import PoolPart, Totals
from distill.training.student import checkpointed, freeze, with_lora
from tests.distill.planning import Case, prompt, sample


class Steps:
    """Two steps of two equal micro-batches."""

    steps = 2

    def __init__(self, part: PoolPart) -> None:
        self.part = part

    def is_boundary(self, step: int) -> bool:
        return False

    def prepare(self, student: Any, step: int) -> None:
        pass

    def parts(self, step: int) -> list[PoolPart]:
        return [self.part, self.part]

    def figures(self, step: int) -> dict[str, float]:
        return {}


def model(directory: str, dtype: torch.dtype) -> Any:
    return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(directory), dtype=dtype)


def run(case: Case, out: Path) -> None:
    train = Train(**case.train)  # type: ignore[arg-type]
    student = model(case.student, torch.float32)
    freeze(student, train.freeze)
    if train.gradient_checkpointing:
        checkpointed(student)
    if train.lora is not None:
        student = with_lora(student, train.lora.rank, train.lora.alpha, train.lora.targets)
    accelerator = processes.accelerator(train.precision)
    teacher = model(case.teacher, getattr(torch, case.teacher_dtype))
    masker = Masker(teacher, case.r_max) if case.r_max else None
    held = processes.hold(accelerator, teacher)
    if masker is not None:
        masker.set(case.r_max)
    switches = Objective()
    reference = None
    if train.lora is None:
        reference = FrozenModel(processes.hold(accelerator, model(case.student, torch.float32)))
    context = Context(
        encoder=Pads(), switches=switches, sharing=tree.TREE, chunk_tokens=train.chunk_tokens,
        reference=reference, lora=train.lora is not None,
    )  # type: ignore[arg-type]  # fmt: skip
    asked: Prompt = prompt(case)
    ids = tuple(range(10, 10 + case.response_tokens))
    scored = tuple(
        Scored((*ids[:-1], 10 + n), 1.0, float(n % 2), (-1.0,) * len(ids)) for n in range(case.responses)
    )
    item = Item(Question(sample(), scored), (asked, asked), tuple(each.mu for each in scored))
    count = float(case.rows * case.responses)
    totals = Totals(count, count, count * case.response_tokens, case.rows)
    part = PoolPart(context, [[item]] * case.rows, [FrozenModel(held)], [1.0], totals)
    settings = Optimizing(optimizer=train.optimizer)
    loop.fit(student, Steps(part), settings, out, accelerator=accelerator, save_every=1000)


class Pads:
    pad_id = 0


def peak_bytes(profile: Any) -> int:
    """The highest running sum of the allocator's events."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        most = max(most, level)
    return most


if __name__ == "__main__":
    torch.set_num_threads(1)
    for number, settings in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        gc.collect()
        AcceleratorState._reset_state(True)
        before = psutil.Process().memory_info().rss
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            run(Case(**settings), Path(sys.argv[1]).parent / f"fit-{number}")
        resident = psutil.Process().memory_info().rss - before
        print(json.dumps({"allocated": peak_bytes(profile), "resident": resident}))
