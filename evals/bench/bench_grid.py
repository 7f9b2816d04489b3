"""The grid of a bench: pictures of several sizes, prompts of several lengths.

In: a picture and a question (or the first bundle's own), sizes, lengths. Out: `Asked`, with files on disk.
Not here: measuring. The same pictures and words go to every bundle; how many tokens each makes of them is
recorded with its results.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps
from tokenizers import Tokenizer

from evals.bench.bench_results import GridPoint
from runtime import bundle as bundles
from runtime import conformance, files, prompt
from runtime.errors import InputError
from runtime.image import MAX_SOURCE_PIXELS, load

LARGEST_SIDE, MOST_TOKENS = 16_384, 1_000_000
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Asked:
    """A grid point with its picture's file (None: no picture)."""

    point: GridPoint
    image: Path | None


def subject(bundle: Path, image: Path | None, question: str | None) -> tuple[Path, str]:
    """The picture and question to measure with; what is None comes from the bundle's first conformance case.

    Raises InputError when the picture is no file, BundleError when the bundle cannot be read.
    """
    if image is not None and not image.is_file():
        raise InputError(f"{image}: is no file; give --image a PNG, JPEG or WebP, or leave it out")
    if image is not None and question is not None:
        return image, question
    case = conformance.read(bundle)[0]
    return image or bundles.locate(bundle, case.image.path), question or case.question


def sizes_of(given: str | None) -> list[tuple[int, int]]:
    """(width, height) of `224,640x480`; one number is a square. Raises InputError with what was wrong."""
    found = []
    for part in (given or "").split(","):
        if not part.strip():
            continue
        match = re.fullmatch(r"\s*(\d+)(?:x(\d+))?\s*", part)
        width = int(match[1]) if match else 0
        height = int(match[2] or match[1]) if match else 0
        if not 1 <= min(width, height) <= max(width, height) <= LARGEST_SIDE:
            raise InputError(
                f"--images {part.strip()}: expected sizes such as 224,640x480, each side 1 to {LARGEST_SIDE}"
            )
        found.append((width, height))
    return list(dict.fromkeys(found))


def lengths_of(given: str | None) -> list[int]:
    """Tokens of `16,128`. Raises InputError with what was wrong."""
    found = [part.strip() for part in (given or "").split(",") if part.strip()]
    for part in found:
        if not part.isdigit() or not 1 <= int(part) <= MOST_TOKENS:
            raise InputError(
                f"--prompts {part}: expected numbers of tokens such as 16,128,512, up to {MOST_TOKENS}"
            )
    return list(dict.fromkeys(int(part) for part in found))


def grid(
    bundle: Path,
    image: Path,
    question: str,
    sizes: Sequence[tuple[int, int]],
    lengths: Sequence[int],
    directory: Path,
) -> list[Asked]:
    """Every size with every length; without sizes the picture as it is, without lengths the question.

    Lengths count tokens of the question's text by `bundle`'s tokenizer. Scaled pictures go to `directory`.
    Raises InputError when the picture cannot be read.
    """
    pictures = _pictures(image, sizes, directory)
    questions: list[tuple[str, str, int | None]] = [("question", question, None)]
    if lengths:
        tokenizer = _tokenizer(bundle)
        questions = [
            (f"{length}-tokens", question_of(tokenizer, question, length), length) for length in lengths
        ]
    return [
        Asked(
            GridPoint(
                id=f"{width}x{height}, {label}",
                image=path.name,
                width=width,
                height=height,
                image_sha256=files.sha256_file(path),
                scaled=path != image,
                question=text,
                question_tokens=length,
            ),
            path,
        )
        for path, width, height in pictures
        for label, text, length in questions
    ]


def question_of(tokenizer: Tokenizer, question: str, tokens: int) -> str:
    """The question again and again, cut where `tokens` tokens end; the last word may be cut, too.

    Raises InputError when the tokenizer makes nothing of the question.
    """
    text = " ".join(question.split())
    while len(found := tokenizer.encode(text, add_special_tokens=False)) < tokens:
        if not len(found):
            raise InputError(f"--question {question!r}: has no token to repeat; ask with words")
        text = f"{text} {text}"
    return text[: found.offsets[tokens - 1][1]]


def _tokenizer(bundle: Path) -> Tokenizer:
    manifest = bundles.read(bundle, verify=False)
    return prompt.load_tokenizer(bundles.locate(bundle, manifest.tokenizer.file.path))


def _pictures(image: Path, sizes: Sequence[tuple[int, int]], directory: Path) -> list[tuple[Path, int, int]]:
    """(file, width, height). A scaled JPEG stays one, the rest becomes PNG: decoding is part of the time."""
    picture = load(image, MAX_SOURCE_PIXELS)
    if not sizes:
        return [(image, picture.width, picture.height)]
    upright, jpeg, found = ImageOps.exif_transpose(picture), picture.format == "JPEG", []
    for width, height in sizes:
        path = directory / f"{image.stem}-{width}x{height}.{'jpg' if jpeg else 'png'}"
        buffer = io.BytesIO()
        scaled = upright.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        scaled.save(buffer, "JPEG", quality=JPEG_QUALITY) if jpeg else scaled.save(buffer, "PNG")
        files.write_bytes(path, buffer.getvalue())
        found.append((path, width, height))
    return found
