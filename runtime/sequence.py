"""The sequence that a session holds: it grows by tokens, and a prompt that begins alike runs only its rest.

In: ids and features of pictures. Out: logits. Not here: the state itself (`runtime/backend.py`), answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.backend import Backend
from runtime.errors import InputError
from runtime.feature_memory import frozen
from runtime.image import ImageFeatures
from runtime.manifest import Manifest, Positions1d
from runtime.positions import position_ids

Floats = NDArray[np.float32]
TokenIds = NDArray[np.int64]


class RunningSequence:
    """Ids, pictures and next position of what a backend's state holds; forgotten when a step fails."""

    def __init__(self, manifest: Manifest, backend: Backend) -> None:
        self._manifest, self._backend = manifest, backend
        self._token = manifest.merge.token
        self._axes = 1 if isinstance(manifest.positions, Positions1d) else 3
        self._ids: list[int] = []
        self._images: tuple[ImageFeatures, ...] = ()
        self._position = 0  # of the next token
        self.reused = 0  # tokens of the last `begin` that were there already

    @property
    def length(self) -> int:
        return len(self._ids)

    def begin(self, ids: TokenIds, images: Sequence[ImageFeatures], *, reuse: bool) -> Floats:
        """Make it `ids` (S,), one or more, with the features of their pictures; logits (vocab,) of the last.

        With `reuse` what it has in common with the present one is not run again.
        """
        if not len(ids):
            raise InputError("prompt: has no tokens; give one or more")
        slots, given = int(np.count_nonzero(ids == self._token)), sum(map(len, images))
        if slots != given:
            raise InputError(f"prompt: has {slots} image tokens, got {given} image features")
        kept = 0
        if reuse:
            held = np.array(self._ids, dtype=np.int64)
            kept = shared_length((held, self._images), (ids, images), self._token)
        self._ids = []
        self.reused = kept = self._backend.rewind(kept)
        logits = self._run(ids, images, kept, keep_pictures=reuse and not self._backend.rewindable)
        self._ids, self._images = [int(i) for i in ids], tuple(frozen(each) for each in images)
        return logits

    def append(self, token_id: int) -> Floats:
        """Logits (vocab,) after one more token, which is no picture's."""
        if not self._ids:
            raise InputError("decode: no sequence is running; call prefill first")
        ids, self._ids = self._ids, []
        positions = np.full((self._axes, 1), self._position)
        logits = self._backend.extend(np.array([token_id], dtype=np.int64), positions, ())
        ids.append(int(token_id))
        self._ids, self._position = ids, self._position + 1
        return logits

    def fork(self) -> int:
        """The present length, which `go_back` then reaches at no cost."""
        self._backend.mark()
        return len(self._ids)

    def go_back(self, length: int) -> None:
        """Forget the tokens after the first `length`; what the state cannot undo is run again."""
        if not 0 < length <= len(self._ids):
            raise InputError(f"go back: to {length} tokens, {len(self._ids)} are there")
        ids, self._ids = self._ids[:length], []
        kept = self._backend.rewind(length)
        self._run(np.array(ids), self._images, kept, keep_pictures=False)
        self._ids = ids

    def _run(
        self, ids: TokenIds, images: Sequence[ImageFeatures], kept: int, *, keep_pictures: bool
    ) -> Floats:
        """Run what of `ids` follows the first `kept`; with `keep_pictures` their end can be gone back to."""
        grids = [grid for each in images for grid in each.grids]
        positions, self._position = positions_of(self._manifest, ids, grids)
        spans = picture_spans(ids, images, self._token)
        end = spans[-1][1] + 1 if spans else kept
        cuts = [kept, end, len(ids)] if keep_pictures and kept < end < len(ids) else [kept, len(ids)]
        logits = np.zeros(0, np.float32)
        for first, last in itertools.pairwise(cuts):
            if keep_pictures:
                self._backend.mark()
            new = [each for each, span in zip(images, spans, strict=True) if first <= span[0] < last]
            if first < last:
                logits = self._backend.extend(ids[first:last], positions[:, first:last], new)
        return logits


def positions_of(manifest: Manifest, ids: TokenIds, grids: Sequence[tuple[int, int]]) -> tuple[TokenIds, int]:
    """Position ids (1 or 3, S) of a whole sequence whose views have these grids, and the next position."""
    return position_ids(manifest.positions, ids == manifest.merge.token, grids, 0)


def picture_spans(ids: TokenIds, images: Sequence[ImageFeatures], image_token: int) -> list[tuple[int, int]]:
    """(first, last) place of each picture's tokens in ids (S,)."""
    places, spans, taken = np.flatnonzero(ids == image_token), [], 0
    for image in images:
        taken += len(image)
        spans.append((int(places[taken - len(image)]), int(places[taken - 1])))
    return spans


def shared_length(
    old: tuple[TokenIds, Sequence[ImageFeatures]],
    new: tuple[TokenIds, Sequence[ImageFeatures]],
    image_token: int,
) -> int:
    """Length of the longest common beginning of two sequences (ids, pictures).

    It never ends inside of a picture, and leaves the new one at least its last token to be run.
    """
    (old_ids, old_images), (ids, images) = old, new
    most = min(len(old_ids), len(ids) - 1)
    differing = np.flatnonzero(old_ids[:most] != ids[:most])
    length = int(differing[0]) if len(differing) else most
    for index, (first, last) in enumerate(picture_spans(ids, images, image_token)):
        if first >= length:
            break
        if last >= length or index >= len(old_images) or not same_picture(old_images[index], images[index]):
            return first
    return length


def same_picture(old: ImageFeatures, new: ImageFeatures) -> bool:
    """Whether the decoder would see the same."""
    if old is new:
        return True
    pairs = [(old.tokens, new.tokens), (old.deepstack, new.deepstack)]
    return old.grids == new.grids and all(
        a is b or (a is not None and b is not None and np.array_equal(a, b)) for a, b in pairs
    )
