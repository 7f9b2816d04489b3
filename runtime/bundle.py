"""A bundle on disk: reads and checks its manifest, hashes its files, writes the manifest last.

In: a bundle directory. Out: a `Manifest` that holds for the files beside it. Not here: the model of the
manifest (`runtime/manifest.py`), running anything.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from runtime.errors import BundleError
from runtime.files import sha256_file, write_text
from runtime.manifest import FileRef, Manifest, Part, known_operations

MANIFEST_NAME = "manifest.json"


def digest(path: Path) -> tuple[str, int]:
    """(hexadecimal sha256, bytes) of a file; of a directory, of its sorted `HASH  RELATIVE\\n` lines."""
    if not path.is_dir():
        return sha256_file(path), path.stat().st_size
    files = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
    lines = "".join(f"{sha256_file(file)}  {name}\n" for name, file in files)
    return hashlib.sha256(lines.encode()).hexdigest(), sum(file.stat().st_size for _, file in files)


def file_ref(bundle: Path, path: str) -> FileRef:
    """The reference to `bundle/path` as it is on disk now."""
    sha256, size = digest(bundle / path)
    return FileRef(path=path, sha256=sha256, bytes=size)


def write(manifest: Manifest, bundle: Path) -> Path:
    """Write `manifest.json` (temporary name, then renamed); call it last, when every part is in place."""
    path = bundle / MANIFEST_NAME
    write_text(path, manifest.model_dump_json(indent=1) + "\n")
    return path


def read(bundle: Path, *, verify: bool = True) -> Manifest:
    """The checked manifest of a bundle directory; `verify` also hashes every file it names.

    Raises BundleError in one line when the manifest is absent, malformed, needs an unknown operation, points
    outside the bundle, or a file is missing or differs from its hash.
    """
    path = bundle / MANIFEST_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BundleError(
            f"{bundle}: no {MANIFEST_NAME}; expected a bundle made by `pocketvlm export`"
        ) from None
    except NotADirectoryError:
        raise BundleError(
            f"{bundle}: is a file; expected a bundle directory made by `pocketvlm export`"
        ) from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: cannot be read as JSON ({error}); re-export") from error
    _refuse_unknown_operations(raw, path)
    try:
        manifest = Manifest.model_validate(raw)
    except ValidationError as error:
        raise BundleError(f"{path}: {_first_fault(error)}; re-export") from error
    for file in manifest.files():
        _check_file(bundle, file, verify)
    return manifest


def locate(bundle: Path, path: str) -> Path:
    """`bundle/path`, refused when a symlink leads out of the bundle."""
    target = (bundle / path).resolve()
    if not target.is_relative_to(bundle.resolve()):
        raise BundleError(f"{bundle.name}/{path}: leads out of the bundle; re-export or copy the file in")
    return target


def _refuse_unknown_operations(raw: Any, path: Path) -> None:
    if not isinstance(raw, dict):
        raise BundleError(f"{path}: is a JSON {type(raw).__name__}, expected an object; re-export")
    requires = raw.get("requires")
    known = known_operations()
    if isinstance(requires, list) and (unknown := [name for name in requires if name not in known]):
        raise BundleError(
            f"{path}: requires {', '.join(map(str, unknown))}, which this runtime does not know; "
            "update pocketvlm or re-export with this version"
        )


def _check_file(bundle: Path, file: FileRef | Part, verify: bool) -> None:
    target = locate(bundle, file.path)
    where = f"{bundle.name or bundle.resolve().name}/{file.path}"
    if not target.exists():
        raise BundleError(f"{where}: missing, but the manifest names it; re-export")
    if not verify:
        return
    sha256, size = digest(target)
    if sha256 != file.sha256:
        size_note = f" ({size} bytes instead of {file.bytes})" if size != file.bytes else ""
        raise BundleError(
            f"{where}: sha256 {sha256[:8]}.., manifest says {file.sha256[:8]}..{size_note}; re-export"
        )


def _first_fault(error: ValidationError) -> str:
    """One line about the first fault; an unknown key gets the nearest right one."""
    fault = error.errors(include_url=False)[0]
    where = ".".join(str(step) for step in fault["loc"]) or "manifest"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if fault["type"] != "extra_forbidden":
        return f"{where}: {fault['msg']}{more}"
    key = str(fault["loc"][-1])
    near = difflib.get_close_matches(key, _all_keys(), n=1)
    hint = f", did you mean {near[0]!r}?" if near else ""
    return f"{where}: unknown key {key!r}{hint}{more}"


def _all_keys() -> set[str]:
    schema = Manifest.model_json_schema()
    objects = [schema, *schema.get("$defs", {}).values()]
    return {key for entry in objects for key in entry.get("properties", {})}
