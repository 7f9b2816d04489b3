"""The pixels of two sessions laid side by side, however each format cuts them into views.

In: what `prepare` of two sessions gave for one picture. Out: a difference as plain JSON, or why there is
none. Not here: ids and logits (`evals/parity/parity_side.py`).

Formats that take floats see the reference's normalised values in the same order. A format that takes bytes
(GGUF, whose library normalises by itself) is compared in bytes: the reference's values are turned back by
its processor's mean, standard deviation and scale, where they lie as channels, rows, columns.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime import files
from runtime.image import PreparedImage
from runtime.image_spec import Normalise

Values = NDArray[Any]
NO_NORM = np.zeros((0, 3))
"""Of a session that does not say how it normalises."""


@dataclass(frozen=True)
class Pixels:
    """All values of one picture, flat, views in their order; `shape` of the first view's tensor.

    `norm` (2, channels): what was subtracted from a byte, then what it was divided by; empty: unknown.
    """

    values: Values
    shape: tuple[int, ...]
    norm: NDArray[np.float64]

    def write(self, path: Path) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, values=self.values, shape=np.array(self.shape), norm=self.norm)
        files.write_bytes(path, buffer.getvalue())

    @classmethod
    def read(cls, path: Path) -> Pixels:
        with np.load(path, allow_pickle=False) as found:
            return cls(found["values"], tuple(int(size) for size in found["shape"]), found["norm"])

    def as_bytes(self) -> Values | None:
        """(rows, columns, channels) uint8 of all views, flat; None where layout or norm are others."""
        if len(self.shape) < 4 or self.shape[-3] != 3 or self.norm.shape != (2, 3):
            return None
        chw = self.values.reshape(-1, *self.shape[-3:]).astype(np.float64)
        subtract, divide = (row[:, None, None] for row in self.norm)
        found = np.rint(chw * divide + subtract)
        return np.clip(found, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1).ravel()


def pixels_of(prepared: PreparedImage, session: Any) -> Pixels:
    """What a reference session's `prepare` gave."""
    views = [np.asarray(view) for view in prepared.pixels]
    values = np.concatenate([view.ravel() for view in views])
    return Pixels(values, views[0].shape, _norm(session))


def diff(reference: Pixels, candidate: PreparedImage) -> dict[str, Any]:
    """`max` and `mean` |difference| and the `share` of values that differ; `why` where they cannot be laid
    side by side. `sizes`: numbers of values when they differ."""
    theirs = np.concatenate([np.asarray(view).ravel() for view in candidate.pixels])
    ours, unit = reference.values, "normalised"
    if theirs.dtype == np.uint8 and ours.dtype != np.uint8:
        unit, bytes_ = "byte", reference.as_bytes()
        if bytes_ is None:
            return {
                "unit": unit,
                "why": "the format takes bytes and the reference's pixels are patches; "
                "the export compared them before the cut",
            }
        ours = bytes_
    if len(ours) != len(theirs):
        return {"unit": unit, "sizes": [len(ours), len(theirs)]}
    off = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    return {
        "unit": unit,
        "max": float(off.max()),
        "mean": float(off.mean()),
        "share": float((off > 0).mean()),
    }


def with_pixels(prepared: PreparedImage, reference: Pixels) -> PreparedImage | None:
    """The candidate's picture with the reference's values in its tensors; None when they do not fit."""
    views, start = [], 0
    for view in prepared.views:
        name = next(key for key in view.inputs if key.startswith("pixel_"))
        tensor = np.asarray(view.inputs[name])
        values = reference.as_bytes() if tensor.dtype == np.uint8 else reference.values
        if values is None or start + tensor.size > len(values):
            return None
        part = values[start : start + tensor.size].reshape(tensor.shape).astype(tensor.dtype)
        views.append(replace(view, inputs={**view.inputs, name: part}))
        start += tensor.size
    return replace(prepared, views=tuple(views)) if start == len(reference.values) else None


def _norm(session: Any) -> NDArray[np.float64]:
    """How a session normalises: from the checkpoint's image processor, or a bundle's manifest."""
    processor = getattr(getattr(session, "processor", None), "image_processor", None)
    if processor is not None:
        mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
        if mean is None or std is None or not getattr(processor, "do_normalize", True):
            mean, std = (0.0,) * 3, (1.0,) * 3
        scale = float(processor.rescale_factor) if getattr(processor, "do_rescale", True) else 1.0
        return np.array([mean, std], np.float64) / scale
    operations = session.manifest.image.operations if hasattr(session, "manifest") else ()
    for operation in operations:
        if isinstance(operation, Normalise):
            return np.array([operation.subtract, operation.divide], np.float64)
    return NO_NORM
