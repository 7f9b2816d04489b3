"""Image features of a frozen vision part: computed once, kept in bounded memory, then on disk.

In: prompts. Out: the features that a model computed for them, bit for bit the same whether they were kept
or not: each prompt's are computed alone. Not here: how features are computed (`distill/forward/features.py`).
"""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from distill.forward.features import Features, encode_images
from distill.inputs.encoding import Prompt
from runtime import files

MEMORY_MIB = 1024
DISK_MIB = 20 * 1024


class FeatureStore:
    """Features by the images' hash, least recently used first out of memory.

    With a `directory` what is computed is also written there, up to `disk_mib`, for a later pass or a run
    that goes on; the directory must belong to these weights (the caller names it by their hash).
    """

    def __init__(
        self, directory: Path | None = None, *, memory_mib: int = MEMORY_MIB, disk_mib: int = DISK_MIB
    ) -> None:
        self.directory, self.memory_bytes, self.disk_bytes = directory, memory_mib << 20, disk_mib << 20
        self.computed = 0
        self._kept: OrderedDict[str, Features] = OrderedDict()
        self._bytes = 0
        self._written = 0 if directory is None else sum(p.stat().st_size for p in directory.glob("*.pt"))

    @torch.no_grad()
    def features(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Prompt],
        encode: Callable[..., Features] = encode_images,
    ) -> Features:
        """Features of each prompt on the model's device, without gradient."""
        found = []
        for prompt in prompts:
            features = self._kept.get(prompt.key) if prompt.key else None
            if features is None and prompt.key:
                features = self._read(prompt.key)
            if features is None:
                features = encode(model, [prompt]).detach()
                self.computed += bool(prompt.key)
                self._write(prompt.key, features)
            self._keep(prompt.key, features)
            found.append(features.map(lambda tensor: tensor.to(model.device)))
        return Features.join(found)

    def clear(self) -> None:
        """Forget what memory holds: the weights have changed."""
        self._kept.clear()
        self._bytes = 0

    def _keep(self, key: str, features: Features) -> None:
        if not key:
            return
        if key not in self._kept:
            self._kept[key] = features.map(lambda tensor: tensor.to("cpu"))
            self._bytes += _size(features)
        self._kept.move_to_end(key)
        while self._bytes > self.memory_bytes and len(self._kept) > 1:
            self._bytes -= _size(self._kept.popitem(last=False)[1])

    def _path(self, key: str) -> Path | None:
        return None if self.directory is None else self.directory / f"{key}.pt"

    def _read(self, key: str) -> Features | None:
        path = self._path(key)
        if path is None or not path.exists():
            return None
        content = torch.load(path, weights_only=True, map_location="cpu")
        levels = tuple(tuple(row) for row in content["levels"])
        return Features(tuple(content["tokens"]), levels, content["stacked"])

    def _write(self, key: str, features: Features) -> None:
        path = self._path(key)
        if path is None or not key or path.exists() or self._written + _size(features) > self.disk_bytes:
            return
        whole = features.map(lambda tensor: tensor.to("cpu").clone())
        buffer = io.BytesIO()
        content = {"tokens": list(whole.tokens), "levels": [list(x) for x in whole.levels]}
        torch.save({**content, "stacked": whole.stacked}, buffer)
        files.write_bytes(path, buffer.getvalue())
        self._written += len(buffer.getvalue())


def _size(features: Features) -> int:
    tensors = [*features.tokens, *(tensor for row in features.levels for tensor in row)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
