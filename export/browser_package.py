"""The page and JavaScript reader that run a bundle in a browser, put beside its parts.

In: a bundle directory and its manifest. Out: `browser/` in it, a static page without a build step.
Not here: the parts (`export/onnx.py`), what a reader must do (docs/bundle.md), onnxruntime-web, which
docs/browser.md brings beside the page. The sources are in `export/browser`.
"""

from __future__ import annotations

from pathlib import Path

from export import readers
from runtime.errors import BundleError
from runtime.manifest import Manifest

DIRECTORY = "browser"
TARGET = "browser"
"""Bundles exported for this target get the page."""

SOURCE = Path(__file__).parent / "browser"

KNOWN = frozenset(
    {
        "attention.causal@1",
        "attention.image_bidirectional@1",
        "cache.static@1",
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
        "to_nchw@1",
        "to_rgb@1",
        "tokens.grid@1",
    }
)
"""Operations that the JavaScript reader carries out; a test compares them with what it says of itself."""

READER = readers.Reader("JavaScript", "page", DIRECTORY, "reader/index.js", KNOWN)


def sources() -> tuple[Path, ...]:
    """The page's files, relative to it, sorted; without hidden ones and what npm installs."""
    found = (path.relative_to(SOURCE) for path in SOURCE.rglob("*") if path.is_file())
    own = (path for path in found if path.parts[0] not in ("node_modules", "ort"))
    return tuple(sorted(path for path in own if not any(part.startswith(".") for part in path.parts)))


def write(bundle: Path, manifest: Manifest) -> Path:
    """Copy the page to `bundle/browser`, over an earlier copy; returns its directory.

    Raises BundleError when the bundle is not of format onnx or needs an operation that the JavaScript reader
    lacks (it would refuse the bundle in the browser), or the page's files were not installed.
    """
    if manifest.format != "onnx":
        raise BundleError(f"{bundle.name}: is {manifest.format}; a browser runs onnx bundles")
    return readers.put(READER, bundle, manifest, SOURCE, sources())
