"""Device classes as data: what an export to each of them is, and what a user changed about it.

In: a target's name and overrides. Out: a `Plan`. Not here: exporting; this module imports neither onnx nor
torch.

A row is a default, not a promise: which of them ran on the hardware they are named for is in docs/targets.md.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from runtime.errors import InputError

Flavour = Literal["ort-fused", "portable-static"]
FLAVOURS: tuple[Flavour, ...] = ("ort-fused", "portable-static")

CPU = "CPUExecutionProvider"
MAX_IMAGES = 4
"""Pictures in a conversation unless told otherwise; the context may hold fewer."""

CHUNK = 128
"""Tokens of a prefill run of fixed shape: a picture of 64 tokens and a question fit into one."""

COREML_CHUNK = 64
"""The same of an ML program, whose state is read in whole by every run."""

MASKED = -1e4
"""Added to the score of a token that must not be seen: float16 holds it, and its exponential is 0."""

STATIC_PRECISIONS = ("fp32", "fp16", "qdq-int8", "qdq-a16w8")
"""Precisions of the flavour portable-static; those of ort-fused are in `quantize_policy.py`."""

LEAST_VISION_BITS = 8


@dataclass(frozen=True)
class Target:
    """A device class.

    `precision` names what `bits` says for each part: the fewest bits of its large weights, which a test holds
    against files. `providers`: onnxruntime's names, the preferred first. `shapes`: which dimensions move.
    `max_context` and `max_image_tokens` (of one picture) are ceilings; the model's own may be lower.
    """

    name: str
    device: str
    format: Literal["onnx", "coreml"]
    flavour: Flavour
    precision: str
    bits: Mapping[str, int]
    providers: tuple[str, ...]
    shapes: str
    max_context: int
    max_image_tokens: int
    max_images: int
    chunk: int = CHUNK


_MOVING = "batch, sequence, views"
_FIXED = "none: a chunk of tokens, one token, one view"
_INT4 = {"vision_encoder": 8, "embed_tokens": 8, "decoder": 4}

TARGETS: tuple[Target, ...] = (
    Target(
        "iphone", "iPhone, iPad: Core ML on the Neural Engine", "coreml", "portable-static", "fp16",
        {"vision_encoder": 16, "embed_tokens": 16, "decoder": 16}, ("CoreMLExecutionProvider", CPU), _FIXED,
        max_context=2048, max_image_tokens=1024, max_images=2, chunk=COREML_CHUNK,
    ),
    Target(
        "android", "Android phone with a Qualcomm NPU (QNN, HTP)", "onnx", "portable-static", "qdq-a16w8",
        {"vision_encoder": 8, "embed_tokens": 8, "decoder": 8}, ("QNNExecutionProvider", CPU), _FIXED,
        max_context=2048, max_image_tokens=1024, max_images=2,
    ),
    Target(
        "jetson-orin", "Jetson Orin: TensorRT", "onnx", "portable-static", "fp16",
        {"vision_encoder": 16, "embed_tokens": 16, "decoder": 16},
        ("TensorrtExecutionProvider", "CUDAExecutionProvider", CPU), _FIXED,
        max_context=4096, max_image_tokens=2048, max_images=4,
    ),
    Target(
        "raspberry-pi", "Raspberry Pi 5, other small ARM boards: CPU kernels", "onnx", "ort-fused", "int4",
        _INT4, (CPU,), _MOVING, max_context=2048, max_image_tokens=512, max_images=2,
    ),
    Target(
        "cpu", "x86-64 or ARM64 computer: CPU kernels", "onnx", "ort-fused", "int4", _INT4, (CPU,), _MOVING,
        max_context=8192, max_image_tokens=4096, max_images=MAX_IMAGES,
    ),
    Target(
        "browser", "WebGPU in a browser, WebAssembly where there is none", "onnx", "ort-fused", "int4",
        _INT4, ("WebGpuExecutionProvider", CPU), _MOVING,
        max_context=4096, max_image_tokens=1024, max_images=2,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What one export makes, beside its precision. None: as the model has it.

    `max_context`, `max_image_tokens` (of one picture) and `max_images` are ceilings. `chunk` and `masked` are
    for portable-static.
    """

    flavour: Flavour = "ort-fused"
    target: str | None = None
    providers: tuple[str, ...] = ()
    max_context: int | None = None
    max_image_tokens: int | None = None
    max_images: int = MAX_IMAGES
    split_images: bool = True
    chunk: int = CHUNK
    masked: float = MASKED

    @property
    def static(self) -> bool:
        """Whether graphs have fixed shapes."""
        return self.flavour == "portable-static"


def find(name: str) -> Target:
    """The row of this name. Raises InputError naming the known ones."""
    for target in TARGETS:
        if target.name == name:
            return target
    known = [target.name for target in TARGETS]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise InputError(f"--target: {name!r} is not known; {hint}choose from {', '.join(known)}")


def plan_for(
    name: str | None,
    *,
    to: str = "onnx",
    flavour: str | None = None,
    max_context: int | None = None,
    max_image_tokens: int | None = None,
    max_images: int | None = None,
    split_images: bool = True,
) -> Plan:
    """The plan of a target (None: any computer, no ceilings) with a user's changes over it.

    Raises InputError for an unknown name, and for a target that this format cannot serve, saying what can.
    """
    if flavour is not None and flavour not in FLAVOURS:
        raise InputError(f"--flavour: got {flavour!r}, choose from {', '.join(FLAVOURS)}")
    if to == "coreml" and flavour is not None:
        raise InputError("--flavour: is for --to onnx; ML programs have fixed shapes in any case")
    plan = (Plan() if to != "coreml" else _any_phone()) if name is None else _of(find(name), to)
    changes = {
        "flavour": flavour,
        "max_context": max_context,
        "max_image_tokens": max_image_tokens,
        "max_images": max_images,
    }
    return replace(
        plan,
        split_images=split_images,
        **{key: value for key, value in changes.items() if value is not None},  # type: ignore[arg-type]
    )


def _of(target: Target, to: str) -> Plan:
    if to == "gguf":  # llama.cpp runs on all of them; what it needs of a target are the ceilings
        return Plan(
            target=target.name,
            max_context=target.max_context,
            max_image_tokens=target.max_image_tokens,
            max_images=target.max_images,
        )
    if target.format != to:
        others = ", ".join(each.name for each in TARGETS if each.format == to)
        raise InputError(
            f"--target {target.name}: needs --to {target.format}; with --to {to} take "
            f"{others or 'no target'}{_INSTEAD.get(target.format, '')}"
        )
    return Plan(
        flavour=target.flavour,
        target=target.name,
        providers=target.providers,
        max_context=target.max_context,
        max_image_tokens=target.max_image_tokens,
        max_images=target.max_images,
        chunk=target.chunk,
    )


_INSTEAD = {
    "coreml": ", or --flavour portable-static --precision fp16 without a target for onnxruntime's "
    "CoreML provider"
}


def _any_phone() -> Plan:
    """Without a target, programs of fixed shapes have the sizes of the first target of the format."""
    return replace(_of(next(each for each in TARGETS if each.format == "coreml"), "coreml"), target=None)


def default_precision(plan: Plan, to: str = "onnx") -> str:
    """The target's own. Of the other flavour: int4 for fused graphs where the target's are qdq, and the
    target's where not; fp32 for fixed shapes. Without a target fp32 (ML programs: fp16)."""
    if plan.target is None:
        return "fp16" if to == "coreml" else "fp32"
    target = find(plan.target)
    if target.flavour == plan.flavour:
        return target.precision
    if plan.static:
        return "fp32"
    return "int4" if target.precision.startswith("qdq-") else target.precision


def check_precision(plan: Plan, precision: str) -> None:
    """Raises InputError for a precision that the plan's flavour does not have."""
    if plan.static and precision not in STATIC_PRECISIONS:
        raise InputError(
            f"--precision {precision}: portable-static has {', '.join(STATIC_PRECISIONS)}; "
            f"{precision} needs --flavour ort-fused"
        )
    if not plan.static and precision.startswith("qdq-"):
        raise InputError(f"--precision {precision}: needs --flavour portable-static or a target that has it")
