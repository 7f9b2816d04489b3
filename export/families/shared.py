"""What several families read from a checkpoint in the same way.

In: a loaded checkpoint. Out: decoder dimensions, manifest operations, refusals that name the setting.
Not here: anything that only one family has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from export.checkpoint import Checkpoint
from export.decoder import DecoderShape
from runtime.contract import Filter
from runtime.errors import CheckpointError, MissingExtra
from runtime.image_spec import Normalise

FILTERS: dict[int, Filter] = {1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""By Pillow's resampling numbers; the filters that the runtime reproduces to the byte."""

STATIC_ROPE = ("default", "linear", "llama3", "yarn", "dynamic")
"""Rotary types whose tables do not depend on the length of the sequence. `dynamic` changes nothing up to
max_position_embeddings, and no bundle takes more tokens (`export/limits.py`)."""

PIXELS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True}
"""Settings of an image processor that the operations of a bundle take for granted."""


def require(checkpoint: Checkpoint, settings: Mapping[str, bool]) -> None:
    """Raises CheckpointError naming the first setting of the image processor that is another."""
    for setting, wanted in settings.items():
        got = _setting(checkpoint, setting)
        if bool(got) is not wanted:
            raise CheckpointError(
                f"{checkpoint.path}: image_processor.{setting} is {got}, and only {wanted} can be exported; "
                "set it in processor_config.json if the model was trained so"
            )


def _setting(checkpoint: Checkpoint, name: str) -> Any:
    """A setting of the image processor; where a file leaves it null (Gemma 3's do_convert_rgb), what the
    processor's class says."""
    found = getattr(checkpoint.processor.image_processor, name, None)
    return getattr(checkpoint.processor, "images_kwargs", {}).get(name) if found is None else found


def filter_of(checkpoint: Checkpoint) -> Filter:
    """The name of the image processor's resampling filter. Raises CheckpointError for another one."""
    number = int(checkpoint.processor.image_processor.resample)
    if number not in FILTERS:
        raise CheckpointError(
            f"{checkpoint.path}: image_processor.resample is {number}; known: {FILTERS} (Pillow's numbers)"
        )
    return FILTERS[number]


def normalise(processor: Any) -> Normalise:
    """Rescale and normalise as transformers fuses them: mean and std over the rescale factor, in float32."""
    scale = 1.0 / processor.rescale_factor
    subtract, divide = (
        tuple((torch.tensor(numbers) * scale).tolist())
        for numbers in (processor.image_mean, processor.image_std)
    )
    return Normalise(subtract=subtract, divide=divide)


def check_text(checkpoint: Checkpoint, known: Sequence[str]) -> None:
    """Raises CheckpointError for another text model, a length-dependent RoPE or a sliding window."""
    path, text = checkpoint.path, checkpoint.config.text_config
    if text.model_type not in known:
        raise CheckpointError(
            f"{path}: text_config.model_type {text.model_type!r}; known with this family: {', '.join(known)}"
        )
    rope = str((getattr(text, "rope_parameters", None) or {}).get("rope_type", "default"))
    if rope not in STATIC_ROPE:
        raise CheckpointError(f"{path}: rope_type {rope!r} depends on the length; known: {STATIC_ROPE}")
    if "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise CheckpointError(
            f"{path}: text_config.layer_types has sliding_attention, the decoder part attends to everything; "
            "set use_sliding_window to false if the model was trained so"
        )
    for setting in ("sliding_window", "attention_chunk_size"):
        # without layer_types transformers gives the cache that window, whatever the layers do
        if getattr(text, "layer_types", None) is None and getattr(text, setting, None) is not None:
            raise CheckpointError(
                f"{path}: text_config.{setting} is {getattr(text, setting)}, the decoder part attends to "
                "everything; take it out of config.json if the model was trained so"
            )


def decoder_shape(checkpoint: Checkpoint) -> DecoderShape:
    """Dimensions of the text model, read through optimum's NormalizedConfig.

    It knows few of the families, so it is asked for the text configuration (by the class of any grouped-query
    model where it does not know that either); head size and context have no normalized name there.
    """
    try:
        from optimum.utils import NormalizedConfigManager
        from optimum.utils.normalized_config import NormalizedTextConfigWithGQA
    except ImportError as error:
        raise MissingExtra(error.name or "optimum", "export") from error
    text = checkpoint.config.text_config
    try:
        dims = NormalizedConfigManager.get_normalized_config_class(text.model_type)(text)
    except KeyError:
        dims = NormalizedTextConfigWithGQA(text)
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
