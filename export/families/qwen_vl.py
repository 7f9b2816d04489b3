"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL with dense text models: pictures of any size, M-RoPE, deepstack.

In: a loaded checkpoint. Out: parts, image operations, prompt segments, positions. Not here: videos (a prompt
takes pictures only), mixtures of experts, what happens inside the vision encoder (`qwen_vision.py`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from export import passes, prompts
from export.checkpoint import Checkpoint
from export.decoder import DEEPSTACK_INPUT, DecoderShape
from export.families import shared
from export.families.base import Family, Modules, VisionPart
from export.families.qwen_vision import QwenVision
from runtime.errors import CheckpointError
from runtime.image_limits import bounded
from runtime.image_spec import ExifRotate, ImageSpec, PatchifyBlocks, SmartResize, TokenGrid, ToRgb
from runtime.manifest import Deepstack, PositionsMrope
from runtime.prompt_spec import PromptSpec

_ASPECT_LIMIT = 200  # smart_resize of Qwen2VLImageProcessor
_HEAD_MULTIPLE = 8  # vision heads; the kernel of RotaryEmbedding
_DEEPSTACK_OUTPUT = "deepstack_features"
_INTERLEAVED = "qwen3_vl"
_GENAI_MARKS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
_SAME = {
    "patch_size": "patch_size",
    "merge_size": "spatial_merge_size",
    "temporal_patch_size": "temporal_patch_size",
}
"""Settings of the image processor and what the vision model calls them."""


class QwenVl(Family):
    """Cuts Qwen-VL checkpoints into parts."""

    model_types: tuple[str, ...] = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse sliding windows, dynamic RoPE, other patches than the vision model has, odd heads."""
        path, vision = checkpoint.path, checkpoint.config.vision_config
        image = checkpoint.processor.image_processor
        shared.require(checkpoint, shared.PIXELS)
        shared.filter_of(checkpoint)
        shared.check_text(checkpoint, tuple(f"{name}_text" for name in self.model_types))
        for ours, theirs in _SAME.items():
            got, wanted = getattr(image, ours, None), getattr(vision, theirs)
            if got != wanted:
                raise CheckpointError(
                    f"{path}: image_processor.{ours} is {got}, vision_config.{theirs} is {wanted}; "
                    "correct processor_config.json"
                )
        width = int(getattr(vision, "embed_dim", None) or vision.hidden_size) // int(vision.num_heads)
        if width % _HEAD_MULTIPLE:
            raise CheckpointError(
                f"{path}: heads of vision_config are {width} wide; RotaryEmbedding needs a multiple of "
                f"{_HEAD_MULTIPLE}; choose another num_heads"
            )
        window = getattr(vision, "window_size", None)
        token = int(vision.patch_size) * int(vision.spatial_merge_size)
        if window is not None and int(window) < token:
            raise CheckpointError(
                f"{path}: vision_config.window_size {window} holds no token of {token} pixels; "
                "correct config.json"
            )

    def decoder_shape(self, checkpoint: Checkpoint) -> DecoderShape:
        return dataclasses.replace(
            shared.decoder_shape(checkpoint), position_rows=3, deepstack_layers=_deepstack_layers(checkpoint)
        )

    def modules(self, checkpoint: Checkpoint) -> Modules:
        """The parts as torch modules sharing the checkpoint's weights."""
        model, stacked = checkpoint.model, _deepstack_layers(checkpoint) > 0
        vision = QwenVision(model.model.visual).eval()
        rows, columns = 2 * vision.merge, 3 * vision.merge  # a small picture; N varies by whole tokens
        tokens = torch.export.Dim("tokens", min=2, max=2**24)
        outputs = ("image_features", *([_DEEPSTACK_OUTPUT] if stacked else []))
        return Modules(
            vision=VisionPart(
                vision,
                {
                    "pixel_values": torch.zeros(rows * columns, vision.patch_embed.weight.shape[1]),
                    "image_grid_thw": torch.tensor([[1, rows, columns]]),
                },
                ({0: vision.merge**2 * tokens}, {}),
                outputs,
                passes=(passes.pack_gate_up, passes.fuse_skip_norm),
                dimensions={
                    "pixel_values": ("num_patches", None),
                    "image_grid_thw": (None, None),
                    "image_features": ("num_image_tokens", None),
                    _DEEPSTACK_OUTPUT: (None, "num_image_tokens", None),
                },
            ),
            embed=model.get_input_embeddings(),
            text=model.model.language_model,
            head=model.lm_head,
        )

    def image(self, checkpoint: Checkpoint) -> ImageSpec:
        """`Qwen2VLImageProcessor`, operation by operation."""
        processor = checkpoint.processor.image_processor
        patch, merge = int(processor.patch_size), int(processor.merge_size)
        operations = (
            ExifRotate(),
            # files are read with convert("RGB"), which drops alpha; a picture in memory goes over white
            ToRgb(file_alpha="drop", pixels_alpha="white"),
            SmartResize(
                factor=patch * merge,
                min_pixels=int(processor.size["shortest_edge"]),
                max_pixels=int(processor.size["longest_edge"]),
                aspect_limit=_ASPECT_LIMIT,
                filter=shared.filter_of(checkpoint),
            ),
            shared.normalise(processor),
            PatchifyBlocks(patch=patch, merge=merge, frames=int(processor.temporal_patch_size)),
        )
        return bounded(operations, TokenGrid(patch=patch, merge=merge))

    def prompt(self, checkpoint: Checkpoint) -> PromptSpec:
        """A picture is `<|vision_start|>`, N `<|image_pad|>`, `<|vision_end|>`, as the template writes it."""
        processor, config = checkpoint.processor, checkpoint.config
        names = checkpoint.tokenizer.convert_ids_to_tokens
        start, end = names(config.vision_start_token_id), names(config.vision_end_token_id)
        token = processor.image_token
        return prompts.segments(
            checkpoint,
            placeholder=f"{start}{token}{end}",
            before=start,
            token=token,
            after=end,
            refused=(token, processor.video_token),
        )

    def positions(self, checkpoint: Checkpoint) -> PositionsMrope:
        """Three rows; Qwen3-VL interleaves the sections, the older ones lay them side by side."""
        time, row, column = _rotary(checkpoint).mrope_section
        interleaved = checkpoint.model_type == _INTERLEAVED
        return PositionsMrope(sections=(int(time), int(row), int(column)), interleaved=interleaved)

    def deepstack(self, checkpoint: Checkpoint) -> Deepstack | None:
        """Features of early vision layers, added after the first text layers (Qwen3-VL)."""
        layers = _deepstack_layers(checkpoint)
        return Deepstack(layers=layers, output=_DEEPSTACK_OUTPUT, input=DEEPSTACK_INPUT) if layers else None

    def genai_type(self, checkpoint: Checkpoint) -> str | None:
        """Its pipelines of this line are one but for the name; they write these tokens into the prompt."""
        config, names = checkpoint.config, checkpoint.tokenizer.convert_ids_to_tokens
        marks = (config.vision_start_token_id, config.image_token_id, config.vision_end_token_id)
        if tuple(names(mark) for mark in marks) != _GENAI_MARKS:
            return None
        return _INTERLEAVED if checkpoint.model_type == _INTERLEAVED else "qwen2_5_vl"


def _rotary(checkpoint: Checkpoint) -> Any:
    return checkpoint.model.model.language_model.rotary_emb


def _deepstack_layers(checkpoint: Checkpoint) -> int:
    return len(getattr(checkpoint.config.vision_config, "deepstack_visual_indexes", None) or ())


QWEN_VL = QwenVl()
