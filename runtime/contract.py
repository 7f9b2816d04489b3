"""What every object of the manifest is built from.

In: values as JSON has them. Out: checked, frozen models. Not here: any section of the manifest.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Dtype = Literal["float32", "float16", "int64", "int32", "int8", "uint8", "bool"]
Filter = Literal["bilinear", "bicubic", "lanczos"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _confined(path: str) -> str:
    pure = PurePosixPath(path)
    if (
        not path
        or pure.is_absolute()
        or ".." in pure.parts
        or "\\" in path
        or ":" in path
        or str(pure) != path
    ):
        raise ValueError(f"path {path!r} must be relative, with forward slashes, and stay inside the bundle")
    return path


RelativePath = Annotated[str, AfterValidator(_confined)]


class Contract(BaseModel):
    """Base of every object in the manifest: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class TensorSpec(Contract):
    """A tensor at a part's border; a dimension is a number or the name of one that varies."""

    name: str
    dtype: Dtype
    shape: tuple[int | str, ...]
