"""LFM2-VL: SigLIP 2 vision on pictures of any aspect, pixel unshuffle, text with short convolutions.

In: a loaded checkpoint. Out: parts, image operations and prompt segments. Not here: tracing the text model
(`export/hybrid.py`), cutting pictures into tiles (`runtime/tiles.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from export import passes, prompts
from export.checkpoint import Checkpoint
from export.families import shared
from export.families.base import Family, Modules, VisionPart
from export.fused import quotient
from export.hybrid import HybridShape, LayerKind
from runtime.errors import CheckpointError
from runtime.image_limits import bounded
from runtime.image_spec import (
    ExifRotate,
    GridTiles,
    ImageOperation,
    ImageSpec,
    LargePicture,
    PatchifyPadded,
    SmartResize,
    TokenGrid,
    ToRgb,
)
from runtime.prompt_spec import PromptSpec

_REQUIRED = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_pad": True}
_GENAI_MARKS = ("<image>", "<|image_start|>", "<|image_end|>")
_KINDS: dict[str, LayerKind] = {"conv": "conv", "full_attention": "attention"}


class _Vision(nn.Module):
    """Vision encoder and projector for one view, patches in reading order without padding.

    Nothing here has a shape that depends on values: a patch finds its row and column from its number, takes
    its position embedding as a weighted sum over the whole table, and a token gathers its patches.
    """

    def __init__(self, model: Any, factor: int) -> None:
        super().__init__()
        tower, self.factor = model.model.vision_tower, factor
        self.patches, self.encoder, self.norm = (
            tower.embeddings.patch_embedding,
            tower.encoder,
            tower.post_layernorm,
        )
        self.projector = model.model.multi_modal_projector
        table = tower.embeddings.position_embedding.weight
        self.side = tower.embeddings.position_embedding_size
        self.register_buffer("table_t", table.detach().T.contiguous())
        self.table_t: torch.Tensor

    def forward(self, pixel_values: torch.Tensor, spatial_shapes: torch.Tensor) -> torch.Tensor:
        """(1, N, P * P * 3) float32 and (1, 2) int64 rows and columns, N their product -> (T, hidden)."""
        count = pixel_values.shape[1]
        rows, columns = spatial_shapes[0, 0], spatial_shapes[0, 1]
        hidden = self.patches(pixel_values) + self._positions(torch.arange(count), rows, columns)
        hidden = self.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
        hidden = self.norm(hidden)[0].index_select(0, self._order(count, columns))
        # one more dimension: a matrix product of two would be a Gemm, which no quantization rule knows
        tokens = hidden.reshape(1, count // self.factor**2, self.factor**2 * hidden.shape[-1])
        return self._project(tokens)[0]

    def _positions(self, number_n: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """(1, N, hidden): the table as F.interpolate(bilinear, antialias) resizes it to rows x columns.

        The table is the left factor, so that no quantizer takes it for a layer's weight.
        """
        row_n = quotient(number_n, columns)
        vertical = _triangle(row_n, rows, self.side)
        across = _triangle(number_n - row_n * columns, columns, self.side)
        weights = (vertical[:, :, None] * across[:, None, :]).flatten(1)
        return torch.matmul(self.table_t, weights.T).T[None]

    def _order(self, count: int, columns: torch.Tensor) -> torch.Tensor:
        """(N,) patch numbers, those of one token (factor x factor, in reading order) beside each other."""
        step = self.factor
        token_t, wide = torch.arange(count // step**2), quotient(columns, step)
        row_t = quotient(token_t, wide)
        corner_t = (row_t * columns + token_t - row_t * wide) * step
        inside = torch.arange(step)
        offsets = (inside[:, None] * columns + inside[None, :]).flatten()
        return (corner_t[:, None] + offsets[None, :]).flatten()

    def _project(self, tokens: torch.Tensor) -> torch.Tensor:
        """The projector after its pixel unshuffle (`_order`); (1, T, f * f * C) -> (1, T, hidden)."""
        projector = self.projector
        if projector.use_layer_norm:
            tokens = projector.layer_norm(tokens)
        return projector.linear_2(projector.act(projector.linear_1(tokens)))


def _triangle(place_n: torch.Tensor, size: torch.Tensor, source: int) -> torch.Tensor:
    """(N, source) weights by which sample `place` of `size` is made of `source` samples.

    PyTorch's antialiased bilinear filter without aligned corners (ATen, UpSampleKernel.cpp,
    `_compute_indices_min_size_weights_aa`), in float32 as there. Its window of samples holds exactly the
    weights above zero, so the whole axis may be taken.
    """
    scale = source / size.to(torch.float32)
    centre_n = scale * (place_n.to(torch.float32) + 0.5)
    distance = torch.arange(source, dtype=torch.float32)[None] - centre_n[:, None] + 0.5
    weights = torch.clamp(1.0 - torch.abs(distance / torch.clamp(scale, min=1.0)), min=0.0)
    return weights / weights.sum(dim=1, keepdim=True)


def drop_padding(model: ir.Model) -> int:
    """Cut `pixel_values` to rows x columns patches: what the graph gets may be padded, as processors do."""
    graph = model.graph
    inputs = {str(value.name): value for value in graph.inputs}
    pixels, shapes = inputs["pixel_values"], inputs["spatial_shapes"]
    uses = list(pixels.uses())
    axis, start = (
        passes.add_initializer(graph, f"padding.{name}", np.array([number], np.int64))
        for name, number in (("axis", 1), ("start", 0))
    )
    count = ir.node(
        "ReduceProd", [shapes, axis], attributes={"keepdims": 0}, name="padding.count", version=None
    )
    real = ir.node("Slice", [pixels, start, count.outputs[0], axis], name="padding.cut")
    count.outputs[0].name, real.outputs[0].name = "padding.count.out", "padding.cut.out"
    count.outputs[0].dtype, real.outputs[0].dtype = ir.DataType.INT64, ir.DataType.FLOAT
    for node, index in uses:
        node.replace_input_with(index, real.outputs[0])
    graph.insert_before(graph[0], [count, real])
    return 1


class Lfm2Vl(Family):
    """Cuts LFM2-VL checkpoints into parts."""

    model_types: tuple[str, ...] = ("lfm2_vl",)

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse what these parts cannot reproduce: other towers, odd tiles, dynamic RoPE, no attention."""
        path, config = checkpoint.path, checkpoint.config
        image = checkpoint.processor.image_processor
        shared.require(checkpoint, _REQUIRED)
        shared.filter_of(checkpoint)
        shared.check_text(checkpoint, ("lfm2",))
        vision, factor = config.vision_config, int(config.downsample_factor)
        if vision.model_type != "siglip2_vision_model":
            raise CheckpointError(
                f"{path}: vision_config.model_type {vision.model_type!r}; known: siglip2_vision_model"
            )
        for setting, got, wanted in (
            ("encoder_patch_size", int(image.encoder_patch_size), int(vision.patch_size)),
            ("downsample_factor", int(image.downsample_factor), factor),
        ):
            if got != wanted:
                raise CheckpointError(
                    f"{path}: image_processor.{setting} is {got}, the model has {wanted}; "
                    "correct processor_config.json"
                )
        cell = factor * int(vision.patch_size)
        if _splits(image) and (int(image.tile_size) % cell or int(image.min_tiles) < 2):
            raise CheckpointError(
                f"{path}: image_processor.tile_size {image.tile_size} and min_tiles {image.min_tiles}: tiles "
                f"must be multiples of {cell} pixels and at least two; correct processor_config.json"
            )
        kinds = set(config.text_config.layer_types)
        if not kinds <= set(_KINDS) or "full_attention" not in kinds:
            raise CheckpointError(
                f"{path}: text_config.layer_types {sorted(kinds)}; known: {', '.join(_KINDS)}, "
                "one full_attention at least"
            )

    def untiled(self) -> Mapping[str, bool | int]:
        """A large picture shrinks to `max_image_tokens`."""
        return {"do_image_splitting": False}

    def decoder_shape(self, checkpoint: Checkpoint) -> HybridShape:
        """As for other families, and what each layer is."""
        text, plain = checkpoint.config.text_config, shared.decoder_shape(checkpoint)
        return HybridShape(
            **{item.name: getattr(plain, item.name) for item in fields(plain)},
            kinds=tuple(_KINDS[kind] for kind in text.layer_types[: plain.layers]),
            conv_columns=int(text.conv_L_cache),
        )

    def modules(self, checkpoint: Checkpoint) -> Modules:
        """The parts as torch modules sharing the checkpoint's weights."""
        model, config = checkpoint.model, checkpoint.config
        factor, patch = int(config.downsample_factor), int(config.vision_config.patch_size)
        rows, columns = 2 * factor, 3 * factor
        width = patch**2 * int(config.vision_config.num_channels)
        return Modules(
            vision=VisionPart(
                _Vision(model, factor).eval(),
                {
                    "pixel_values": torch.zeros(1, rows * columns, width),
                    "spatial_shapes": torch.tensor([[rows, columns]]),
                },
                ({1: torch.export.Dim.DYNAMIC}, {}),
                passes=(drop_padding,),
                dimensions={
                    "pixel_values": (None, "padded_patches", None),
                    "image_features": ("image_tokens", None),
                },
            ),
            embed=model.get_input_embeddings(),
            text=model.model.language_model,
            head=model.lm_head,
        )

    def image(self, checkpoint: Checkpoint) -> ImageSpec:
        """`Lfm2VlImageProcessor`, operation by operation."""
        image, config = checkpoint.processor.image_processor, checkpoint.config
        patch, factor = int(config.vision_config.patch_size), int(config.downsample_factor)
        cell, name = patch * factor, shared.filter_of(checkpoint)
        most = int(image.max_image_tokens)
        whole = SmartResize(
            factor=cell,
            min_pixels=int(image.min_image_tokens) * cell**2,
            max_pixels=most * cell**2,
            at_least_factor=True,
            filter=name,
        )
        resize: ImageOperation = whole
        length = most * factor**2
        if _splits(image):
            tile = int(image.tile_size)
            length = max(length, (tile // patch) ** 2)
            resize = GridTiles(
                height=tile,
                width=tile,
                grids=_grids(image),
                only=LargePicture(
                    factor=cell, least=patch, pixels=most * cell**2 * float(image.max_pixels_tolerance)
                ),
                whole=whole,
                whole_after_tiles=bool(image.use_thumbnail),
                filter=name,
            )
        return bounded(
            (
                ExifRotate(),
                # files are read with convert("RGB"), which drops alpha; a picture in memory goes over white
                ToRgb(file_alpha="drop", pixels_alpha="white"),
                resize,
                shared.normalise(image),
                PatchifyPadded(patch=patch, length=length),
            ),
            TokenGrid(patch=patch, merge=factor),
        )

    def prompt(self, checkpoint: Checkpoint) -> PromptSpec:
        """`<|image_start|>`, tiles each after `<|img_row_R_col_C|>`, `<|img_thumbnail|>`, `<|image_end|>`."""
        processor = checkpoint.processor
        marked = bool(processor.use_image_special_tokens)
        start, thumbnail, end = (
            getattr(processor, f"image_{name}_token") if marked else ""
            for name in ("start", "thumbnail", "end")
        )
        tiled = None
        if _splits(processor.image_processor):
            grids = _grids(processor.image_processor)
            rows, columns = (max(sides) for sides in zip(*grids, strict=True))
            tiled = prompts.TiledText(
                before=start,
                cells=tuple(
                    tuple(f"<|img_row_{r + 1}_col_{c + 1}|>" if marked else "" for c in range(columns))
                    for r in range(rows)
                ),
                row_end="",
                whole=thumbnail if processor.image_processor.use_thumbnail else "",
                after=end,
            )
        return prompts.segments(
            checkpoint,
            placeholder=processor.image_token,
            before=start,
            token=processor.image_token,
            after=end,
            refused=(processor.image_token,),
            tiled=tiled,
        )

    def genai_type(self, checkpoint: Checkpoint) -> str | None:
        """Its pipeline writes these tokens into the prompt; tiles it has none."""
        processor = checkpoint.processor
        marks = (processor.image_token, processor.image_start_token, processor.image_end_token)
        return "lfm2_vl" if processor.use_image_special_tokens and marks == _GENAI_MARKS else None


def _splits(image: Any) -> bool:
    """Whether the image processor cuts large pictures into tiles."""
    return bool(image.do_image_splitting) and not image.min_tiles == image.max_tiles == 1


def _grids(image: Any) -> tuple[tuple[int, int], ...]:
    """Candidate (rows, columns) in the order in which the processor tries them."""
    return tuple(
        (rows, columns) for columns, rows in image._target_ratios(int(image.min_tiles), int(image.max_tiles))
    )


LFM2_VL = Lfm2Vl()
