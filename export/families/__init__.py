"""The model families that can be exported; the only place in the project that knows them.

In: a loaded checkpoint. Out: its family. Not here: tracing, quantizing, writing.
To add a family: one file beside this one with an object that has the methods of `base.Family`, and its
name in `FAMILIES`.
"""

from __future__ import annotations

from pathlib import Path

from export.checkpoint import Checkpoint
from export.families.base import Family, Modules
from export.families.gemma3 import GEMMA3
from export.families.internvl import INTERNVL
from export.families.lfm2_vl import LFM2_VL
from export.families.qwen_vl import QWEN_VL
from export.families.smolvlm import SMOLVLM
from runtime.errors import CheckpointError

__all__ = ["FAMILIES", "Family", "Modules", "check_type", "family_of", "without_tiles"]

FAMILIES: tuple[Family, ...] = (
    SMOLVLM,
    INTERNVL,
    LFM2_VL,
    GEMMA3,
    QWEN_VL,
)


_LAYOUTS = {
    "internvl_chat": "the original layout of InternVL, whose code comes with it; take the same model for "
    "transformers itself, published as NAME-hf or -HF (model_type internvl)",
    "lfm2-vl": "as LFM2-VL was before transformers knew it, and in MLX's copies; take the model's present "
    "repository (model_type lfm2_vl)",
}
"""What the model types of other layouts of known families are, and what to take instead."""


def other_layout(path: Path, model_type: str) -> CheckpointError | None:
    """The refusal of a known family in a layout that is not transformers'; None for any other type."""
    found = _LAYOUTS.get(model_type)
    return CheckpointError(f"{path}: model_type {model_type!r}: {found}") if found else None


def check_type(path: Path, model_type: str) -> Family:
    """The family of a `model_type`. Raises CheckpointError naming what is known and what to write."""
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    if (refusal := other_layout(path, model_type)) is not None:
        raise refusal
    known = ", ".join(sorted(name for family in FAMILIES for name in family.model_types))
    raise CheckpointError(
        f"{path}: model_type {model_type!r} has no exporter; known: {known}; "
        "to add it, write export/families/NAME.py (docs/export.md) and list it in FAMILIES"
    )


def family_of(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint, checked. Raises CheckpointError naming what is known."""
    family = check_type(checkpoint.path, checkpoint.model_type)
    family.check(checkpoint)
    return family


def without_tiles(checkpoint: Checkpoint) -> dict[str, bool | int]:
    """Set the loaded image processor so that a picture is one view; what was changed, for the manifest.

    Raises CheckpointError for a family that never cuts a picture.
    """
    settings = check_type(checkpoint.path, checkpoint.model_type).untiled()
    if not settings:
        raise CheckpointError(
            f"{checkpoint.path}: {checkpoint.model_type} cuts no picture into tiles; leave split_images on"
        )
    image, changed = checkpoint.processor.image_processor, {}
    for name, value in settings.items():
        if getattr(image, name) != value:
            changed[f"image_processor.{name}"] = value
            setattr(image, name, value)
    return changed
