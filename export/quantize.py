"""A part's float graph with rounded weights, as the rules say; what a rule could not do is kept in the model.

In: a float32 `onnx_ir.Model` of a part, rules, and a calibration where a scheme needs one. Out: a quantized
model. Not here: the rules (`quantize_policy.py`), how a scheme rounds (`quantize_schemes.py`,
`quantize_fp16.py`, `gptq.py`), proof that only the weights changed (`audit.py`).

The first rule that matches a node decides. A node that its scheme does not allow gets the next that fits;
that stands in the model's metadata, and from there in the manifest's `parts[].fallbacks`.
"""

from __future__ import annotations

import collections
import fnmatch
import json
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from export import gptq, quantize_fp16, quantize_schemes, storage
from export.calibrate import Calibration
from export.passes import constant
from export.quantize_facts import suffix, weight_bits
from export.quantize_policy import POLICIES, Policy, Rule, Scheme, blocks_of, resolve
from runtime.errors import InputError
from runtime.manifest import Fallback

__all__ = [
    "POLICIES", "Policy", "Rule", "Scheme", "fallbacks", "policy", "quantize", "resolve", "scheme_of",
    "suffix", "weight_bits",
]  # fmt: skip

_FALLBACKS = "pocketvlm.fallbacks"
_SIZES = (128, 64, 32)
_KV_HEAD_MULTIPLE = 8


def policy(precision: str) -> tuple[Rule, ...]:
    """The rules of a named precision or a YAML file. Raises InputError naming the known ones."""
    return resolve(precision).rules


def scheme_of(node: ir.Node, part: str, rules: Sequence[Rule]) -> Scheme:
    """The scheme a node gets: the first matching rule's, or what its shape allows instead."""
    return _fitting(node, _asked(node, part, rules))[0]


def quantize(
    model: ir.Model, part: str, rules: Sequence[Rule], calibration: Calibration | None = None
) -> ir.Model:
    """A quantized copy of `model`; `model` itself is not changed, but every node gets a name of its own.

    Raises InputError when a scheme needs a calibration and there is none.
    """
    _name_nodes(model)
    chosen: dict[Scheme, list[str]] = collections.defaultdict(list)
    refused: list[Fallback] = []
    for node in model.graph:
        asked = _asked(node, part, rules)
        scheme, reason = _fitting(node, asked)
        if scheme.endswith("-gptq"):
            scheme, reason = _fitting_calibration(node, part, scheme, reason, calibration)
        chosen[scheme].append(str(node.name))
        if reason:
            refused.append(Fallback(node=str(node.name), asked=asked, got=scheme, reason=reason))
    result = storage.as_from_file(model)
    result = _apply(result, chosen, calibration)
    common.RemoveUnusedNodesPass()(result)
    quantize_schemes.drop_unused_weights(result)
    common.TopologicalSortPass()(result)
    if refused:
        result.metadata_props[_FALLBACKS] = json.dumps([each.model_dump() for each in refused])
    return result


def fallbacks(model: ir.Model) -> tuple[Fallback, ...]:
    """What the rules asked for and a node did not allow, as written with the model."""
    found = json.loads(model.metadata_props.get(_FALLBACKS, "[]"))
    return tuple(Fallback.model_validate(each) for each in found)


def _asked(node: ir.Node, part: str, rules: Sequence[Rule]) -> Scheme:
    label = f"{node.op_type}:{node.name}"
    for rule in rules:
        if fnmatch.fnmatchcase(part, rule.part) and fnmatch.fnmatchcase(label, rule.node):
            return rule.scheme
    return "keep"


def _fitting(node: ir.Node, asked: Scheme) -> tuple[Scheme, str]:
    """The scheme that the node allows, and why it is another ("" when there was nothing to do)."""
    if asked == "keep":
        return "keep", ""
    if asked == "fp16":
        reason = quantize_fp16.refusal(node)
        return ("fp16", "") if reason is None else ("keep", reason)
    if asked == "int8-kv":
        return _fitting_cache(node)
    weight = _weight(node, "Gather", 0) if asked == "int8-row" else _weight(node, "MatMul", 1)
    if weight is None:
        return "keep", ""
    blocks = blocks_of(asked)
    if blocks is None or len(weight) >= blocks.size:
        return asked, ""
    rows = f"{len(weight)} rows do not fill a block of {blocks.size}"
    for size in _SIZES:
        if size < blocks.size and len(weight) >= size:
            smaller = asked.replace(f"block{blocks.size}", f"block{size}")
            return smaller, rows  # type: ignore[return-value]
    return "keep", rows  # more padding than weights


def _fitting_cache(node: ir.Node) -> tuple[Scheme, str]:
    if node.op_type != "GroupQueryAttention":
        return "keep", ""
    past = node.inputs[3]
    if past is None or past.shape is None or not isinstance(width := past.shape[3], int):
        return "keep", "the node has no cache of a known head size"
    if width % _KV_HEAD_MULTIPLE:
        return "keep", f"head size {width} is no multiple of {_KV_HEAD_MULTIPLE}"
    return "int8-kv", ""


def _fitting_calibration(
    node: ir.Node, part: str, scheme: Scheme, reason: str, calibration: Calibration | None
) -> tuple[Scheme, str]:
    """Calibrated blocks, or those rounded to nearest where calibration gains nothing."""
    plain: Scheme = scheme.removesuffix("-gptq")  # type: ignore[assignment]
    if part != "decoder":
        return plain, "only the decoder is calibrated"
    blocks = blocks_of(scheme)
    assert blocks is not None
    found = _needed(calibration, scheme).rounded(str(node.name), blocks.size)
    if found.calibrated:
        return scheme, reason
    return plain, "calibrated blocks lose more than nearest ones on held-out prompts"


def _weight(node: ir.Node, op_type: str, index: int) -> np.ndarray | None:
    """The constant two-dimensional float weight of an `op_type`."""
    found = constant(node.inputs[index]) if node.op_type == op_type else None
    return found if found is not None and found.ndim == 2 and found.dtype == np.float32 else None


def _apply(
    model: ir.Model, chosen: Mapping[Scheme, Sequence[str]], calibration: Calibration | None
) -> ir.Model:
    """fp16 goes first: it needs the types of inner values, which onnxruntime's quantizer drops."""
    if names := chosen.get("fp16"):
        quantize_fp16.to_half(model, names)
    if names := chosen.get("int8-kv"):
        quantize_schemes.cache_to_int8(model, names, _needed(calibration, "int8-kv").scales)
    if names := chosen.get("int8-row"):
        quantize_schemes.rows_to_int8(model, names)
    for scheme, names in chosen.items():
        if (blocks := blocks_of(scheme)) is None:
            continue
        if blocks.gptq:
            rounded = {name: _needed(calibration, scheme).rounded(name, blocks.size) for name in names}
            gptq.write(model, rounded)
        else:
            model = quantize_schemes.matmul_to_blocks(model, names, blocks.bits, blocks.size)
    if chosen.get("fp16"):
        quantize_fp16.follow(model)
    if names := chosen.get("int8-dynamic"):
        model = quantize_schemes.matmul_to_int8(model, names)
    return model


def _needed(calibration: Calibration | None, scheme: str) -> Calibration:
    if calibration is None:
        raise InputError(f"{scheme}: needs a calibration with prompts about pictures; pass one to quantize")
    return calibration


def _name_nodes(model: ir.Model) -> None:
    """The quantizers address nodes by name: give every node one of its own."""
    seen: set[str] = set()
    for index, node in enumerate(model.graph):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{index}"
        seen.add(node.name)
