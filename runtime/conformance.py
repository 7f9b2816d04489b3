"""A bundle's conformance vectors: what every reader, in any language, must reproduce before it is trusted.

In: a bundle with `conformance/cases.json`. Out: the differences of this runtime, normally none.
Not here: how close the bundle is to its checkpoint (that is the export gate's work).

A case is a picture in the bundle and a question, with the expected pixels (raw little-endian float32, in C
order, view after view; of many only every n-th), ids, positions and the five largest logits of the first
step. docs/bundle.md describes the files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from runtime import bundle
from runtime.contract import Contract
from runtime.errors import BundleError
from runtime.files import write_bytes, write_text
from runtime.manifest import FileRef
from runtime.session import Session

CASES_PATH = "conformance/cases.json"
TOP = 5
MOST_VALUES = 1 << 18
"""Pixel values that a case keeps, 1 MiB; a picture of 17 tiles has 13 million."""


class TopLogit(Contract):
    """One of the largest logits of the first step."""

    id: int
    logit: float


class Case(Contract):
    """A picture and a question with what must come out; a tolerance bounds the absolute difference."""

    name: str = Field(pattern=r"^[a-z0-9-]+$")
    image: FileRef
    question: str
    pixels: FileRef
    pixels_shapes: tuple[tuple[int, ...], ...] = Field(min_length=1)
    pixels_step: int = Field(
        gt=0, default=1, description="the file holds value 0 of all views joined, then every pixels_step-th"
    )
    pixels_tolerance: float = Field(ge=0)
    ids: tuple[int, ...]
    positions: tuple[tuple[int, ...], ...]
    top: tuple[TopLogit, ...] = Field(min_length=1)
    logit_tolerance: float = Field(ge=0)


class Cases(Contract):
    """The file `conformance/cases.json`."""

    cases_version: Literal[1] = 1
    cases: tuple[Case, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Vector:
    """A case to be written: `image` is a whole PNG file (every decoder agrees on it), logits (vocab,)."""

    name: str
    image: bytes
    question: str
    pixels: tuple[NDArray[np.float32], ...]
    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    logits: NDArray[np.float32]


def record(session: Session, name: str, image: bytes, question: str) -> Vector:
    """What this session makes of a PNG file and a question; a writer may put in reference values."""
    prepared = session.prepare(image)
    ids = session.prompt_ids(question, [prepared])
    logits = session.prefill(ids, [session.encode_image(prepared)])
    return Vector(name, image, question, prepared.pixels, ids, session.positions(ids, [prepared]), logits)


def write(
    directory: Path, vectors: Sequence[Vector], *, pixels_tolerance: float, logit_tolerance: float
) -> FileRef:
    """Write the vectors into a bundle directory; returns what the manifest's `conformance` must hold."""
    cases = []
    for vector in vectors:
        order = np.argsort(-vector.logits, kind="stable")[:TOP]
        step = _step(sum(view.size for view in vector.pixels))
        cases.append(
            Case(
                name=vector.name,
                image=_store(directory, f"conformance/{vector.name}.png", vector.image),
                question=vector.question,
                pixels=_store(
                    directory,
                    f"conformance/{vector.name}.f32",
                    _every(vector.pixels, step).astype("<f4").tobytes(),
                ),
                pixels_shapes=tuple(view.shape for view in vector.pixels),
                pixels_step=step,
                pixels_tolerance=pixels_tolerance,
                ids=tuple(int(token) for token in vector.ids),
                positions=tuple(tuple(row) for row in vector.positions.tolist()),
                top=tuple(TopLogit(id=int(i), logit=float(vector.logits[i])) for i in order),
                logit_tolerance=logit_tolerance,
            )
        )
    write_text(directory / CASES_PATH, Cases(cases=tuple(cases)).model_dump_json(indent=1) + "\n")
    return bundle.file_ref(directory, CASES_PATH)


def read(directory: Path) -> tuple[Case, ...]:
    """The cases of a bundle, at least one. Raises BundleError naming the file that cannot be read."""
    path = bundle.locate(directory, bundle.read(directory, verify=False).conformance.path)
    try:
        return Cases.model_validate_json(path.read_bytes()).cases
    except (OSError, ValidationError) as error:
        raise BundleError(
            f"{path}: no readable conformance cases ({str(error).splitlines()[0]}); re-export"
        ) from error


def check(session: Session, directory: Path) -> list[str]:
    """One line for every difference between this runtime and the bundle's vectors; empty when it conforms."""
    return [line for case in read(directory) for line in _differences(session, directory, case)]


def _differences(session: Session, directory: Path, case: Case) -> list[str]:
    image, raw = (_load(directory, file) for file in (case.image, case.pixels))
    found = []
    prepared = session.prepare(image)
    shapes = tuple(view.shape for view in prepared.pixels)
    if shapes != case.pixels_shapes:
        return [f"{case.name}: pixels have shapes {shapes}, expected {case.pixels_shapes}"]
    expected = np.frombuffer(raw, dtype="<f4")
    pixels = _every(prepared.pixels, case.pixels_step)
    if pixels.shape != expected.shape:
        raise BundleError(
            f"{directory.name}/{case.pixels.path}: holds {len(expected)} values, its shapes and step say "
            f"{len(pixels)}; re-export"
        )
    off = float(np.abs(pixels - expected).max())
    if not off <= case.pixels_tolerance:
        found.append(f"{case.name}: pixels differ by {off:.3g}, allowed {case.pixels_tolerance:.3g}")
    ids = session.prompt_ids(case.question, [prepared])
    if ids.tolist() != list(case.ids):
        return [*found, f"{case.name}: prompt ids differ ({len(ids)} ids, expected {len(case.ids)})"]
    positions = session.positions(ids, [prepared])
    if positions.tolist() != [list(row) for row in case.positions]:
        found.append(f"{case.name}: positions differ")
    logits = session.prefill(ids, [session.encode_image(prepared)])
    for top in case.top:
        off = abs(float(logits[top.id]) - top.logit)
        if not off <= case.logit_tolerance:
            found.append(
                f"{case.name}: logit of id {top.id} differs by {off:.3g}, allowed {case.logit_tolerance:.3g}"
            )
    return found


def _step(values: int) -> int:
    """1, or the first step to few enough values that shares no factor with their number.

    Such a step comes by every channel, column and row, whose sizes are factors of the number.
    """
    step = -(-values // MOST_VALUES)
    while math.gcd(step, values) > 1:
        step += 1
    return step


def _every(pixels: Sequence[NDArray[Any]], step: int) -> NDArray[np.float32]:
    """Every step-th value of all views joined."""
    return np.concatenate([view.ravel() for view in pixels])[::step].astype(np.float32)


def _store(directory: Path, path: str, data: bytes) -> FileRef:
    write_bytes(directory / path, data)
    return bundle.file_ref(directory, path)


def _load(directory: Path, file: FileRef) -> bytes:
    try:
        data = bundle.locate(directory, file.path).read_bytes()
    except OSError as error:
        raise BundleError(
            f"{directory.name}/{file.path}: cannot be read ({error.strerror}); re-export"
        ) from error
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise BundleError(f"{directory.name}/{file.path}: differs from its hash in {CASES_PATH}; re-export")
    return data
