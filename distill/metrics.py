"""What a reader of a run wants to know, JSON-ready: the contents of `metrics.json`.

In: what the stages found. Out: one mapping. Not here: measuring.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from distill.answers.pool_statistics import Line
from distill.masks.teachers import Gated, Phase
from distill.recipe import Recipe
from distill.training import checkpoints, warnings
from distill.training.loop import Log


def collect(
    plan: Recipe,
    log: Log,
    phases: Sequence[Phase],
    gated: Sequence[Gated],
    *,
    processes: int,
    parameters: int,
    sharing: Mapping[str, str],
    skipped: Mapping[int, str],
    pool: Sequence[Line],
    signal: Sequence[Mapping[str, Any]],
    stages: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """`tokens` are response tokens that were trained on, of distinct responses; `generated` what was drawn,
    by source; `stages` what each has cost."""
    values = checkpoints.validations(log)
    step, value = max(values, key=lambda pair: (pair[1], -pair[0])) if values else (len(log) - 1, None)
    generated: dict[str, int] = {}
    for line in pool:
        generated[line.source] = generated.get(line.source, 0) + line.tokens
    return {
        "name": plan.name,
        "recipe_sha256": plan.sha256,
        "processes": processes,
        "parameters": parameters,
        "phases": [asdict(phase) for phase in phases],
        "gates": [_gate(each) for each in gated],
        "sharing": dict(sharing),
        "skipped": {str(index): why for index, why in sorted(skipped.items())},
        "validation": {"step": step, "accuracy": value, "all": values},
        "tokens": sum(entry["tokens"] for entry in log),
        "generated": generated,
        "pool": [asdict(line) for line in pool],
        "signal": list(signal),
        "stages": list(stages),
        "warnings": [asdict(sign) for sign in warnings.Watch().new(log)],
        "log": log,
    }


def _gate(gated: Gated) -> dict[str, Any]:
    return {
        "teacher": gated.teacher,
        "r_max": gated.r_max,
        "inert": gated.inert,
        "curve": [[point.ratio, point.accuracy, point.sparsity] for point in gated.curve],
    }
