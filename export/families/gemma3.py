"""Gemma 3: SigLIP vision pooled to a fixed number of tokens, text in which a picture's tokens see each other.

In: a loaded checkpoint. Out: parts, image operations and prompt segments. Not here: attention both ways and
windows (`export/bidirectional.py`), pan-and-scan, which is refused by name.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import nn

from export import prompts
from export.bidirectional import TYPES_INPUT, WindowedShape, attend_both_ways
from export.checkpoint import Checkpoint
from export.families import shared
from export.families.base import Family, Modules, VisionPart
from runtime.errors import CheckpointError
from runtime.image_limits import bounded
from runtime.image_spec import ExifRotate, ImageSpec, ResizeExact, TokenGrid, ToNchw, ToRgb
from runtime.manifest import ImageAttention
from runtime.prompt_spec import PromptSpec

_KINDS = ("full_attention", "sliding_attention")
_GENAI_TOKENS = 256


class _OneCentredRMSNorm(nn.Module):
    """The projector's norm, which multiplies by 1 + weight, with that factor as its weight."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.eps = float(norm.eps)
        self.register_buffer("weight", 1.0 + norm.weight.detach())
        self.weight: torch.Tensor

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class _Vision(nn.Module):
    """Vision encoder, average pooling and projection for pictures of the one size."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        tower, projector = model.model.vision_tower, model.model.multi_modal_projector
        self.embeddings, self.encoder, self.last_norm = tower.embeddings, tower.encoder, tower.post_layernorm
        self.pool, self.side = projector.avg_pool, int(projector.patches_per_image)
        self.norm = _OneCentredRMSNorm(projector.mm_soft_emb_norm)
        weight = projector.mm_input_projection_weight
        self.projection = nn.Linear(weight.shape[0], weight.shape[1], bias=False)
        self.projection.weight = nn.Parameter(weight.detach().T, requires_grad=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) float32 -> (N, T, hidden)."""
        hidden = self.encoder(inputs_embeds=self.embeddings(pixel_values)).last_hidden_state
        grid = self.last_norm(hidden).transpose(1, 2).unflatten(2, (self.side, self.side))
        return self.projection(self.norm(self.pool(grid).flatten(2).transpose(1, 2)))


class _Embedding(nn.Module):
    """The table with its scale multiplied in; image features are not scaled."""

    def __init__(self, table: Any) -> None:
        super().__init__()
        self.register_buffer("table", table.weight.detach() * table.embed_scale)
        self.table: torch.Tensor

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(input_ids, self.table)


class Gemma3(Family):
    """Cuts Gemma 3 checkpoints with a vision tower into parts."""

    model_types: tuple[str, ...] = ("gemma3",)

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse what these parts cannot reproduce: pan-and-scan, soft caps, other sizes, dynamic RoPE."""
        path, config = checkpoint.path, checkpoint.config
        image, text, vision = checkpoint.processor.image_processor, config.text_config, config.vision_config
        shared.require(checkpoint, {**shared.PIXELS, "do_pan_and_scan": False})
        shared.filter_of(checkpoint)
        side, pooled = int(vision.image_size) // int(vision.patch_size), int(config.mm_tokens_per_image**0.5)
        size = (int(image.size["height"]), int(image.size["width"]))
        if size != (int(vision.image_size),) * 2 or pooled**2 != config.mm_tokens_per_image or side % pooled:
            raise CheckpointError(
                f"{path}: pictures of {size[0]} x {size[1]}, a tower of {vision.image_size} with {side} x "
                f"{side} patches and {config.mm_tokens_per_image} tokens; correct processor_config.json"
            )
        if int(checkpoint.processor.image_seq_length) != config.mm_tokens_per_image:
            raise CheckpointError(
                f"{path}: processor says {checkpoint.processor.image_seq_length} image tokens, the model "
                f"makes {config.mm_tokens_per_image}; correct image_seq_length in processor_config.json"
            )
        for setting in ("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention"):
            if getattr(text, setting, None):
                raise CheckpointError(
                    f"{path}: text_config.{setting} is {getattr(text, setting)}; the decoder part has none"
                )
        if config.image_token_id >= text.vocab_size:
            raise CheckpointError(
                f"{path}: image_token_index {config.image_token_id}, and {text.vocab_size} embeddings"
            )
        for kind in text.layer_types:
            rope = str((text.rope_parameters or {}).get(kind, {}).get("rope_type", "default"))
            if kind not in _KINDS or rope not in shared.STATIC_ROPE:
                raise CheckpointError(
                    f"{path}: layer type {kind!r} with rope_type {rope!r}; known: {_KINDS} with "
                    f"{shared.STATIC_ROPE}"
                )

    def decoder_shape(self, checkpoint: Checkpoint) -> WindowedShape:
        """As for other families, and what each layer sees."""
        text, plain = checkpoint.config.text_config, shared.decoder_shape(checkpoint)
        kinds = tuple(text.layer_types[: plain.layers])
        return WindowedShape(
            **{item.name: getattr(plain, item.name) for item in fields(plain)},
            kinds=kinds,
            windows=tuple(int(text.sliding_window) if kind == _KINDS[1] else None for kind in kinds),
        )

    def attention(self, checkpoint: Checkpoint) -> ImageAttention:
        """A picture's tokens see each other; some layers see a window."""
        return ImageAttention(input=TYPES_INPUT, windows=self.decoder_shape(checkpoint).windows)

    def modules(self, checkpoint: Checkpoint) -> Modules:
        """The parts as torch modules; all but norms and the embedding share the checkpoint's weights."""
        model, side = checkpoint.model, int(checkpoint.config.vision_config.image_size)
        return Modules(
            vision=VisionPart(
                _Vision(model).eval(),
                {"pixel_values": torch.zeros(2, 3, side, side)},
                ({0: torch.export.Dim.DYNAMIC},),
            ),
            embed=_Embedding(model.get_input_embeddings()),
            text=model.model.language_model,
            head=model.lm_head,
            passes=(attend_both_ways,),
        )

    def image(self, checkpoint: Checkpoint) -> ImageSpec:
        """`Gemma3ImageProcessor` without pan-and-scan: every picture is stretched to the one square."""
        config, image = checkpoint.config, checkpoint.processor.image_processor
        side, patch = int(config.vision_config.image_size), int(config.vision_config.patch_size)
        return bounded(
            (
                ExifRotate(),
                # files are read with convert("RGB"), which drops alpha; a picture in memory goes over white
                ToRgb(file_alpha="drop", pixels_alpha="white"),
                ResizeExact(height=side, width=side, filter=shared.filter_of(checkpoint)),
                shared.normalise(image),
                ToNchw(),
            ),
            TokenGrid(patch=patch, merge=side // patch // int(config.mm_tokens_per_image**0.5)),
        )

    def prompt(self, checkpoint: Checkpoint) -> PromptSpec:
        """A picture is an empty line, `<start_of_image>`, its tokens, `<end_of_image>`, an empty line."""
        processor = checkpoint.processor
        token = processor.tokenizer.image_token
        before, after = processor.full_image_sequence.split(token * int(processor.image_seq_length))
        return prompts.segments(
            checkpoint,
            placeholder=processor.boi_token,
            before=before,
            token=token,
            after=after,
            refused=(processor.boi_token, token),
        )

    def genai_type(self, checkpoint: Checkpoint) -> str | None:
        """Its processor writes so many of these tokens for a picture, whatever the checkpoint says."""
        processor = checkpoint.processor
        marks = "\n\n<start_of_image>" + "<image_soft_token>" * _GENAI_TOKENS + "<end_of_image>\n\n"
        return "gemma3" if processor.full_image_sequence == marks else None


GEMMA3 = Gemma3()
