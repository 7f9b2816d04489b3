"""A Hugging Face checkpoint directory in, device bundles out.

from export import export_checkpoint
export_checkpoint(Path("student"), Path("bundles/student-onnx-int8"), precision="int8")

Importing this package loads no torch; the first export does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export import coreml_policy, gguf_kinds
from export.gguf_kinds import Request
from export.quantize_policy import resolve
from export.targets import STATIC_PRECISIONS, Plan, check_precision
from runtime.errors import InputError

if TYPE_CHECKING:
    from runtime.image import ImageInput

__all__ = ["FORMATS", "PRECISIONS", "export_all", "export_checkpoint"]

FORMATS = ("onnx", "gguf", "coreml")

PRECISIONS = ("fp32", "int8", "int4")
"""Those of `export_all`; every name and YAML file that `quantize_policy.resolve` knows may be given. GGUF has
its own: `export.gguf_kinds.KINDS`; Core ML too: `export.coreml_policy.NAMES`."""


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    *,
    to: str = "onnx",
    precision: str = "fp32",
    name: str | None = None,
    sample_images: Sequence[ImageInput] = (),
    image_required: bool = False,
    plan: Plan | None = None,
    examples: Sequence[tuple[ImageInput, str]] = (),
    request: Request | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write one bundle to `out` and return it; the parity gate has passed when this returns.

    `sample_images` (paths, bytes or PIL images) join the gate's own pictures. With `image_required` the
    bundle refuses a question without an image, which a model that never saw one would answer blindly.
    `plan` (`export.targets.plan_for`) says for which target; by default for any computer. `examples`:
    pictures with questions that calibrated precisions (`-gptq`, `-kv8`, GGUF's importance) look at instead of
    the gate's own, and `qdq-` beside them. `request`: GGUF's rules and importance matrix. `progress` gets one
    line at the start of every step.
    Raises PocketError: CheckpointError, InputError, ParityError or StateError.
    """
    _check_names(to, [precision], plan)
    found = _writer(to, plan)(
        Path(checkpoint),
        {precision: Path(out)},
        names={precision: name or Path(out).name},
        sample_images=sample_images,
        image_required=image_required,
        plan=plan,
        progress=progress,
        **_examples(to, plan, examples),
        **({"request": request} if to == "gguf" else {}),
    )
    return found[0]


def export_all(
    checkpoint: Path,
    out_dir: Path,
    precisions: Sequence[str] = PRECISIONS,
    *,
    to: str = "onnx",
    name: str | None = None,
    sample_images: Sequence[ImageInput] = (),
    image_required: bool = False,
    plan: Plan | None = None,
    examples: Sequence[tuple[ImageInput, str]] = (),
    request: Request | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Path]:
    """Write `<out_dir>/<name>-<to>-<precision>` for every precision from one trace of the checkpoint.

    A plan's target, or its flavour portable-static, joins the name. `name` is the checkpoint directory's by
    default. Raises as `export_checkpoint` does; bundles finished before the error stay.
    """
    _check_names(to, precisions, plan)
    base = "-".join([name or Path(checkpoint).resolve().name, to, *_marks(to, plan)])
    names = {precision: f"{base}-{_short(to, precision)}" for precision in precisions}
    targets = {precision: Path(out_dir) / names[precision] for precision in precisions}
    return _writer(to, plan)(
        Path(checkpoint),
        targets,
        names=names,
        sample_images=sample_images,
        image_required=image_required,
        plan=plan,
        progress=progress,
        **_examples(to, plan, examples),
        **({"request": request} if to == "gguf" else {}),
    )


def _writer(to: str, plan: Plan | None) -> Callable[..., list[Path]]:
    if to == "gguf":
        from export.gguf import export_gguf

        return export_gguf
    if to == "coreml":
        from export.coreml import export_coreml

        return export_coreml
    if plan is not None and plan.static:
        from export.static_bundle import export_static

        return export_static
    from export.onnx import export_onnx

    return export_onnx


def _examples(to: str, plan: Plan | None, examples: Sequence[tuple[ImageInput, str]]) -> dict[str, Any]:
    if not examples:
        return {}
    if to == "coreml":
        raise InputError("examples: nothing of a Core ML export is calibrated; leave --data out")
    return {"examples": examples}


def _marks(to: str, plan: Plan | None) -> list[str]:
    """What of a plan stands in a bundle's name."""
    if plan is None:
        return []
    static = plan.static and to == "onnx"  # ML programs always are
    return [plan.target] if plan.target else ["static"] if static else []


def _short(to: str, precision: str) -> str:
    if to == "gguf":
        return precision
    if to == "coreml":
        return coreml_policy.resolve(precision).name
    return precision if precision in STATIC_PRECISIONS else resolve(precision).name


def _check_names(to: str, precisions: Sequence[str], plan: Plan | None) -> None:
    if to not in FORMATS:
        raise InputError(f"format {to!r} is not known; choose from {', '.join(FORMATS)}")
    if not precisions:
        known = {"gguf": gguf_kinds.KINDS, "coreml": coreml_policy.NAMES}.get(to, PRECISIONS)
        raise InputError(f"no precision given; choose from {', '.join(known)}")
    if to == "gguf":
        for precision in precisions:
            gguf_kinds.check(precision)
        return
    if to == "coreml":
        for precision in precisions:
            coreml_policy.resolve(precision)
        return
    for precision in precisions:
        check_precision(plan or Plan(), precision)
        if not precision.startswith("qdq-"):
            resolve(precision)
