"""Ceilings of a plan: image tokens of a picture, tokens of a sequence; and pictures brought to one size.

In: a checkpoint and the plan's ceilings. Out: the checkpoint's processor held to them, the context, a
reference session over pictures of one size. Not here: what the operations become (`runtime/image_limits.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from PIL import Image

from evals.torch_session import TorchImage, TorchSession
from export.checkpoint import Checkpoint
from export.families import Family
from runtime import image as pictures
from runtime.errors import InputError
from runtime.image import ImageInput
from runtime.image_limits import limit
from runtime.image_spec import (
    GridTiles,
    ImageOperation,
    ImageSpec,
    ResizeLongestEdge,
    SmartResize,
    SplitTiles,
)
from runtime.manifest import Limits

LEAST_TOKENS = 64
"""Room for a question and an answer beside one picture, below which a context is refused."""

Changes = dict[str, bool | int]


def hold(checkpoint: Checkpoint, family: Family, max_tokens: int | None) -> Changes:
    """Set the loaded image processor so that a picture takes at most `max_tokens`; what was changed.

    Raises InputError with the smallest number that is possible.
    """
    if max_tokens is None:
        return {}
    wanted = limit(family.image(checkpoint), max_tokens)
    if _is_held(family.image(checkpoint), max_tokens):
        return {}
    before = checkpoint.processor.image_processor.to_dict()
    for settings in _settings(wanted, checkpoint.processor.image_processor, family):
        _apply(checkpoint.processor.image_processor, settings)
        if _is_held(family.image(checkpoint), max_tokens):
            return _flat(settings)
        _apply(checkpoint.processor.image_processor, {key: before[key] for key in settings})
    raise InputError(
        f"max_image_tokens: {max_tokens} cannot be set in this checkpoint's image processor, so the gate "
        "could not compare; give a larger number or --no-split"
    )


def narrowed(image: ImageSpec, max_tokens: int | None) -> ImageSpec:
    """The section of a processor that is held to it; needles that would take more tokens are refused."""
    return image if max_tokens is None else limit(image, max_tokens)


def _is_held(image: ImageSpec, max_tokens: int) -> bool:
    """Whether a section keeps to so many tokens, or would without pictures of an extreme aspect."""
    held = limit(image, max_tokens)
    return [_any_aspect(op) for op in held.operations] == [_any_aspect(op) for op in image.operations]


def _any_aspect(operation: ImageOperation) -> ImageOperation:
    return (
        operation.model_copy(update={"aspect_limit": None})
        if isinstance(operation, SmartResize)
        else operation
    )


def _settings(wanted: ImageSpec, processor: Any, family: Family) -> Iterator[dict[str, Any]]:
    """Processor settings under which it may do what `wanted` says; the caller looks whether it does."""
    for operation in wanted.operations:
        if isinstance(operation, SmartResize):
            edges = {"shortest_edge": operation.min_pixels, "longest_edge": operation.max_pixels}
            yield {"size": edges}
            if hasattr(processor, "max_image_tokens"):
                cell = operation.factor**2
                least, most = operation.min_pixels // cell, operation.max_pixels // cell
                yield {**family.untiled(), "min_image_tokens": least, "max_image_tokens": most}
        if isinstance(operation, GridTiles):
            count = max(rows * columns for rows, columns in operation.grids)
            for name in ("max_patches", "max_tiles"):
                if hasattr(processor, name):
                    yield {name: count}
        if isinstance(operation, ResizeLongestEdge) and any(
            isinstance(x, SplitTiles) for x in wanted.operations
        ):
            yield {"size": {"longest_edge": operation.longest_edge}}
    if untiled := dict(family.untiled()):
        yield untiled


def _apply(processor: Any, settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        old = getattr(processor, name)
        setattr(
            processor,
            name,
            type(old)(**value) if isinstance(value, dict) and not isinstance(old, dict) else value,
        )


def _flat(settings: dict[str, Any]) -> Changes:
    found: Changes = {}
    for name, value in settings.items():
        inner = value.items() if isinstance(value, dict) else [("", value)]
        found.update({f"image_processor.{name}{'.' + key if key else ''}": each for key, each in inner})
    return found


def context(checkpoint: Checkpoint, family: Family, image: ImageSpec, ceiling: int | None) -> int:
    """Tokens of a sequence: the model's own number or the ceiling. Raises InputError when no picture fits."""
    own = family.decoder_shape(checkpoint).max_positions
    if ceiling is None or ceiling >= own:
        return own
    if ceiling < image.max_tokens + LEAST_TOKENS:
        raise InputError(
            f"max_context: {ceiling} tokens hold no picture of {image.max_tokens} and {LEAST_TOKENS} tokens "
            f"of text; give {image.max_tokens + LEAST_TOKENS} or more, or fewer --max-image-tokens"
        )
    return ceiling


def most_pictures(image: ImageSpec, context: int, *, fixed: bool) -> int:
    """How many pictures a conversation of `context` tokens may hold, at least 1.

    With `fixed` shapes every picture takes the most tokens, and so needs room for its question beside it;
    otherwise most take fewer, and what does not fit is told when it is asked.
    """
    return max(1, context // (image.max_tokens + (LEAST_TOKENS if fixed else 0)))


def presized(image: ImageSpec) -> type[TorchSession]:
    """A reference session that brings every picture to the one size of `image` first, by our own resize.

    The checkpoint's processor then leaves the size alone, and everything after it can be compared.
    """
    spec = image

    class PresizedSession(TorchSession):
        def prepare(self, source: ImageInput) -> TorchImage:
            return super().prepare(_resized(source, spec))

    return PresizedSession


def _resized(source: ImageInput, spec: ImageSpec) -> Image.Image:
    """The picture after every operation before `normalise`, as 8-bit RGB."""
    value: Any = pictures.load(source, Limits.model_fields["source_pixels"].default)
    for operation in spec.operations[:-2]:
        value = pictures.OPERATIONS[type(operation)](value, operation, not isinstance(source, Image.Image))
    return Image.fromarray(value)
