"""Small benchmark files in the harnesses' formats, and models whose answers are written down."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from evals.asking.subjects import Model
from runtime.errors import InputError


def png(number: int, side: int = 24) -> bytes:
    """A picture of one colour, another for every number below 256."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (number % 256, 40, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def base64_png(number: int) -> str:
    return base64.b64encode(png(number)).decode()


def write_tsv(path: Path, rows: Sequence[dict[str, Any]], *, pictures: bool = True) -> Path:
    """A TSV as VLMEvalKit's: a picture in every row, but in rows of other orders the index of the first."""
    columns = ["index", *(["image"] if pictures else []), *(key for row in rows for key in row)]
    named = [name for name in dict.fromkeys(columns) if name != "prediction"]
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, named, "", delimiter="\t", extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            first = int(row["index"]) % 1_000_000
            picture = base64_png(first) if int(row["index"]) == first else str(first)
            writer.writerow({"image": picture, **row})
    return path


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass
class Reply:
    text: str
    finish_reason: str = "stop"
    token_ids: tuple[int, ...] = (1, 2)


@dataclass
class Script:
    """A session with its steps open, which answers a prompt as it is told, or `none`; counts its work."""

    replies: dict[str, str]
    asked: list[str] = field(default_factory=list)
    encoded: int = 0

    def prepare(self, source: Any) -> Any:
        return source

    def encode_image(self, prepared: Any) -> Any:
        self.encoded += 1
        return prepared

    def prompt_ids(self, question: str, images: Sequence[Any]) -> Any:
        return question

    def check_length(self, ids: Any, new_tokens: int = 0) -> None:
        if "too long" in ids:
            raise InputError("prompt: needs 9 tokens, 8 are available")

    def complete(self, ids: Any, features: Any, options: Any = None) -> Reply:
        self.asked.append(ids)
        text = self.replies.get(ids, "none")
        return Reply(text, "length" if text.endswith("..") else "stop")

    def __enter__(self) -> Script:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@dataclass(frozen=True)
class Told(Model):
    """A model that is a script."""

    script: Script = field(default_factory=lambda: Script({}))

    def open(self, *, threads: int | None = None) -> Any:
        return self.script

    @property
    def bytes(self) -> int:
        return 1


def told(name: str, replies: dict[str, str] | None = None) -> Told:
    return Told(
        name=name,
        path=Path(name),
        format="safetensors",
        precision="fp32",
        sha256=(name.encode().hex() * 64)[:64],
        source_sha256="0" * 64,
        script=Script(replies or {}),
    )
