"""The parts of a checkpoint as functions that Core ML can have: every shape fixed, every view one size.

In: a checkpoint, its family, an image section whose views have one shape, sizes. Out: `Function`s by part
and name. Not here: the decoder's module (`coreml_decoder.py`), conversion (`coreml_convert.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from export import coreml_decoder
from export.checkpoint import Checkpoint
from export.coreml_convert import ENTRY, Function
from export.coreml_decoder import CoremlDecoder, scaled
from export.families import Family
from export.families.base import VisionPart
from export.static_decoder import StaticSizes, normed
from runtime.errors import CheckpointError
from runtime.image import prepare
from runtime.image_spec import ImageSpec, PatchifyPadded

ROLES = ("vision_encoder", "embed_tokens", "decoder")
"""In the order of use."""

PREFILL, DECODE = "prefill", "decode"
_KEY = "pocketvlm_coreml_vision"


@dataclass(frozen=True)
class Parts:
    """Functions of each part by name, ready to be converted one by one."""

    vision_encoder: dict[str, Function]
    embed_tokens: dict[str, Function]
    decoder: dict[str, Function]

    def of(self, role: str) -> dict[str, Function]:
        found: dict[str, Function] = getattr(self, role)
        return found


def parts_of(checkpoint: Checkpoint, family: Family, image: ImageSpec, sizes: StaticSizes) -> Parts:
    """Functions over the checkpoint's own modules. Raises CheckpointError for what has no Core ML form."""
    shape = family.decoder_shape(checkpoint)
    coreml_decoder.check_shape(shape, str(checkpoint.path))
    modules = family.modules(checkpoint)
    lengths = {PREFILL: sizes.chunk, DECODE: 1}
    decoders = {
        name: CoremlDecoder(modules.text, modules.head, shape, sizes, length).eval()
        for name, length in lengths.items()
    }
    states = coreml_decoder.state_shapes(shape, sizes.context)
    return Parts(
        vision_encoder={ENTRY: _vision(modules.vision, image)},
        embed_tokens={
            name: Function(
                modules.embed, {"input_ids": torch.zeros(1, length, dtype=torch.int32)}, ["inputs_embeds"]
            )
            for name, length in lengths.items()
        },
        decoder={
            name: Function(
                decoder, decoder.example(), ["logits"], states, partial(coreml_decoder.traceable, decoder)
            )
            for name, decoder in decoders.items()
        },
    )


# --- vision -----------------------------------------------------------


class _OneView(nn.Module):
    """A vision module whose inputs but the pixels are constants of the one shape; features (T, hidden)."""

    def __init__(self, module: nn.Module, inputs: dict[str, torch.Tensor], patches: int | None) -> None:
        super().__init__()
        self.module, self._names, self._patches = module, list(inputs), patches
        for name in self._names[1:]:
            self.register_buffer(f"constant_{name}", inputs[name])

    def forward(self, pixel_values: torch.Tensor) -> Any:
        """The view's tensor as the image section makes it; padded patches are cut off."""
        with FromInputs(pixel_values):
            if self._patches is not None:
                pixel_values = pixel_values[:, : self._patches]
            more = (getattr(self, f"constant_{name}") for name in self._names[1:])
            found = self.module(pixel_values, *more)
            features, *stack = found if isinstance(found, tuple) else (found,)
            features = features.reshape(-1, features.shape[-1])
        return (features, *stack) if stack else features


class FromInputs(TorchFunctionMode):
    """Inside it a trace sees only what depends on values of `inputs`; all else becomes constants.

    Sizes are fixed, so whatever is computed from them (a grid's positions, resized tables) is computed by
    torch, here and now: a converter has not every operator for it.
    """

    _MARK = "_pocketvlm_from_inputs"

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self._mark(inputs)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = (args, kwargs or {})
        if func not in _SIZES and any(hasattr(leaf, self._MARK) for leaf in tree_leaves(given)):
            found = func(*args, **(kwargs or {}))
            self._mark(found)
            return found
        state = torch._C._get_tracing_state()
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        try:
            return func(*args, **(kwargs or {}))
        finally:
            torch._C._set_tracing_state(state)  # type: ignore[attr-defined]

    def _mark(self, found: Any) -> None:
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                setattr(leaf, self._MARK, True)


_SIZES = (torch.Tensor.size, torch.Tensor.shape.__get__, torch.Tensor.numel, torch.Tensor.dim)  # type: ignore[attr-defined]


def _vision(part: VisionPart, image: ImageSpec) -> Function:
    """For the one shape that every view has; `pixel_values` is its only input."""
    view = prepare(Image.new("RGB", (64, 64)), image).views[0]
    inputs = {name: torch.from_numpy(np.ascontiguousarray(view.inputs[name])) for name in part.example}
    if next(iter(inputs)) != "pixel_values":
        raise CheckpointError(f"vision part: its first input is {next(iter(inputs))}, wanted pixel_values")
    padded = isinstance(image.operations[-1], PatchifyPadded)
    rows, columns = view.grid
    module = _OneView(part.module, inputs, rows * columns * image.tokens.merge**2 if padded else None).eval()
    example = {"pixel_values": inputs["pixel_values"].clone()}
    return Function(module, example, list(part.outputs), scope=partial(_plain_attention, part.module))


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """(1, H, S, D) three times -> (1, S, H, D), as transformers' attention interface; one operation."""
    if attention_mask is not None or key.shape[1] != query.shape[1]:
        raise CheckpointError("vision part: attention with a mask or shared heads has no Core ML part here")
    out = functional.scaled_dot_product_attention(scaled(query, scaling), key, value)
    return out.transpose(1, 2), None


@contextlib.contextmanager
def _plain_attention(module: nn.Module) -> Iterator[None]:
    """Attention layers and RMSNorms of `module` are Core ML's inside this block only."""
    configs: dict[int, Any] = {
        id(each.config): each.config
        for each in module.modules()
        if hasattr(getattr(each, "config", None), "_attn_implementation")
    }
    with normed(module), contextlib.ExitStack() as undo:
        AttentionInterface.register(_KEY, _attention)
        undo.callback(AttentionInterface._global_mapping.pop, _KEY, None)
        AttentionMaskInterface.register(_KEY, lambda *_, **__: None)
        undo.callback(AttentionMaskInterface._global_mapping.pop, _KEY, None)
        for config in configs.values():
            undo.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = _KEY
        yield
