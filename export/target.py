"""Where a bundle is written: beside its target, renamed when whole; only our own bundles are replaced.

In: the target path. Out: a staging directory. Not here: what goes into it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from export import space
from runtime import files
from runtime.bundle import MANIFEST_NAME
from runtime.errors import StateError

_LOCK = ".lock"


def check(path: Path) -> None:
    """Raises StateError unless `path` is free, an empty directory, or a bundle that may be replaced."""
    if path.is_symlink():
        raise StateError(f"{path}: is a symbolic link; give the directory itself as the output")
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise StateError(f"{place}: is a file; choose another output directory")
    if not path.exists():
        return
    if any(path.iterdir()) and not _is_bundle(path):
        raise StateError(
            f"{path}: exists and is no bundle of ours; choose another output directory or empty it"
        )


def _is_bundle(path: Path) -> bool:
    try:
        manifest = json.loads((path / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and {"manifest_version", "parts", "requires"} <= set(manifest)


@contextlib.contextmanager
def staging(path: Path) -> Iterator[Path]:
    """A directory beside `path` that replaces it when the block ends without an error.

    What a killed export of the same target left behind is removed first; a running one keeps its own.
    """
    check(path)
    _remove_stale(path)
    with space.told(path), files.new_directory(path) as staged, files.lock(staged):
        yield staged
        (staged / _LOCK).unlink()


def _remove_stale(path: Path) -> None:
    for stale in path.parent.glob(f"{files.TEMP_PREFIX}{path.name}-*"):
        with contextlib.suppress(StateError), files.lock(stale):  # held: another export is running
            shutil.rmtree(stale, ignore_errors=True)


@contextlib.contextmanager
def workspace(first: Path) -> Iterator[Path]:
    """A directory for what several types need. It lies beside the first bundle under such a name that the
    next export of that bundle removes what a killed one left."""
    first.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{files.TEMP_PREFIX}{first.name}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=first.parent) as scratch, files.lock(Path(scratch)):
        yield Path(scratch)
