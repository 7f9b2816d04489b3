"""Log-probs (mu) of responses that came without: an OpenAI-compatible server need not return them.

In: a phase's questions, the student at its start. Out: the raw T = 1 log-prob of every token of each response
that the student drew and nobody recorded (METHOD 5), kept in sealed shards. A teacher's response needs none:
the loss takes the masked teacher's own log-prob (`distill/losses/objective.py`). Not here: the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from distill.forward import tree
from distill.losses.signal import LiveSignal
from distill.training.batches import Question
from distill.training.learner import Context
from runtime import files

SHARD = 32
"""Questions in a shard."""
Found = dict[tuple[int, int], tuple[float, ...]]


@torch.no_grad()
def stage_start_mu(
    student: PreTrainedModel,
    context: Context,
    questions: Sequence[Question],
    directory: Path,
    *,
    rank: int = 0,
    world: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> Found:
    """{(question, response): log-probs}. Every process does its share of the shards, then reads them all.

    Shards that exist are kept: they come from the student that began the phase, whoever asks now.
    """
    wanted = [
        index
        for index, question in enumerate(questions)
        if any(r.mu is None and not r.teacher for r in question.responses)
    ]
    shards = [wanted[start : start + SHARD] for start in range(0, len(wanted), SHARD)]
    for number, indices in enumerate(shards):
        path = directory / f"{number:05d}.jsonl"
        if number % world == rank and not path.exists():
            files.write_shard(path, [_scored(student, context, i, questions[i]) for i in indices])
    wait()
    found: Found = {}
    for number in range(len(shards)):
        for row in files.read_shard(directory / f"{number:05d}.jsonl"):
            for response, values in row["mu"]:
                found[row["question"], response] = tuple(values)
    return found


def _scored(student: PreTrainedModel, context: Context, index: int, question: Question) -> dict[str, Any]:
    """One question's missing log-probs: a batch of its own, so that the result depends on nothing else."""
    missing = [n for n, r in enumerate(question.responses) if r.mu is None and not r.teacher]
    prompt = context.encoder.encode(question.sample)
    group = tree.Group(prompt, tuple(question.responses[n].ids for n in missing))
    batch = tree.pack(student, [[group]], context.encoder.pad_id)
    hidden_th = context.hidden(student, [[group]], batch)
    signal = LiveSignal(hidden_th, context.head(student))
    values: list[float] = []
    for start in range(0, len(batch.target_t), context.chunk_tokens):
        stop = min(start + context.chunk_tokens, len(batch.target_t))
        log_probs_tv = signal.chunk(start, stop)
        values += log_probs_tv.gather(-1, batch.target_t[start:stop, None])[:, 0].tolist()
    lengths = batch.length_r.tolist()
    starts = [sum(lengths[:n]) for n in range(len(lengths))]
    mu = [[n, values[a : a + size]] for n, a, size in zip(missing, starts, lengths, strict=True)]
    return {"question": index, "mu": mu}
