"""A student before training: which parts learn, LoRA adapters, recomputed activations.

In: a Hugging Face model. Out: the same model, set up. Not here: optimizers, the loss.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from runtime.errors import InputError, MissingExtra

VISION, EMBEDDINGS, LANGUAGE = "vision", "embeddings", "language"


def plain(model: Any) -> PreTrainedModel:
    """The Hugging Face model inside a peft model (adapters included), or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def vision_parameters(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Parameters that image features come from: encoder and projector."""
    inner = cast(Any, model.base_model)
    others = {id(p) for p in inner.get_decoder().parameters()}
    for outer in (model.get_input_embeddings(), model.get_output_embeddings()):
        others |= {id(p) for p in outer.parameters()}
    return [p for p in model.parameters() if id(p) not in others]


def freeze(model: Any, kinds: Sequence[str]) -> None:
    """Stop training parts of a student: `vision` (encoder and projector), `embeddings` (with a head that is
    tied to them), `language` (the decoder); with LoRA their adapters, so it comes after `with_lora`.
    Raises InputError for another name."""
    model = plain(model)
    embeddings = list(model.get_input_embeddings().parameters())
    known = {
        VISION: vision_parameters(model),
        EMBEDDINGS: embeddings,
        LANGUAGE: list(cast(Any, model.base_model).get_decoder().parameters()),
    }
    for kind in kinds:
        if kind not in known:
            raise InputError(f"train.freeze: unknown part {kind!r}; known: {', '.join(known)}")
        for parameter in known[kind]:
            parameter.requires_grad_(False)


def with_lora(model: PreTrainedModel, rank: int, alpha: float, targets: str | Sequence[str]) -> Any:
    """The model with trainable peft adapters and everything else frozen. The reference model is then the
    same one with its adapters off: no second copy (METHOD 5: pi_ref is the initial student)."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtra("peft", "distill") from error
    wanted = targets if isinstance(targets, str) else list(targets)
    settings = LoraConfig(r=rank, lora_alpha=cast(Any, alpha), target_modules=wanted, lora_dropout=0.0)
    return get_peft_model(cast(Any, model), settings)


def checkpointed(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass. Hugging Face then keeps no cache: the tree needs none."""
    model.activation_checkpointing_enable({"use_reentrant": False})


@contextlib.contextmanager
def adapters_off(model: torch.nn.Module) -> Iterator[None]:
    """The model without its LoRA adapters. peft's own switch also changes what is trainable, which DDP and
    FSDP2 do not expect in the middle of a step."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer._disable_adapters = value
