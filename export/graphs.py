"""The three float32 graphs of a checkpoint, traced once and shared by every precision.

In: a checkpoint and its family. Out: `onnx_ir` models by role, with the layout's tensor names.
Not here: quantization, files.
"""

from __future__ import annotations

import onnx_ir as ir
import torch

from export import passes
from export.checkpoint import Checkpoint
from export.decoder import to_onnx, trace_decoder
from export.families import Family
from runtime.errors import CheckpointError

ROLES = ("vision_encoder", "embed_tokens", "decoder")
"""In the order of use."""

_DIMENSIONS: dict[str, list[str | None]] = {
    "inputs_embeds": ["batch_size", "sequence_length", None],
    "attention_mask": ["batch_size", "total_sequence_length"],
    "position_ids": ["batch_size", "sequence_length"],
    "input_ids": ["batch_size", "sequence_length"],
    "past_key_values.*": ["batch_size", None, "past_sequence_length", None],
    "present.*": ["batch_size", None, "total_sequence_length", None],
    "logits": ["batch_size", "kept_length", None],
    "pixel_values": ["num_images", None, None, None],
    "image_features": ["num_images", None, None],
}


_FILE_LIMIT = 2**31 - 1  # protobuf


def _check_size(role: str, model: ir.Model) -> None:
    """One part is one file; larger ones will need their weights beside the graph."""
    size = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    if size > _FILE_LIMIT:
        raise CheckpointError(
            f"{role}: {size / 2**30:.1f} GiB in float32, an ONNX file holds 2 GiB; take a smaller student"
        )


def trace_all(checkpoint: Checkpoint, family: Family) -> dict[str, ir.Model]:
    """Trace vision encoder, embedding and decoder in float32."""
    modules, shape = family.modules(checkpoint), family.decoder_shape(checkpoint)
    vision = modules.vision
    ids = torch.zeros(2, 3, dtype=torch.long)
    auto = torch.export.Dim.DYNAMIC
    try:
        models = {
            "vision_encoder": to_onnx(
                vision.module,
                tuple(vision.example.values()),
                list(vision.example),
                list(vision.outputs),
                vision.dynamic,
            ),
            "embed_tokens": to_onnx(
                modules.embed, (ids,), ["input_ids"], ["inputs_embeds"], ({0: auto, 1: auto},)
            ),
            "decoder": trace_decoder(modules.text, modules.head, shape),
        }
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        first = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise CheckpointError(
            f"{checkpoint.path}: torch {torch.__version__} cannot trace it: {first}; "
            "the family in export/families/ does not fit this checkpoint"
        ) from error
    passes.run(models["vision_encoder"], (passes.name_weights,))
    passes.run(models["decoder"], passes.DECODER_PASSES)
    for model in models.values():
        passes.name_dimensions(model, _DIMENSIONS)
        passes.strip(model)
    for role, model in models.items():
        _check_size(role, model)
    # through the wire format: attributes get the precision that a file keeps, and nothing holds on to torch
    return {role: ir.from_proto(ir.to_proto(model)) for role, model in models.items()}
