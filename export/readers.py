"""Readers of bundles in other languages, put beside the parts as sources.

In: a bundle, its manifest, a reader's files. Out: a copy in the bundle. Not here: which files those are and
what the reader can do (`browser_package.py`, `swift_package.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime import files
from runtime.errors import BundleError
from runtime.manifest import Manifest


@dataclass(frozen=True)
class Reader:
    """`name`: its language; `sources`: what its files are; `entry`: one that no installation is without;
    `known`: operations that it carries out."""

    name: str
    sources: str
    directory: str
    entry: str
    known: frozenset[str]


def put(reader: Reader, bundle: Path, manifest: Manifest, source: Path, found: Sequence[Path]) -> Path:
    """Copy the files `found` under `source` into the bundle, over an earlier copy; returns their directory.

    Raises BundleError when the manifest needs an operation that the reader lacks (it would refuse the bundle
    on the device), or the reader's files were not installed.
    """
    if unknown := sorted(set(manifest.requires) - reader.known):
        raise BundleError(
            f"{bundle.name}: needs {', '.join(unknown)}, which the {reader.name} reader cannot do; "
            f"add it to export/{reader.directory} or export for another target"
        )
    if Path(reader.entry) not in found:
        raise BundleError(
            f"export/{reader.directory}: this installation lacks the {reader.sources}; "
            "install pocketvlm again"
        )
    out = bundle / reader.directory
    for path in found:
        files.write_bytes(out / path, (source / path).read_bytes())
    return out
