"""The LM head of a model, whatever its logits go through after the matrix product.

In: a Hugging Face model. Out: its head as one object; log-softmax without a second tensor of that size.
Not here: chunks and losses (`distill/losses/heads.py`), teachers (`distill/losses/signal.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from runtime.errors import CheckpointError


@dataclass(frozen=True)
class Head:
    """The LM head of a model: a module, then a factor and a soft cap on the logits where it has them."""

    module: nn.Module
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: Any) -> Head:
        """The head of a Hugging Face model, with the factor and soft cap that its logits have.

        Configurations name them in many ways, so where one has a candidate the model itself is asked:
        the choice must reproduce its logits on a few text tokens. Raises CheckpointError where none does.
        """
        module = model.get_output_embeddings()
        if module is None:
            raise CheckpointError(f"{model.config.name_or_path}: no LM head; give a generating model")
        scales, caps = _candidates(model.config)
        if len(scales) == 1 and len(caps) == 1:
            return cls(module)
        heads = [cls(module, scale, cap) for cap in caps for scale in scales]
        return _asked(model, heads)

    @property
    def linear(self) -> nn.Linear | None:
        """The module where it is a plain linear layer whose weight is here as a whole, else None.

        A sharded or partitioned weight, a wrapped layer (LoRA, quantised) or one with hooks must be
        called as a module.
        """
        module = self.module
        if type(module) is not nn.Linear or "forward" in vars(module):
            return None
        if module._forward_hooks or module._forward_pre_hooks:
            return None
        whole = module.weight.numel() == module.in_features * module.out_features
        return module if whole and not is_traceable_wrapper_subclass(module.weight) else None

    @property
    def vocab(self) -> int:
        """Rows of the head's weight."""
        size = getattr(self.module, "out_features", None)
        return int(cast(Any, self.module).weight.shape[0] if size is None else size)

    def logits(self, hidden_th: torch.Tensor, vocab: int | None = None) -> torch.Tensor:
        """(T, vocab) fp32 logits (float64 for a float64 model), scaled and capped, differentiable."""
        linear = self.linear
        if vocab is None or vocab == self.vocab:
            logits_tv = self.module(hidden_th)
        elif linear is None:
            logits_tv = self.module(hidden_th)[:, :vocab]
        else:  # the rest is not even computed
            bias = None if linear.bias is None else linear.bias[:vocab]
            logits_tv = nn.functional.linear(hidden_th, linear.weight[:vocab], bias)
        return self.finish(logits_tv.to(working_dtype(logits_tv.dtype)))

    def finish(self, logits_tv: torch.Tensor) -> torch.Tensor:
        """Scale and soft cap."""
        if self.scale != 1.0:
            logits_tv = logits_tv * self.scale
        if self.softcap:
            logits_tv = torch.tanh(logits_tv / self.softcap) * self.softcap
        return logits_tv


def _candidates(config: Any) -> tuple[list[float], list[float | None]]:
    """Factors and soft caps that a configuration may mean for its logits; 1 and None among them."""
    scales: list[float] = [1.0]
    caps: list[float | None] = [None]
    for part in (config.get_text_config(), config):
        for name, value in part.to_dict().items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value:
                continue
            if re.search("logit|lm_head|output|softcap", name):
                if "cap" in name:
                    caps.append(float(value))
                elif re.search("scal|mult", name) and value != 1:
                    scales += [float(value), 1 / value]
    return list(dict.fromkeys(scales)), list(dict.fromkeys(caps))


@torch.no_grad()
def _asked(model: Any, heads: Sequence[Head]) -> Head:
    """The head that reproduces the model's own logits on eight text tokens."""
    device = next(model.parameters()).device
    ids = torch.arange(8, device=device)[None] % model.config.get_text_config().vocab_size
    training = model.training
    model.eval()
    try:
        wanted = model(input_ids=ids, use_cache=False).logits[0].float()
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    finally:
        model.train(training)
    errors = [
        (head.finish(head.module(hidden).float()) - wanted).abs().max().item() / wanted.abs().max().item()
        for head in heads
    ]
    best = min(range(len(heads)), key=errors.__getitem__)
    if errors[best] > 2e-2:  # bf16 logits differ by 2^-8
        raise CheckpointError(
            f"{model.config.name_or_path}: its logits are no scaled or soft-capped output of its head "
            f"(off by {errors[best]:.0%}); this model's loss cannot be computed from hidden states"
        )
    return heads[best]


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which distributions are computed: fp32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


BLOCK_ELEMENTS = 1 << 24
"""Element-wise work on a chunk goes by blocks of rows of this size, so that its temporaries stay small."""


def row_blocks(rows: int, vocab: int) -> Iterator[slice]:
    """Slices of at most BLOCK_ELEMENTS // vocab rows, at least one row each; one empty slice for no rows."""
    step = max(1, BLOCK_ELEMENTS // max(1, vocab))
    for start in range(0, max(1, rows), step):
        yield slice(start, min(start + step, rows))


def log_softmax_(logits_tv: torch.Tensor) -> torch.Tensor:
    """Log-softmax over the last axis in place, without a second tensor of that size. No autograd.

    Rows are copied first if the tensor is a view: the memory of others is left alone.
    """
    if logits_tv._is_view():
        logits_tv = logits_tv.clone()
    for rows in row_blocks(*logits_tv.shape):
        logits_tv[rows] -= logits_tv[rows].logsumexp(-1, keepdim=True)
    return logits_tv
