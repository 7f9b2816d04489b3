"""How far a candidate session is from a reference on the same pictures, prompts and forced tokens.

In: two sessions (a bundle's, or the checkpoint itself) and cases. Out: `ParityResult`.
Not here: what difference is allowed (`export/gate.py`), accuracy on a task (`accuracy.py`).

Pixels and ids are compared first: what differs there is preprocessing, not arithmetic. Logits are compared
with the same tokens forced on both sides, over the prefill and every decode step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.image import ImageInput

Floats = NDArray[np.float32]


class Steps(Protocol):
    """The steps of a session that a comparison looks between."""

    def prepare(self, source: Any) -> Any: ...

    def encode_image(self, prepared: Any) -> Any: ...

    def prompt_ids(self, question: str, images: Any) -> NDArray[np.int64]: ...

    def prefill(self, ids: Any, images: Any) -> Floats: ...

    def decode(self, token_id: int) -> Floats: ...


@dataclass(frozen=True)
class ParityCase:
    """A question about a picture (several, or none), and the tokens forced after the prompt."""

    name: str
    question: str
    image: ImageInput | Sequence[ImageInput] | None = None
    forced: tuple[int, ...] = ()

    @property
    def images(self) -> list[ImageInput]:
        """The pictures as a list."""
        if self.image is None:
            return []
        return list(self.image) if isinstance(self.image, (list, tuple)) else [self.image]  # type: ignore[list-item]


@dataclass(frozen=True)
class ParityResult:
    """Largest and typical differences over all cases; KL in nats, reference to candidate, per position."""

    cases: int
    positions: int
    pixels_equal: bool
    pixel_max_diff: float
    ids_equal: bool
    feature_max_diff: float  # |difference|, over the largest |reference| feature of the picture
    feature_rms_error: float  # worst picture: rms of the difference over rms of the reference
    logit_max_diff: float  # absolute, in logits
    logit_rel_diff: float  # |difference|, over the largest |reference| logit of the position
    logit_rms_error: float  # all positions: rms of the difference over rms of centred reference logits
    kl_mean: float
    kl_median: float
    kl_p99: float
    top1_agreement: float
    near_ties: int  # positions without agreement whose two best reference logits differ by less than 1e-4

    def figures(self) -> dict[str, float]:
        """All fields as numbers."""
        return {item.name: float(getattr(self, item.name)) for item in fields(self)}


NEAR_TIE = 1e-4
"""Logits; the reference itself would choose either token with another order of summation."""


def greedy_forced(reference: Steps, case: ParityCase, steps: int, extra: Sequence[int]) -> ParityCase:
    """The case with `steps` tokens forced: half of them the reference's greedy choice, then ids of `extra`.

    The foreign ids matter: greedy text can fall into one repeated token, which hides a wrong cache.
    """
    images = [reference.prepare(each) for each in case.images]
    features = [reference.encode_image(each) for each in images]
    logits = reference.prefill(reference.prompt_ids(case.question, images), features)
    forced: list[int] = []
    for index in range(steps):
        forced.append(int(np.argmax(logits)) if index % 2 == 0 else int(extra[index % len(extra)]))
        logits = reference.decode(forced[-1])
    return ParityCase(case.name, case.question, case.image, tuple(forced))


def forced_logits(session: Steps, ids: Any, images: Sequence[Any], forced: Sequence[int]) -> Floats:
    """Logits (1 + forced, vocab): of the prompt's last position and after each forced token."""
    rows = [session.prefill(ids, images)]
    rows += [session.decode(token) for token in forced]
    return np.stack(rows)


def compare(
    reference: Steps,
    candidate: Steps,
    cases: Sequence[ParityCase],
    judge: Callable[[ParityCase, ParityResult], None] | None = None,
) -> ParityResult:
    """Run every case on both sessions. Each side uses its own pixels, ids and features, as in use.

    `judge` sees the result of each case alone as soon as it is there, and may raise.
    """
    left = (side(reference, case) for case in cases)
    right = (side(candidate, case) for case in cases)
    return compare_sides(left, right, cases, judge)


def compare_sides(
    reference: Iterable[Side],
    candidate: Iterable[Side],
    cases: Sequence[ParityCase],
    judge: Callable[[ParityCase, ParityResult], None] | None = None,
) -> ParityResult:
    """As `compare`, on what each session gave for each case (`side`): they need not be there any more."""
    found = _Differences()
    for case, left, right in zip(cases, reference, candidate, strict=True):
        found.add(left, right)
        if judge is not None:
            alone = _Differences()
            alone.add(left, right)
            judge(case, alone.result())
    return found.result()


@dataclass(frozen=True)
class Side:
    """What a session gave for a case."""

    pixels: list[list[NDArray[Any]]]  # of each picture, its views as the format shapes them
    ids: NDArray[np.int64]
    features: list[NDArray[Any]]  # of each picture, deepstack behind
    logits: Floats


def side(session: Steps, case: ParityCase) -> Side:
    """Everything of a case that is compared: pixels, ids, features, logits."""
    prepared = [session.prepare(each) for each in case.images]
    ids = session.prompt_ids(case.question, prepared)
    features = [session.encode_image(each) for each in prepared]
    logits = forced_logits(session, ids, features, case.forced)
    return Side([list(each.pixels) for each in prepared], ids, [_features(each) for each in features], logits)


def _flat(views: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """All views' pixels in their order; how a view's tensor is shaped is the format's matter."""
    return np.concatenate([np.asarray(view).ravel() for view in views])


def _features(features: Any) -> NDArray[Any]:
    """(1 + deepstack layers, image tokens, hidden)."""
    tokens = features.tokens[None]
    return tokens if features.deepstack is None else np.concatenate([tokens, features.deepstack])


class _Differences:
    def __init__(self) -> None:
        self.pixel: list[float] = []
        self.ids_equal = True
        self.feature: list[float] = []
        self.feature_rms: list[float] = []
        self.reference: list[Floats] = []
        self.candidate: list[Floats] = []
        self.cases = 0

    def add(self, left: Side, right: Side) -> None:
        self.cases += 1
        self.ids_equal &= left.ids.tolist() == right.ids.tolist()
        for our_views, their_views in zip(left.pixels, right.pixels, strict=True):
            self.pixel.append(_max_diff(_flat(our_views), _flat(their_views)))
        for ours, theirs in zip(left.features, right.features, strict=True):
            self.feature.append(_max_diff(ours, theirs) / max(_peak(ours), 1e-30))
            self.feature_rms.append(_rms_error(ours, theirs))
        self.reference.append(left.logits)
        self.candidate.append(right.logits)

    def result(self) -> ParityResult:
        reference, candidate = (
            np.concatenate(x).astype(np.float64) for x in (self.reference, self.candidate)
        )
        difference = np.abs(reference - candidate)
        peaks = np.maximum(np.abs(reference).max(axis=1), 1e-30)
        kl = kl_rows(reference, candidate)
        agree = reference.argmax(axis=1) == candidate.argmax(axis=1)
        best = np.sort(reference, axis=1)[:, -2:]
        pixel = max(self.pixel, default=0.0)
        return ParityResult(
            cases=self.cases,
            positions=len(reference),
            pixels_equal=pixel == 0.0,
            pixel_max_diff=pixel,
            ids_equal=self.ids_equal,
            feature_max_diff=max(self.feature, default=0.0),
            feature_rms_error=max(self.feature_rms, default=0.0),
            logit_max_diff=_nan_is_worst(difference.max()),
            logit_rel_diff=_nan_is_worst((difference.max(axis=1) / peaks).max()),
            logit_rms_error=_rms_error(
                reference - reference.mean(axis=1, keepdims=True),
                candidate - candidate.mean(axis=1, keepdims=True),
            ),
            kl_mean=_nan_is_worst(kl.mean()),
            kl_median=_nan_is_worst(np.median(kl)),
            kl_p99=_nan_is_worst(np.percentile(kl, 99)),
            top1_agreement=float(agree.mean()),
            near_ties=int((~agree & (best[:, 1] - best[:, 0] < NEAR_TIE)).sum()),
        )


def kl_rows(reference_tv: NDArray[Any], candidate_tv: NDArray[Any]) -> NDArray[np.float64]:
    """KL(reference || candidate) per row of logits (T, V), in nats, float64."""
    p, q = (log_softmax(np.asarray(x, dtype=np.float64)) for x in (reference_tv, candidate_tv))
    return np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)


def log_softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _peak(values: NDArray[Any]) -> float:
    return float(np.abs(values).max())


def _max_diff(left: NDArray[Any], right: NDArray[Any]) -> float:
    if left.shape != right.shape:
        return float("inf")
    return _nan_is_worst(np.abs(left.astype(np.float64) - right.astype(np.float64)).max())


def _rms_error(reference: NDArray[Any], candidate: NDArray[Any]) -> float:
    if reference.shape != candidate.shape:
        return float("inf")
    error = np.sqrt(np.mean((reference.astype(np.float64) - candidate) ** 2))
    return _nan_is_worst(error / max(float(np.sqrt(np.mean(reference.astype(np.float64) ** 2))), 1e-30))


def _nan_is_worst(value: Any) -> float:
    return float("inf") if np.isnan(value) else float(value)
