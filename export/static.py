"""The four float32 graphs of fixed shapes and standard operators (flavour `portable-static`).

In: a checkpoint, its family, an image section whose views have one shape, sizes. Out: `onnx_ir` models by
role. Not here: the decoder (`static_decoder.py`), rounding (`static_qdq.py`), files (`static_files.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from PIL import Image
from torch import nn

from export import passes
from export.checkpoint import Checkpoint
from export.decoder import DecoderShape, to_onnx
from export.families import Family
from export.families.base import VisionPart
from export.static_decoder import StaticSizes, trace_static
from export.targets import MASKED
from runtime.errors import CheckpointError, InputError
from runtime.image import prepare
from runtime.image_limits import bounded
from runtime.image_spec import GridTiles, ImageSpec, ResizeExact, SmartResize
from runtime.manifest import StateTensor

ROLES = ("vision_encoder", "embed_tokens", "decoder_prefill", "decoder")
"""In the order of use."""


def check_decoder(shape: DecoderShape) -> None:
    """Raises InputError for a decoder of more than plain attention: states or masks with no static graph."""
    if type(shape) is not DecoderShape:
        raise InputError(
            "portable-static: short convolutions, windows and pictures whose tokens see each other have no "
            "static graph here; use --flavour ort-fused"
        )


MOST_FIXED = 4096
"""Tokens of a picture up to which fixed shapes are the model's own: attention grows with their square."""


def fixed_views(spec: ImageSpec, max_tokens: int | None = None) -> ImageSpec:
    """The section with every view of one shape: a resize to any size becomes one to a square of tokens.

    Tiles have one shape already. A square of any-size models has as many tokens as `max_tokens` (by default
    the most that the section allows) leaves room for; the aspect of a picture is not kept. Raises InputError.
    """
    *before, last, normalise, layout = spec.operations
    if isinstance(last, GridTiles) and isinstance(last.whole, SmartResize):
        raise InputError("fixed shapes: tiles and a whole view of any size differ in shape; add --no-split")
    if not isinstance(last, SmartResize):
        return spec
    cells = last.factor // (spec.tokens.patch * spec.tokens.merge)
    if max_tokens is None and spec.max_tokens > MOST_FIXED:
        raise InputError(
            f"fixed shapes: each picture would be as large as the model's largest, {spec.max_tokens} tokens; "
            "give --max-image-tokens (1024, say) or --target"
        )
    most = min(last.max_pixels // last.factor**2, (max_tokens or spec.max_tokens) // cells**2)
    side = isqrt(most)
    if side < 1 or side * side * last.factor**2 < last.min_pixels:
        least = -(-last.min_pixels // last.factor**2) * cells**2
        raise InputError(f"max_image_tokens: got {max_tokens}, this model's pictures take {least} at least")
    edge = side * last.factor
    exact = ResizeExact(height=edge, width=edge, filter=last.filter)
    return bounded((*before, exact, normalise, layout), spec.tokens)


def trace_all(
    checkpoint: Checkpoint, family: Family, image: ImageSpec, sizes: StaticSizes
) -> dict[str, ir.Model]:
    """Trace the four parts in float32. Raises CheckpointError for a model without a static form."""
    modules, shape = family.modules(checkpoint), family.decoder_shape(checkpoint)
    kinds = set(getattr(modules.text.config, "layer_types", None) or ()) - {"full_attention"}
    if kinds or not hasattr(modules.text, "rotary_emb"):
        raise CheckpointError(
            f"{checkpoint.path}: layers of type {', '.join(sorted(kinds)) or 'without rotary_emb'} have no "
            "static graph; use --flavour ort-fused"
        )
    ids = torch.zeros(1, sizes.chunk, dtype=torch.int32)
    try:
        models = {
            "vision_encoder": _vision(modules.vision, image),
            "embed_tokens": to_onnx(modules.embed, (ids,), ["input_ids"], ["inputs_embeds"], None),
            "decoder_prefill": trace_static(modules.text, modules.head, shape, sizes, sizes.chunk),
            "decoder": trace_static(modules.text, modules.head, shape, sizes, 1),
        }
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        first = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise CheckpointError(
            f"{checkpoint.path}: torch {torch.__version__} cannot trace it with fixed shapes: {first}"
        ) from error
    for model in models.values():
        passes.name_weights(model)
        fold_constants(model)
        passes.strip(model)
        check_static(model, str(checkpoint.path))
    return remasked(models, sizes.masked)


class _OneView(nn.Module):
    """A vision module whose inputs but the pixels are constants of the one shape."""

    def __init__(self, module: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.module, self._names = module, list(inputs)
        for name in self._names[1:]:
            self.register_buffer(f"constant_{name}", inputs[name])

    def forward(self, pixel_values: torch.Tensor) -> Any:
        return self.module(pixel_values, *(getattr(self, f"constant_{name}") for name in self._names[1:]))


def _vision(part: VisionPart, image: ImageSpec) -> ir.Model:
    """Traced for the one shape that every view has; `pixel_values` is its only input."""
    view = prepare(Image.new("RGB", (64, 64)), image).views[0]
    inputs = {name: torch.from_numpy(np.ascontiguousarray(view.inputs[name])) for name in part.example}
    if next(iter(inputs)) != "pixel_values":
        raise CheckpointError(f"vision part: its first input is {next(iter(inputs))}, wanted pixel_values")
    module = _OneView(part.module, inputs).eval()
    return to_onnx(module, (inputs["pixel_values"],), ["pixel_values"], list(part.outputs), None)


def fold_constants(model: ir.Model) -> None:
    """Compute what depends on constants alone (positions of the one grid), and drop what then is unused."""
    from onnxscript import optimizer

    optimizer.fold_constants(model, input_size_limit=2**40, output_size_limit=2**40)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveUnusedNodesPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.TopologicalSortPass()(model)


def check_static(model: ir.Model, where: str) -> None:
    """Raises CheckpointError for an operator outside the standard set, or a dimension that is no number."""
    for node in model.graph:
        if node.domain not in ("", "ai.onnx"):
            raise CheckpointError(f"{where}: {node.domain}::{node.op_type} is no standard operator")
    inner = [out for node in model.graph for out in node.outputs]
    for value in [*model.graph.inputs, *model.graph.outputs, *inner]:
        if value.shape is None or not all(isinstance(size, int) for size in value.shape):
            raise CheckpointError(f"{where}: {value.name} has the shape {value.shape}, wanted numbers alone")


def remasked(graphs: Mapping[str, ir.Model], new: float) -> dict[str, ir.Model]:
    """Copies whose constant masks (zeros and one value of -10,000 or below) say `new`; the rest is equal."""
    found = {}
    for role, model in graphs.items():
        found[role] = ir.from_proto(ir.to_proto(model))
        for value in found[role].graph.initializers.values():
            array = passes.constant(value)
            if array is not None and _is_mask(array):
                value.const_value = ir.tensor(
                    np.where(array == 0, 0, new).astype(np.float32), name=value.name
                )
    return found


def _is_mask(array: np.ndarray) -> bool:
    """Some write the lowest float32 or -inf into a mask of windows, which float16 and 16 bits do not hold."""
    if array.dtype != np.float32 or not array.size or array.min() > MASKED:
        return False
    return set(np.unique(array).tolist()) <= {0.0, float(array.min())}


def states(decoder_inputs: Any) -> tuple[StateTensor, ...]:
    """The cache entries of the decoder's inputs; keys grow along their last dimension, values before it."""
    return tuple(
        StateTensor(
            input=spec.name,
            output=spec.name.replace("past_key_values.", "present."),
            kind="kv",
            dtype=spec.dtype,
            shape=spec.shape,
            sequence_axis=3 if spec.name.endswith(".key") else 2,
            rewindable=True,
            padding_side="right",
        )
        for spec in decoder_inputs
        if spec.name.startswith("past_key_values.")
    )
