"""SmolVLM and Idefics3: SigLIP vision, pixel shuffle, Llama text; one square picture, no tiles.

In: a loaded checkpoint. Out: parts, image operations and prompt segments. Not here: tiles
(`do_image_splitting`), which are refused by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from export import prompts
from export.checkpoint import Checkpoint
from export.decoder import DecoderShape
from export.families.base import Modules, VisionPart
from runtime.contract import Filter
from runtime.errors import CheckpointError, MissingExtra
from runtime.image_spec import (
    ExifRotate,
    ImageSpec,
    Normalise,
    ResizeExact,
    ResizeLongestEdge,
    TokenGrid,
    ToNchw,
    ToRgb,
)
from runtime.prompt_spec import PromptSpec

_FILTERS: dict[int, Filter] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""By Pillow's resampling numbers; the filters that the runtime reproduces to the byte."""

_LONGEST_CAP = 4096  # MAX_IMAGE_SIZE in both image processors of transformers

_STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary types whose tables do not depend on the length of the sequence."""

_REQUIRED = {
    "do_image_splitting": False,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
}


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


class SmolVlm:
    """Cuts SmolVLM and Idefics3 checkpoints into parts."""

    model_types: tuple[str, ...] = ("smolvlm", "idefics3")

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse what these parts cannot reproduce: tiles, odd sizes, another text model, dynamic RoPE."""
        path, config, processor = checkpoint.path, checkpoint.config, checkpoint.processor
        image = processor.image_processor
        for setting, wanted in _REQUIRED.items():
            if bool(getattr(image, setting, None)) is not wanted:
                got = getattr(image, setting, None)
                raise CheckpointError(
                    f"{path}: image_processor.{setting} is {got}, and only {wanted} can be exported; "
                    "set it in processor_config.json if the model was trained so"
                )
        if int(image.resample) not in _FILTERS:
            raise CheckpointError(
                f"{path}: image_processor.resample is {image.resample}; known: {_FILTERS} (Pillow's numbers)"
            )
        side, patch = _side(checkpoint), int(config.vision_config.patch_size)
        if side % (patch * int(config.scale_factor)):
            raise CheckpointError(
                f"{path}: max_image_size {side} is no multiple of patch_size x scale_factor "
                f"({patch} x {config.scale_factor}); correct processor_config.json"
            )
        tokens = _tokens(checkpoint)
        if int(processor.image_seq_len) != tokens:
            raise CheckpointError(
                f"{path}: processor says {processor.image_seq_len} image tokens, the model makes {tokens}; "
                "correct image_seq_len in processor_config.json"
            )
        text = config.text_config
        if text.model_type != "llama":
            raise CheckpointError(
                f"{path}: text_config.model_type {text.model_type!r}; only llama is known here"
            )
        rope = str((text.rope_parameters or {}).get("rope_type", "default"))
        if rope not in _STATIC_ROPE:
            raise CheckpointError(f"{path}: rope_type {rope!r} depends on the length; known: {_STATIC_ROPE}")

    def decoder_shape(self, checkpoint: Checkpoint) -> DecoderShape:
        """Read through optimum's NormalizedConfig.

        It knows `llama` but neither `smolvlm` nor `idefics3`, so it is asked for the text configuration;
        head size and context have no normalized name there.
        """
        try:
            from optimum.utils import NormalizedConfigManager
        except ImportError as error:
            raise MissingExtra(error.name or "optimum", "export") from error
        text = checkpoint.config.text_config
        dims = NormalizedConfigManager.get_normalized_config_class(text.model_type)(text)
        shape = DecoderShape(
            layers=int(dims.num_layers),
            heads=int(dims.num_attention_heads),
            kv_heads=int(dims.num_key_value_heads),
            head_dim=int(getattr(text, "head_dim", None) or dims.hidden_size // dims.num_attention_heads),
            hidden=int(dims.hidden_size),
            vocab=int(dims.vocab_size),
            max_positions=int(text.max_position_embeddings),
        )
        shape.check(str(checkpoint.path))
        return shape

    def modules(self, checkpoint: Checkpoint) -> Modules:
        """The parts as torch modules sharing the checkpoint's weights."""
        model = checkpoint.model
        return Modules(
            vision=VisionPart(
                _Vision(model, _side(checkpoint)).eval(),
                {"pixel_values": torch.zeros(2, 3, _side(checkpoint), _side(checkpoint))},
                ({0: torch.export.Dim.DYNAMIC},),
            ),
            embed=model.get_input_embeddings(),
            text=model.model.text_model,
            head=model.lm_head,
        )

    def image(self, checkpoint: Checkpoint) -> ImageSpec:
        """`SmolVLMImageProcessor` / `Idefics3ImageProcessor` without splitting, operation by operation."""
        processor, side = checkpoint.processor.image_processor, _side(checkpoint)
        name = _FILTERS[int(processor.resample)]
        # transformers folds the rescale into mean and std, in float32
        scale = 1.0 / processor.rescale_factor
        subtract, divide = (
            tuple((torch.tensor(numbers) * scale).tolist())
            for numbers in (processor.image_mean, processor.image_std)
        )
        return ImageSpec(
            operations=(
                ExifRotate(),
                # files are read with convert("RGB"), which drops alpha; a picture in memory goes over white
                ToRgb(file_alpha="drop", pixels_alpha="white"),
                ResizeLongestEdge(
                    longest_edge=int(processor.size["longest_edge"]), cap=_LONGEST_CAP, filter=name
                ),
                ResizeExact(height=side, width=side, filter=name),
                Normalise(subtract=subtract, divide=divide),
                ToNchw(),
            ),
            tokens=TokenGrid(
                patch=int(checkpoint.config.vision_config.patch_size),
                merge=int(checkpoint.config.scale_factor),
            ),
            max_views=1,
            max_tokens=_tokens(checkpoint),
        )

    def prompt(self, checkpoint: Checkpoint) -> PromptSpec:
        """A picture is `<fake_token_around_image><global-img>`, N `<image>`, `<fake_token_around_image>`."""
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
        )


def _side(checkpoint: Checkpoint) -> int:
    """Side in pixels of the square that the vision encoder gets."""
    return int(checkpoint.processor.image_processor.max_image_size["longest_edge"])


def _tokens(checkpoint: Checkpoint) -> int:
    config = checkpoint.config
    return (_side(checkpoint) // int(config.vision_config.patch_size) // int(config.scale_factor)) ** 2


SMOLVLM = SmolVlm()
