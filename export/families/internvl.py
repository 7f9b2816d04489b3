"""InternVL in its transformers layout (`-hf` checkpoints): tiles and a thumbnail, Qwen or Llama text.

In: a loaded checkpoint. Out: parts, image operations and prompt segments. Not here: videos, and the original
repositories, whose code comes with the checkpoint (`export/checkpoint.py` refuses it).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from export import prompts
from export.checkpoint import Checkpoint
from export.decoder import DecoderShape
from export.families import shared
from export.families.base import Family, Modules, VisionPart
from runtime.errors import CheckpointError
from runtime.image_limits import bounded
from runtime.image_spec import ExifRotate, GridTiles, ImageSpec, ResizeExact, TokenGrid, ToNchw, ToRgb
from runtime.prompt_spec import PromptSpec

TEXT_MODELS = ("qwen2", "qwen3", "llama")


class _Vision(nn.Module):
    """Vision tower, pixel shuffle and projector, as `InternVLModel.get_image_features` chains them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        self.tower, self.projector = model.model.vision_tower, model.model.multi_modal_projector
        self._shuffle, self._ratio = model.model.pixel_shuffle, float(config.downsample_ratio)
        self._layers = _layers(config)
        self._drops_cls = config.vision_feature_select_strategy == "default"
        self._last = int(config.vision_feature_layer) == -1
        size, patch = _tile(config), config.vision_config.patch_size
        self._grid = size[0] // patch[0], size[1] // patch[1]

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) float32 -> (N, T, hidden)."""
        hidden = self.tower.embeddings(pixel_values)
        for layer in self.tower.encoder.layer[: self._layers]:
            hidden = layer(hidden)
        if self._last:
            hidden = self.tower.layernorm(hidden)
        if self._drops_cls:
            hidden = hidden[:, 1:]
        hidden = hidden.reshape(-1, *self._grid, hidden.shape[-1])
        hidden = self._shuffle(hidden, scale_factor=self._ratio)
        return self.projector(hidden.reshape(hidden.shape[0], -1, hidden.shape[-1]))


def _layers(config: Any) -> int:
    """How many encoder layers run before the features are taken; `hidden_states[0]` is before the first."""
    depth, layer = int(config.vision_config.num_hidden_layers), int(config.vision_feature_layer)
    return depth if layer == -1 else layer if layer >= 0 else depth + 1 + layer


def _tile(config: Any) -> tuple[int, int]:
    """(height, width) in pixels of what the vision tower takes."""
    height, width = config.vision_config.image_size
    return int(height), int(width)


class InternVl(Family):
    """Cuts InternVL 2.5, 3 and 3.5 checkpoints in the transformers layout into parts."""

    model_types: tuple[str, ...] = ("internvl",)

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse what these parts cannot reproduce: other sizes, several layers, another text model."""
        path, config, processor = checkpoint.path, checkpoint.config, checkpoint.processor
        shared.require(checkpoint, shared.PIXELS)
        shared.filter_of(checkpoint)
        shared.check_text(checkpoint, TEXT_MODELS)
        if not isinstance(config.vision_feature_layer, int):
            raise CheckpointError(
                f"{path}: vision_feature_layer is {config.vision_feature_layer}; a single one can be exported"
            )
        if config.vision_feature_select_strategy not in ("default", "full"):
            raise CheckpointError(
                f"{path}: vision_feature_select_strategy {config.vision_feature_select_strategy!r}; "
                "known: default, full"
            )
        height, width = _tile(config)
        size = processor.image_processor.size
        if (int(size["height"]), int(size["width"])) != (height, width):
            raise CheckpointError(
                f"{path}: image_processor.size is {dict(size)}, the vision tower takes {width} x {height}; "
                "correct processor_config.json"
            )
        patch, merge = config.vision_config.patch_size, _merge(checkpoint)
        if height != width or patch[0] != patch[1] or height % (patch[0] * merge):
            raise CheckpointError(
                f"{path}: image_size {height} x {width} is no square of whole tokens "
                f"({patch[0]} x {patch[1]} pixels a patch, {merge} x {merge} patches a token)"
            )
        tokens = (height // patch[0] // merge) ** 2
        if int(processor.image_seq_length) != tokens:
            raise CheckpointError(
                f"{path}: processor says {processor.image_seq_length} tokens a tile, the model makes "
                f"{tokens}; correct image_seq_length in processor_config.json"
            )

    def untiled(self) -> Mapping[str, bool | int]:
        """The processor class turns `crop_to_patches` on whatever the settings say; one tile is none."""
        return {"min_patches": 1, "max_patches": 1}

    def decoder_shape(self, checkpoint: Checkpoint) -> DecoderShape:
        return shared.decoder_shape(checkpoint)

    def modules(self, checkpoint: Checkpoint) -> Modules:
        """The parts as torch modules sharing the checkpoint's weights."""
        model = checkpoint.model
        return Modules(
            vision=VisionPart(
                _Vision(model).eval(),
                {"pixel_values": torch.zeros(2, 3, *_tile(checkpoint.config))},
                ({0: torch.export.Dim.DYNAMIC},),
            ),
            embed=model.get_input_embeddings(),
            text=model.model.language_model,
            head=model.lm_head,
        )

    def image(self, checkpoint: Checkpoint) -> ImageSpec:
        """`GotOcr2ImageProcessor` under `InternVLProcessor`, operation by operation."""
        processor = checkpoint.processor.image_processor
        height, width = _tile(checkpoint.config)
        name = shared.filter_of(checkpoint)
        whole = ResizeExact(height=height, width=width, filter=name)
        grids = _grids(int(processor.min_patches), int(processor.max_patches))
        cut: GridTiles | ResizeExact = whole
        if _crops(checkpoint) and grids != ((1, 1),):
            cut = GridTiles(height=height, width=width, grids=grids, whole=whole, filter=name)
        operations = (
            ExifRotate(),
            ToRgb(file_alpha="drop", pixels_alpha="white"),  # as every processor on torchvision
            cut,
            shared.normalise(processor),
            ToNchw(),
        )
        patch = int(checkpoint.config.vision_config.patch_size[0])
        return bounded(operations, TokenGrid(patch=patch, merge=_merge(checkpoint)))

    def prompt(self, checkpoint: Checkpoint) -> PromptSpec:
        """A picture is `<img>`, `<IMG_CONTEXT>` for every token of all its views, `</img>`."""
        processor = checkpoint.processor
        return prompts.segments(
            checkpoint,
            placeholder=processor.image_token,
            before=processor.start_image_token,
            token=processor.image_token,
            after=processor.end_image_token,
            refused=(processor.image_token, processor.video_token),
        )


def _merge(checkpoint: Checkpoint) -> int:
    """Patches along one side of a token."""
    return round(1 / float(checkpoint.config.downsample_ratio))


def _crops(checkpoint: Checkpoint) -> bool:
    """Whether pictures are cut; the processor class's own default is stronger than the image processor's."""
    processor = checkpoint.processor
    default = getattr(processor, "images_kwargs", {})
    return bool(default.get("crop_to_patches", processor.image_processor.crop_to_patches))


def _grids(least: int, most: int) -> tuple[tuple[int, int], ...]:
    """(rows, columns) of `get_all_supported_aspect_ratios`, in its order: fewer tiles, then fewer columns."""
    found = [
        (rows, columns)
        for columns in range(1, most + 1)
        for rows in range(1, most + 1)
        if least <= rows * columns <= most
    ]
    return tuple(sorted(found, key=lambda grid: grid[0] * grid[1]))


INTERNVL = InternVl()
