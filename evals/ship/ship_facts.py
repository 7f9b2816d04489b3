"""What needs no test between two reports: bytes are counted, and parity has intervals of its own.

In: two `Evidence`s. Out: `Fact`s. Not here: accuracy and timings (`evals/ship/ship_compare.py`).

A parity figure is called changed when both 95 % intervals are apart, which is stricter than a test at 5 %.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from evals import formatting as fmt
from evals.parity.parity_results import Estimate
from evals.ship.ship_compare_results import Fact
from evals.ship.ship_evidence import BundleFacts, Evidence, ParitySeen
from evals.ship.ship_gate import Tolerance
from evals.ship.ship_words import estimate

Finding = Literal["worse", "better", "unchanged", "tolerated"]
EQUAL = (("prompts with equal ids", "prompts_equal"), ("pictures with equal pixels", "images_equal"))


def facts(old: Evidence, new: Evidence, matched: Mapping[str, str], tolerance: Tolerance) -> list[Fact]:
    """`matched`: new name to old name."""
    found: list[Fact] = []
    for bundle in new.bundles:
        was = matched.get(bundle.name)
        before = old.bundle(was) if was else None
        if before is None:
            continue
        found += _bytes(before, bundle, tolerance)
        known = {_key(one): one for one in old.parity if one.bundle == was}
        for one in new.parity:
            if one.bundle == bundle.name and _key(one) in known:
                found += _parity(known[_key(one)], one, tolerance)
    return found


def _key(one: ParitySeen) -> tuple[str, str]:
    """Figures of other questions or another reference say nothing about each other."""
    return one.asked.data_sha256, one.reference.name


def _bytes(old: BundleFacts, new: BundleFacts, tolerance: Tolerance) -> Iterator[Fact]:
    for label, name in (("download", "download_bytes"), ("size on disk", "disk_bytes")):
        before, now = getattr(old, name), getattr(new, name)
        if before and now and not (name == "disk_bytes" and old.download_bytes and new.download_bytes):
            growth = 100 * (now / before - 1)
            finding: Finding = "unchanged" if now == before else "better" if now < before else "worse"
            if finding == "worse" and growth <= tolerance.bytes_percent:
                finding = "tolerated"
            yield Fact(
                label=label, bundle=new.name, old=fmt.size(before), new=fmt.size(now), finding=finding,
                why=f"{growth:+.1f}{fmt.THIN}%".replace("-", fmt.MINUS),
            )  # fmt: skip


def _parity(old: ParitySeen, new: ParitySeen, tolerance: Tolerance) -> Iterator[Fact]:
    place = new.asked.source
    if old.preprocessing and new.preprocessing:
        before, now = old.preprocessing, new.preprocessing
        for label, name in EQUAL:
            a, b = getattr(before, name), getattr(now, name)
            finding: Finding = "unchanged" if a == b else "better" if b > a else "worse"
            yield Fact(
                label=label, bundle=new.bundle, place=place, old=f"{a:,}", new=f"{b:,}", finding=finding
            )
    if old.main and new.main and old.main.forced == new.main.forced:
        before_kl, now_kl = old.main.kl_mean, new.main.kl_mean
        forgiven = max(tolerance.parity_nats, before_kl.value * tolerance.parity_percent / 100)
        yield _apart("mean KL", new.bundle, place, before_kl, now_kl, forgiven)
        a, b = _other(old.main.top1_agreement), _other(new.main.top1_agreement)
        yield _apart("positions with another best token", new.bundle, place, a, b)


def _other(share: Estimate) -> Estimate:
    return Estimate(value=1 - share.value, low=1 - share.high, high=1 - share.low)


def _apart(label: str, bundle: str, place: str, old: Estimate, new: Estimate, forgiven: float = 0.0) -> Fact:
    """Larger is worse; a rise of `forgiven` is tolerated."""
    finding: Finding = "worse" if new.low > old.high else "better" if new.high < old.low else "unchanged"
    if finding == "worse" and new.value - old.value <= forgiven:
        finding = "tolerated"
    return Fact(
        label=label,
        bundle=bundle,
        place=place,
        old=estimate(old),
        new=estimate(new),
        finding=finding,
        why="intervals are apart" if finding != "unchanged" else "intervals overlap",
    )
