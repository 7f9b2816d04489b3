"""The Swift package that reads a Core ML bundle on Apple's devices, put beside the models.

In: a bundle directory and its manifest. Out: `swift/` in it, a package that builds as it is.
Not here: the models (`export/coreml.py`), what a reader must do (docs/bundle.md). The sources are in
`export/swift`; its README says what of them was compiled and run, and what never was.
"""

from __future__ import annotations

from pathlib import Path

from export import readers
from runtime.manifest import Manifest

DIRECTORY = "swift"
SOURCE = Path(__file__).parent / "swift"

KNOWN = frozenset(
    {
        "attention.causal@1",
        "cache.stateful@1",
        "deepstack.add@1",
        "exif_rotate@1",
        "normalise@1",
        "patchify.blocks@1",
        "patchify.padded@1",
        "positions.1d@1",
        "positions.mrope@1",
        "replace_tokens@1",
        "resize_exact@1",
        "resize_longest_edge@1",
        "smart_resize@1",
        "tiles.grid@1",
        "tiles.split@1",
        "to_bytes@1",
        "to_nchw@1",
        "to_rgb@1",
        "tokens.grid@1",
    }
)
"""Operations that the Swift reader carries out; a test compares them with its source."""

READER = readers.Reader("Swift", "Swift package", DIRECTORY, "Package.swift", KNOWN)


def sources() -> tuple[Path, ...]:
    """The package's files, relative to it, sorted. What a build left behind is none of them."""
    found = (path.relative_to(SOURCE) for path in SOURCE.rglob("*") if path.is_file())
    return tuple(sorted(path for path in found if not path.parts[0].startswith(".")))


def write(bundle: Path, manifest: Manifest) -> Path:
    """Copy the package to `bundle/swift`, over an earlier copy; returns its directory.

    Raises BundleError when the manifest needs an operation that the Swift reader lacks (it would refuse the
    bundle on the device), or the package's files were not installed.
    """
    return readers.put(READER, bundle, manifest, SOURCE, sources())
