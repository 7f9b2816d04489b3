"""Optimizers and learning rates: AdamW as in the paper, Muon for tiny models from random weights.

In: a model and settings. Out: an optimizer whose rate is set by `scale`. Not here: the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from runtime.errors import TrainingError

COSINE_END = 0.03
"""Share of the peak rate at which a cosine ends."""


@dataclass(frozen=True)
class Optimizing:
    """Optimizer settings. The defaults are the paper's (METHOD 6; Sec. 4.1): AdamW, a fixed rate of 1e-6.

    `lr` is AdamW's peak rate; `muon_ratio` times it is Muon's. `warmup_steps` of linear warm-up, then a
    constant rate or a cosine to 3 % of the peak. Gradients are clipped at the norm `clip` (0: not at all).
    """

    lr: float = 1e-6
    optimizer: Literal["adamw", "muon"] = "adamw"
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    muon_ratio: float = 20 / 3

    @classmethod
    def muon(cls, lr: float = 3e-3, warmup_steps: int = 20) -> Optimizing:
        """What the demo trains with: Muon on hidden matrices, AdamW on the rest, a cosine."""
        return cls(
            lr=lr,
            optimizer="muon",
            schedule="cosine",
            warmup_steps=warmup_steps,
            weight_decay=0.02,
            betas=(0.9, 0.98),
        )


def rate(step: int, steps: int, settings: Optimizing) -> float:
    """Share of the peak learning rate at a step: linear warm-up times 1, or a cosine from 1 to 0.03."""
    warm = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    if settings.schedule == "constant":
        return warm
    return warm * (COSINE_END + (1 - COSINE_END) * 0.5 * (1 + math.cos(math.pi * step / steps)))


def build(model: PreTrainedModel, settings: Optimizing) -> torch.optim.Optimizer:
    """The optimizer of the model's trainable parameters. Every group holds its peak rate as `peak_lr`.

    Raises TrainingError when nothing is trainable, or when parameters are in 16 bits (METHOD 6).
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise TrainingError("the student has no trainable parameter; `train.freeze` leaves nothing to learn")
    for name, parameter in trained.items():
        if parameter.dtype != torch.float32:
            raise TrainingError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')}, wanted float32: at a rate of "
                f"{settings.lr:g} its updates round to zero; load the student in float32 and set "
                "`train.precision: bf16`, which computes in bfloat16 over float32 weights"
            )
    if settings.optimizer == "muon":
        return HiddenMuon(model, settings)
    decayed = [p for p in trained.values() if p.ndim > 1]
    plain = [p for p in trained.values() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if not settings.weight_decay:
        groups = [{"params": list(trained.values())}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=0.0,
        fused=True,
    )
    return _with_peaks(optimizer)


def _with_peaks(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def scale(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def parts(optimizer: torch.optim.Optimizer) -> Sequence[torch.optim.Optimizer]:
    """The plain torch optimizers inside: what a checkpoint saves."""
    inner = getattr(optimizer, "optimizer", optimizer)  # inside Accelerate's wrapper
    return inner.parts if isinstance(inner, HiddenMuon) else [inner]


def refresh(optimizer: torch.optim.Optimizer) -> None:
    """To be called after the state of the `parts` was loaded: torch then holds new groups."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if isinstance(inner, HiddenMuon):
        inner.refresh()


class HiddenMuon(torch.optim.Optimizer):
    """Muon on the 2-D weights of hidden layers and AdamW on embeddings, head, convolutions, norms, biases."""

    def __init__(self, model: PreTrainedModel, settings: Optimizing) -> None:
        outer = {
            id(p)
            for m in (model.get_input_embeddings(), model.get_output_embeddings())
            for p in m.parameters()
        }
        embeddings = {
            id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()
        } | outer
        trained = [p for p in model.parameters() if p.requires_grad]
        hidden = [p for p in trained if p.ndim == 2 and id(p) not in embeddings]
        kept = {id(p) for p in hidden}
        rest = [p for p in trained if id(p) not in kept]
        self.parts: list[torch.optim.Optimizer] = []
        if rest:
            adam = torch.optim.AdamW(rest, lr=settings.lr, betas=settings.betas, weight_decay=0.0, fused=True)
            self.parts.append(_with_peaks(adam))
        if hidden:
            rate = settings.lr * settings.muon_ratio
            muon = torch.optim.Muon(hidden, lr=rate, weight_decay=settings.weight_decay, ns_steps=4)
            self.parts.append(_with_peaks(muon))
        super().__init__(trained, {})
        self.refresh()

    def refresh(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        self.refresh()
