"""Importance of weights for llama.cpp's quantization, from prompts with pictures.

In: the checkpoint as a session, cases, the plan of the text model's file. Out: mean squared input of each
matrix by column, under its GGUF name: what an importance matrix holds (llama.cpp's tool sees text alone).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from evals.parity.parity import ParityCase, forced_logits
from evals.torch_session import TorchSession
from export.families.gguf_layout import text_name
from export.gguf_plan import Plan


class _Columns:
    """Sums of squares of a matrix's inputs, and how many inputs there were."""

    def __init__(self) -> None:
        self.total: torch.Tensor | None = None
        self.count = 0

    def add(self, inputs: torch.Tensor) -> None:
        flat = inputs.detach().reshape(-1, inputs.shape[-1]).double()
        squares = (flat * flat).sum(0)
        self.total = squares if self.total is None else self.total + squares
        self.count += len(flat)


def collect(
    reference: TorchSession, cases: Sequence[ParityCase], plan: Plan
) -> Mapping[str, NDArray[np.float32]]:
    """Run prompts and forced tokens of every case; (columns,) float32 by GGUF tensor name."""
    targets = {text_name(piece.source): piece.name for piece in plan.pieces}
    found: dict[str, _Columns] = {}
    with _watched(reference.model, targets, found):
        for case in cases:
            prepared = [reference.prepare(each) for each in case.images]
            ids = reference.prompt_ids(case.question, prepared)
            forced_logits(reference, ids, [reference.encode_image(each) for each in prepared], case.forced)
    return {
        name: (columns.total / columns.count).float().numpy()
        for name, columns in found.items()
        if columns.total is not None
    }


@contextlib.contextmanager
def _watched(model: Any, targets: Mapping[str, str], found: dict[str, _Columns]) -> Iterator[None]:
    """Every linear layer of the text model adds up its inputs inside this block."""
    hooks = []
    for name, module in model.named_modules():
        target = targets.get(text_name(f"{name}.weight"))
        if target is not None and isinstance(module, torch.nn.Linear):
            columns = found.setdefault(target, _Columns())
            hooks.append(module.register_forward_pre_hook(lambda _, args, seen=columns: seen.add(args[0])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
