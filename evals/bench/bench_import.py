"""Results that were measured elsewhere: a phone's harness, a browser, another machine.

In: a bench.json of any origin, and bundles that are here. Out: the same file, checked, completed.
Not here: fetching it from a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evals.bench import bench_facts, bench_results, bench_summary
from evals.bench.bench_facts import BundleFacts
from evals.bench.bench_results import BenchResults, BundleResult
from runtime.errors import InputError

FACTS = (
    *("sha256", "source_sha256", "target", "disk_bytes", "download_bytes", "parts", "ceilings"),
    *("precision", "name"),
)
"""What the bundle itself knows better than who measured it; the units that ran its parts are kept."""


def read(path: Path, bundles: Sequence[Path] = (), device_name: str | None = None) -> BenchResults:
    """Read, check and complete. `bundles`: directories here, found in the file by their manifest's hash.

    device_name: what a fleet's matrix is to call the device; phones of one model call themselves alike.
    A result without a hash is joined by name. Raises InputError when the file is faulty, or a bundle is not
    in it: then something else was measured than what is here.
    """
    found = bench_results.read(path)
    if device_name is not None:
        found = found.model_copy(update={"device": found.device.model_copy(update={"name": device_name})})
    joined = list(found.bundles)
    for facts in bench_facts.read(bundles, any_format=True) if bundles else ():
        index = _place(facts, joined, path)
        joined[index] = _joined(joined[index], facts)
    names = [each.name for each in joined]
    renamed = {old.name: new for old, new in zip(found.bundles, names, strict=True)}
    ratios = [
        each.model_copy(update={"reference": renamed[each.reference], "candidate": renamed[each.candidate]})
        for each in found.ratios
    ]
    if len(set(names)) < len(names):
        raise InputError(f"{path}: two results are called alike once joined ({', '.join(names)})")
    return bench_summary.complete(
        found.model_copy(update={"bundles": tuple(joined), "ratios": tuple(ratios)})
    )


def _place(facts: BundleFacts, results: Sequence[BundleResult], path: Path) -> int:
    for index, each in enumerate(results):
        if each.sha256 == facts.sha256 or (each.sha256 is None and each.name == facts.name):
            return index
    known = ", ".join(f"{each.name} ({(each.sha256 or 'no hash')[:8]})" for each in results)
    raise InputError(
        f"{facts.path}: its manifest is {facts.sha256[:8]}, {path} holds {known}; "
        "give the bundle that was measured, or none"
    )


def _joined(result: BundleResult, facts: BundleFacts) -> BundleResult:
    own = facts.result()
    units = {part.role: part for part in result.parts}
    parts = tuple(
        part.model_copy(update={"unit": units[part.role].unit, "unit_note": units[part.role].unit_note})
        if part.role in units
        else part
        for part in own.parts
    )
    update = {name: getattr(own, name) for name in FACTS if name != "parts"}
    return result.model_copy(update={**update, "parts": parts})
