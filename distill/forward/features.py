"""Image features: what a model's vision part gives the language model, one entry a row of a batch.

In: a model, prompts. Out: features that can be cached, selected, joined, and passed back to the model in
place of pixels. Knows no model family: reads what `get_image_features` takes and returns.
Not here: token layouts (`distill/forward/tree.py`), when features may be cached.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from distill.inputs.encoding import Prompt
from runtime.errors import CheckpointError


@dataclass
class ImageOutput(BaseModelOutputWithPooling):
    """What a base model takes as `mm_encoder_outputs["image"]`."""

    deepstack_features: list[list[torch.Tensor]] | None = None


@dataclass(frozen=True)
class Features:
    """Features of rows: each entry (image tokens of the row, hidden), 0 tokens for a row without images.

    `levels` holds, a row, one such tensor for every deeper level that the model adds to its first layers
    (deepstack), () where it has none. `stacked`: the model wants one tensor instead of a list.
    """

    tokens: tuple[torch.Tensor, ...]
    levels: tuple[tuple[torch.Tensor, ...], ...]
    stacked: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, rows: Sequence[int]) -> Features:
        """The entries of `rows`, which may repeat."""
        return Features(
            tuple(self.tokens[i] for i in rows), tuple(self.levels[i] for i in rows), self.stacked
        )

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Features:
        """Every tensor changed, for example detached or moved."""
        levels = tuple(tuple(map(change, row)) for row in self.levels)
        return Features(tuple(map(change, self.tokens)), levels, self.stacked)

    def detach(self) -> Features:
        return self.map(torch.Tensor.detach)

    @staticmethod
    def join(parts: Sequence[Features]) -> Features:
        """The rows of all parts, in order."""
        return Features(
            tuple(x for part in parts for x in part.tokens),
            tuple(x for part in parts for x in part.levels),
            any(part.stacked for part in parts),
        )

    def outputs(self) -> dict[str, ImageOutput] | None:
        """`mm_encoder_outputs` for a batch of these rows; None where no row has an image."""
        seen = [i for i, x in enumerate(self.tokens) if len(x)]
        if not seen:
            return None
        tokens = [self.tokens[i] for i in seen]
        pooled = torch.cat(tokens)[None] if self.stacked else tokens
        found = ImageOutput(pooler_output=cast(Any, pooled))
        if self.levels[seen[0]]:
            rows = [self.levels[i] for i in seen]
            found.deepstack_features = [list(level) for level in zip(*rows, strict=True)]
        return {"image": found}


def base_of(model: PreTrainedModel) -> Any:
    """The model without its LM head; of a peft model, the one inside, adapters included."""
    inner = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    return inner.base_model


def image_token(model: PreTrainedModel) -> int:
    """The id of the image placeholder, which features replace."""
    for name in ("image_token_id", "image_token_index"):
        if isinstance(found := getattr(model.config, name, None), int):
            return found
    raise CheckpointError(f"{model.config.name_or_path}: the configuration names no image_token_id")


def accepted(function: Callable[..., Any], prompt: Prompt) -> dict[str, torch.Tensor]:
    """The prompt's vision tensors that a function takes by name."""
    names = parameter_names(getattr(function, "__func__", function))
    return {name: value for name, value in prompt.vision.items() if name in names}


@functools.cache
def parameter_names(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def encode_images(model: PreTrainedModel, prompts: Sequence[Prompt]) -> Features:
    """Features of each prompt's images, one entry a prompt; differentiable.

    Prompts whose vision tensors agree in all but the first dimension are encoded in one call.
    Raises CheckpointError where a prompt's placeholders and the model's features differ in number.
    """
    base = base_of(model)
    placeholder = image_token(model)
    calls: dict[tuple[object, ...], list[int]] = {}
    inputs = [accepted(base.get_image_features, prompt) for prompt in prompts]
    for index, tensors in enumerate(inputs):
        shape: tuple[object, ...] = tuple(
            (name, value.shape[1:], value.dtype) for name, value in sorted(tensors.items())
        )
        calls.setdefault(shape, []).append(index)
    hidden = model.config.get_text_config().hidden_size
    empty = torch.empty((0, hidden), device=model.device, dtype=model.dtype)
    tokens: list[torch.Tensor] = [empty] * len(prompts)
    levels: list[tuple[torch.Tensor, ...]] = [()] * len(prompts)
    stacked = False
    for shape, rows in calls.items():
        if not shape:
            continue
        batch = {
            name: torch.cat([inputs[i][name] for i in rows]).to(model.device) for name in inputs[rows[0]]
        }
        found = base.get_image_features(**batch, return_dict=True)
        counts = [prompts[i].ids.count(placeholder) for i in rows]
        stacked |= isinstance(found.pooler_output, torch.Tensor)
        parts = _split(found.pooler_output, counts, model)
        deeper = [_split(level, counts, model) for level in getattr(found, "deepstack_features", None) or ()]
        for place, row in enumerate(rows):
            tokens[row] = parts[place]
            levels[row] = tuple(level[place] for level in deeper)
    return Features(tuple(tokens), tuple(levels), stacked)


def _split(
    found: torch.Tensor | Sequence[torch.Tensor], counts: Sequence[int], model: PreTrainedModel
) -> tuple[torch.Tensor, ...]:
    """A model's features, one tensor or a list of them, as one (tokens, hidden) tensor a row."""
    flat = (
        found.flatten(0, -2)
        if isinstance(found, torch.Tensor)
        else torch.cat([x.flatten(0, -2) for x in found])
    )
    if len(flat) != sum(counts):
        raise CheckpointError(
            f"{model.config.name_or_path}: {sum(counts)} image placeholders in the prompts, the model made "
            f"{len(flat)} features; processor and model do not belong together"
        )
    return flat.split(list(counts))
