"""Runs a GGUF bundle (text model and mmproj) with llama.cpp.

In: a bundle directory and its manifest. Out: a `Backend` (`runtime/backend.py`).
Not here: the binding (`runtime/gguf_library.py`), pictures, text, sampling.

Pictures come in the size that the vision model is to see, so that llama.cpp's own preprocessing has nothing
left to do but to normalise; prompts come as ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime import bundle
from runtime.backend import RowsState
from runtime.errors import BundleError
from runtime.gguf_library import SPEED, Settings, TextModel, VisionModel
from runtime.image import ImageFeatures, View, join_features
from runtime.manifest import ImageAttention, Manifest, Positions1d
from runtime.providers import ProviderReport, RunSettings
from runtime.threads import default_threads

Floats = NDArray[np.float32]
TokenIds = NDArray[np.int64]


class GgufBackend:
    """Text model, vision model and one sequence."""

    providers: tuple[ProviderReport, ...] = ()
    no_rows = "llama.cpp is given one sequence here"

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        settings: RunSettings,
        context: int,
        speed: Settings = SPEED,
    ) -> None:
        threads = settings.threads or default_threads()
        paths = {part.role: bundle.locate(directory, part.path) for part in manifest.parts}
        self._manifest = manifest
        self._rows = 1 if isinstance(manifest.positions, Positions1d) else 4
        self._both_ways = isinstance(manifest.attention, ImageAttention)
        self.text = TextModel(
            paths["text_model"], context=context, threads=threads, settings=speed, spin=bool(settings.spin)
        )
        try:
            self._vision = VisionModel(paths["mmproj"], self.text, threads=threads, settings=speed)
        except BundleError:
            self.text.close()
            raise
        self.rewindable = not self.text.recurrent
        self._starts: list[int] = []  # of each token the position that the cache knows it by

    @property
    def state_bytes(self) -> int:
        """What the cache takes when the context is full."""
        return self.text.cache_bytes

    def encode_view(self, view: View) -> ImageFeatures:
        """What the vision model makes of one view."""
        found = self._vision.encode(view.inputs["pixel_bytes"])
        pieces = np.split(found, found.shape[1] // self.text.hidden, axis=1)
        stack = np.stack(pieces[1:]) if len(pieces) > 1 else None
        return ImageFeatures(pieces[0], (view.grid,), stack)

    def rewind(self, length: int) -> int:
        """Cut to `length` tokens; inside a picture to its beginning; a recurrent state only to nothing."""
        if length >= len(self._starts):
            return len(self._starts)
        while length and self._starts[length] == self._starts[length - 1]:
            length -= 1  # all tokens of a picture have one position in the cache
        if not length or not self.text.cut(self._starts[length]):
            length = 0
            self.text.clear()
        del self._starts[length:]
        return length

    def mark(self) -> None:
        """Nothing is kept: an attention cache can be cut anywhere, a recurrent one nowhere."""

    def rows(self, rows: int, capacity: int) -> RowsState:
        """Not here; `no_rows` says so."""
        raise BundleError(f"batch: {self.no_rows}; ask one by one")

    def extend(self, ids: TokenIds, positions: TokenIds, images: Sequence[ImageFeatures]) -> Floats:
        """Append ids (S,) at positions (1 or 3, S), text and pictures in turn; the last's logits."""
        # a token that was generated is text, whatever its id
        is_image = (ids == self._manifest.merge.token) & bool(images)
        joined = join_features(images) if images else None
        given = 0
        logits = np.zeros(0, np.float32)
        for part in _runs(is_image):
            places = positions[:, part]
            if is_image[part.start]:
                assert joined is not None
                chosen = slice(given, given + part.stop - part.start)
                logits = self.text.extend(
                    _embeddings(joined, chosen), self._places(places), both_ways=self._both_ways
                )
                given = chosen.stop
            else:
                logits = self.text.extend(ids[part], places[:1])
            self._starts += places[0].tolist()
        return logits

    def close(self) -> None:
        """Free the models."""
        self._vision.close()
        self.text.close()

    def _places(self, positions: TokenIds) -> TokenIds:
        """Rows as llama.cpp wants them for embeddings: time, row, column and an unused one; or just one."""
        if self._rows == 1:
            return positions[:1]
        return np.concatenate([positions, np.zeros_like(positions[:1])])


def _embeddings(features: ImageFeatures, chosen: slice) -> Floats:
    """(tokens, hidden), deepstack features behind each token's."""
    if features.deepstack is None:
        return features.tokens[chosen]
    return np.concatenate([features.tokens[chosen], *features.deepstack[:, chosen]], axis=1)


def _runs(is_image: NDArray[np.bool_]) -> Iterator[slice]:
    """Stretches of only text or only pictures."""
    edges = np.flatnonzero(np.diff(is_image.astype(np.int8))) + 1
    for start, stop in zip([0, *edges], [*edges, len(is_image)], strict=True):
        yield slice(int(start), int(stop))
