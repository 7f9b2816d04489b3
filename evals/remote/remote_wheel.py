"""The wheel that a device installs: front door, runtime and evals of the code that runs here, nothing else.

In: this program's own files and its metadata (installed, or pyproject.toml of a checkout). Out: a wheel.
Not here: sending and installing it.

The same files give the same bytes. The version ends with a hash of them (`0.1.0+dev.3f2a91c0`), so that pip
there replaces a wheel of other code and keeps one of the same, and results name the code that measured.
"""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from evals.remote.remote_ssh import DeviceError

ROOT = Path(__file__).resolve().parents[2]
MODULE, PACKAGES = "pocketvlm.py", ("evals", "runtime")
EXTRAS = ("onnx", "gguf")
"""What a device may need; a bundle's format names the one."""

LONG_AGO = (1980, 1, 1, 0, 0, 0)


def write(folder: Path, root: Path = ROOT) -> Path:
    """Make the wheel in `folder`; its path. Raises DeviceError when the program's metadata is not known."""
    content = dict(_content(root))
    digest = hashlib.sha256()
    for name, data in content.items():
        digest.update(f"{name} {hashlib.sha256(data).hexdigest()}\n".encode())
    base, needs, python = _metadata(root)
    version = f"{base.partition('+')[0]}+dev.{digest.hexdigest()[:10]}"
    info = f"pocketvlm-{version}.dist-info"
    content[f"{info}/METADATA"] = _metadata_file(version, needs, python)
    content[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: pocketvlm\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    content[f"{info}/entry_points.txt"] = b"[console_scripts]\npocketvlm = pocketvlm:main\n"
    content[f"{info}/RECORD"] = _record(content, f"{info}/RECORD")
    path = folder / f"pocketvlm-{version}-py3-none-any.whl"
    path.write_bytes(_zip(content))
    return path


def version(wheel: Path) -> str:
    """The version that a wheel's name says."""
    return wheel.name.split("-")[1]


def _content(root: Path) -> Iterator[tuple[str, bytes]]:
    yield MODULE, (root / MODULE).read_bytes()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith("."):
                yield path.relative_to(root).as_posix(), path.read_bytes()


def _metadata(root: Path) -> tuple[str, list[str], str]:
    """(version, requirements as METADATA writes them, versions of Python)."""
    if (root / "pyproject.toml").is_file():
        return _from_pyproject(root / "pyproject.toml")
    try:
        found = metadata.metadata("pocketvlm")
    except metadata.PackageNotFoundError:
        raise DeviceError(
            f"{root}: neither pyproject.toml nor an installed pocketvlm; pip install it"
        ) from None
    return (
        found["Version"],
        [line for line in found.get_all("Requires-Dist") or [] if _wanted(line)],
        found["Requires-Python"] or ">=3.10",
    )


def _wanted(requirement: str) -> bool:
    _, marked, extra = requirement.partition("extra ==")
    return not marked or extra.strip(" \"')") in EXTRAS


def _from_pyproject(path: Path) -> tuple[str, list[str], str]:
    try:
        import tomllib
    except ImportError:
        try:  # Python 3.10; pip brings a copy
            from pip._vendor import tomli as tomllib  # type: ignore[no-redef]
        except ImportError:
            raise DeviceError(f"{path}: reading it needs Python 3.11 or pip; pip install pocketvlm") from None
    project = tomllib.loads(path.read_text())["project"]
    needs = list(project["dependencies"])
    for extra in EXTRAS:
        needs += [f'{need}; extra == "{extra}"' for need in project["optional-dependencies"][extra]]
    return project["version"], needs, project["requires-python"]


def _metadata_file(version: str, needs: list[str], python: str) -> bytes:
    lines = ["Metadata-Version: 2.1", "Name: pocketvlm", f"Version: {version}", f"Requires-Python: {python}"]
    lines += [f"Provides-Extra: {extra}" for extra in EXTRAS]
    lines += [f"Requires-Dist: {need}" for need in needs]
    return ("\n".join(lines) + "\n").encode()


def _record(content: dict[str, bytes], own: str) -> bytes:
    lines = []
    for name, data in content.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(data)}")
    return ("\n".join([*lines, f"{own},,"]) + "\n").encode()


def _zip(content: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            entry = zipfile.ZipInfo(name, LONG_AGO)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)
    return buffer.getvalue()
