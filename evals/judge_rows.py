"""Judged responses with labels, as files: what an audit of a judge reads.

In: JSON-lines files, or a directory of them. Out: `Row`s. Not here: the audit (`evals/judge_audit.py`).
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime import files
from runtime.errors import InputError


class Row(BaseModel):
    """One response with the judge's verdict and the label (1 right, 0 wrong).

    `id` names the question; without it, its text does. `option` is the letter that the response chooses,
    `length` its length in any unit (default: characters), `how` what the judge noted (`unparsable`, ...).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: str
    reference: str
    response: str
    verdict: int = Field(ge=0, le=1)
    label: int = Field(ge=0, le=1)
    source: Literal["teacher", "student"] | None = None
    option: str | None = None
    length: int | None = Field(default=None, ge=0)
    id: str | None = None
    how: str | None = None

    @property
    def size(self) -> int:
        return len(self.response) if self.length is None else self.length


def read(path: Path) -> list[Row]:
    """Rows of a JSON-lines file, or of every `*.jsonl` shard of a directory (sealed ones are checked).

    Raises InputError naming file and line.
    """
    paths = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not paths:
        raise InputError(
            f"{path}: holds no *.jsonl; wanted rows with question, reference, response, verdict, label"
        )
    return [row for one in paths for row in _read_file(one)]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines, whole or not at all."""
    files.write_text(path, "".join(row.model_dump_json(exclude_none=True) + "\n" for row in rows))


def _read_file(path: Path) -> Iterator[Row]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); wanted a JSON-lines file") from error
    values = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                values.append((number, json.loads(line)))
            except ValueError as error:
                raise InputError(
                    f"{path}, line {number}: no JSON ({error}); mend or delete the line"
                ) from error
    if values and isinstance(values[-1][1], dict) and set(values[-1][1]) == {"rows", "sha256"}:
        files.read_shard(path)  # checks the seal
        values.pop()
    for number, value in values:
        try:
            yield Row.model_validate(value)
        except ValidationError as error:
            raise InputError(f"{path}, line {number}: {_says(error)}") from error


def _says(error: ValidationError) -> str:
    """The first fault, in words: which key, what is wrong, the nearest right key for an unknown one."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, Row.model_fields, 1)
        return f"unknown key {key!r}; wanted {near[0] if near else ', '.join(Row.model_fields)}"
    if first["type"] == "missing":
        return f"no {key!r}; wanted question, reference, response, verdict and label in every row"
    return f"{key or 'the row'}: {first['msg']}, got {first['input']!r}"
