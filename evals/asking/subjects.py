"""What is evaluated: a checkpoint directory or a bundle directory, told apart, described and opened.

In: a path. Out: a `Model` with its facts, and a session of it. Not here: asking, comparing.
Importing this loads no backend; opening a checkpoint needs transformers, a bundle its runtime.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime import bundle
from runtime.errors import InputError
from runtime.files import sha256_file
from runtime.manifest import Manifest

_HASHED = ("*.safetensors", "*.json", "*.jinja")


@dataclass(frozen=True)
class Model:
    """A directory that answers. `sha256`: of a bundle's manifest.json (which has every file's hash), of a
    checkpoint's files; `source_sha256`: of the checkpoint that a bundle was made from."""

    name: str
    path: Path
    format: str
    precision: str
    sha256: str
    source_sha256: str
    manifest: Manifest | None = None

    @property
    def is_bundle(self) -> bool:
        return self.manifest is not None

    @property
    def bytes(self) -> int:
        """Of all its files."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def open(self, *, threads: int | None = None) -> Any:
        """A session: `runtime.session.Session` without reuse, or `evals.torch_session.TorchSession`."""
        if self.is_bundle:
            from runtime.session import open_bundle

            return open_bundle(self.path, threads=threads, reuse=False)
        from evals.torch_session import TorchSession

        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        return TorchSession(self.path)


def describe(path: Path) -> Model:
    """The facts of a bundle or a checkpoint. Raises InputError when it is neither, BundleError."""
    if (path / bundle.MANIFEST_NAME).is_file():
        manifest = bundle.read(path, verify=False)
        own = sha256_file(path / bundle.MANIFEST_NAME)
        name = path.resolve().name
        return Model(name, path, manifest.format, manifest.precision, own, manifest.source.sha256, manifest)
    if (path / "config.json").is_file():
        own = checkpoint_sha256(path)
        return Model(path.resolve().name, path, "safetensors", "fp32", own, own)
    raise InputError(
        f"{path}: no manifest.json and no config.json; expected a bundle or a Hugging Face checkpoint"
    )


def describe_all(paths: Sequence[Path]) -> list[Model]:
    """Like `describe`; two directories of one name are told apart by what is above them."""
    found = [describe(path) for path in paths]
    names = [model.name for model in found]
    for index, model in enumerate(found):
        if names.count(model.name) > 1:
            longer = "/".join(model.path.resolve().parts[-2:])
            found[index] = Model(**{**vars(model), "name": longer})
    resolved = [model.path.resolve() for model in found]
    if twice := [str(path) for path, real in zip(paths, resolved, strict=True) if resolved.count(real) > 1]:
        raise InputError(f"{twice[-1]}: is given twice; give each directory once")
    return found


def checkpoint_sha256(path: Path) -> str:
    """Hash of the sorted `HASH  NAME` lines of weights, configuration, tokenizer and template; what a
    bundle's manifest calls its source's sha256."""
    found = sorted({file for pattern in _HASHED for file in path.glob(pattern) if file.is_file()})
    lines = "".join(f"{sha256_file(file)}  {file.name}\n" for file in found)
    return hashlib.sha256(lines.encode()).hexdigest()
