"""Records of data files by position, without holding a file in memory.

In: a JSON, JSONL, TSV or Parquet file, or a directory that `datasets` saved. Out: mappings, one a record, in
any order. Not here: what a record means (`distill/inputs/formats.py`, `evals/tasks/`).

Text files are scanned once for the byte offsets of their records (16 bytes a record are kept); tables go
through Arrow's memory map.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from runtime.errors import InputError, MissingExtra

BLOCK_BYTES = 1 << 24
LINE_SUFFIXES = (".jsonl", ".ndjson")
HEAD_BYTES = 4096

Offsets = npt.NDArray[np.int64]


class Store(Protocol):
    """A file's records by position."""

    path: Path

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Raises InputError for a record that cannot be read."""
        ...


class _Spans:
    """Records that are byte ranges of a file; the file is opened for each access, so forks share nothing."""

    def __init__(self, path: Path, starts: Offsets, ends: Offsets) -> None:
        self.path, self._starts, self._ends = path, starts, ends

    def __len__(self) -> int:
        return len(self._starts)

    def text(self, index: int, *, at_most: int | None = None) -> str:
        start, end = int(self._starts[index]), int(self._ends[index])
        if at_most is not None:
            end = min(end, start + at_most)
        with self.path.open("rb") as stream:
            stream.seek(start)
            return stream.read(end - start).decode("utf-8", "strict" if at_most is None else "ignore")


class Json(_Spans):
    """Records that are JSON objects."""

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        try:
            found = json.loads(self.text(index))
        except ValueError as error:
            raise InputError(f"no JSON ({error})") from error
        if not isinstance(found, dict):
            raise InputError(f"wanted a JSON object, got {type(found).__name__}")
        return found


class Tsv(_Spans):
    """Rows of a tab-separated file whose first row names the columns; quoted fields may hold line breaks."""

    def __init__(self, path: Path) -> None:
        csv.field_size_limit(sys.maxsize)
        starts, ends = _line_spans(path, quotes=True)
        if not len(starts):
            raise InputError(f"{path}: is empty; wanted a first row with the column names")
        super().__init__(path, starts[:1], ends[:1])
        self.columns = [name.lstrip("\ufeff") for name in self._fields(self.text(0))]
        super().__init__(path, starts[1:], ends[1:])
        self._row_of: dict[str, int] | None = None

    def __getitem__(self, index: int) -> Mapping[str, str]:
        found = self._fields(self.text(index))
        if len(found) != len(self.columns):
            raise InputError(f"has {len(found)} fields, the first row names {len(self.columns)}")
        return dict(zip(self.columns, found, strict=True))

    def row_of(self, key: str) -> int:
        """The row whose `index` column is `key`. Raises InputError. The first call reads that column."""
        if self._row_of is None:
            first = self.columns[:1] == ["index"]  # then the head of a row is enough
            self._row_of = {}
            for row in range(len(self)):
                text = self.text(row, at_most=HEAD_BYTES if first else None)
                fields = self._fields(text.split("\t", 1)[0]) if first else self._fields(text)
                self._row_of[fields[self.columns.index("index")]] = row
        if key not in self._row_of:
            raise InputError(f"image {key!r} is neither base64 nor the index of another row")
        return self._row_of[key]

    @staticmethod
    def _fields(text: str) -> list[str]:
        try:
            return next(csv.reader(io.StringIO(text, newline=""), delimiter="\t"), [])
        except csv.Error as error:
            raise InputError(f"cannot be read as TSV ({error})") from error


class Table:
    """Rows of a memory-mapped Arrow table; pictures stay encoded."""

    def __init__(self, path: Path, table: Any) -> None:
        self.path = path
        self._table = table.with_format("arrow")

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._table[index : index + 1].to_pylist()[0]


# --- opening ----------------------------------------------------------


def open_store(path: Path, split: str | None = None) -> Store:
    """The records of a `.jsonl`, `.json` (an array, or lines), `.tsv` or `.parquet` file, of a directory of
    Parquet files, or of one that `datasets.save_to_disk` wrote (`split` chooses among several).

    Raises InputError for a path that is absent or of another kind.
    """
    if not path.exists():
        raise InputError(f"{path}: there is no such data file; paths are relative to where the command runs")
    if path.is_dir() or path.suffix == ".parquet":
        return _table(path, split)
    if split is not None:
        raise InputError(f"{path}: a file has no splits; remove split: {split}")
    if path.suffix == ".tsv":
        return Tsv(path)
    if path.suffix in LINE_SUFFIXES or (path.suffix == ".json" and _first_byte(path) != b"["):
        return Json(path, *_line_spans(path))
    if path.suffix == ".json":
        return Json(path, *_array_spans(path))
    raise InputError(
        f"{path}: wanted .jsonl, .json, .tsv, .parquet or a directory; unpack or convert it first"
    )


def _table(path: Path, split: str | None) -> Table:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "distill") from error
    try:
        if path.is_dir() and any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
            found: Any = datasets.load_from_disk(str(path))
        else:
            shards = sorted(map(str, path.rglob("*.parquet"))) if path.is_dir() else [str(path)]
            if not shards:
                raise InputError(f"{path}: holds neither Parquet files nor a data set saved by `datasets`")
            found = datasets.Dataset.from_parquet(shards)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be read as a data set ({_line(error)})") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise InputError(f"{path}: has the splits {', '.join(map(str, found))}; got split: {split}")
        return Table(path, found[split])
    if split is not None:
        raise InputError(f"{path}: has no splits; remove split: {split}")
    return Table(path, found)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(64).lstrip()[:1]


def _line_spans(path: Path, *, quotes: bool = False) -> tuple[Offsets, Offsets]:
    """Start and end of every line that holds more than white space, without its line break.

    With `quotes` a break inside double quotes ends nothing (a doubled quote leaves the count even).
    """
    breaks: list[Offsets] = []
    base = inside = 0
    with path.open("rb") as stream:
        while block := stream.read(BLOCK_BYTES):
            bytes_n = np.frombuffer(block, np.uint8)
            found = np.flatnonzero(bytes_n == ord("\n"))
            if quotes:
                quoted = np.flatnonzero(bytes_n == ord('"'))
                before = inside + np.searchsorted(quoted, found)
                found = found[before % 2 == 0]
                inside += len(quoted)
            breaks.append(found + base)
            base += len(block)
    ends = np.concatenate([*breaks, np.array([base])]).astype(np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1])
    keep = ends > starts
    for place in np.flatnonzero(keep & (ends - starts < 16)):  # a lone carriage return or blanks
        with path.open("rb") as stream:
            stream.seek(int(starts[place]))
            keep[place] = bool(stream.read(int(ends[place] - starts[place])).strip())
    return starts[keep], ends[keep]


def _array_spans(path: Path) -> tuple[Offsets, Offsets]:
    """Start and end of every element of a JSON array, read in blocks."""
    spans = np.fromiter((edge for edges in _elements(path) for edge in edges), np.int64)
    return spans[::2], spans[1::2]


def _elements(path: Path) -> Iterator[tuple[int, int]]:
    decode = json.JSONDecoder().raw_decode
    utf8 = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as stream:
        text, size, place, base = "", BLOCK_BYTES, 0, 0  # `base`: byte offset of text[place]

        def more() -> bool:
            nonlocal text, place, size
            block = stream.read(size)
            text, place, size = text[place:] + utf8.decode(block, final=not block), 0, size * 2
            return bool(block)

        def skip(characters: str) -> None:
            nonlocal place, base
            while place < len(text) or more():
                if text[place] not in characters:
                    return
                place, base = place + 1, base + len(text[place].encode())

        skip(" \t\r\n\ufeff")
        skip("[")
        while True:
            skip(" \t\r\n,")
            if place >= len(text):
                raise InputError(f"{path}: the JSON array does not end; the file is cut")
            if text[place] == "]":
                return
            try:
                _, end = decode(text, place)
            except ValueError as error:
                if not more():
                    raise InputError(f"{path}: no JSON from byte {base} on ({error})") from error
                continue
            length = len(text[place:end].encode())
            yield base, base + length
            place, base, size = end, base + length, BLOCK_BYTES
