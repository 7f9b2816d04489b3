"""Masked teachers: the smallest weights of each tensor set to zero, and put back exactly (METHOD 1, 2).

In: a model, the largest ratio, which tensors. Out: the same model in place at any smaller ratio.
Not here: which ratio to use, what the masked teacher says.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from runtime.errors import CheckpointError


def schedule(r_max: float, step: float) -> tuple[float, ...]:
    """The ratios of the stages, from `r_max` down to 0: r[i] = r_max - s * floor(i * M / I) with
    M = r_max / s + 1 (Sec. 3.2, Eq. 3), one entry for each of the M values; clamped at 0."""
    if not 0 <= r_max < 1 or step <= 0:
        raise ValueError(f"r_max {r_max} must be in [0, 1) and the step {step} above 0")
    stages = round(r_max / step) + 1
    return tuple(max(0.0, round(r_max - step * stage, 10)) for stage in range(stages))


def ratio_at(i: int, total: int, r_max: float, step: float) -> float:
    """r[i] of Eq. 3 for i in 0..total (at i = total the formula goes below 0: clamped)."""
    stages = round(r_max / step) + 1
    return max(0.0, round(r_max - step * math.floor(i * stages / total), 10))


def choose_r_max(curve: Sequence[tuple[float, float]], *, most_lost: float = 0.03) -> float:
    """The largest ratio that loses at most `most_lost` accuracy against r = 0 (METHOD 2).

    `curve` holds (ratio, accuracy) with ratio 0 among them.
    """
    accuracy = dict(curve)
    return max(ratio for ratio, value in curve if value >= accuracy[0.0] - most_lost)


def is_inert(curve: Sequence[tuple[float, float]], *, least_lost: float = 0.01) -> bool:
    """Whether every ratio up to 0.5 loses less than `least_lost`: masking then teaches nothing (METHOD 2)."""
    accuracy = dict(curve)
    return all(accuracy[0.0] - value < least_lost for ratio, value in curve if ratio <= 0.5)


LANGUAGE, VISION, EMBEDDINGS = "language", "vision", "embeddings"


def maskable(model: PreTrainedModel, kinds: Sequence[str] = (LANGUAGE,)) -> dict[str, torch.Tensor]:
    """The weight tensors that a mask may touch: linear and convolution weights of the language model by
    default; `vision` and `embeddings` on request; norms, biases and the LM head never (METHOD 1)."""
    unknown = set(kinds) - {LANGUAGE, VISION, EMBEDDINGS}
    if unknown:
        raise ValueError(
            f"mask: unknown tensors {sorted(unknown)}; known: {LANGUAGE}, {VISION}, {EMBEDDINGS}"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise CheckpointError(
            f"{model.config.name_or_path}: a quantised teacher cannot be masked; give the original weights"
        )
    taken = {id(p) for p in model.get_output_embeddings().parameters()}
    taken |= {id(p) for p in model.get_input_embeddings().parameters()} if EMBEDDINGS not in kinds else set()
    decoder = {id(p) for p in cast(Any, model.base_model).get_decoder().parameters()}
    chosen = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)):
            continue
        weight = module.weight
        if isinstance(module, nn.Embedding):
            kind = EMBEDDINGS
        else:
            kind = LANGUAGE if id(weight) in decoder else VISION
        if kind in kinds and id(weight) not in taken:
            chosen[f"{name}.weight"] = weight
            taken.add(id(weight))  # a tensor that two modules share is masked once
    return chosen


class Masker:
    """Sets the smallest-magnitude share of every tensor to zero, in place; nested and exactly reversible.

    W_r = m * W with m = 1 if |w| >= lambda_r else 0, lambda_r the r-quantile of |w| of the tensor
    (Sec. 3.1, Eq. 1-2). Exactly floor(r * n) weights are masked; ties at the threshold go by position,
    so a smaller ratio keeps a superset of the weights of a larger one.

    Only the values that a mask up to `r_max` can remove are kept aside, with one bit a weight that tells
    their places: r_max of the weights' bytes, plus 1/16 in 16-bit and 1/32 in 32-bit floats
    (`kept_bytes`). While weights may be masked, only `set` may change them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        r_max: float,
        kinds: Sequence[str] = (LANGUAGE,),
        *,
        only: str = "*",
    ) -> None:
        if not 0 <= r_max < 1:
            raise ValueError(f"mask: r_max {r_max} must be in [0, 1)")
        self.r_max, self.kinds = r_max, tuple(kinds)
        self.ratio = 0.0
        self._kept: list[_Kept] = []
        for name, weight in maskable(model, kinds).items():
            if not fnmatch.fnmatch(name, only):
                continue
            self._kept.append(_Kept(weight.data.view(-1), r_max))

    @torch.no_grad()
    def set(self, ratio: float) -> None:
        """Mask at `ratio`, from whatever ratio is in force. Raises ValueError above `r_max`."""
        if not 0 <= ratio <= self.r_max + 1e-12:
            raise ValueError(
                f"mask ratio {ratio} is outside 0..{self.r_max}; build the masker with a larger r_max"
            )
        if ratio != self.ratio:
            for kept in self._kept:
                kept.mask(ratio)
        self.ratio = ratio

    @property
    def sparsity(self) -> float:
        """Measured share of zeros in the masked tensors."""
        zeros = sum(int((kept.flat == 0).sum()) for kept in self._kept)
        return zeros / max(1, sum(kept.flat.numel() for kept in self._kept))

    @property
    def kept_bytes(self) -> int:
        """Bytes kept aside so that every weight can be put back."""
        return sum(kept.values.nbytes + kept.bits.nbytes for kept in self._kept)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the tensors that the mask touches."""
        return sum(kept.flat.nbytes for kept in self._kept)


class _Kept:
    """What a mask up to `r_max` can remove from one tensor: the values in the tensor's order, and a bit
    for each weight. Which of them a smaller ratio removes follows from the values alone."""

    def __init__(self, flat: torch.Tensor, r_max: float) -> None:
        self.flat = flat
        removable = _smallest(flat.abs(), _share(r_max, flat.numel()))
        self.values = flat[removable]
        self.bits = _pack(removable)

    def mask(self, ratio: float) -> None:
        """Put every value back, then set the smallest floor(ratio * n) to zero."""
        places = _unpack(self.bits, self.flat.numel()).nonzero()[:, 0]
        wanted = _smallest(self.values.abs(), _share(ratio, self.flat.numel()))
        self.flat[places] = self.values.masked_fill(wanted, 0)


def _share(ratio: float, count: int) -> int:
    """floor(ratio * count), of the decimal ratio that was written (0.29 * 100 is 29)."""
    return math.floor(Fraction(str(float(ratio))) * count)


def _smallest(magnitude_n: torch.Tensor, count: int) -> torch.Tensor:
    """(n,) bool: exactly `count` smallest magnitudes; of equal ones at the threshold, the first places."""
    if count == 0:
        return torch.zeros_like(magnitude_n, dtype=torch.bool)
    threshold = magnitude_n.kthvalue(count).values
    chosen_n = magnitude_n < threshold
    ties = (magnitude_n == threshold).nonzero()[:, 0]
    chosen_n[ties[: count - int(chosen_n.sum())]] = True
    return chosen_n


def _pack(chosen_n: torch.Tensor) -> torch.Tensor:
    """(ceil(n / 8),) uint8 from (n,) bool."""
    padded = torch.nn.functional.pad(chosen_n.to(torch.uint8), (0, -len(chosen_n) % 8)).view(-1, 8)
    return sum((padded[:, bit] << bit for bit in range(1, 8)), start=padded[:, 0].clone())


def _unpack(bits: torch.Tensor, count: int) -> torch.Tensor:
    """(n,) bool from (ceil(n / 8),) uint8."""
    place = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[:, None] >> place & 1).bool().flatten()[:count]
