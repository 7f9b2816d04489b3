"""Questions that a bundle answers otherwise than its checkpoint, with their pictures where the file has them.

In: `EvalResults`. Out: `FlipSeen` records, the worst first, at most KEPT a bundle; how many were left out.
Not here: counting flips (`evals/ship/ship_checks.py` does, from all scores).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from evals.asking.eval_results import ORIGINAL, EvalResults, Given
from evals.ship.ship_evidence import BundleFacts, FlipSeen, SubjectSeen

KEPT = 12
"""Of each bundle and task."""


def reference_of(subjects: Iterable[SubjectSeen], bundle: BundleFacts | None) -> str | None:
    """The subject that a bundle is measured against: the checkpoint it was made from.

    The checkpoint whose hash the bundle names, else the first one; None when no checkpoint answered.
    """
    checkpoints = [one for one in subjects if one.kind == "checkpoint"]
    source = bundle.source_sha256 if bundle else None
    own = [one for one in checkpoints if source and one.sha256 == source]
    return (own or checkpoints)[0].name if checkpoints else None


def flips_of(
    found: EvalResults, names: Mapping[str, str], bundles: Mapping[str, BundleFacts]
) -> tuple[list[FlipSeen], int]:
    """On the questions as the task has them. `names`: the name in the file to the name everywhere."""
    subjects = [
        SubjectSeen(
            name=one.name, kind=one.kind, format=one.format, precision=one.precision, sha256=one.sha256
        )
        for one in found.subjects
    ]
    pictures = {e.id: e.images[0] for e in found.examples if e.images and e.variant == ORIGINAL}
    kept: list[FlipSeen] = []
    left_out = 0
    for subject in subjects:
        reference = reference_of(subjects, bundles.get(names[subject.name]))
        if subject.kind != "bundle" or reference is None:
            continue
        pairs = [p for p in found.differing(reference, subject.name) if p[0].score != p[1].score]
        # what lost most first, and of those what can be seen
        pairs.sort(key=lambda pair: (pair[1].score - pair[0].score, pair[1].id not in pictures))
        kept += [_flip(found, names[subject.name], reference, pictures, *pair) for pair in pairs[:KEPT]]
        left_out += max(0, len(pairs) - KEPT)
    return kept, left_out


def _flip(
    found: EvalResults, bundle: str, reference: str, pictures: Mapping[str, str], before: Given, after: Given
) -> FlipSeen:
    question = next(one for one in found.questions if one.id == after.id)
    return FlipSeen(
        task=found.task.name,
        variant=after.variant,
        bundle=bundle,
        reference_subject=reference,
        id=after.id,
        question=question.question,
        references=tuple(question.references),
        before=before.answer,
        after=after.answer,
        before_score=before.score,
        after_score=after.score,
        picture=pictures.get(after.id),
    )
