"""Pictures of a sample, unopened: files, or the bytes of one.

In: what data sets write for a picture. Out: `ImageSource`s that open as transformers opens a file.
Not here: resizing and tokens, which are the processor's.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from runtime import image as pictures
from runtime.errors import InputError

MAX_SOURCE_PIXELS = 256 * 1024 * 1024
"""A picture above this is a mistake or an attack; `data.max_pixels` is what the processor shrinks to."""
BASE64_FROM = 256
"""A longer string without a dot is base64, not a path."""

MEND = "mend the path, or where paths begin (--images of eval, images of a recipe's source)"


@dataclass(frozen=True)
class ImageSource:
    """A picture that is not opened yet: a file, or the bytes of one."""

    path: Path | None = None
    data: bytes | None = field(default=None, repr=False)

    def bytes(self) -> bytes:
        """The encoded file. Raises InputError naming the path."""
        if self.data is not None:
            return self.data
        if self.path is None:
            raise InputError("the picture has neither a path nor bytes")
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise InputError(f"the picture {self.path} cannot be read ({error.strerror}); {MEND}") from error

    def open(self) -> Image.Image:
        """Decoded, upright by its EXIF tag, RGB: as transformers loads a file. Raises InputError."""
        name = str(self.path) if self.path is not None else "the picture's bytes"
        try:
            found = pictures.load(self.bytes(), MAX_SOURCE_PIXELS)
        except InputError as error:
            raise InputError(str(error).replace("image bytes", name, 1)) from error
        with contextlib.suppress(Exception):  # an unreadable EXIF block says nothing about the pixels
            found = ImageOps.exif_transpose(found)
        return found.convert("RGB")

    @property
    def sha256(self) -> str:
        """Hash of the encoded bytes."""
        return hashlib.sha256(self.bytes()).hexdigest()


def image_source(value: Any, folder: Path) -> ImageSource:
    """A path (relative to `folder`), bytes, base64, a data URL, or a mapping that holds one of them.

    Raises InputError, naming the path of a file that is not there.
    """
    if isinstance(value, Mapping):
        if isinstance(value.get("base64"), str):
            return ImageSource(data=_decoded(value["base64"]))
        for key in ("bytes", "image", "image_url", "url", "path"):
            if value.get(key) is not None:
                return image_source(value[key], folder)
        raise InputError(f"a picture with the keys {sorted(value)}: wanted bytes, base64, path, image or url")
    if isinstance(value, (bytes, bytearray)):
        return ImageSource(data=bytes(value))
    if not isinstance(value, str):
        raise InputError(f"a picture is {type(value).__name__}; wanted a path, bytes or base64")
    if value.startswith(("http://", "https://")):
        raise InputError(f"the picture {value} is an address; download it and give its path")
    if value.startswith("data:"):
        return ImageSource(data=_decoded(value.partition(",")[2]))
    if len(value) > BASE64_FROM and "." not in value:
        return ImageSource(data=_decoded(value))
    path = folder / value.removeprefix("file://")
    if not path.is_file():
        raise InputError(f"the picture {path} does not exist; {MEND}")
    return ImageSource(path=path)


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"a picture is no base64 ({error})") from error


def listed(value: Any) -> list[Any]:
    """A value as a list: none, one or several."""
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]
