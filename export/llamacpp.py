"""Quantization by llama.cpp's own `quantize`, and what a file really holds afterwards.

In: a GGUF file in f32, f16 or bf16, a named type, rules, an importance matrix. Out: a quantized file and its
actual types. Not here: conversion (`gguf_write.py`), where importance comes from (`gguf_importance.py`).
"""

from __future__ import annotations

import collections
import ctypes
import fnmatch
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from export.gguf_kinds import TensorRule
from runtime import gguf_library
from runtime.errors import CheckpointError, InputError
from runtime.manifest import WeightBits


def ggml_type(name: str) -> gguf.GGMLQuantizationType:
    """A tensor type by its name, as `q8_0`. Raises InputError naming those that there are."""
    try:
        return gguf.GGMLQuantizationType[name.upper()]
    except KeyError:
        known = ", ".join(kind.name.lower() for kind in gguf.GGMLQuantizationType)
        raise InputError(f"tensor type {name!r} is not known; choose from {known}") from None


def quantize(
    source: Path,
    out: Path,
    kind: str,
    *,
    rules: Sequence[TensorRule] = (),
    importance: Mapping[str, NDArray[np.float32]] | None = None,
    threads: int = 1,
) -> None:
    """Write `out` from `source`. `importance`: mean squared input by tensor name and column.

    Raises CheckpointError when llama.cpp refuses.
    """
    lib, _ = gguf_library.load()
    wanted = lib.llama_model_quantize_default_params()
    wanted.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    wanted.nthread = threads
    names = [tensor.name for tensor in gguf.GGUFReader(source).tensors]
    types = chosen(names, rules)
    overrides = (lib.llama_model_tensor_override * (len(types) + 1))()
    for place, (name, type_name) in enumerate(types.items()):
        overrides[place].pattern = f"^{re.escape(name)}$".encode()
        overrides[place].type = int(ggml_type(type_name))
    wanted.tt_overrides = overrides
    kept = _importance(lib, importance or {})
    if importance:
        wanted.imatrix = kept[0]
    status = lib.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(wanted))
    if status:
        raise CheckpointError(f"{source.name}: llama.cpp cannot quantize it to {kind} ({status})")


def chosen(names: Sequence[str], rules: Sequence[TensorRule]) -> dict[str, str]:
    """Tensor name -> type. Raises InputError: a rule that matches nothing, a type that is not known."""
    found: dict[str, str] = {}
    used = set()
    for name in names:
        for rule in rules:
            if fnmatch.fnmatchcase(name, rule.tensor):
                ggml_type(rule.type)
                found[name] = rule.type
                used.add(rule)
                break
    if unused := [rule for rule in rules if rule not in used]:
        raise InputError(f"rule {unused[0].tensor!r}: matches no tensor; names are as {names[0]!r}")
    return found


def _importance(lib: Any, importance: Mapping[str, NDArray[np.float32]]) -> tuple[Any, ...]:
    """The structure that llama.cpp reads, and what it points into."""
    arrays = {name: np.ascontiguousarray(values, np.float32) for name, values in importance.items()}
    table = (lib.llama_model_imatrix_data * (len(arrays) + 1))()
    for place, (name, values) in enumerate(arrays.items()):
        table[place].name = name.encode()
        table[place].data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        table[place].size = values.size
    return table, arrays


def weight_bits(path: Path) -> tuple[WeightBits, ...]:
    """What the file really stores: parameters by type, with the bits a parameter takes."""
    counts: collections.Counter[str] = collections.Counter()
    for tensor in gguf.GGUFReader(path).tensors:
        counts[tensor.tensor_type.name] += int(tensor.n_elements)
    return tuple(
        WeightBits(bits=_bits(name), parameters=number, scheme=name.lower())
        for name, number in sorted(counts.items(), key=lambda item: _bits(item[0]))
    )


def _bits(name: str) -> int:
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    return int(8 * size // block)  # whole bits a weight; scales make it a fraction more


def fallbacks(path: Path, kind: str) -> dict[str, str]:
    """Matrices that could not get the type asked for because of their row size, and the type they got."""
    whole = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[_base(kind)]][0]
    return {
        tensor.name: tensor.tensor_type.name.lower()
        for tensor in gguf.GGUFReader(path).tensors
        if len(tensor.shape) > 1 and int(tensor.shape[0]) % whole
    }


def _base(kind: str) -> str:
    """`q4_k_m` -> `Q4_K`: the type of most tensors."""
    return re.sub(r"_[MS]$", "", kind.upper())
