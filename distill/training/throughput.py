"""How fast a run trains: tokens a second per device, and the share of the device's peak (MFU).

In: the floating-point operations and tokens of each step, as counted here, and its seconds. Out: rates.
Not here: what a step costs in memory (`distill/planning/plan.py`).

MFU = model operations a second / peak operations a second of the devices. Model operations are those of
the mathematics, two for each multiply-add: 2 x weights x tokens for a forward pass, twice that for a
backward pass through trained weights, and once where only activations need a gradient (frozen weights of
a decoder under LoRA); attention's products of queries and keys are left out, as is what checkpointing
computes again. A prompt that a tree shares is counted once.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from distill.inputs.encoding import Prompt

PEAK_FLOPS = (
    # the first name that the device's name contains; dense bfloat16, operations a second
    ("B200", 2250e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense bfloat16 peak of a known GPU; None for other devices and for float32 training."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_FLOPS if known in name), None)


@dataclass(frozen=True)
class Weights:
    """Weights that take part in a product for each token of their kind."""

    decoder: int
    vision: int
    head: int
    patch_values: int  # pixel values that make one patch; 0 where the model has no patch embedding
    trained_decoder: bool
    trained_vision: bool


_COUNTED: weakref.WeakKeyDictionary[nn.Module, Weights] = weakref.WeakKeyDictionary()


def weights(model: Any) -> Weights:
    """Count a model's weights by where they are used: embeddings are looked up, they cost nothing."""
    if model not in _COUNTED:
        _COUNTED[model] = _count(model)
    return _COUNTED[model]


def _count(model: Any) -> Weights:
    head = model.get_output_embeddings().weight
    looked_up = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    skipped = looked_up | {id(head)}
    decoder = {id(p): p for p in model.base_model.get_decoder().parameters() if id(p) not in skipped}
    vision = {id(p): p for p in model.parameters() if id(p) not in skipped and id(p) not in decoder}
    patch = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), None)
    return Weights(
        decoder=sum(p.numel() for p in decoder.values()),  # of a shard, too, the whole tensor's
        vision=sum(p.numel() for p in vision.values()),
        head=head.numel(),
        patch_values=0 if patch is None else patch.weight.numel() // patch.weight.shape[0],
        trained_decoder=any(p.requires_grad for p in decoder.values()),
        trained_vision=any(p.requires_grad for p in vision.values()),
    )


def flops(
    counted: Weights,
    prompts: Sequence[Prompt],
    *,
    tokens: int,
    predicted: int,
    cached: bool,
    backward: bool,
) -> float:
    """Operations of one pass over `tokens` packed tokens of which `predicted` places reach the head.

    `prompts` hold the pixels that are encoded, unless their features are `cached`.
    """
    pixels = sum(
        tensor.numel()
        for prompt in (() if cached else prompts)
        for name, tensor in prompt.vision.items()
        if name.startswith("pixel_values")
    )
    patches = pixels / counted.patch_values if counted.patch_values else 0.0
    decoder = 3 if backward and counted.trained_decoder else 2 if backward else 1
    seen = 3 if backward and counted.trained_vision else 1
    head = 2 if backward else 1  # its input's gradient; the weight's is as much again where it is trained
    return (
        2.0 * counted.decoder * tokens * decoder
        + 2.0 * counted.vision * patches * seen
        + 2.0 * counted.head * predicted * (head + (backward and counted.trained_decoder))
    )


@dataclass
class Meter:
    """Rates over the last steps. `add` takes what all processes did in a step and its seconds."""

    devices: int
    peak: float | None
    keep: int = 20
    _steps: list[tuple[float, float, float]] = field(default_factory=list)

    def add(self, tokens: float, flops: float, seconds: float) -> None:
        self._steps = [*self._steps[-self.keep + 1 :], (tokens, flops, max(seconds, 1e-9))]

    def figures(self) -> dict[str, float]:
        """`tokens_per_s_device`, and `mfu` in 0..1 where the device's peak is known."""
        tokens, operations, seconds = (sum(column) for column in zip(*self._steps, strict=True))
        found = {"tokens_per_s_device": tokens / seconds / self.devices}
        if self.peak is not None and operations:
            found["mfu"] = operations / seconds / self.devices / self.peak
        return found
