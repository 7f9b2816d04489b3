"""The response pool: what teachers and student answered (METHOD 3).

In: sealed shards (`draw` makes them). Out: per sample, distinct responses with counts by source, merged over
sources; the majority answer of a question without a label.
Not here: drawing (shards.py), who answers (engines.py), rewards, statistics (pool_statistics.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distill.answers.shards import POOL, draw
from distill.inputs.data import Sample
from evals import scorers
from runtime import files
from runtime.errors import StateError

__all__ = [
    "Pool",
    "Reference",
    "Response",
    "draw",
    "load",
    "majority",
    "merge",
    "merge_pools",
    "reference",
    "skipped",
]


@dataclass(frozen=True)
class Response:
    """A distinct response to one question. `counts` says how often each source (`teacher`, `student`) drew
    it. `mu`: raw T = 1 log-prob of each token under what drew it, None where that is not known: the learner
    then recomputes it with the model that drew (METHOD 5). `retokenised`: from a server that gives text."""

    ids: tuple[int, ...]
    counts: Mapping[str, int]
    mu: tuple[float, ...] | None
    finished: bool = True
    retokenised: bool = False

    @property
    def count(self) -> int:
        return sum(self.counts.values())


Pool = dict[str, list[Response]]
"""Sample id -> distinct responses."""


@dataclass(frozen=True)
class Reference:
    """The answer that responses are held against. `pseudo`: voted by responses, no label; `share` of the
    votes that it had (1 for a label). An empty `text`: nobody gave an answer, so no response is right."""

    text: str
    pseudo: bool
    share: float


def merge(first: Sequence[Response], second: Sequence[Response]) -> list[Response]:
    """Merge duplicates by their token ids. Where both have mu, the behaviour is the mixture of the two: the
    count-weighted mean of each token's probabilities; where one has none, mu is None."""
    merged = {response.ids: response for response in first}
    for new in second:
        old = merged.get(new.ids)
        merged[new.ids] = new if old is None else _both(old, new)
    return list(merged.values())


def _both(old: Response, new: Response) -> Response:
    mu = None
    if old.mu is not None and new.mu is not None:
        shares = np.log(np.array([old.count, new.count]) / (old.count + new.count))
        mixture = np.logaddexp(shares[0] + np.array(old.mu), shares[1] + np.array(new.mu))
        mu = tuple(float(value) for value in mixture)
    return Response(
        old.ids,
        dict(Counter(old.counts) + Counter(new.counts)),
        mu,
        old.finished or new.finished,
        old.retokenised and new.retokenised,
    )


def merge_pools(first: Pool, second: Pool) -> Pool:
    """Both pools' responses to every question that either has."""
    keys = dict.fromkeys([*first, *second])
    return {key: merge(first.get(key, []), second.get(key, [])) for key in keys}


def majority(
    responses: Sequence[Response],
    text: Callable[[Sequence[int]], str],
    scorer: str = "exact",
    choices: Sequence[str] = (),
) -> Reference:
    """The most frequent answer: the reference of a question without a label (METHOD 4).

    Responses of another wording vote for one answer where the sample's rule gives them one form. A response
    without an answer is no vote; of equally frequent answers the first one drawn is taken.
    """
    votes: Counter[str] = Counter()
    for response in responses:
        answer = scorers.vote(scorer, text(response.ids), choices)
        if answer:
            votes[answer] += response.count
    if not votes:
        return Reference("", pseudo=True, share=0.0)
    (answer, most), total = votes.most_common(1)[0], votes.total()
    return Reference(answer, pseudo=True, share=most / total)


def reference(
    sample: Sample, responses: Sequence[Response], text: Callable[[Sequence[int]], str]
) -> Reference:
    """The sample's label, or without one the majority answer of `responses` (the full teacher's)."""
    if sample.answer is not None:
        return Reference(sample.answer, pseudo=False, share=1.0)
    return majority(responses, text, sample.scorer, sample.choices)


def load(directory: Path) -> Pool:
    """Every response under `directory`, a question that was asked twice merged. Raises StateError where the
    pool is not whole (naming the missing shards) or a shard is damaged."""
    facts = files.read_json(directory / POOL)
    paths = [directory / f"{number:05d}.jsonl" for number in range(facts["shards"])]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise StateError(
            f"{directory}: {len(missing)} of {len(paths)} shards are missing ({', '.join(missing[:3])}"
            f"{', ...' if len(missing) > 3 else ''}); run the command that draws them again"
        )
    found: Pool = {}
    for path in paths:
        for row in files.read_shard(path):
            if isinstance(row, dict):
                continue
            sample, ids, times, mu, finished, retokenised = row
            known = None if mu is None else tuple(mu)
            new = Response(tuple(ids), {facts["source"]: times}, known, finished, retokenised)
            found[sample] = merge(found.get(sample, []), [new])
    return found


def skipped(directory: Path) -> dict[int, str]:
    """Index in the data set -> why it has no responses."""
    return {
        row["skipped"]: row["why"]
        for path in sorted(directory.glob("*.jsonl"))
        for row in files.read_shard(path)
        if isinstance(row, dict) and "skipped" in row
    }
