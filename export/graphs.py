"""The three float32 graphs of a checkpoint, traced once and shared by every precision.

In: a checkpoint and its family. Out: `onnx_ir` models by role, with the layout's tensor names.
Not here: quantization, files.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from export import fused, passes, storage, vision_passes
from export.bidirectional import WindowedShape, trace_windowed
from export.checkpoint import Checkpoint
from export.decoder import to_onnx, trace_decoder
from export.families import Family
from export.families.base import VisionPart
from export.hybrid import HybridShape, trace_hybrid
from runtime.errors import CheckpointError

ROLES = ("vision_encoder", "embed_tokens", "decoder")
"""In the order of use."""

_DIMENSIONS: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    ("inputs_embeds", ("batch_size", "sequence_length", None)),
    ("attention_mask", ("batch_size", "total_sequence_length")),
    ("position_ids", ("batch_size", "sequence_length")),
    ("position_ids", (None, "batch_size", "sequence_length")),
    ("deepstack_embeds", (None, "batch_size", "sequence_length", None)),
    ("input_ids", ("batch_size", "sequence_length")),
    ("past_key_values.*", ("batch_size", None, "past_sequence_length", None)),
    ("present.*", ("batch_size", None, "total_sequence_length", None)),
    ("past_conv.*", ("batch_size", None, None)),
    ("present_conv.*", ("batch_size", None, None)),
    ("logits", ("batch_size", "kept_length", None)),
    ("pixel_values", ("num_images", None, None, None)),
    ("image_features", ("num_images", None, None)),
)
"""The first entry that fits a tensor's name and rank counts; None keeps a dimension."""


_TRACERS: dict[type, Any] = {HybridShape: trace_hybrid, WindowedShape: trace_windowed}


def trace_all(checkpoint: Checkpoint, family: Family) -> dict[str, ir.Model]:
    """Trace vision encoder, embedding and decoder in float32."""
    modules, shape = family.modules(checkpoint), family.decoder_shape(checkpoint)
    ids = torch.zeros(2, 3, dtype=torch.long)
    auto = torch.export.Dim.DYNAMIC
    tracer = _TRACERS.get(type(shape), trace_decoder)
    try:
        models = {
            "vision_encoder": _trace_vision(modules.vision),
            "embed_tokens": to_onnx(
                modules.embed, (ids,), ["input_ids"], ["inputs_embeds"], ({0: auto, 1: auto},)
            ),
            "decoder": tracer(modules.text, modules.head, shape),
        }
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        first = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise CheckpointError(
            f"{checkpoint.path}: torch {torch.__version__} cannot trace it: {first}; "
            "the family in export/families/ does not fit this checkpoint"
        ) from error
    passes.run(models["vision_encoder"], (*vision_passes.VISION_PASSES, *modules.vision.passes))
    passes.run(models["decoder"], (*passes.DECODER_PASSES, *modules.passes))
    names = (*modules.vision.dimensions.items(), *_DIMENSIONS)
    for model in models.values():
        passes.name_dimensions(model, names)
        passes.strip(model)
    return {role: storage.as_from_file(model) for role, model in models.items()}


def _trace_vision(vision: VisionPart) -> ir.Model:
    with vision_passes.emitted_attention(vision.module), fused.emitting(), fused.rms_norms(vision.module):
        return to_onnx(
            vision.module,
            tuple(vision.example.values()),
            list(vision.example),
            list(vision.outputs),
            vision.dynamic,
        )
