"""Masked teachers: the smallest weights of each tensor set to zero, and put back exactly (METHOD 1, 2).

In: a model, whole or sharded by FSDP2, the largest ratio, which tensors. Out: the same model in place at
any smaller ratio. Not here: finding the smallest (`distill/masks/magnitudes.py`), which ratio to use
(`distill/masks/teachers.py`), what the masked teacher says.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill.masks.magnitudes import Layout, Smallest, layout, pack, pieces, unpack
from runtime.errors import CheckpointError


def schedule(r_max: float, step: float) -> tuple[float, ...]:
    """The ratios of the stages, from `r_max` down to 0: r[i] = r_max - s * floor(i * M / I) with
    M = r_max / s + 1 (Sec. 3.2, Eq. 3), one entry for each of the M values; clamped at 0. Where r_max is
    no multiple of the step, M is rounded up: the last stage has the full teacher."""
    if not 0 <= r_max < 1 or step <= 0:
        raise ValueError(f"r_max {r_max} must be in [0, 1) and the step {step} above 0")
    stages = math.ceil(r_max / step - 1e-9) + 1
    return tuple(max(0.0, round(r_max - step * stage, 10)) for stage in range(stages))


def choose_r_max(curve: Sequence[tuple[float, float]], *, most_lost: float = 0.03) -> float:
    """The largest ratio that loses at most `most_lost` accuracy against r = 0 (METHOD 2).

    `curve` holds (ratio, accuracy) with ratio 0 among them.
    """
    accuracy = dict(curve)
    return max(ratio for ratio, value in curve if value >= accuracy[0.0] - most_lost - 1e-9)


def is_inert(curve: Sequence[tuple[float, float]], *, least_lost: float = 0.01) -> bool:
    """Whether every ratio up to 0.5 loses less than `least_lost`: masking then teaches nothing (METHOD 2)."""
    accuracy = dict(curve)
    return all(accuracy[0.0] - value < least_lost - 1e-9 for ratio, value in curve if ratio <= 0.5)


LANGUAGE, VISION, EMBEDDINGS = "language", "vision", "embeddings"
LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)


@dataclass(frozen=True)
class Rule:
    """Tensors whose name fits the glob are masked at `scale` times the ratio; None leaves them alone."""

    tensors: str
    scale: float | None = 1.0


@dataclass(frozen=True)
class Target:
    """A weight to mask: where it is found, and its ratio as a multiple of the asked one."""

    module: nn.Module
    attribute: str
    scale: float = 1.0

    @property
    def parameter(self) -> torch.Tensor:
        return getattr(self.module, self.attribute)

    @torch.no_grad()
    def values(self) -> torch.Tensor:
        """(n,) this process's values, as a view. Looked up anew: loading a checkpoint under FSDP2 may replace
        the parameter or its storage."""
        parameter = self.parameter.data
        return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).view(-1)


@dataclass(frozen=True)
class Sparsity:
    """What was measured on one tensor: its zeros among all its values."""

    name: str
    zeros: int
    count: int

    @property
    def share(self) -> float:
        return self.zeros / max(1, self.count)


def maskable(
    model: PreTrainedModel, kinds: Sequence[str] = (LANGUAGE,), rules: Sequence[Rule] = ()
) -> dict[str, Target]:
    """The weights that a mask may touch, by name.

    Linear and convolution weights of the language model by default, experts that are stacked in one
    parameter among them; `vision` and `embeddings` on request; norms, biases, the LM head (and what is
    tied to it) never (METHOD 1). Then the first of `rules` that fits a name decides its scale. A stack of
    experts is one tensor with one threshold.

    Raises CheckpointError for a quantised or FSDP1 model, for a rule that fits nothing, and for a matrix of
    the language model that belongs to no known layer and that no rule names.
    """
    unknown = set(kinds) - {LANGUAGE, VISION, EMBEDDINGS}
    if unknown:
        raise ValueError(
            f"mask: unknown tensors {sorted(unknown)}; known: {LANGUAGE}, {VISION}, {EMBEDDINGS}"
        )
    _refuse(model)
    reshard(model)
    taken = {id(p) for p in model.get_output_embeddings().parameters()}
    taken |= {id(p) for p in model.get_input_embeddings().parameters()} if EMBEDDINGS not in kinds else set()
    chosen, fitting = {}, set[str]()
    for name, module, attribute, kind in _weights(model, rules):
        weight = getattr(module, attribute)
        if kind not in kinds or id(weight) in taken:
            continue
        taken.add(id(weight))  # a tensor that two modules share is masked once
        fitting |= {rule.tensors for rule in rules if fnmatch.fnmatchcase(name, rule.tensors)}
        scale = next((rule.scale for rule in rules if fnmatch.fnmatchcase(name, rule.tensors)), 1.0)
        if scale:
            chosen[name] = Target(module, attribute, scale)
    for rule in rules:
        if rule.tensors not in fitting:
            example = next(iter(chosen), "none")
            raise CheckpointError(f"mask rule {rule.tensors!r} fits no weight; names look like {example}")
    return chosen


def _refuse(model: PreTrainedModel) -> None:
    name = model.config.name_or_path
    if getattr(model, "hf_quantizer", None) is not None:
        raise CheckpointError(f"{name}: a quantised teacher cannot be masked; give the original weights")
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise CheckpointError(f"{name}: FSDP1 cannot be masked; set fsdp_version: 2 for accelerate")


def reshard(model: nn.Module) -> None:
    """Drop FSDP2's gathered copies: they would keep the old values, and hide the shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _weights(model: PreTrainedModel, rules: Sequence[Rule]) -> Iterator[tuple[str, nn.Module, str, str]]:
    """(name, module, attribute, kind) of every matrix that could be masked."""
    decoder = {id(p) for p in cast(Any, model.base_model).get_decoder().parameters()}
    experts = _expert_counts(model)
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            yield f"{path}.weight", module, "weight", EMBEDDINGS
        elif isinstance(module, LINEAR):
            yield f"{path}.weight", module, "weight", LANGUAGE if id(module.weight) in decoder else VISION
        else:
            for attribute, weight in module.named_parameters(recurse=False):
                name = f"{path}.{attribute}"
                if weight.ndim < 2 or id(weight) not in decoder or attribute.endswith("bias"):
                    continue
                if weight.shape[0] not in experts and not any(
                    fnmatch.fnmatchcase(name, rule.tensors) for rule in rules
                ):
                    raise CheckpointError(
                        f"{name}: {tuple(weight.shape)} in {type(module).__name__} is no linear layer, "
                        "convolution or stack of experts; say in a mask rule for its name whether to mask it"
                    )
                yield name, module, attribute, LANGUAGE


def _expert_counts(model: PreTrainedModel) -> set[int]:
    """How many experts a layer can have, by the config: first dimension of stacked experts and routers."""
    config = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return {n for key, n in vars(config).items() if "expert" in key and isinstance(n, int) and n > 1}


class Masker:
    """Sets the smallest-magnitude share of every tensor to zero, in place; nested and exactly reversible.

    W_r = m * W with m = 1 if |w| >= lambda_r else 0, lambda_r the r-quantile of |w| of the tensor
    (Sec. 3.1, Eq. 1-2). Exactly floor(r * n) weights are masked; ties at the threshold go by position,
    so a smaller ratio keeps a superset of the weights of a larger one.

    Only the values that a mask up to `r_max` can remove are kept aside, with one bit a weight that tells
    their places: r_max of the weights' bytes, plus 1/16 in 16-bit and 1/32 in 32-bit floats
    (`kept_bytes`). Temporary memory does not grow with the model. While weights may be masked, only `set`
    may change them.

    Under FSDP2 every rank masks its own shards, exactly as the whole tensors would be masked. Building,
    `set` and `sparsity` are then collective: all ranks call them. DeepSpeed ZeRO-3, FSDP1 and tensor
    parallelism are refused with CheckpointError.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        r_max: float,
        kinds: Sequence[str] = (LANGUAGE,),
        *,
        rules: Sequence[Rule] = (),
        only: str = "*",
    ) -> None:
        if not 0 <= r_max < 1:
            raise ValueError(f"mask: r_max {r_max} must be in [0, 1)")
        self.model, self.r_max, self.kinds = model, r_max, tuple(kinds)
        self.ratio = 0.0
        targets = maskable(model, kinds, rules)
        for name, target in targets.items():
            if not 0 <= target.scale * r_max < 1:
                raise ValueError(f"mask: {target.scale} times r_max {r_max} is not below 1 for {name}")
        self._kept = [
            _Kept(name, target, r_max) for name, target in targets.items() if fnmatch.fnmatch(name, only)
        ]
        if r_max and not self._kept:
            raise CheckpointError(
                f"{model.config.name_or_path}: no weights of {', '.join(self.kinds)} to mask; see its rules"
            )

    def set(self, ratio: float) -> None:
        """Mask at `ratio`, from whatever ratio is in force. Raises ValueError above `r_max`."""
        if not 0 <= ratio <= self.r_max + 1e-12:
            raise ValueError(
                f"mask ratio {ratio} is outside 0..{self.r_max}; build the masker with a larger r_max"
            )
        if ratio != self.ratio:
            reshard(self.model)
            for kept in self._kept:
                kept.mask(ratio)
        self.ratio = ratio

    def measure(self) -> list[Sparsity]:
        """Zeros of every tensor, of all shards together. The ratio that was asked for is never reported."""
        reshard(self.model)
        return [kept.sparsity() for kept in self._kept]

    @property
    def sparsity(self) -> float:
        """Measured share of zeros in the masked tensors."""
        found = self.measure()
        return sum(tensor.zeros for tensor in found) / max(1, sum(tensor.count for tensor in found))

    @property
    def kept_bytes(self) -> int:
        """Bytes that this process keeps aside so that every weight can be put back."""
        return sum(kept.values.nbytes + kept.bits.nbytes for kept in self._kept)

    @property
    def weight_bytes(self) -> int:
        """Bytes of this process's part of the tensors that the mask touches."""
        return sum(kept.target.values().nbytes for kept in self._kept)


class _Kept:
    """What a mask up to `r_max` can remove from one tensor: the values in the tensor's order, and a bit
    for each weight. Which of them a smaller ratio removes follows from the values alone."""

    def __init__(self, name: str, target: Target, r_max: float) -> None:
        self.name, self.target = name, target
        self.where: Layout = layout(name, target.parameter)
        flat = target.values()
        runs = self.where.runs
        ends_b = torch.arange(1, runs + 1, device=flat.device) * (len(flat) // runs)
        removable = Smallest(flat, self._share(r_max), self.where, ends_b)
        self.values = flat.new_empty(removable.local)
        self.bits = torch.empty(-(-len(flat) // 8), dtype=torch.uint8, device=flat.device)
        self.ends_b = torch.zeros(runs, dtype=torch.long, device=flat.device)  # of each run's kept values
        filled = 0
        for start, values in pieces(flat):
            chosen = removable.mark(values)
            self.bits[start // 8 : -(-(start + len(values)) // 8)] = pack(chosen)
            places = chosen.nonzero()[:, 0]
            self.values[filled : filled + len(places)] = values[places]
            filled += len(places)
            self.ends_b += torch.searchsorted(ends_b, places + start, right=True).bincount(minlength=runs)
        self.ends_b = self.ends_b.cumsum(0)

    def mask(self, ratio: float) -> None:
        """Put every value back, then set the smallest floor(ratio * n) to zero."""
        flat, filled = self.target.values(), 0
        wanted = Smallest(self.values, self._share(ratio), self.where, self.ends_b)
        for start, piece in pieces(flat):
            bits = self.bits[start // 8 : -(-(start + len(piece)) // 8)]
            places = unpack(bits, len(piece)).nonzero()[:, 0]
            values = self.values[filled : filled + len(places)]
            piece[places] = values.masked_fill(wanted.mark(values), 0)
            filled += len(places)

    def sparsity(self) -> Sparsity:
        flat = self.target.values()
        zeros = torch.zeros(1, dtype=torch.long, device=flat.device)
        for _, values in pieces(flat):
            zeros += (values == 0).sum()
        return Sparsity(self.name, int(self.where.total(zeros)), self.where.count)

    def _share(self, ratio: float) -> int:
        """floor(ratio * n), of the decimals that were written (0.29 * 100 is 29)."""
        return math.floor(Fraction(str(float(ratio))) * Fraction(str(self.target.scale)) * self.where.count)
