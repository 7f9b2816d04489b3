"""What a bundle costs: load, stages, first text, tokens a second, memory, bytes; in fresh processes.

In: bundle directories, one image, one question. Out: `Latency` per bundle, ratios to the first bundle.
Not here: accuracy (`evals/accuracy.py`), the device sheet (`evals/device.py`). No torch.

`python -m evals.latency BUNDLE --image FILE --question TEXT` is the fresh process; it prints its samples as
one JSON object. Every repeat decodes a fixed number of tokens and ignores stop tokens, so that a short
answer still gives decode figures, and bundles are compared over equal work.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from evals import stats
from evals.device import describe, peak_rss_mib
from evals.records import Amount, Count, Device, Latency, LatencyRatio, Percentiles, Record
from runtime.errors import PocketError

if TYPE_CHECKING:
    from runtime.session import Session

WARM_LOADS = 3
CHILD_SECONDS = 600
RATIOS = ("load_warm_ms", "encode_ms", "prefill_ms", "ttft_ms", "decode_ms", "end_to_end_ms")


class Plan(Record):
    """How often and with what one process measures. decode_tokens: forced number of tokens per repeat."""

    threads: Annotated[int, Field(ge=1)]
    warmup: Count
    repeats: Annotated[int, Field(ge=1)]
    decode_tokens: Annotated[int, Field(ge=1)]


class Samples(Record):
    """What one fresh process saw; lists hold one value per repeat (decode_ms: per token). Times in ms."""

    prompt_tokens: Count
    image_tokens: Count
    load_cold_ms: Amount
    load_warm_ms: list[float]
    preprocess_ms: list[float]
    encode_ms: list[float]
    prefill_ms: list[float]
    ttft_ms: list[float]
    decode_ms: list[float]
    end_to_end_ms: list[float]
    base_rss_mib: Amount
    peak_rss_mib: Amount
    device: Device


class Measured(Record):
    """One bundle's figures, and how they compare to the first bundle of the same call (empty for itself)."""

    bundle: str
    latency: Latency
    ratios: list[LatencyRatio]


def measure(
    bundle_dir: Path,
    image: Path,
    question: str,
    *,
    warmup: int = 3,
    repeats: int = 20,
    threads: int = 2,
    decode_tokens: int = 16,
    drop_cache: bool = False,
) -> Latency:
    """Measure one bundle in one fresh process; arguments and errors as `measure_all`."""
    return measure_all(
        [bundle_dir],
        image,
        question,
        rounds=1,
        warmup=warmup,
        repeats=repeats,
        threads=threads,
        decode_tokens=decode_tokens,
        drop_cache=drop_cache,
    )[0].latency


def measure_all(
    bundles: Sequence[Path],
    image: Path,
    question: str,
    *,
    rounds: int = 3,
    warmup: int = 3,
    repeats: int = 20,
    threads: int = 2,
    decode_tokens: int = 16,
    drop_cache: bool = False,
    progress: Callable[[str], None] | None = None,
) -> list[Measured]:
    """Measure several bundles, interleaved A B A B, each time in a fresh process.

    A drift of the machine then falls on all of them. Ratios are medians over the first bundle's, with an
    interval that resamples the rounds in pairs and the repeats inside them.
    Raises ValueError on no bundles or a count below 1; PocketError when a measuring process fails.
    """
    if not bundles or rounds < 1:
        raise ValueError(f"measure_all: {len(bundles)} bundles, {rounds} rounds; wanted at least one of each")
    plan = Plan(threads=threads, warmup=warmup, repeats=repeats, decode_tokens=decode_tokens)
    seen: list[list[Samples]] = [[] for _ in bundles]
    for number in range(rounds):
        for bundle, samples in zip(bundles, seen, strict=True):
            if progress:
                progress(f"{bundle.name}, round {number + 1} of {rounds}")
            if drop_cache:
                _drop_page_cache(bundle)
            samples.append(_run_child(bundle, image, question, plan))
    return [
        Measured(
            bundle=bundle.name,
            latency=_summarise(bundle, samples, plan, "dropped" if drop_cache else "warm"),
            ratios=_ratios(bundles[0].name, seen[0], samples) if i else [],
        )
        for i, (bundle, samples) in enumerate(zip(bundles, seen, strict=True))
    ]


def sample(bundle_dir: Path, image: Path, question: str, plan: Plan) -> Samples:
    """Take the samples in this process. Call it once in a fresh one, or the memory figures mean nothing."""
    import runtime

    data = image.read_bytes()
    base = peak_rss_mib()
    start = time.perf_counter()
    session = runtime.open_bundle(
        bundle_dir, threads=plan.threads, reuse=False
    )  # every repeat is a first one
    cold = _since(start)
    rows = [_repeat(session, data, question, plan.decode_tokens) for _ in range(plan.warmup + plan.repeats)]
    rows = rows[plan.warmup :]
    peak = peak_rss_mib()  # before the bundle is opened again, which may raise it
    session.close()
    warm = [_timed_open(bundle_dir, plan.threads) for _ in range(WARM_LOADS)]
    stages = ("preprocess_ms", "encode_ms", "prefill_ms", "ttft_ms", "end_to_end_ms")
    return Samples(
        prompt_tokens=rows[0]["prompt_tokens"],
        image_tokens=rows[0]["image_tokens"],
        load_cold_ms=cold,
        load_warm_ms=warm,
        decode_ms=[value for row in rows for value in row["decode_ms"]],
        base_rss_mib=base,
        peak_rss_mib=peak,
        device=describe(),
        **{name: [row[name] for row in rows] for name in stages},
    )


def _repeat(session: Session, image: bytes, question: str, decode_tokens: int) -> dict[str, Any]:
    """One pass stage by stage, then one pass through `stream` for the time to first text."""
    start = time.perf_counter()
    prepared = session.prepare(image)
    preprocess = _since(start)
    mark = time.perf_counter()
    features = session.encode_image(prepared)
    encode = _since(mark)
    ids = session.prompt_ids(question, [prepared])
    mark = time.perf_counter()
    logits = session.prefill(ids, [features])
    prefill = _since(mark)
    decode = []
    for _ in range(decode_tokens):
        mark = time.perf_counter()
        logits = session.decode(int(logits.argmax()))
        decode.append(_since(mark))
    return {
        "prompt_tokens": len(ids),
        "image_tokens": len(features),
        "preprocess_ms": preprocess,
        "encode_ms": encode,
        "prefill_ms": prefill,
        "decode_ms": decode,
        "end_to_end_ms": _since(start),
        "ttft_ms": _time_to_first_text(session, image, question),
    }


def _time_to_first_text(session: Session, image: bytes, question: str) -> float:
    """Image bytes in, first text out. An answer without any text counts until its end."""
    start = time.perf_counter()
    pieces = session.stream(image, question)
    for piece in pieces:
        if piece:
            break
    elapsed = _since(start)
    close = getattr(pieces, "close", None)
    if close:
        close()
    return elapsed


def _timed_open(bundle_dir: Path, threads: int) -> float:
    import runtime

    start = time.perf_counter()
    session = runtime.open_bundle(bundle_dir, threads=threads)
    elapsed = _since(start)
    session.close()
    return elapsed


def _since(start: float) -> float:
    return (time.perf_counter() - start) * 1000


def _run_child(bundle: Path, image: Path, question: str, plan: Plan) -> Samples:
    command = [
        sys.executable,
        "-m",
        "evals.latency",
        str(bundle),
        f"--image={image}",
        f"--question={question}",
    ]
    command.append(f"--plan={plan.model_dump_json()}")
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=CHILD_SECONDS,
            env={**os.environ, "PYTHONPATH": path},
        )
    except subprocess.TimeoutExpired:
        raise PocketError(
            f"{bundle}: measuring took more than {CHILD_SECONDS} s; lower repeats or decode_tokens"
        ) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise PocketError(f"{bundle}: the measuring process failed: {lines[-1]}")
    return Samples.model_validate_json(done.stdout.splitlines()[-1])


def _summarise(
    bundle: Path, samples: Sequence[Samples], plan: Plan, page_cache: Literal["warm", "dropped"]
) -> Latency:
    def pooled(name: str) -> list[float]:
        return [value for one in samples for value in getattr(one, name)]

    first, prefill, decode = samples[0], pooled("prefill_ms"), pooled("decode_ms")
    return Latency(
        threads=plan.threads,
        rounds=len(samples),
        warmup=plan.warmup,
        repeats=plan.repeats,
        prompt_tokens=first.prompt_tokens,
        image_tokens=first.image_tokens,
        decode_tokens=plan.decode_tokens,
        page_cache=page_cache,
        load_cold_ms=Percentiles.of([one.load_cold_ms for one in samples]),
        load_warm_ms=Percentiles.of(pooled("load_warm_ms")),
        preprocess_ms=Percentiles.of(pooled("preprocess_ms")),
        encode_ms=Percentiles.of(pooled("encode_ms")),
        prefill_ms=Percentiles.of(prefill),
        ttft_ms=Percentiles.of(pooled("ttft_ms")),
        decode_ms=Percentiles.of(decode),
        end_to_end_ms=Percentiles.of(pooled("end_to_end_ms")),
        prefill_tok_s=1000 * first.prompt_tokens / stats.percentile(prefill, 50),
        decode_tok_s=1000 / stats.percentile(decode, 50),
        base_rss_mib=max(one.base_rss_mib for one in samples),
        peak_rss_mib=max(one.peak_rss_mib for one in samples),
        disk_bytes=sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file()),
        device=first.device,
    )


def _ratios(name: str, reference: Sequence[Samples], candidate: Sequence[Samples]) -> list[LatencyRatio]:
    found = []
    for metric in RATIOS:
        ratio, interval = stats.bootstrap_ratio(
            [getattr(one, metric) for one in reference], [getattr(one, metric) for one in candidate]
        )
        found.append(
            LatencyRatio(metric=metric, reference=name, ratio=ratio, low=interval.low, high=interval.high)
        )
    return found


def _drop_page_cache(bundle: Path) -> None:
    """Ask the kernel to forget the bundle's pages (needs no rights; advice, not a guarantee)."""
    if not hasattr(os, "posix_fadvise"):
        raise PocketError("drop_cache needs posix_fadvise (Linux); measure with a warm page cache instead")
    for file in sorted(path for path in bundle.rglob("*") if path.is_file()):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evals.latency", description="Time one bundle once.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--question", required=True)
    plan = Plan(threads=2, warmup=3, repeats=20, decode_tokens=16)
    parser.add_argument("--plan", type=Plan.model_validate_json, default=plan, help="JSON of `Plan`")
    given = parser.parse_args(arguments)
    try:
        samples = sample(given.bundle, given.image, given.question, given.plan)
    except (PocketError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(samples.model_dump()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
