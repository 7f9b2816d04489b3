"""SmolVLM and Idefics3: SigLIP vision, pixel shuffle, Llama text; tiles and a whole view, or one square.

In: a loaded checkpoint. Out: parts, image operations and prompt segments. Not here: videos.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from export import layout, prompts
from export.checkpoint import Checkpoint
from export.decoder import DecoderShape
from export.families import shared
from export.families.base import Family, Modules, VisionPart
from export.prompts import TiledText
from runtime.errors import CheckpointError
from runtime.image_limits import bounded
from runtime.image_spec import (
    ExifRotate,
    ImageSpec,
    ResizeExact,
    ResizeLongestEdge,
    SplitTiles,
    TokenGrid,
    ToNchw,
    ToRgb,
)
from runtime.prompt_spec import PromptSpec

_LONGEST_CAP = 4096  # MAX_IMAGE_SIZE in both image processors of transformers


class _Vision(nn.Module):
    """Vision encoder and connector for full square pictures: no mask, constant position ids.

    The ids are taken from the checkpoint's own embedding module, once, for this size.
    """

    def __init__(self, model: Any, side: int) -> None:
        super().__init__()
        self.encoder, self.connector = model.model.vision_model, model.model.connector
        self.register_buffer("position_ids", _position_ids(self.encoder, side))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) float32 -> (N, T, hidden)."""
        embeddings = self.encoder.embeddings
        patches = embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        hidden = patches + embeddings.position_embedding(self.position_ids)
        hidden = self.encoder.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
        return self.connector(self.encoder.post_layernorm(hidden))


def _position_ids(vision: Any, side: int) -> torch.Tensor:
    """(1, patches) position ids that the vision model uses for a full picture of `side` pixels."""
    seen: list[torch.Tensor] = []
    table = vision.embeddings.position_embedding
    hook = table.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    try:
        with torch.no_grad():
            vision(pixel_values=torch.zeros(1, 3, side, side))
    finally:
        hook.remove()
    return seen[0]


class SmolVlm(Family):
    """Cuts SmolVLM and Idefics3 checkpoints into parts."""

    model_types: tuple[str, ...] = ("smolvlm", "idefics3")

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse what these parts cannot reproduce: odd sizes, another text model, dynamic RoPE."""
        path, config, processor = checkpoint.path, checkpoint.config, checkpoint.processor
        shared.require(checkpoint, shared.PIXELS)
        shared.filter_of(checkpoint)
        for setting in ("size", "max_image_size"):
            found = getattr(processor.image_processor, setting, None) or {}
            if not dict(found).get("longest_edge"):
                raise CheckpointError(
                    f"{path}: image_processor.{setting} is {dict(found)}, wanted a longest_edge; correct "
                    "processor_config.json"
                )
        side, patch = _side(checkpoint), int(config.vision_config.patch_size)
        # pixels beyond the last whole patch are seen by nobody, as with 384 pixels and patches of 14
        if side < patch or side // patch % int(config.scale_factor):
            raise CheckpointError(
                f"{path}: max_image_size {side} makes {side // patch} patches of {patch} a side, which is no "
                f"multiple of scale_factor {config.scale_factor}; correct processor_config.json"
            )
        tokens = (side // patch // int(config.scale_factor)) ** 2
        if int(processor.image_seq_len) != tokens:
            raise CheckpointError(
                f"{path}: processor says {processor.image_seq_len} image tokens, the model makes {tokens}; "
                "correct image_seq_len in processor_config.json"
            )
        shared.check_text(checkpoint, ("llama",))

    def untiled(self) -> Mapping[str, bool | int]:
        return {"do_image_splitting": False}

    def decoder_shape(self, checkpoint: Checkpoint) -> DecoderShape:
        return shared.decoder_shape(checkpoint)

    def modules(self, checkpoint: Checkpoint) -> Modules:
        """The parts as torch modules sharing the checkpoint's weights."""
        model, side = checkpoint.model, _side(checkpoint)
        return Modules(
            vision=VisionPart(
                _Vision(model, side).eval(),
                {"pixel_values": torch.zeros(2, 3, side, side)},
                ({0: torch.export.Dim.DYNAMIC},),
                passes=(layout.any_batch,),
            ),
            embed=model.get_input_embeddings(),
            text=model.model.text_model,
            head=model.lm_head,
        )

    def image(self, checkpoint: Checkpoint) -> ImageSpec:
        """`SmolVLMImageProcessor` / `Idefics3ImageProcessor`, operation by operation."""
        processor, side = checkpoint.processor.image_processor, _side(checkpoint)
        name, edge = shared.filter_of(checkpoint), int(processor.size["longest_edge"])
        cut: SplitTiles | ResizeExact = ResizeExact(height=side, width=side, filter=name)
        if processor.do_image_splitting:
            cut = SplitTiles(side=side, filter=name)
        operations = (
            ExifRotate(),
            # files are read with convert("RGB"), which drops alpha; a picture in memory goes over white
            ToRgb(file_alpha="drop", pixels_alpha="white"),
            ResizeLongestEdge(longest_edge=edge, cap=_LONGEST_CAP, filter=name),
            cut,
            shared.normalise(processor),
            ToNchw(),
        )
        config = checkpoint.config
        tokens = TokenGrid(patch=int(config.vision_config.patch_size), merge=int(config.scale_factor))
        return bounded(operations, tokens)

    def prompt(self, checkpoint: Checkpoint) -> PromptSpec:
        """A picture is `<fake_token_around_image><global-img>`, N `<image>`, `<fake_token_around_image>`.

        Tiles come before it, `<fake_token_around_image><row_R_col_C>` and N `<image>` each, a line a row.
        """
        processor = checkpoint.processor
        edge = processor.fake_image_token
        whole = (
            getattr(processor, "global_image_token", None) or processor.global_image_tag
        )  # Idefics3's name
        pictures = [processor.image_token, getattr(processor, "video_token", None)]
        return prompts.segments(
            checkpoint,
            placeholder=processor.image_token,
            before=f"{edge}{whole}",
            token=processor.image_token,
            after=edge,
            refused=tuple(token for token in pictures if token),
            tiled=_tiled(checkpoint, edge, whole),
        )


def _tiled(checkpoint: Checkpoint, edge: str, whole: str) -> TiledText | None:
    """`_prompt_split_image` of transformers: a line's end after each row, and one more before the whole."""
    image = checkpoint.processor.image_processor
    if not image.do_image_splitting:
        return None
    longest = min(int(image.size["longest_edge"]), _LONGEST_CAP)
    count = -(-(longest + longest % 2) // _side(checkpoint))
    return TiledText(
        before="",
        cells=tuple(
            tuple(f"{edge}<row_{row + 1}_col_{column + 1}>" for column in range(count))
            for row in range(count)
        ),
        row_end="\n",
        whole=f"\n\n{edge}{whole}",
        after=edge,
    )


def _side(checkpoint: Checkpoint) -> int:
    """Side in pixels of the square that the vision encoder gets."""
    return int(checkpoint.processor.image_processor.max_image_size["longest_edge"])


SMOLVLM = SmolVlm()
