"""Writes a GGUF file tensor by tensor: the largest one is all that is in memory.

In: a `Plan` and a `Source`. Out: a file. Not here: names (`families/gguf.py`),
k-quants (`llamacpp.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from export.gguf_plan import Piece, Plan
from export.gguf_source import Source
from export.gguf_tokenizer import write_tokenizer
from runtime.errors import CheckpointError

PRECISIONS = {"f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16, "q8_0": Type.Q8_0}
"""What is written directly; the rest is llama.cpp's `quantize`."""

_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}


def tensor_type(piece: Piece, shape: tuple[int, ...], precision: str) -> Type:
    """The type that a tensor of `shape` gets: llama.cpp reads vectors and norms in float32 only, and blocks
    of 32 need rows that are a multiple of it (else float16)."""
    if len(shape) <= 1 or piece.name.endswith("_norm.weight") or piece.keep == "f32":
        return Type.F32
    if piece.keep == "f16":
        return Type.F16 if precision == "f16" else Type.F32
    if piece.keep == "half":
        return Type.F32 if precision == "f32" else Type.F16
    if not piece.name.endswith(".weight"):
        return Type.F32
    wanted = PRECISIONS[precision]
    block = gguf.GGML_QUANT_SIZES[wanted][0]
    return wanted if shape[-1] % block == 0 else Type.F16


def stored_bytes(
    plan: Plan, source: Source, precision: str, more: Callable[[str], Type | None] = lambda _: None
) -> int:
    """What the tensors of the file will take. `more`: a type by tensor name, counted where it takes more."""
    total = 0
    for piece in plan.pieces:
        shape = _shape(piece, source)
        kinds = (tensor_type(piece, shape, precision), more(piece.name))
        total += max(_bytes(kind, shape) for kind in kinds if kind is not None)
    return total


def _bytes(kind: Type, shape: tuple[int, ...]) -> int:
    block, stored = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * stored


def write(plan: Plan, source: Source, out: Path, precision: str) -> None:
    """Write one file, in a directory that is renamed when all is well. CheckpointError: a tensor doubled."""
    _check(plan, source)
    writer = gguf.GGUFWriter(out, plan.architecture)
    try:
        shapes = [_shape(piece, source) for piece in plan.pieces]
        types = [tensor_type(*each, precision) for each in zip(plan.pieces, shapes, strict=True)]
        _write_values(writer, plan, source, shapes, precision)
        for piece, shape, kind in zip(plan.pieces, shapes, types, strict=True):
            writer.add_tensor_info(
                piece.name, shape, np.dtype(np.float32), _bytes(kind, shape), raw_dtype=kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for piece, kind in zip(plan.pieces, types, strict=True):
            _write_tensor(writer, _rows(piece, source), kind, f"{source.path}: {piece.source}")
    finally:
        writer.close()


def _check(plan: Plan, source: Source) -> None:
    names = [piece.name for piece in plan.pieces]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise CheckpointError(
            f"{source.path}: two tensors would be called {doubled[0]}; the checkpoint holds a layer twice"
        )
    if not names:
        raise CheckpointError(f"{source.path}: no {plan.model} tensors found")


def _shape(piece: Piece, source: Source) -> tuple[int, ...]:
    """The tensor's shape in the file, without its data."""
    import torch

    meta = torch.empty(source.shape(piece.source), device="meta")
    return tuple((piece.change(meta) if piece.change else meta).shape)


def _rows(piece: Piece, source: Source) -> Any:
    """The tensor of the file, in the type that it is stored in, as (rows, columns)."""
    tensor = source.tensor(piece.source)
    tensor = piece.change(tensor) if piece.change else tensor
    return tensor.reshape(-1, tensor.shape[-1])


_LARGEST_HALF = 65504.0


def _check_values(values: NDArray[np.float32], kind: Type, name: str) -> None:
    """Raises CheckpointError for a number that the type does not have."""
    largest = float(np.abs(values).max())  # of a NaN: NaN
    if not math.isfinite(largest):
        raise CheckpointError(
            f"{name}: holds a number that is none (NaN or infinite); train or save it again"
        )
    if kind == Type.F16 and largest > _LARGEST_HALF:
        raise CheckpointError(f"{name}: holds {largest:.4g}, more than float16 can; choose bf16 or f32")


def _write_tensor(writer: Any, rows: Any, kind: Type, name: str) -> None:
    """Round and write a few rows at a time: only the stored form of the tensor is whole in memory."""
    stream, written = writer.fout[0], 0
    writer.write_padding(stream, stream.tell())
    step = max(1, _VALUES_AT_ONCE // rows.shape[1])
    for start in range(0, len(rows), step):
        values = rows[start : start + step].float().numpy()
        _check_values(values, kind, name)
        some = gguf.quants.quantize(values, kind)
        stream.write(some.tobytes())
        written += some.nbytes
    writer.write_padding(stream, written)


_VALUES_AT_ONCE = 1 << 18


def _write_values(
    writer: Any, plan: Plan, source: Source, shapes: list[tuple[int, ...]], precision: str
) -> None:
    total = sum(map(math.prod, shapes))
    facts = gguf.Metadata.load(None, source.path, None, total)
    facts.name = facts.name or source.path.name
    facts.size_label = facts.size_label or gguf.size_label(total, 0, 0, 0)
    writer.add_type(gguf.GGUFType.MMPROJ if plan.model == "vision" else gguf.GGUFType.MODEL)
    facts.set_gguf_meta_model(writer)
    writer.add_file_type(_FILE_TYPES[precision])
    plan.values(writer)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if plan.has_tokenizer:
        write_tokenizer(writer, source.path, int(source.config["text_config"]["vocab_size"]))
