"""Writes graphs that share their weights: every distinct tensor once, in files that all graphs refer to.

In: models by file name. Out: graph files and data files. Not here: which graphs there are, hashes; a part
with weights of its own (`storage.py`).

Prefill and decode are two graphs over the same weights. Tensors are recognised by their bytes, so rounded
weights and tables are shared as well. Small ones stay in the graphs, where a provider wants them at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from export.storage import INLINE_BYTES, LIMIT_BYTES

_PAGE_BYTES = 4096  # the ONNX specification's advice for files that are mapped into memory
_ALIGN_BYTES = 64


class _Shelf:
    """Data files in which a tensor's bytes lie once; the next file begins when one is full."""

    def __init__(self, base: Path, limit: int) -> None:
        self._base, self._limit = base, limit
        self.files: list[Path] = []
        self._stream: BinaryIO | None = None
        self._places: dict[str, tuple[str, int]] = {}

    def place(self, data: bytes) -> tuple[str, int]:
        """(file name, offset) of these bytes."""
        key = hashlib.sha256(data).hexdigest()
        if key not in self._places:
            stream = self._room(len(data))
            align = _PAGE_BYTES if len(data) > _PAGE_BYTES else _ALIGN_BYTES
            stream.write(b"\0" * (-stream.tell() % align))
            self._places[key] = (self.files[-1].name, stream.tell())
            stream.write(data)
        return self._places[key]

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _room(self, size: int) -> BinaryIO:
        if self._stream is None or self._stream.tell() + size + _PAGE_BYTES > self._limit:
            self.close()
            suffix = f"_{len(self.files)}" if self.files else ""
            self.files.append(self._base.with_name(f"{self._base.name}{suffix}"))
            self._stream = self.files[-1].open("wb")
        return self._stream


def save_sharing(models: Mapping[str, ir.Model], data: Path, limit_bytes: int = LIMIT_BYTES) -> list[Path]:
    """Write each model as the file beside `data` that it is named by; returns the data files.

    The models stay as they are. A tensor larger than `limit_bytes` gets a file of its own.
    """
    shelf = _Shelf(data, limit_bytes)
    try:
        for name, model in models.items():
            _save(model, data.parent / name, shelf)
    finally:
        shelf.close()
    return shelf.files


def _save(model: ir.Model, path: Path, shelf: _Shelf) -> None:
    kept = {name: value.const_value for name, value in model.graph.initializers.items()}
    try:
        for name, value in model.graph.initializers.items():
            tensor = kept[name]
            if tensor is None or tensor.nbytes <= INLINE_BYTES:
                continue
            bytes_ = tensor.tobytes()
            file, offset = shelf.place(bytes_)
            value.const_value = ir.ExternalTensor(
                file,
                offset,
                len(bytes_),
                tensor.dtype,
                shape=ir.Shape(list(tensor.numpy().shape)),
                name=name,
                base_dir=str(path.parent),
            )
        ir.save(model, path)
    finally:
        for name, value in model.graph.initializers.items():
            value.const_value = kept[name]


def used_files(model: ir.Model) -> list[str]:
    """Names of the data files that a loaded graph refers to, sorted."""
    return sorted(
        {
            str(value.const_value.location)
            for value in model.graph.initializers.values()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
    )
