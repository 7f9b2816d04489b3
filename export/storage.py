"""Writes the graph of a part, and its weights beside it when they do not fit into one file.

In: an `onnx_ir` model and a path. Out: `x.onnx`, and for a large one `x.onnx_data`, `x.onnx_data_1`, ... as
transformers.js and onnxruntime look for them. Not here: which parts there are, hashes.

A protobuf file holds 2 GiB and a browser's buffer 2 GB, so no file is larger than `LIMIT_BYTES`.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import mmap
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from runtime.errors import CheckpointError

LIMIT_BYTES = 2_000_000_000
"""The most that one file of a bundle holds."""

INLINE_BYTES = 1024
"""Smaller tensors stay in the graph: shapes and scales that a loader wants at once."""

_GRAPH_BYTES = 2**20  # nodes and names of a large graph are a tenth of it


def save(model: ir.Model, path: Path, limit_bytes: int | None = None, *, beside: bool = False) -> list[Path]:
    """Write `model` to `path`; returns the graph file and then its data files. `model` stays as it is.

    `beside`: data files also where one file would do; writing and opening it then need less memory.
    Raises CheckpointError when one tensor alone is larger than a file may be.
    """
    limit = LIMIT_BYTES if limit_bytes is None else limit_bytes
    weights = _weights(model)
    if not beside and sum(map(_size, weights)) + min(_GRAPH_BYTES, limit // 2) <= limit:
        ir.save(model, path)
        return [path]
    files = [
        (path.with_name(f"{path.name}_data{f'_{i}' if i else ''}"), values)
        for i, values in enumerate(_split([v for v in weights if _size(v) > INLINE_BYTES], limit, path))
    ]
    with _restored(weights):
        for file, values in files:
            _write(file, values)
        ir.save(model, path)
    return [path, *(file for file, _ in files)]


def as_from_file(model: ir.Model) -> ir.Model:
    """The model as a file would keep it: attributes in its precision, nothing of the tracer's.

    The weights are the same arrays in memory: no copy is made.
    """
    weights = [value for value in _weights(model) if _size(value) > INLINE_BYTES]
    arrays = {
        str(value.name): value.const_value.numpy() for value in weights if value.const_value is not None
    }
    with _restored(weights):
        for value in weights:
            assert value.const_value is not None
            value.const_value = _elsewhere(value.const_value, str(value.name), Path("elsewhere"), 0)
        found = ir.from_proto(ir.to_proto(model))
    for name, array in arrays.items():
        found.graph.initializers[name].const_value = ir.tensor(array, name=name)
    return found


def mapped(path: Path) -> ir.Model:
    """The model that `save(..., beside=True)` wrote to `path`, with its weights read from the disk when used.

    The files may be deleted meanwhile, where the system allows that for what is open.
    """
    model = ir.load(path)
    files: dict[str, mmap.mmap] = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        if tensor.path not in files:
            with Path(tensor.path).open("rb") as file:
                files[tensor.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            _MAPPED.add(files[tensor.path])
        kind = tensor.dtype.numpy()
        data = np.frombuffer(files[tensor.path], kind, tensor.nbytes // kind.itemsize, tensor.offset or 0)
        value.const_value = ir.Tensor(data.reshape(tensor.shape.numpy()), name=name)
    return model


_MAPPED: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()


SMALL = 2**24
"""Parameters of a model whose weights are not worth the search for garbage, which takes about a second."""


def release(parameters: int) -> None:
    """Give memory that was freed back to the system, where the C library can (glibc keeps a gigabyte).

    Pages of mapped weights leave this process, too; they are read again when they are used. Nothing is done
    for a model of fewer than SMALL `parameters`.
    """
    if parameters < SMALL:
        return
    while gc.collect():  # what torch holds of a freed cycle is garbage only then
        pass
    if hasattr(mmap, "MADV_DONTNEED"):
        for each in _MAPPED:
            each.madvise(mmap.MADV_DONTNEED)
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def data_files(path: Path) -> list[Path]:
    """The data files beside a graph file, in their order."""
    beside = [file for file in path.parent.glob(f"{path.name}_data*") if file.is_file()]
    return sorted(beside, key=lambda file: int(file.name.rpartition("_data")[2].lstrip("_") or 0))


def shared_bytes(models: Mapping[str, ir.Model], least: int = INLINE_BYTES) -> dict[str, int]:
    """Bytes that parts store more than once, as `{"decoder + embed_tokens": bytes}`.

    A tied embedding and LM head lie one in each part; in float32 they are transposes of one another.
    """
    holders: dict[str, set[str]] = {}
    sizes: dict[str, int] = {}
    for role, model in models.items():
        for value in _weights(model):
            if _size(value) < least or value.const_value is None:
                continue
            for key in _fingerprints(value):
                holders.setdefault(key, set()).add(role)
                sizes[key] = _size(value)
    found: dict[str, int] = {}
    for key, roles in holders.items():
        if len(roles) > 1:
            name = " + ".join(sorted(roles))
            found[name] = found.get(name, 0) + sizes[key]
    return found


def _fingerprints(value: ir.Value) -> set[str]:
    """Hashes of the bytes, and of those of the transpose's standard order; one per distinct content."""
    assert value.const_value is not None
    array = value.const_value.numpy()
    kinds = [array] if array.ndim != 2 else [min(array, array.T, key=lambda x: x.shape)]
    return {hashlib.sha256(f"{x.shape}{x.dtype}".encode() + x.tobytes()).hexdigest() for x in kinds}


def _weights(model: ir.Model) -> list[ir.Value]:
    return [v for v in model.graph.initializers.values() if v.const_value is not None]


def _size(value: ir.Value) -> int:
    assert value.const_value is not None
    return int(value.const_value.nbytes)


def _split(values: Sequence[ir.Value], limit: int, path: Path) -> list[list[ir.Value]]:
    """In their order, as many as fit into each file."""
    groups: list[list[ir.Value]] = [[]]
    used = 0
    for value in values:
        size = _size(value)
        if size > limit:
            raise CheckpointError(
                f"{path.name}: {value.name} has {size:,} bytes, a file of a bundle at most {limit:,}; "
                "take a lower precision"
            )
        if used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append(value)
        used += size
    return [group for group in groups if group]


def _write(path: Path, values: Sequence[ir.Value]) -> None:
    """The tensors' bytes one after another; each value then points there."""
    offset = 0
    with path.open("wb") as stream:
        for value in values:
            tensor = value.const_value
            assert tensor is not None
            data = tensor.tobytes()
            stream.write(data)
            value.const_value = _elsewhere(tensor, str(value.name), path, offset)
            offset += len(data)


def _elsewhere(tensor: ir.TensorProtocol, name: str, path: Path, offset: int) -> ir.ExternalTensor:
    """What a graph file says of a tensor that lies at `offset` of the file beside it."""
    return ir.ExternalTensor(
        path.name,
        offset,
        int(tensor.nbytes),
        tensor.dtype,
        shape=ir.Shape([int(size) for size in tensor.shape]),  # type: ignore[arg-type]
        name=name,
        base_dir=str(path.parent),
    )


@contextlib.contextmanager
def _restored(values: Sequence[ir.Value]) -> Iterator[None]:
    """The tensors that `values` have now are theirs again afterwards."""
    tensors = [value.const_value for value in values]
    try:
        yield
    finally:
        for value, tensor in zip(values, tensors, strict=True):
            value.const_value = tensor
