"""The gate of Core ML bundles: the packages on disk, evaluated, must reproduce the checkpoint.

In: packages just written, what the checkpoint answers. Out: measured figures, or a ParityError that
says what broke. Not here: the measuring (`evals/parity/parity.py`), the audit of compressed weights
(`coreml_audit.py`), what all formats are shown (`gate_cases.py`).

The packages are read back and evaluated by the runtime's own reader, which shares no code with the exporter
or with coremltools, every operation rounded to the type that the program declares. So a pass proves numerics:
not that Core ML accepts the program, not where or how fast it runs, not how a device adds up.

In this order: prompt segments; every row of the token table; pixels, ids, features, logits of prefill and
decode over the state, case by case; a conversation that goes on from its state. float16 is held against the
checkpoint. Fewer bits are held weight by weight against the float16 packages, which passed before.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from export import coreml_audit, gate
from export.checkpoint import Checkpoint
from export.coreml_parts import PREFILL, ROLES
from export.coreml_policy import Policy
from export.facts import Facts
from export.gate import GateSession
from export.gate_limits import Limit, rms_error
from runtime import bundle
from runtime.errors import ParityError
from runtime.manifest import Manifest, Parity
from runtime.mil import NUMERICS_ONLY, Program

SPREAD = 0.05
"""Conformance tolerance over the largest logit: float16, added up in another order by each compute unit."""

FP16_LIMITS = (
    Limit("feature_rms_error", 0.01, "float16 weights and results: 1e-3 seen, growing with depth"),
    Limit("logit_rms_error", 0.02, "the same, through vision and text"),
)
FP32_LIMITS = (
    Limit("feature_rms_error", 1e-4, "float32 sums in another order"),
    Limit("logit_rms_error", 5e-3, "keys and values of a state are float16 in any precision"),
)
LATER_FP16 = Limit("later_logit_rms_error", 0.02, "as logit_rms_error: over a state kept from turn to turn")


def check(
    facts: Facts, staged: Path, draft: Manifest, policy: Policy, plain: tuple[Path, Manifest] | None
) -> Parity:
    """Hold the packages in `staged` against the checkpoint. Raises ParityError or BundleError.

    `plain`: the packages before compression and their manifest, which passed; None when this one is it.
    """
    assert facts.geometry is not None and facts.expected is not None
    gate.check_prompts(facts.checkpoint, staged, draft, facts.geometry)
    exact = plain is None
    figures: dict[str, float] = {}
    if plain is not None:
        folder, before = plain
        for role in ROLES:
            packages = (bundle.locate(folder, before.part(role).path), _package(staged, draft, role))
            figures[f"{role}_weight_rms_error"] = coreml_audit.same_but_rounded(*packages)
    else:
        _check_rows(facts.checkpoint, _package(staged, draft, "embed_tokens"), policy)
    limits = list(FP32_LIMITS if policy.base == "float32" else FP16_LIMITS) if exact else []
    with GateSession.from_manifest(staged, draft, threads=1, max_context=draft.limits.context) as session:
        result = gate.measure(facts.expected.sides, session, facts.cases, limits, "checkpoint")
        limit = LATER_FP16 if exact else _told(LATER_FP16)
        later = gate.check_later(session, facts.expected.later, (limit, rms_error), "checkpoint")
    figures |= {limit.figure: got for limit, got in later.items()}
    held = [*limits, *(later if exact else ())]
    return Parity(
        reference=f"{gate.reference_name()}; packages {NUMERICS_ONLY}",
        cases=result.cases,
        figures={**result.figures(), **figures},
        limits={limit.figure: limit.most for limit in held},
    )


def _told(limit: Limit) -> Limit:
    """The same figure for a bundle whose weights were audited instead: any finite number."""
    return Limit(limit.figure, float(np.finfo(np.float64).max), "a number at all")


def _package(staged: Path, draft: Manifest, role: str) -> Path:
    return bundle.locate(staged, draft.part(role).path)


def _check_rows(checkpoint: Checkpoint, package: Path, policy: Policy) -> None:
    """Every row of the table, exactly: the cases use only a few ids, so the chain cannot see the others."""
    program = Program.open(package)
    spec = program.inputs(PREFILL)["input_ids"]
    size = int(spec.shape[-1] or 0)
    embed = checkpoint.model.get_input_embeddings()
    for ids in _chunks(len(embed.weight), size):
        got = program.run({"input_ids": ids[None].astype(spec.numpy)}, function=PREFILL)["inputs_embeds"][0]
        with torch.no_grad():
            wanted = embed(torch.from_numpy(ids)).numpy().astype(policy.base)
        if not np.array_equal(got.astype(policy.base), wanted):
            wrong = int(ids[(got.astype(policy.base) != wanted).any(axis=1)][0])
            raise ParityError(
                f"gate: {package.name}: the embedding of id {wrong} is not the checkpoint's; "
                "no bundle was written"
            )


def _chunks(count: int, size: int) -> Sequence[np.ndarray]:
    """All ids below `count` in runs of `size`, the last one from the start again."""
    return [np.arange(start, start + size) % count for start in range(0, count, size)]
