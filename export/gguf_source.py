"""A checkpoint's tensors, one at a time: nothing but the one asked for is in memory.

In: a checkpoint directory. Out: names, and tensors by name. Not here: what they become.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from evals.torch_session import quiet_transformers
from export.checkpoint import read_config
from runtime.errors import CheckpointError


@dataclass(frozen=True)
class Source:
    """Configuration and where each tensor lies."""

    path: Path
    config: Mapping[str, Any]
    files: Mapping[str, Path]

    @property
    def names(self) -> list[str]:
        return list(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self.files[name], "pt") as opened:
            return tuple(opened.get_slice(name).get_shape())

    def tensor(self, name: str) -> Any:
        """One tensor in the type that it is stored in."""
        with safe_open(self.files[name], "pt") as opened:
            found = opened.get_tensor(name)
        if not found.is_floating_point():
            raise CheckpointError(
                f"{self.path}: {name} is {found.dtype}; a quantized checkpoint cannot be converted"
            )
        return found

    @property
    def preprocessor(self) -> dict[str, Any]:
        """Image preprocessing: preprocessor_config.json, over it processor_config.json's image processor."""
        found: dict[str, Any] = {}
        for name in ("preprocessor_config.json", "processor_config.json"):
            file = self.path / name
            if file.is_file():
                try:
                    content = json.loads(file.read_text(encoding="utf-8"))
                except ValueError as error:
                    raise CheckpointError(
                        f"{file}: cannot be read as JSON ({error}); copy it again"
                    ) from error
                found |= content | content.get("image_processor", {})
        if "image_mean" not in found:
            raise CheckpointError(
                f"{self.path}: no image_mean in preprocessor_config.json; copy it beside the weights"
            )
        return found


def _filled(path: Path) -> Mapping[str, Any]:
    """The configuration as transformers reads it: with what a file leaves out or words in an older way."""
    from transformers import AutoConfig

    read_config(path)
    with quiet_transformers():
        try:
            found = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises classes of every kind
            first = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise CheckpointError(f"{path}: transformers cannot read config.json: {first}") from error
    return dict(found.to_dict())


def open_source(path: Path) -> Source:
    """Names of all tensors, no weights read. CheckpointError: no checkpoint, missing or damaged shards."""
    config = _filled(path)
    if "text_config" not in config or "vision_config" not in config:
        raise CheckpointError(
            f"{path}: config.json has no text_config and vision_config; expected a vision-language model"
        )
    index = path / "model.safetensors.index.json"
    shards = (
        sorted({path / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        if index.exists()
        else [path / "model.safetensors"]
    )
    files: dict[str, Path] = {}
    for shard in shards:
        try:
            with safe_open(shard, "pt") as opened:
                files |= dict.fromkeys(opened.keys(), shard)
        except Exception as error:  # safetensors has one class, which is no OSError
            raise CheckpointError(f"{shard}: cannot be read ({error}); copy it again") from error
    return Source(path, config, files)
