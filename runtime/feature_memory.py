"""Features of the pictures seen last, so that another question about one of them does not encode it again.

In: prepared pictures and their features. Out: remembered `ImageFeatures`, read-only.
Not here: encoding.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

import numpy as np

from runtime.image import ImageFeatures, PreparedImage


def frozen(image: ImageFeatures) -> ImageFeatures:
    """The features, or a copy of them if somebody may still write into them."""
    arrays = [image.tokens, *([] if image.deepstack is None else [image.deepstack])]
    if not any(array.flags.writeable for array in arrays):
        return image
    stack = None if image.deepstack is None else image.deepstack.copy()
    return freeze(ImageFeatures(image.tokens.copy(), image.grids, stack))


def freeze(image: ImageFeatures) -> ImageFeatures:
    """Make the arrays read-only; the same object."""
    for array in (image.tokens, image.deepstack):
        if array is not None:
            array.setflags(write=False)
    return image


class FeatureMemory:
    """Features of the pictures seen last, up to so many bytes."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._kept: OrderedDict[bytes, ImageFeatures] = OrderedDict()

    def get(self, key: bytes) -> ImageFeatures | None:
        """The features, which count as seen now."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: bytes, features: ImageFeatures) -> None:
        """Keep them; the oldest go."""
        self._kept[key] = features
        self._kept.move_to_end(key)
        while self._kept and self.bytes > self._most_bytes:
            self._kept.popitem(last=False)

    @property
    def bytes(self) -> int:
        return sum(
            each.tokens.nbytes + (0 if each.deepstack is None else each.deepstack.nbytes)
            for each in self._kept.values()
        )

    def __len__(self) -> int:
        return len(self._kept)


def picture_key(prepared: PreparedImage) -> bytes:
    """SHA-256 of everything that the vision part takes of a picture, and of how its views lie."""
    digest = hashlib.sha256(repr((prepared.tiles, [view.grid for view in prepared.views])).encode())
    for view in prepared.views:
        for name, array in sorted(view.inputs.items()):
            digest.update(repr((name, array.shape, str(array.dtype))).encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.digest()
