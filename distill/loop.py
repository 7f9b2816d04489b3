"""The training loop: steps that can be cut anywhere and continue to the same weights.

In: a model, a plan that gives the loss of step i, a directory. Out: trained weights, a log of every
step, and a state file from which an interrupted run continues bit for bit. Not here: what the loss is.
All randomness of a step comes from (seed, step), so nothing random is carried between steps.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from runtime import files
from runtime.errors import TrainingError

STATE = "state.pt"


class Plan(Protocol):
    """What to learn: `steps` losses, step i always the same for the same weights."""

    steps: int

    def is_boundary(self, step: int) -> bool:
        """Whether the state must be saved before this step, because `prepare` draws from the weights."""
        ...

    def prepare(self, model: PreTrainedModel, step: int) -> None:
        """Called before every step. What it makes is kept on disk, or is the same when made again."""
        ...

    def loss(self, model: PreTrainedModel, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss (nats) of one step, and figures to log. `tokens` counts predicted response tokens."""
        ...


@dataclass(frozen=True)
class Optimizing:
    """Optimizer settings: Muon on hidden matrices, AdamW on the rest.

    `lr` is AdamW's peak rate and `muon_ratio` times it is Muon's; linear warm-up over `warmup` steps,
    then a cosine to 3 % of the peak.
    """

    lr: float = 3e-3
    muon_ratio: float = 20 / 3
    warmup: int = 20
    clip: float = 1.0
    weight_decay: float = 0.02


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
        self.parts = [
            torch.optim.AdamW(rest, lr=settings.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
            torch.optim.Muon(
                hidden, lr=settings.lr * settings.muon_ratio, weight_decay=settings.weight_decay, ns_steps=4
            ),
        ]
        super().__init__(trained, {})
        self.param_groups = [group for part in self.parts for group in part.param_groups]
        self.peaks = [group["lr"] for group in self.param_groups]

    def scale(self, factor: float) -> None:
        """Set every group's rate to `factor` times its peak."""
        for group, peak in zip(self.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor

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
        self.param_groups = [group for part in self.parts for group in part.param_groups]


def rate(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up times a cosine from 1 to 0.03."""
    return min(1.0, (step + 1) / warmup) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def fit(
    model: PreTrainedModel,
    plan: Plan,
    settings: Optimizing,
    directory: Path,
    *,
    save_every: int = 200,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Train in place and return the log, one entry a step. Continues from `directory` if cut there before.

    Raises TrainingError when the loss is no longer finite.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    optimizer = HiddenMuon(model, settings)
    start, log = _restore(directory, model, optimizer)
    model.train()
    for step in range(start, plan.steps):
        if step > start and (step % save_every == 0 or plan.is_boundary(step)):
            _save(directory, model, optimizer, step, log)
        plan.prepare(model, step)
        optimizer.scale(rate(step, plan.steps, settings.warmup))
        loss, figures = plan.loss(model, step)
        accelerator.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        log.append({"step": step, "loss": loss.item(), "grad_norm": norm.item(), **figures})
        if not math.isfinite(log[-1]["loss"]):
            raise TrainingError(
                f"{directory}: loss is {log[-1]['loss']} at step {step}; lower the learning rate"
            )
        if progress is not None:
            progress(step + 1, plan.steps, log[-1])
    model.eval()
    return log


def _save(directory: Path, model: PreTrainedModel, optimizer: HiddenMuon, step: int, log: list[Any]) -> None:
    buffer = io.BytesIO()
    state = {"step": step, "log": log, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, buffer)
    files.write_bytes(directory / STATE, buffer.getvalue())


def _restore(
    directory: Path, model: PreTrainedModel, optimizer: HiddenMuon
) -> tuple[int, list[dict[str, float]]]:
    path = directory / STATE
    if not path.exists():
        return 0, []
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["log"]
