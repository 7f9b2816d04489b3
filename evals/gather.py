"""Report records from what is on disk: a bundle's manifest, a picture, the predictions of several models.

In: bundle directories, questions, `AccuracyResult`s. Out: `Bundle` and `Example` records.
Not here: measuring, writing the report.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from evals.accuracy import AccuracyResult, Item, Prediction
from evals.bench.bench_facts import mean_bits
from evals.bench.latency import Measured
from evals.results import Agreement, Bundle, Example, ExampleAnswer, Parity, Part, Score
from runtime import bundle as bundles
from runtime.manifest import Manifest

THUMBNAIL = 128
"""Longest side, in pixels, of a picture inside the report."""


def bundle_record(
    directory: Path,
    *,
    student: str,
    method: str,
    path: str | None = None,
    test: Score | None = None,
    agreement: Agreement | None = None,
    measured: Measured | None = None,
) -> Bundle:
    """The report's record of a bundle: its manifest's facts plus what was measured.

    `path` is what the report shows (default: the directory's name). `bits` of a part is the mean over its
    parameters. Raises BundleError when the manifest cannot be read.
    """
    manifest = bundles.read(directory, verify=False)
    return Bundle(
        name=directory.name,
        path=path or directory.name,
        format=manifest.format,
        precision=manifest.precision,
        student=student,
        method=method,
        bytes=sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()),
        parts=[
            Part(
                name=part.role,
                bits=mean_bits([(b.bits, b.parameters) for b in part.bits]),
                bytes=size,
            )
            for part, size in zip(manifest.parts, part_bytes(manifest), strict=True)
        ],
        parity=Parity.of(manifest.parity.figures, manifest.parity.limits),
        test=test,
        agreement=agreement,
        latency=measured.latency if measured else None,
        ratios=measured.ratios if measured else [],
    )


def part_bytes(manifest: Manifest) -> list[int]:
    """Bytes of each part with its data files; a file that parts share counts with the first."""
    seen: set[str] = set()
    sizes = []
    for part in manifest.parts:
        sizes.append(part.bytes + sum(file.bytes for file in part.data if file.path not in seen))
        seen |= {file.path for file in part.data}
    return sizes


def examples(
    items: Sequence[Item], answers: Mapping[str, AccuracyResult], *, count: int = 8, seed: int = 0
) -> list[Example]:
    """Up to `count` questions on different images: half where models disagree, the rest drawn at random.

    `answers` maps a model's name to its predictions. Questions that a model did not answer are passed over.
    """
    given = {name: {one.id: one for one in result.predictions} for name, result in answers.items()}
    common = [item for item in items if given and all(str(item.id) in rows for rows in given.values())]
    order = [common[i] for i in np.random.default_rng(seed).permutation(len(common))]
    split = [item for item in order if len({rows[str(item.id)].right for rows in given.values()}) > 1]
    chosen: list[Item] = []
    for pool, limit in ((split, count // 2), (order, count)):
        for item in pool:
            if len(chosen) < limit and item.image_id not in {one.image_id for one in chosen}:
                chosen.append(item)
    return [_example(item, {name: rows[str(item.id)] for name, rows in given.items()}) for item in chosen]


def data_uri(path: Path) -> str:
    """A picture as `data:image/png;base64,...`, at most THUMBNAIL pixels on its longest side."""
    with Image.open(path) as opened:
        return data_uri_of(ImageOps.exif_transpose(opened).convert("RGB"))


def data_uri_of(picture: Image.Image) -> str:
    """An RGB picture as `data_uri` gives a file."""
    small = picture.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _example(item: Item, rows: Mapping[str, Prediction]) -> Example:
    return Example(
        id=str(item.id),
        image=data_uri(item.image_path),
        question=item.question,
        reference=item.answer,
        answers=[ExampleAnswer(by=name, text=row.text, right=row.right) for name, row in rows.items()],
    )
