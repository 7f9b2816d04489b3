"""The model families that can be exported; the only place in the project that knows them.

In: a loaded checkpoint. Out: its family. Not here: tracing, quantizing, writing.
To add a family: one file beside this one with an object that has the methods of `base.Family`, and its
name in `FAMILIES`.
"""

from __future__ import annotations

from export.checkpoint import Checkpoint
from export.families.base import Family, Modules
from export.families.smolvlm import SMOLVLM
from runtime.errors import CheckpointError

__all__ = ["FAMILIES", "Family", "Modules", "family_of"]

FAMILIES: tuple[Family, ...] = (SMOLVLM,)


def family_of(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint, checked. Raises CheckpointError naming what is known."""
    for family in FAMILIES:
        if checkpoint.model_type in family.model_types:
            family.check(checkpoint)
            return family
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise CheckpointError(
        f"{checkpoint.path}: model_type {checkpoint.model_type!r} has no exporter; known: {known}; "
        "to add it, write export/families/NAME.py (docs/export.md) and list it in FAMILIES"
    )
