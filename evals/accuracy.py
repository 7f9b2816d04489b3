"""Accuracy of anything that answers: a runtime `Session`, the torch reference, or texts made elsewhere.

In: questions with labels, and a session or the answers. Out: one prediction per question, its score, and
what changed between two runs. Not here: the scoring rule (`evals/scorers.py`), timing, judging.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from evals import scorers, stats
from evals.records import Agreement, Comparison, Flip, Record, Score
from runtime import files

MAX_NEW_TOKENS = 32
TIE_MARGIN = 1e-4
DIFFERING_KEPT = 100


class Item(Protocol):
    """A question with its label, such as `evals.easy_vqa.Question`."""

    @property
    def id(self) -> Hashable: ...
    @property
    def image_id(self) -> Hashable: ...
    @property
    def image_path(self) -> Path: ...
    @property
    def question(self) -> str: ...
    @property
    def answer(self) -> str: ...


class Prediction(Record):
    """One answer, as generated. `token_ids` is empty when only the text is known."""

    id: str
    image_id: str
    question: str
    reference: str
    text: str
    right: bool
    token_ids: list[int]


class AccuracyResult(Record):
    """Every prediction, in the order of the questions."""

    predictions: list[Prediction]

    @classmethod
    def of(
        cls, items: Sequence[Item], texts: Sequence[str], token_ids: Sequence[Sequence[int]] | None = None
    ) -> AccuracyResult:
        """Score texts that were generated elsewhere. Raises ValueError on unequal lengths."""
        given = [len(items), len(texts), len(items) if token_ids is None else len(token_ids)]
        if len(set(given)) != 1:
            raise ValueError(f"AccuracyResult.of: {given} items, texts and token lists; wanted equal numbers")
        ids = token_ids if token_ids is not None else [()] * len(items)
        rows = zip(items, texts, ids, strict=True)
        return cls(predictions=[_predict(item, text, tokens) for item, text, tokens in rows])

    @property
    def score(self) -> Score:
        return Score.of(sum(self.outcomes), len(self.predictions))

    @property
    def outcomes(self) -> list[bool]:
        return [one.right for one in self.predictions]

    def write(self, path: Path) -> Path:
        files.write_text(path, self.model_dump_json() + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> AccuracyResult:
        return cls.model_validate_json(path.read_bytes())


def evaluate(
    session: Any,
    items: Sequence[Item],
    progress: Callable[[int, int], None] | None = None,
    options: Any = None,
) -> AccuracyResult:
    """Ask every question, greedily unless `options` (runtime `GenerationOptions`) say otherwise.

    An image is prepared and encoded once for consecutive questions about it, where the session offers its
    steps (`prepare`, `encode_image`, `prompt_ids`, `complete`); else `ask` is used. `progress(done, total)`
    is called after each question. Errors of the session pass through: a question that cannot be asked is
    not a wrong answer.
    """
    if options is None:
        from runtime.generation import GenerationOptions

        options = GenerationOptions(max_new_tokens=MAX_NEW_TOKENS)
    predictions = []
    for item, answer in zip(items, _answers(session, items, options), strict=True):
        predictions.append(_predict(item, answer.text, answer.token_ids))
        if progress:
            progress(len(predictions), len(items))
    return AccuracyResult(predictions=predictions)


def compare_methods(
    student: str,
    names: tuple[str, str],
    reference: AccuracyResult,
    candidate: AccuracyResult,
    *,
    seed: int = 0,
) -> Comparison:
    """Two methods (names: reference, candidate) on the same questions. Raises ValueError if they differ."""
    return Comparison(
        student=student, reference=names[0], candidate=names[1], **_paired(reference, candidate, seed)
    )


def compare_answers(
    reference: AccuracyResult,
    candidate: AccuracyResult,
    *,
    margins: Mapping[str, float] | None = None,
    tie_margin: float = TIE_MARGIN,
    keep: int = DIFFERING_KEPT,
    seed: int = 0,
) -> Agreement:
    """A bundle's answers (candidate) against its checkpoint's (reference), text for text.

    `margins` maps a question's id to the logit gap at the first token that differs (`split_margins`); a
    differing answer below `tie_margin` is a near tie, counted and listed. At most `keep` differing answers
    are listed, near ties and flips first. Raises ValueError when the questions are not the same.
    """
    paired = _paired(reference, candidate, seed)
    found = [
        _flip(before, after, (margins or {}).get(before.id), tie_margin)
        for before, after in _differing(reference, candidate)
    ]
    decisive = {
        a.id for a, b in zip(reference.predictions, candidate.predictions, strict=True) if a.right != b.right
    }
    found.sort(key=lambda flip: not (flip.near_tie or flip.id in decisive))
    return Agreement(
        same=paired["n"] - len(found),
        near_ties=sum(flip.near_tie for flip in found),
        tie_margin=tie_margin,
        differing=found[:keep],
        **paired,
    )


def split_margins(
    session: Any, items: Iterable[Item], reference: AccuracyResult, candidate: AccuracyResult
) -> dict[str, float]:
    """Logit gap, in `session` (the reference), between both tokens where two answers first differ.

    Only questions whose texts differ are replayed: prefill, then the common tokens. The gap is at least that
    of the top two logits, and equals it when the candidate took the second best. A question is left out
    when one answer is the other's beginning or its token ids are unknown.
    """
    by_id = {str(item.id): item for item in items}
    margins = {}
    for before, after in _differing(reference, candidate):
        pairs = enumerate(zip(before.token_ids, after.token_ids, strict=False))
        split = next((i for i, (a, b) in pairs if a != b), None)
        if split is None:
            continue
        logits = _replay(session, by_id[before.id], before.token_ids[:split])
        gap = float(logits[before.token_ids[split]]) - float(logits[after.token_ids[split]])
        margins[before.id] = abs(gap)
    return margins


def _answers(session: Any, items: Sequence[Item], options: Any) -> Iterator[Any]:
    if not all(hasattr(session, step) for step in ("prepare", "encode_image", "prompt_ids", "complete")):
        for item in items:
            yield session.ask(item.image_path, item.question, options)
        return
    path: Path | None = None
    for item in items:
        if item.image_path != path:
            prepared = session.prepare(item.image_path)
            features = session.encode_image(prepared)
            path = item.image_path
        yield session.complete(session.prompt_ids(item.question, [prepared]), [features], options)


def _replay(session: Any, item: Item, tokens: Sequence[int]) -> np.ndarray:
    """Logits (vocab,) after the prompt and `tokens`."""
    prepared = session.prepare(item.image_path)
    ids = session.prompt_ids(item.question, [prepared])
    logits = session.prefill(ids, [session.encode_image(prepared)])
    for token in tokens:
        logits = session.decode(token)
    return np.asarray(logits)


def _predict(item: Item, text: str, token_ids: Sequence[int]) -> Prediction:
    return Prediction(
        id=str(item.id),
        image_id=str(item.image_id),
        question=item.question,
        reference=item.answer,
        text=text,
        right=bool(scorers.exact(text, item.answer)),
        token_ids=[int(token) for token in token_ids],
    )


def _paired(reference: AccuracyResult, candidate: AccuracyResult, seed: int) -> dict[str, Any]:
    """The paired figures that `Comparison` and `Agreement` share."""
    before, after = reference.predictions, candidate.predictions
    if [(p.id, p.question) for p in before] != [(p.id, p.question) for p in after] or not before:
        raise ValueError(f"compare: {len(before)} and {len(after)} predictions are not of the same questions")
    counted = stats.flips(reference.outcomes, candidate.outcomes)
    interval = stats.paired_interval(
        [float(right) for right in reference.outcomes],
        [float(right) for right in candidate.outcomes],
        groups=[p.image_id for p in before],
        seed=seed,
    )
    return {
        "n": counted.n,
        "right_to_wrong": counted.right_to_wrong,
        "wrong_to_right": counted.wrong_to_right,
        "difference": counted.difference,
        "low": interval.low,
        "high": interval.high,
        "p_value": stats.mcnemar_exact(counted.right_to_wrong, counted.wrong_to_right),
    }


def _differing(
    reference: AccuracyResult, candidate: AccuracyResult
) -> Iterator[tuple[Prediction, Prediction]]:
    pairs = zip(reference.predictions, candidate.predictions, strict=True)
    return ((before, after) for before, after in pairs if before.text != after.text)


def _flip(before: Prediction, after: Prediction, margin: float | None, tie_margin: float) -> Flip:
    return Flip(
        id=before.id,
        question=before.question,
        reference=before.reference,
        checkpoint_text=before.text,
        bundle_text=after.text,
        margin=margin,
        near_tie=margin is not None and margin < tie_margin,
    )
