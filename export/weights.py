"""Whether the weights in the files are the model's: none missing, none left over, all finite.

In: a loaded model and what transformers says about loading it. Out: notes, or a CheckpointError that names a
weight and what to do. Not here: reading files (`checkpoint.py`).

transformers fills a missing weight with random numbers and drops one without a place, with a warning at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from runtime.errors import CheckpointError

MERGE = (
    "merge it first (peft: PeftModel.from_pretrained(base, adapter).merge_and_unload()), save that with "
    "save_pretrained, and the processor beside it"
)
"""What to do with an adapter."""

_ADAPTERS = ("lora_", "base_layer", "modules_to_save", "ia3_", "oft_", "vera_lambda", "prompt_encoder")
"""In names that peft writes."""

_SMALL = ("F8", "F6_", "F4", "I8", "U8", "I4", "U4")
"""How the names of types of 8 bits or fewer begin in a safetensors header."""

_COMPUTED = ("position_ids", "inv_freq", "masked_bias")
"""Buffers that older versions stored and that are computed now."""

_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.")
"""What DistributedDataParallel, torch.compile, FSDP and peft put before a name, or into it."""


def check(path: Path, model: Any, info: Mapping[str, Any]) -> tuple[str, ...]:
    """Notes on what was left out without harm. `info`: `output_loading_info` of `from_pretrained`.

    Raises CheckpointError: weights missing or of another shape, an adapter that was not merged, a weight of a
    layer that the configuration gives none (a bias), NaN or infinity.
    """
    _check_stored(path)
    left = sorted(name for name in info["unexpected_keys"] if not name.endswith(_COMPUTED))
    if adapters := [name for name in left if any(mark in name for mark in _ADAPTERS)]:
        raise CheckpointError(
            f"{path}: {len(adapters)} weights of an adapter beside the model's (first: {adapters[0]}), which "
            f"transformers leaves out; {MERGE}"
        )
    if absent := sorted({*info["missing_keys"], *map(str, info["mismatched_keys"])}):
        raise CheckpointError(
            f"{path}: {len(absent)} weights missing or of another shape (first: {absent[0]}); they would be "
            f"random; {_remedy(left)}"
        )
    owners = {name for name, module in model.named_modules() if name and module._parameters}
    if strange := [name for name in left if _owner(name, owners)]:
        raise CheckpointError(
            f"{path}: {strange[0]} is in the files, and config.json gives that layer none ({len(strange)} "
            "such weights), so transformers leaves it out; correct config.json (attention_bias, ...)"
        )
    _check_finite(path, model.named_parameters())
    if not left:
        return ()
    return (f"{len(left)} weights in the files have no place in the model and were left out: {left[0]}, ...",)


def _check_stored(path: Path) -> None:
    """Raises CheckpointError for a weight stored in 8 bits or fewer: its scales are not known here."""
    from safetensors import safe_open

    for file in sorted(path.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  (no mapping)
                kind = tensors.get_slice(name).get_dtype()
                if kind.startswith(_SMALL) and name.endswith("weight"):
                    raise CheckpointError(
                        f"{file}: {name} is stored as {kind}, which is quantized; export the model in 16 or "
                        "32 bits and give --precision"
                    )


def _remedy(left: list[str]) -> str:
    """What to do about missing weights, by the names that found no place."""
    if not left:
        return "save the model again"
    for mark in _WRAPPERS:
        if all(mark in name for name in left):
            return f"names in the files have {mark!r} in them (first: {left[0]}); take it out, or save again"
    return f"the files have other names (first: {left[0]}); save the model again with save_pretrained"


def _owner(name: str, owners: Iterable[str]) -> bool:
    """Whether a weight belongs to a layer of the model that has other weights."""
    layer = name.rpartition(".")[0]
    return bool(layer) and any(owner == layer or owner.endswith(f".{layer}") for owner in owners)


def _check_finite(path: Path, parameters: Iterable[tuple[str, Any]]) -> None:
    """Raises CheckpointError at the first weight with a NaN or an infinity."""
    import torch

    for name, weight in parameters:
        if not weight.numel():
            continue
        least, most = torch.aminmax(weight)  # both NaN if one number is
        if not (torch.isfinite(least) and torch.isfinite(most)):
            count = int((~torch.isfinite(weight)).sum())
            raise CheckpointError(
                f"{path}: {name} has {count} of {weight.numel()} numbers that are NaN or infinite; the "
                "training diverged or the file is damaged; take an earlier checkpoint"
            )
