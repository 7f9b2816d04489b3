"""From rows of cases to the figures of a candidate.

In: rows of `parity/parity_side.py`. Out: records of `parity/parity_results.py`. Not here: running sessions.
Intervals resample whole images, because questions and positions of one image are not independent.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals import stats
from evals.parity.parity_results import Estimate, Forced, Greedy, Numerics, Position, Preprocessing
from runtime.errors import InputError

Row = dict[str, Any]
Floats = NDArray[np.float64]
WORST = 10
NOISE = 1e-6
"""Nats; a smaller KL comes from the order of summation, and is no example of anything."""


def preprocessing(rows: Sequence[Row]) -> Preprocessing:
    """Pixels and ids of all cases; a picture that several questions share counts once for each."""
    pictures = [(row["id"], one) for row in rows for one in row["pictures"]]
    compared = [(name, one) for name, one in pictures if "max" in one]
    unlike = [(name, one) for name, one in pictures if one.get("max") or "sizes" in one]
    ids = [(row["id"], row["ids"]) for row in rows if row["ids"] is not None]
    worst = max((one for _, one in compared), key=lambda one: one["mean"], default=None)
    return Preprocessing(
        images=len(pictures),
        images_compared=len(compared),
        images_equal=sum(one["max"] == 0 for _, one in compared),
        pixel_unit=pictures[0][1]["unit"] if pictures else "normalised",
        pixel_max_diff=max((one["max"] for _, one in compared), default=None),
        pixel_mean_diff=worst["mean"] if worst else None,
        pixel_share=worst["share"] if worst else None,
        shapes_equal=len(pictures) - sum("sizes" in one for _, one in pictures),
        image_tokens_equal=sum(sum(row["image_tokens_equal"]) for row in rows),
        prompts=len(rows),
        prompts_equal=len(rows) - len(ids),
        first_pixels=_told(*unlike[0]) if unlike else None,
        first_ids=f"{ids[0][0]}: {ids[0][1]}" if ids else None,
        why_not_compared=next((one["why"] for _, one in pictures if "why" in one), None),
    )


def _told(name: str, one: Row) -> str:
    if "sizes" in one:
        return f"{name}: {one['sizes'][1]} pixel values, the reference has {one['sizes'][0]}"
    return f"{name}: up to {one['max']:.3g} apart, {one['share']:.1%} of the values"


def numerics(forced: Forced, rows: Sequence[Row], groups: Sequence[Hashable], seed: int = 0) -> Numerics:
    """Rows as `parity_side.positions` gave them, with the image group of each.

    Raises InputError when no position has numbers for logits.
    """
    kl = [_numbers(row["kl"]) for row in rows]
    usable = [np.isfinite(one) for one in kl]
    flat = np.concatenate([one[fine] for one, fine in zip(kl, usable, strict=True)])
    own = np.concatenate([_numbers(row["nll_reference"])[u] for row, u in zip(rows, usable, strict=True)])
    other = np.concatenate([_numbers(row["nll"])[u] for row, u in zip(rows, usable, strict=True)])
    by_position = [g for g, u in zip(groups, usable, strict=True) for _ in range(int(u.sum()))]
    agree = np.concatenate([np.asarray(row["agree"], np.float64) for row in rows])
    everywhere = [g for g, row in zip(groups, rows, strict=True) for _ in row["agree"]]
    if len(flat) == 0:
        raise InputError(f"parity: no logit of {len(agree)} positions is a number; export the bundle again")
    ratio = estimate(other - own, by_position, seed)
    return Numerics(
        forced=forced,
        cases=len(rows),
        positions=len(agree),
        kl_mean=estimate(flat, by_position, seed),
        kl_median=float(np.median(flat)),
        kl_p90=float(np.percentile(flat, 90)),
        kl_p99=float(np.percentile(flat, 99)),
        kl_max=float(flat.max()),
        top1_agreement=share(agree, everywhere, seed),
        top1_differ=int((agree == 0).sum()),
        near_ties=sum(sum(row["near_tie"]) for row in rows),
        perplexity_reference=float(np.exp(own.mean())),
        perplexity=float(np.exp(other.mean())),
        perplexity_ratio=Estimate(
            value=float(np.exp(ratio.value)), low=float(np.exp(ratio.low)), high=float(np.exp(ratio.high))
        ),
        not_finite=len(agree) - len(flat),
    )


def greedy(rows: Sequence[Row], groups: Sequence[Hashable], seed: int = 0) -> Greedy:
    """Rows of the reference's greedy answers: how far the candidate's best token is the forced one."""
    lengths = np.array([len(row["agree"]) for row in rows], np.float64)
    prefix = np.array([_leading(row["agree"]) for row in rows], np.float64)
    return Greedy(
        answers=len(rows),
        tokens_mean=float(lengths.mean()),
        prefix_mean=estimate(prefix, groups, seed),
        prefix_median=float(np.median(prefix)),
        prefix_share=share(prefix / lengths, groups, seed),
        whole_equal=share((prefix == lengths).astype(np.float64), groups, seed),
    )


def worst(cases: Sequence[tuple[str, str, Row]], most: int = WORST) -> list[Position]:
    """The positions that differ most, one a case at most; `cases`: id, question, row of positions."""
    found = []
    for name, question, row in cases:
        place = row["worst"]
        kl = row["kl"][place["position"]]
        if kl is not None and kl > NOISE:
            found.append(Position(case=name, question=question, kl=kl, **place))
    return sorted(found, key=lambda one: -one.kl)[:most]


def estimate(values: Floats, groups: Sequence[Hashable], seed: int = 0) -> Estimate:
    """Mean with its bootstrap interval over groups."""
    interval = stats.bootstrap_difference(
        np.zeros(len(values)).tolist(), values.tolist(), groups=groups, seed=seed
    )
    mean = float(values.mean())
    return Estimate(value=mean, low=min(interval.low, mean), high=max(interval.high, mean))


def share(values: Floats, groups: Sequence[Hashable], seed: int = 0) -> Estimate:
    """Like `estimate`; where every value is 1, the low end is what so many images without a fault exclude."""
    found = estimate(values, groups, seed)
    if (values == 1).all():
        count = len(set(groups))
        return Estimate(value=1.0, low=stats.wilson(count, count).low, high=1.0)
    return found


def _numbers(values: Sequence[float | None]) -> Floats:
    return np.array([np.nan if value is None else value for value in values], np.float64)


def _leading(agree: Sequence[bool]) -> int:
    return next((place for place, same in enumerate(agree) if not same), len(agree))
