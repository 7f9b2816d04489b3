"""What onnxruntime-genai reads beside the parts, for families whose pipeline it has.

In: a bundle being written and its draft manifest. Out: `genai_config.json`, `genai_processor.json` and small
graphs `onnx/genai_*.onnx` whose weights are the parts' own data files. Not here: the graphs
(`genai_graphs.py`), the proof that they compute what the parts do (`genai_check.py`), which families
(`Family.genai_type`).

Names follow the reader of that file in onnxruntime-genai 0.18 (`src/config.cpp`) and the transforms of
onnxruntime-extensions (`shared/api/image_processor.cc`). What its image processor does otherwise than the
checkpoint's is told in docs/export.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from export import browser_package, genai_graphs
from export.checkpoint import Checkpoint
from export.decoder import DecoderShape
from export.families import Family
from export.hybrid import HybridShape
from runtime import files
from runtime.contract import TensorSpec
from runtime.errors import CheckpointError
from runtime.image_spec import (
    GridTiles,
    ImageOperation,
    ImageSpec,
    Normalise,
    PatchifyBlocks,
    PatchifyPadded,
    ResizeExact,
    SmartResize,
)
from runtime.manifest import Manifest

CONFIG, PROCESSOR = "genai_config.json", "genai_processor.json"
"""Its own default for the second is `processor_config.json`, which is transformers' file here."""

EMBEDDING, DECODER, VISION = (f"onnx/genai_{name}.onnx" for name in ("embedding", "decoder", "vision"))
NO_PADDING = -1
WITHOUT = (browser_package.TARGET,)
"""Targets whose bundles are not for it."""

_FILTERS = {"bilinear": "LINEAR", "bicubic": "CUBIC", "lanczos": "LANCZOS"}
_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id")
_BYTE = 255.0


def wanted(family: Family, checkpoint: Checkpoint, target: str | None) -> bool:
    """Whether a fused bundle gets these files; the weights of its parts then lie beside their graphs."""
    return target not in WITHOUT and family.genai_type(checkpoint) is not None


def write(bundle: Path, draft: Manifest, family: Family, checkpoint: Checkpoint) -> list[Path]:
    """Write the files into `bundle`, whose parts have their weights in data files; returns their paths."""
    parts = {part.role: bundle / part.path for part in draft.parts}
    features = _output(draft, "vision_encoder", genai_graphs.FEATURES)
    rider = genai_graphs.passenger(draft)
    kind = ir.DataType[{"float32": "FLOAT", "float16": "FLOAT16"}[features.dtype]]
    graphs = {
        EMBEDDING: genai_graphs.embedding(parts["embed_tokens"], draft.merge.token, kind, rider),
        DECODER: genai_graphs.decoder(parts["decoder"], rider),
        VISION: genai_graphs.vision(
            parts["vision_encoder"], rider, mask=_layout(draft.image, PatchifyPadded) is not None
        ),
    }
    written = []
    for name, model in graphs.items():
        if model is not None:
            ir.save(model, bundle / name)
            written.append(bundle / name)
    shape = family.decoder_shape(checkpoint)
    config = {
        "model": {
            "type": family.genai_type(checkpoint),
            **_token_ids(draft, checkpoint),
            "vocab_size": _output(draft, "decoder", "logits").shape[-1],
            "context_length": draft.limits.context,
            "decoder": _decoder(shape, rider.columns(shape.hidden) if rider else 0),
            "embedding": {
                "filename": EMBEDDING,
                "inputs": {"input_ids": "input_ids", "image_features": genai_graphs.FEATURES},
                "outputs": {"inputs_embeds": genai_graphs.EMBEDS},
            },
            "vision": _vision(draft, VISION if bundle / VISION in written else None),
        },
        "search": {"do_sample": False, "max_length": draft.limits.context, "past_present_share_buffer": True},
    }
    files.write_json(bundle / CONFIG, config)
    files.write_json(bundle / PROCESSOR, processor(draft.image))
    return [*written, bundle / CONFIG, bundle / PROCESSOR]


def _output(draft: Manifest, role: str, name: str) -> TensorSpec:
    return next(each for each in draft.part(role).outputs if each.name == name)


def _token_ids(draft: Manifest, checkpoint: Checkpoint) -> dict[str, Any]:
    """Ids by its names. Every token that equals padding is masked, also in the middle of a prompt: a
    checkpoint that pads with a token of its prompts gets none (-1)."""
    tokenizer, stop = checkpoint.tokenizer, list(draft.tokenizer.stop_ids)
    padding = tokenizer.pad_token_id
    if padding is None or padding in _numbers(draft.prompt.model_dump()) | set(stop):
        padding = NO_PADDING
    found: dict[str, Any] = {"eos_token_id": stop, "pad_token_id": padding}
    if tokenizer.bos_token_id is not None:
        found["bos_token_id"] = tokenizer.bos_token_id
    known = {name: getattr(checkpoint.config, name, None) for name in _TOKENS}
    return {**found, **{name: int(token) for name, token in known.items() if token is not None}}


def _numbers(value: Any) -> set[int]:
    """All integers in JSON-like data; true and false are none."""
    if isinstance(value, int):
        return set() if isinstance(value, bool) else {value}
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return {number for each in inner for number in _numbers(each)}


def _decoder(shape: DecoderShape, columns: int) -> dict[str, Any]:
    """`hidden_size` is the width of what goes between the graphs, `columns` more than the model's."""
    found: dict[str, Any] = {
        "filename": DECODER,
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "hidden_size": shape.hidden + columns,
        "head_size": shape.head_dim,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "num_hidden_layers": shape.layers,
    }
    inputs = {
        "inputs_embeds": genai_graphs.EMBEDS,
        "attention_mask": "attention_mask",
        "position_ids": "position_ids",
        "past_key_names": "past_key_values.%d.key",
        "past_value_names": "past_key_values.%d.value",
    }
    outputs = {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    }
    if isinstance(shape, HybridShape):
        inputs["past_conv_names"], outputs["present_conv_names"] = "past_conv.%d", "present_conv.%d"
        names = {"attention": "full_attention", "conv": "conv"}
        found["layer_types"] = [names[kind] for kind in shape.kinds]
        found["conv_cache_size"] = shape.conv_columns
    return {**found, "inputs": inputs, "outputs": outputs}


def _vision(draft: Manifest, graph: str | None) -> dict[str, Any]:
    grid = draft.image.tokens
    inputs = {"pixel_values": "pixel_values"}
    if _layout(draft.image, PatchifyPadded) is not None:
        inputs |= {"attention_mask": genai_graphs.MASK, "image_sizes": "spatial_shapes"}
    elif _layout(draft.image, PatchifyBlocks) is not None:
        inputs["image_grid_thw"] = "image_grid_thw"
    return {
        "filename": graph or draft.part("vision_encoder").path,
        "config_filename": PROCESSOR,
        "patch_size": grid.patch,
        "spatial_merge_size": grid.merge,
        "inputs": inputs,
        "outputs": {"image_features": genai_graphs.FEATURES},
    }


# --- pictures ---------------------------------------------------------


def processor(image: ImageSpec) -> dict[str, Any]:
    """The image section as transforms of onnxruntime-extensions. Tiles become the whole view alone."""
    colours = next(each for each in image.operations if isinstance(each, Normalise))
    blocks = _layout(image, PatchifyBlocks)
    steps: list[tuple[str, dict[str, Any]]] = [
        ("DecodeImage", {"color_space": "RGB"}),
        ("Resize", _resize(image)),
        ("Rescale", {"rescale_factor": 1 / _BYTE}),
        ("Normalize", {"mean": _fractions(colours.subtract), "std": _fractions(colours.divide)}),
    ]
    if isinstance(blocks, PatchifyBlocks):
        sizes = {"patch_size": blocks.patch, "temporal_patch_size": blocks.frames, "merge_size": blocks.merge}
        steps.append(("PatchImage", sizes))
    else:
        steps.append(("Permute3D", {"dims": [2, 0, 1]}))
    if _layout(image, PatchifyPadded) is not None:
        steps.append(("PixtralImageSizes", {}))
    transforms = [
        {"operation": {"name": kind.lower(), "type": kind, **({"attrs": attrs} if attrs else {})}}
        for kind, attrs in steps
    ]
    return {"processor": {"name": "image_processor", "transforms": transforms}}


def _resize(image: ImageSpec) -> dict[str, Any]:
    """Attributes of its Resize. Raises CheckpointError for a way of resizing that it lacks."""
    for operation in image.operations:
        found = operation.whole if isinstance(operation, GridTiles) else operation
        if isinstance(found, SmartResize):
            return {
                "interpolation": _FILTERS[found.filter],
                "smart_resize": 1,
                "min_pixels": found.min_pixels,
                "max_pixels": found.max_pixels,
                "patch_size": image.tokens.patch,
                "merge_size": image.tokens.merge,
            }
        if isinstance(found, ResizeExact):
            size = {"height": found.height, "width": found.width}
            return {"interpolation": _FILTERS[found.filter], "keep_aspect_ratio": 0, **size}
    names = ", ".join(operation.op for operation in image.operations)
    raise CheckpointError(
        f"image operations {names}: onnxruntime-genai's processor has no such resize; "
        "let the family's genai_type be None"
    )


def _layout(image: ImageSpec, kind: type[ImageOperation]) -> ImageOperation | None:
    last = image.operations[-1]
    return last if isinstance(last, kind) else None


def _fractions(numbers: Sequence[float]) -> list[float]:
    return [number / _BYTE for number in numbers]
