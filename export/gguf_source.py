"""A checkpoint's tensors, one at a time: nothing but the one asked for is in memory.

In: a checkpoint directory. Out: names, and tensors by name. Not here: what they become.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
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

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers; some rows of each are in memory at a time."""
        if self.shape(one) != self.shape(other):
            return False
        with safe_open(self.files[one], "pt") as left, safe_open(self.files[other], "pt") as right:
            pair = left.get_slice(one), right.get_slice(other)
            for start in range(0, self.shape(one)[0], _ROWS):
                first, second = (each[start : start + _ROWS] for each in pair)
                if not bool((first == second).all()):
                    return False
        return True

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

    @cached_property
    def preprocessor(self) -> dict[str, Any]:
        """Settings of the image processor as transformers reads them, whatever files they stand in."""
        for name in ("preprocessor_config.json", "processor_config.json"):
            _json(self.path / name)
        from transformers import AutoImageProcessor

        return _read(
            f"{self.path}: transformers cannot read the image processor",
            lambda: AutoImageProcessor.from_pretrained(
                self.path, local_files_only=True, trust_remote_code=False
            ).to_dict(),
        )


def _json(file: Path) -> Any:
    """The content of a JSON file; None where there is none. Raises CheckpointError for what is no JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError as error:
        raise CheckpointError(f"{file}: cannot be read as JSON ({error}); copy it again") from error


def _read(what: str, call: Callable[[], Any]) -> dict[str, Any]:
    """What `call` gives, with its errors, which transformers raises in classes of every kind, as one."""
    with quiet_transformers():
        try:
            return dict(call())
        except Exception as error:
            first = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise CheckpointError(f"{what}: {first}") from error


def _filled(path: Path) -> Mapping[str, Any]:
    """The configuration as transformers reads it: with what a file leaves out or words in an older way."""
    from transformers import AutoConfig

    read_config(path)
    return _read(
        f"{path}: transformers cannot read config.json",
        lambda: AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False).to_dict(),
    )


def open_source(path: Path) -> Source:
    """Names of all tensors, no weights read. CheckpointError: no checkpoint, missing or damaged shards."""
    config = _filled(path)
    if "text_config" not in config or "vision_config" not in config:
        raise CheckpointError(
            f"{path}: config.json has no text_config and vision_config; expected a vision-language model"
        )
    if not (path / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{path}: no tokenizer.json; write it by AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
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
    return _one_table(Source(path, config, files))


def _one_table(source: Source) -> Source:
    """Without an output matrix that only repeats the embedding's. As in transformers, one that is tied by the
    configuration but stored with other numbers (trained apart) is used as it is stored."""
    if not source.config.get("tie_word_embeddings"):
        return source
    heads, tables = (
        [name for name in source.files if name.endswith(f"{part}.weight")]
        for part in ("lm_head", "embed_tokens")
    )
    if not heads or not tables or not source.same(heads[0], tables[0]):
        return source
    return replace(source, files={name: file for name, file in source.files.items() if name != heads[0]})


_ROWS = 1024
