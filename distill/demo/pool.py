"""The response pool: what masked teachers and the student answered before training (METHOD 3).

In: a model, rows of questions. Out: sealed shards of responses with counts and raw log-probs.
Not here: which teacher answers which question, rewards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from distill.demo.vqa import VqaData
from distill.forward.sampling import Sampling, sample
from runtime import files

ROWS_PER_SHARD = 50


@dataclass(frozen=True)
class Row:
    """One visit of an image: which of its questions are asked."""

    image: int
    questions: tuple[int, ...]


@dataclass
class Response:
    """A distinct response to one question. `teacher` and `student` count how often each drew it;
    `mu` is the raw log-prob of each token under the model, or the mixture of models, that drew it."""

    ids: tuple[int, ...]
    teacher: int
    student: int
    mu: tuple[float, ...]

    @property
    def count(self) -> int:
        return self.teacher + self.student


Responses = dict[int, list[Response]]  # question id -> distinct responses


def merge(first: Sequence[Response], second: Sequence[Response]) -> list[Response]:
    """Merge duplicates by their token ids. The behaviour probability of a response that both drew is the
    count-weighted mean of the two."""
    merged = {response.ids: response for response in first}
    for new in second:
        old = merged.get(new.ids)
        if old is None:
            merged[new.ids] = new
            continue
        total = old.count + new.count
        mu = np.logaddexp(np.log(old.count / total) + old.mu, np.log(new.count / total) + new.mu).tolist()
        merged[new.ids] = Response(new.ids, old.teacher + new.teacher, old.student + new.student, tuple(mu))
    return list(merged.values())


def majority(
    responses: Sequence[Response], text: Callable[[Sequence[int]], str], last: Callable[[str], str]
) -> str:
    """The most frequent final answer: the reference of a question without a label (METHOD 4).

    A response without an answer is no vote; "" where no response has one.
    """
    votes: Counter[str] = Counter({"": 0})
    for response in responses:
        answer = last(text(response.ids))
        votes[answer] += response.count if answer else 0
    return votes.most_common(1)[0][0]


@torch.no_grad()
def draw(
    model: PreTrainedModel,
    data: VqaData,
    rows: Sequence[Row],
    count: int,
    source: str,
    directory: Path,
    *,
    seed: int,
    sampling: Sampling | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Responses:
    """Draw `count` responses to every question and keep them in sealed shards under `directory`.

    Shards that exist are read, not drawn again; the draw of a shard depends on (seed, shard) alone.
    `source` is `teacher` or `student`. Returns the distinct responses of every question.
    """
    shards = range(0, len(rows), ROWS_PER_SHARD)
    for number, start in enumerate(shards):
        path = directory / f"{number:05d}.jsonl"
        if not path.exists():
            part = rows[start : start + ROWS_PER_SHARD]
            state = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
            generator = torch.Generator().manual_seed(state)
            files.write_shard(path, _draw_shard(model, data, part, count, generator, sampling or Sampling()))
        if progress is not None:
            progress(number + 1, len(shards))
    return load(directory, source)


def _draw_shard(
    model: PreTrainedModel,
    data: VqaData,
    rows: Sequence[Row],
    count: int,
    generator: torch.Generator,
    sampling: Sampling,
) -> list[list[object]]:
    tokens = data.tokenizer
    drawn = sample(
        model,
        [[data.group(q) for q in row.questions] for row in rows],
        data.encode(model, [row.image for row in rows]),
        count,
        sampling,
        generator,
        pad_id=tokens.pad_token_id,
        eos_ids=[tokens.eos_token_id],
    )
    out: list[list[object]] = []
    for question, responses in zip((q for row in rows for q in row.questions), drawn, strict=True):
        times = Counter(response.ids for response in responses)
        first = {response.ids: response for response in reversed(responses)}
        for ids, number in times.items():
            mu = [round(value, 6) for value in first[ids].log_probs]
            out.append([question, list(ids), number, mu])
    return out


def load(directory: Path, source: str) -> Responses:
    """Every sealed shard of a directory; the responses of a question that was visited twice are merged."""
    found: Responses = {}
    for path in sorted(directory.glob("*.jsonl")):
        for question, ids, times, mu in files.read_shard(path):
            teacher, student = (times, 0) if source == "teacher" else (0, times)
            response = Response(tuple(ids), teacher, student, tuple(mu))
            found[question] = merge(found.get(question, []), [response])
    return found
