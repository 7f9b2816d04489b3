"""A masked teacher as a checkpoint on disk, for a server in another process, as long as its stage lasts.

In: a model (whole or sharded by FSDP2) under a Masker, its processor, a directory. Out: a Hugging Face
checkpoint of the weights as they are now, with `masked.json` beside them; deleted when the stage ends.
Not here: masking, the server.

    masked.json   {"source", "ratio", "sparsity", "sha256", "files": {name: sha256}}, written last
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, ProcessorMixin
from transformers.core_model_loading import revert_weight_conversion

from distill.masks.masking import Masker
from runtime import files
from runtime.errors import StateError

RECORD = "masked.json"
SHARD_BYTES = 2 << 30


@dataclass(frozen=True)
class Materialised:
    """Where the checkpoint is, and what was written: measured sparsity, a hash over its weight files."""

    path: Path
    ratio: float
    sparsity: float
    sha256: str


@contextlib.contextmanager
def materialised(
    masker: Masker,
    processor: ProcessorMixin,
    directory: Path,
    source: str,
    *,
    shard_bytes: int = SHARD_BYTES,
    alone: bool = False,
) -> Iterator[Materialised]:
    """The model under `masker` as a checkpoint at `directory`, for the length of a `with` block.

    Written one safetensors file of about `shard_bytes` at a time: memory holds one of them and no second
    copy of the model. Names and layout are those of the checkpoint that the model was loaded from. What a
    killed run left there is used again if it is the same teacher (`source` names it) at the same ratio and
    its hashes match. Under several processes all of them enter and leave; the first one writes.

    Raises StateError when the disk is too small or full.
    """
    sparsity = masker.sparsity
    wanted = {"source": source, "ratio": masker.ratio, "sparsity": sparsity}
    whole = _is_whole(directory, wanted) if _is_first() else False
    if not (whole if alone else _agreed(whole)):
        _write(masker.model, processor, directory, wanted, shard_bytes)
        if not alone:
            _barrier()
    record = files.read_json(directory / RECORD)
    try:
        yield Materialised(directory, masker.ratio, sparsity, record["sha256"])
        if not alone:
            _barrier()
    finally:
        if _is_first():
            shutil.rmtree(directory, ignore_errors=True)


def _is_whole(directory: Path, wanted: dict[str, Any]) -> bool:
    if not (directory / RECORD).exists():
        return False
    record = files.read_json(directory / RECORD)
    return all(record.get(key) == value for key, value in wanted.items()) and all(
        (directory / name).exists() and files.sha256_file(directory / name) == sha
        for name, sha in record["files"].items()
    )


def _write(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    directory: Path,
    wanted: dict[str, Any],
    shard_bytes: int,
) -> None:
    """Every process gathers, the first one writes; the directory takes its name when it is whole."""
    if not _is_first():
        for _ in _tensors(model):
            pass
        return
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    directory.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory.parent).free
    if free < size:
        raise StateError(
            f"{directory}: needs {size / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; "
            "make room, or put --out on another disk"
        )
    try:
        with files.new_directory(directory) as temporary:
            _write_config(model, temporary)
            processor.save_pretrained(temporary)
            hashes = _write_weights(model, temporary, shard_bytes)
            record = {**wanted, "sha256": files.sha256_json(hashes), "files": hashes}
            files.write_json(temporary / RECORD, record)
    except OSError as error:
        raise StateError(f"{directory}: cannot be written ({error}); make room and run again") from error


def _write_config(model: PreTrainedModel, directory: Path) -> None:
    config = copy.deepcopy(model.config)
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__.removeprefix("FSDP")]
    config.save_pretrained(directory)
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.save_pretrained(directory)


def _write_weights(model: PreTrainedModel, directory: Path, shard_bytes: int) -> dict[str, str]:
    """SHA-256 of each weight file, by name."""
    parts: list[tuple[Path, list[str]]] = []
    held: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        path = directory / f"part-{len(parts)}"
        save_file(held, path, metadata={"format": "pt"})
        parts.append((path, list(held)))
        held.clear()

    for name, tensor in _tensors(model):
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > shard_bytes:
            flush()
        held[name] = tensor
        total += tensor.nbytes
    flush()
    places, hashes = {}, {}
    for number, (path, names) in enumerate(parts, 1):
        single = len(parts) == 1
        file = "model.safetensors" if single else f"model-{number:05}-of-{len(parts):05}.safetensors"
        path.rename(directory / file)
        hashes[file] = files.sha256_file(directory / file)
        places.update(dict.fromkeys(names, file))
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return hashes


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """(name in the original checkpoint's format, whole tensor on the CPU), a layer at a time. Collective."""
    for group in _layers(model):
        gathered = {}
        for name, tensor in group.items():
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            gathered[name] = whole.detach().cpu()
        for name, tensor in cast(dict[str, torch.Tensor], revert_weight_conversion(model, gathered)).items():
            own = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous()
            yield name, tensor if own else tensor.clone(memory_format=torch.contiguous_format)


def _layers(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """The model's tensors to save, grouped so that what a checkpoint stores otherwise (experts one by one,
    projections fused) stays together: by layer, or by module outside of the layers."""
    ignored = set(model._keys_to_ignore_on_save or ())
    tied = model.all_tied_weights_keys
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        if name in ignored or (name in tied and state.get(tied[name]) is tensor):
            continue
        layer = re.match(r"(.*?\.\d+)\.", name)
        key = layer[1] if layer else name.rpartition(".")[0]
        groups.setdefault(key, {})[name] = tensor
    yield from groups.values()


# --- several processes -------------------------------------------------


def _is_first() -> bool:
    return not distributed.is_initialized() or distributed.get_rank() == 0


def _agreed(value: bool) -> bool:
    """The first process's answer, on all of them."""
    if not distributed.is_initialized():
        return value
    held = [value]
    distributed.broadcast_object_list(held, src=0)
    return held[0]


def _barrier() -> None:
    if distributed.is_initialized():
        distributed.barrier()
