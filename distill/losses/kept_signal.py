"""A phase's teacher signal from disk: made where it is missing, then no teacher is in memory (METHOD 5).

In: a phase's questions with responses, its teachers under their masks, stores. Out: the signal of any
micro-batch. Not here: what is stored, and how exact it is (`distill/losses/signal_store.py`).

The questions are divided into blocks, whatever the number of processes, and a block is computed whole:
what a run that goes on computes is what the run that was cut would have computed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from distill.forward import tree
from distill.inputs.encoding import Encoder
from distill.losses.signal import Mixture, Signal, even_weights
from distill.losses.signal_store import SignalStore, entry_key
from distill.training import batches, processes
from distill.training.batches import Item, Question
from distill.training.learner import FrozenModel
from distill.training.parts import rows_for

BLOCK = 32
"""Questions in a block."""


def keys(question: Question) -> list[str]:
    """Names of a question's responses in a store."""
    return [entry_key(question.sample.id, response.ids) for response in question.responses]


@dataclass(frozen=True)
class KeptTeachers:
    """The teachers of a phase: a store each, and their weights beside each other."""

    stores: tuple[SignalStore, ...]
    weights: tuple[float, ...]

    def signal(self, items: Sequence[Item], weights: Sequence[float], device: torch.device) -> Signal:
        """What they say on the items' responses, in order; a teacher of weight 0 is left out."""
        wanted = [key for item in items for key in keys(item.question)]
        taught = [(s, w) for s, w in zip(self.stores, weights, strict=True) if w or len(self.stores) == 1]
        signals = tuple(store.signal(wanted, device) for store, _ in taught)
        if len(signals) == 1:
            return signals[0]
        return Mixture(signals, even_weights([w for _, w in taught], signals[0].tokens).to(device))


def complete(
    store: SignalStore,
    questions: Sequence[Question],
    teacher: Callable[[], FrozenModel],
    student_encoder: Encoder,
    *,
    tokens: int,
    accelerator: Accelerator,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Compute and seal what the store lacks of the questions' responses, every process its share of blocks.

    `teacher` is loaded only where something is missing. `tokens` bounds a forward. Every process calls this.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    accelerator.wait_for_everyone()
    store.refresh()
    blocks = [questions[start : start + BLOCK] for start in range(0, len(questions), BLOCK)]
    todo = [block for block in blocks if store.missing([key for q in block for key in keys(q)])]
    accelerator.wait_for_everyone()  # all have looked before one writes
    if todo:
        model = teacher()
        model.held.reshard()
        for number in range(0, len(todo), world):
            mine = todo[number + rank] if number + rank < len(todo) else None
            _block(store, mine or todo[number], model, student_encoder, tokens, accelerator, keep=bool(mine))
            progress(min(number + world, len(todo)), len(todo))
        store.seal()
    accelerator.wait_for_everyone()
    store.refresh()


def _block(
    store: SignalStore,
    questions: Sequence[Question],
    teacher: FrozenModel,
    student_encoder: Encoder,
    tokens: int,
    accelerator: Accelerator,
    *,
    keep: bool,
) -> None:
    """One block. Sharded models need as many forwards in every process, so some may be for nothing."""
    parts = _micro_batches(questions, teacher, student_encoder, tokens)
    forwards = processes.largest(accelerator, len(parts)) if accelerator.is_fsdp2 else len(parts)
    for number in range(forwards):
        if not keep and not accelerator.is_fsdp2:
            return
        rows = parts[min(number, len(parts) - 1)]
        signal = teacher.signal(rows_for(rows, 0), student_encoder.pad_id)
        if keep and number < len(parts):
            flat = [item.question for row in rows for item in row]
            lengths = [len(response.ids) for question in flat for response in question.responses]
            store.add([key for question in flat for key in keys(question)], lengths, signal)


def _micro_batches(
    questions: Sequence[Question], teacher: FrozenModel, student_encoder: Encoder, tokens: int
) -> list[list[list[Item]]]:
    encoder = teacher.encoder or student_encoder
    rows: dict[Hashable, list[Item]] = {}
    for question in questions:
        prompt = encoder.encode(question.sample)
        nobody: tuple[Any, ...] = (None,) * len(question.responses)
        key = tree.row_key(teacher.model, prompt)
        rows.setdefault(key, []).append(Item(question, (prompt,), nobody))
    return batches.micro_batches(list(rows.values()), tokens, teacher.sharing)
