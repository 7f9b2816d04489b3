"""What stores and browsers allow a download to weigh, and which of it a bundle stays under.

In: bytes of a download and of its largest file. Out: `Ceiling` records. Not here: counting the bytes.

The numbers are the stores' and browsers' own words, read in November 2026; they change, so each carries its
source. A model is compared alone: the app's own bytes come on top. Quantized weights hardly shrink when a
store compresses them, so bytes as stored are compared with limits of compressed downloads, too.
"""

from __future__ import annotations

from dataclasses import dataclass

from evals.bench.bench_results import Ceiling

MB, GB, MIB, GIB = 10**6, 10**9, 1 << 20, 1 << 30


@dataclass(frozen=True)
class Limit:
    """`of_file`: the limit is on one file (or on what one buffer holds), not on the whole download."""

    name: str
    bytes: int
    source: str
    note: str = ""
    of_file: bool = False


PLAY = "https://support.google.com/googleplay/android-developer/answer/9859372"
APPLE = "https://developer.apple.com/help/app-store-connect/reference/maximum-build-file-sizes"
WEB = "https://onnxruntime.ai/docs/tutorials/web/large-models.html"

LIMITS: tuple[Limit, ...] = (
    Limit("Google Play, base module", 200 * MB, PLAY, "inside the app itself; compressed size"),
    Limit("Google Play, one asset pack", 1500 * MB, PLAY, "delivered with or after the app; compressed size"),
    Limit("Google Play, all asset packs", 4 * GB, PLAY, "compressed size"),
    Limit("App Store, whole app", 4 * GB, APPLE, "uncompressed; more with Background Assets"),
    Limit("App Clip, iOS 17 and later", 100 * MB, APPLE, "uncompressed, digital invocations only"),
    Limit("browser, one file", 0x7FE00000, WEB, "largest ArrayBuffer in Chrome", of_file=True),
    Limit("browser, WebAssembly memory", 4 * GIB, WEB, "weights and everything else of the run"),
)
"""Rows in the order they are shown."""


def check(download_bytes: int, largest_file_bytes: int) -> tuple[Ceiling, ...]:
    """Every limit, and whether the bundle stays under it."""
    return tuple(
        Ceiling(
            name=limit.name,
            limit_bytes=limit.bytes,
            fits=(largest_file_bytes if limit.of_file else download_bytes) <= limit.bytes,
            source=limit.source,
            note=limit.note,
        )
        for limit in LIMITS
    )
