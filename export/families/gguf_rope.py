"""Rotary embeddings of the text model in llama.cpp's files: base, sections, and scaling for longer contexts.

In: text_config. Out: keys, and the divisors of frequencies that `llama3` needs as a tensor. Not here: a base
by kind of layer (`gguf_gemma3.py`).

`dynamic` is the default up to max_position_embeddings, which is the context that the file states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gguf

from runtime.errors import CheckpointError

Config = Mapping[str, Any]

_KNOWN = ("default", "mrope", "dynamic", "linear", "yarn", "llama3")
_BETAS = {"beta_fast": 32, "beta_slow": 1}
"""llama.cpp reads no others for these architectures."""


def parameters(text: Config) -> dict[str, Any]:
    """Rotary parameters, wherever this version of transformers wrote them, `rope_type` and `rope_theta` among
    them. Raises CheckpointError for a kind that has no counterpart."""
    found = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    kind = str(found.get("rope_type", found.get("type", "default")))
    if kind not in _KNOWN:
        raise CheckpointError(
            f"text_config: rope_type {kind!r} has no GGUF export here; known: {', '.join(_KNOWN)}"
        )
    found.setdefault("rope_theta", text.get("rope_theta", 10000.0))
    part = float(found.get("partial_rotary_factor") or text.get("partial_rotary_factor") or 1.0)
    if part != 1.0:
        raise CheckpointError(f"text_config: partial_rotary_factor {part} has no GGUF export here; known: 1")
    for name, usual in _BETAS.items():
        if kind == "yarn" and (got := found.get(name) or usual) != usual:
            raise CheckpointError(f"text_config: yarn with {name} {got}; llama.cpp knows {usual} alone")
    return {**found, "rope_type": kind}


def write_values(writer: Any, text: Config) -> None:
    """Keys of base, sections and scaling."""
    rope = parameters(text)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if "mrope_section" in rope:
        writer.add_rope_dimension_sections([*rope["mrope_section"], 0, 0, 0, 0][:4])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif rope["rope_type"] == "yarn":
        factor, original = _stretch(rope, text)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(original)
        if (scale := _scale(rope, factor) / _log_scale(factor, 1.0)) != 1.0:
            writer.add_rope_scaling_attn_factors(scale)


def _stretch(rope: Config, text: Config) -> tuple[float, int]:
    """(factor, context before it) as transformers reads them."""
    original = int(rope.get("original_max_position_embeddings") or text["max_position_embeddings"])
    return float(rope.get("factor") or text["max_position_embeddings"] / original), original


def _scale(rope: Config, factor: float) -> float:
    """What cosines and sines are multiplied by; transformers' `_compute_yarn_parameters`."""
    if (given := rope.get("attention_factor")) is not None:
        return float(given)
    one, all_ = rope.get("mscale"), rope.get("mscale_all_dim")
    if one and all_:
        return _log_scale(factor, float(one)) / _log_scale(factor, float(all_))
    return _log_scale(factor, 1.0)


def _log_scale(factor: float, times: float) -> float:
    """llama.cpp multiplies by this, with `times` 1, unless told more."""
    return 1.0 if factor <= 1 else 0.1 * times * math.log(factor) + 1.0


def divisors(text: Config, head_dim: int) -> list[float] | None:
    """What `llama3` divides each of the head_dim / 2 frequencies by; None for other kinds.

    As transformers' `_compute_llama3_parameters`: long waves by `factor`, short ones by 1, a ramp between.
    """
    rope = parameters(text)
    if rope["rope_type"] != "llama3":
        return None
    factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    original = float(rope["original_max_position_embeddings"])
    found = []
    for index in range(0, head_dim, 2):
        turns = original / (2 * math.pi * float(rope["rope_theta"]) ** (index / head_dim))
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - share) / factor + share))
    return found
