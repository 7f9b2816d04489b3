"""Made-up bench.json, eval.json and parity.json for the tests of report and compare. Never measured."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageDraw

from evals import stats
from evals.asking import eval_results
from evals.asking.eval_results import ORIGINAL, EvalResults, TaskInfo
from evals.bench import bench_results
from evals.bench.bench_results import BenchResults
from evals.parity import parity_results
from evals.parity.parity_results import ParityResults
from evals.ship.ship_evidence import Answered, BundleFacts, DeviceSeen, Evidence, SubjectSeen, Task
from evals.ship.ship_timing import timing_of

Rights: TypeAlias = "np.ndarray[Any, Any]"
CREATED = "2026-11-22T09:00:00+00:00"
STAGES = {"preprocess_ms": 2.0, "encode_ms": 30.0, "prefill_ms": 40.0}
BUNDLES = {"student-fp32": 1.0, "student-int8": 0.7, "student-int4": 0.6}
"""Name to time over the first one's."""
MEGABYTES = {"fp32": 120.0, "int8": 33.0, "int4": 19.0}
VARIANTS = [{"name": ORIGINAL, "family": "original"}] + [
    {"name": f"blur-{severity}", "family": "blur", "severity": severity} for severity in (1, 3, 5)
]


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def precision(bundle: str) -> str:
    return bundle.split("-")[-1] if bundle.split("-")[-1] in MEGABYTES else "int8"


# --- bench ------------------------------------------------------------


def bench(
    device: str = "Board A",
    bundles: Mapping[str, float] = BUNDLES,
    *,
    processes: int = 10,
    repeats: int = 20,
    scatter: float = 0.02,
    scale: float = 1.0,
    seed: int = 0,
    grid: Sequence[str] = ("small",),
    **changed: Any,
) -> BenchResults:
    """Processes scatter by `scatter`, repeats jitter by 5 %; `scale` multiplies every time."""
    draw = np.random.default_rng([seed, *device.encode()])
    found: dict[str, Any] = {
        "schema": bench_results.SCHEMA,
        "created": CREATED,
        "tool": {"name": "pocketvlm", "version": "0.1.0"},
        "source": "local",
        "device": {
            "name": device, "kind": "board", "cpu": f"CPU of {device}", "architecture": "aarch64", "cores": 4,
            "memory_mib": 8192, "os": "Some Linux 1", "governor": "performance", "power_mode": "MAXN",
            "packages": {"onnxruntime": "1.31.1"}, "temperatures": [{"zone": "cpu", "celsius": 48.5}],
        },
        "policy": {
            "rounds": processes, "warmup": 3, "repeats": repeats, "decode_tokens": 4, "threads": 2,
        },
        "grid": [
            {"id": point, "image": "photo.png", "width": 512, "height": 384, "question": "what is this?"}
            for point in grid
        ],
        "bandwidth": {
            "read_gb_s": 12.5, "loop": "sum", "threads": 2, "buffer_bytes": 1 << 28, "samples_gb_s": [12.5],
        },
        "bundles": [
            _bundle(draw, name, scale * times, processes, repeats, scatter, grid)
            for name, times in bundles.items()
        ],
        "missing": [{"what": "energy", "why": "this board has no meter"}],
        **changed,
    }  # fmt: skip
    return BenchResults.model_validate(found)


def _bundle(
    draw: np.random.Generator, name: str, times: float, processes: int, repeats: int, scatter: float,
    grid: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    size = int(MEGABYTES[precision(name)] * 1e6)
    return {
        "name": name, "sha256": sha(name), "source_sha256": sha("student"), "format": "onnx",
        "precision": precision(name), "disk_bytes": size + 1000, "download_bytes": size,
        "parts": [{"role": "vision", "bytes": size // 3, "bits": 8.0, "unit": "CPUExecutionProvider"}],
        "ceilings": [
            {"name": "a store", "limit_bytes": 50_000_000, "fits": size < 50_000_000, "source": "its manual"}
        ],
        "points": [
            {
                "point": point, "prompt_tokens": 90 + 200 * number, "image_tokens": 64 + 200 * number,
                "decode_tokens": 4,
                "runs": [
                    _run(draw, times * (1 + number) * np.exp(draw.normal(0, scatter)), i, repeats, size)
                    for i in range(processes)
                ],
                "energy": {"why_not": "this board has no meter"},
            }
            for number, point in enumerate(grid)
        ],
    }  # fmt: skip


def _run(draw: np.random.Generator, level: float, number: int, repeats: int, size: int) -> dict[str, Any]:
    def jitter(ms: float, count: int) -> list[float]:
        return [float(x) for x in ms * level * np.exp(draw.normal(0, 0.05, count))]

    stages = {name: jitter(ms, repeats) for name, ms in STAGES.items()}
    peak = 150 + size / 1e6 * 1.2 + float(draw.normal(0, 0.3))
    return {
        "round": number, "order": number,
        "load": {"cold_ms": jitter(300, 1)[0], "warm_ms": jitter(80, 3), "page_cache": "warm"},
        "times": {
            **stages, "ttft_ms": jitter(75, repeats), "decode_ms": [jitter(9, 4) for _ in range(repeats)],
            "end_to_end_ms": jitter(110, repeats),
        },
        "memory": {
            "meter": "VmHWM", "base_rss_mib": 60, "load_peak_rss_mib": peak - 20, "peak_rss_mib": peak,
        },
        "disturbance": {"own_share": 0.4, "other_share": 0.02, "steal_share": 0.0},
        "harness_share": 0.004,
    }  # fmt: skip


# --- eval -------------------------------------------------------------


def evaluation(
    bundles: Mapping[str, tuple[float, float]] | None = None,
    *,
    task: str = "shapes",
    n: int = 400,
    per_image: int = 1,
    accuracy: float = 0.9,
    seed: int = 0,
    variants: Sequence[Mapping[str, Any]] = VARIANTS[:1],
    pictures: int = 0,
    teacher: bool = True,
) -> EvalResults:
    """A checkpoint that is right with `accuracy`, bundles that lose and gain given shares of all questions.

    `variants` beyond the first cost a tenth of the right answers per severity. Every n-th question of the
    first `pictures` has a picture. The checkpoint's answers depend on `seed` = 0 alone, as a checkpoint's do.
    """
    bundles = {"student-fp32": (0.0, 0.0), "student-int8": (0.01, 0.01)} if bundles is None else bundles
    fixed = np.random.default_rng([0, *task.encode()])
    right = fixed.random(n) < accuracy
    draw = np.random.default_rng([seed, 1])
    kinds = {"student": "checkpoint"} | ({"teacher": "teacher"} if teacher else {})
    subjects = []
    for name in [*kinds, *bundles]:
        answers = []
        for variant in variants:
            now = right & (fixed.random(n) >= 0.1 * variant.get("severity", 0))
            if name in bundles:
                lost, gained = bundles[name]
                luck = draw.random(n)
                now = np.where(
                    now, luck >= lost / max(now.mean(), 1e-9), luck < gained / max(1 - now.mean(), 1e-9)
                )
            answers += [_given(i, variant["name"], bool(ok)) for i, ok in enumerate(now)]
        subjects.append(
            {
                "name": name, "kind": kinds.get(name, "bundle"), "path": name, "precision": precision(name),
                "format": "onnx" if name in bundles else "safetensors",
                "sha256": sha(name), "bytes": int(MEGABYTES[precision(name)] * 1e6), "answers": answers,
            }
        )  # fmt: skip
    found = {
        "schema": eval_results.SCHEMA, "created": CREATED, "version": "0.1.0",
        "task": {
            "name": task, "format": "lmms-jsonl", "split": "test", "source": f"{task}.jsonl",
            "data_sha256": sha(f"{task} {n}"), "questions": n, "available": n,
            "groups": -(-n // per_image), "scorer": "exact", "rules": "pocketvlm", "right_from": 1.0,
            "prompt": "raw", "max_new_tokens": 8,
        },
        "variants": list(variants),
        "questions": [_question(i, per_image) for i in range(n)],
        "subjects": subjects,
        "summaries": [
            _summary(one["name"], one["answers"], variant["name"], n)
            for one in subjects
            for variant in variants
        ],
        "examples": [
            {"id": str(i), "why": "flip", "images": [picture(i)]} for i in range(pictures)
        ],
        "missing": [],
    }  # fmt: skip
    return EvalResults.model_validate(found)


def _question(number: int, per_image: int) -> dict[str, Any]:
    return {
        "id": str(number), "unit": str(number), "group": f"picture {number // per_image}",
        "question": f"what colour is <shape> {number}?", "prompt": "what colour?", "references": ["red"],
    }  # fmt: skip


def _given(number: int, variant: str, right: bool) -> dict[str, Any]:
    return {
        "id": str(number), "variant": variant, "answer": "red" if right else "blue", "score": float(right),
        "finish": "stop",
    }  # fmt: skip


def _summary(subject: str, answers: list[dict[str, Any]], variant: str, n: int) -> dict[str, Any]:
    right = sum(one["score"] == 1 for one in answers if one["variant"] == variant)
    interval = stats.wilson(right, n)
    return {
        "subject": subject, "variant": variant, "units": n, "groups": n, "value": right / n,
        "low": interval.low, "high": interval.high, "interval": "wilson", "right": right,
    }  # fmt: skip


def picture(number: int) -> str:
    """A circle in one of a few colours, as a data URI."""
    image = Image.new("RGB", (96, 96), "white")
    colour = ("red", "blue", "teal", "orange")[number % 4]
    ImageDraw.Draw(image).ellipse((14 + number % 9, 14, 74, 74), fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# --- parity -----------------------------------------------------------


def parity(
    bundles: Sequence[str] = tuple(BUNDLES), *, kl: float = 0.002, prompts_equal: int = 50
) -> ParityResults:
    """KL grows with coarser precision."""
    factor = {"fp32": 1e-4, "int8": 1.0, "int4": 8.0}
    found = {
        "schema": parity_results.SCHEMA, "created": CREATED, "version": "0.1.0",
        "reference": {
            "name": "student", "kind": "checkpoint", "path": "student", "format": "safetensors",
            "precision": "fp32", "sha256": sha("student"), "backend": "transformers 5.23.0",
        },
        "asked": {
            "source": "shapes, test", "data_sha256": sha("shapes"), "cases": 50, "groups": 50,
            "max_tokens": 8,
        },
        "candidates": [
            {
                "name": name, "kind": "bundle", "path": name, "format": "onnx", "precision": precision(name),
                "backend": "onnxruntime 1.31.1", "sha256": sha(name), "same_source": True,
                "preprocessing": {
                    "images": 50, "images_compared": 50, "images_equal": 50, "pixel_max_diff": 0.0,
                    "shapes_equal": 50, "image_tokens_equal": 50, "prompts": 50,
                    "prompts_equal": prompts_equal,
                },
                "numerics": [_numerics(kl * factor[precision(name)])],
                "greedy": {
                    "answers": 50, "tokens_mean": 5.0, "prefix_mean": _estimate(4.9, 0.1),
                    "prefix_median": 5.0, "prefix_share": _estimate(0.98, 0.01),
                    "whole_equal": _estimate(0.96, 0.03),
                },
            }
            for name in bundles
        ],
        "missing": [{"what": "another dtype of the checkpoint", "why": "float32 is the reference"}],
    }  # fmt: skip
    return ParityResults.model_validate(found)


def _estimate(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def _numerics(kl: float) -> dict[str, Any]:
    return {
        "forced": "reference-greedy", "cases": 50, "positions": 250, "kl_mean": _estimate(kl, kl / 5),
        "kl_median": kl / 4, "kl_p90": 3 * kl, "kl_p99": 9 * kl, "kl_max": 20 * kl,
        "top1_agreement": _estimate(0.99, 0.008), "top1_differ": 2, "near_ties": 1,
        "perplexity_reference": 1.8, "perplexity": 1.81, "perplexity_ratio": _estimate(1.005, 0.004),
    }  # fmt: skip


# --- evidence without files, for many trials --------------------------


def asked(rights: dict[str, Rights]) -> Evidence:
    """Evidence of one task, without files, for many trials."""
    n = len(next(iter(rights.values())))
    info = evaluation(n=2).task.model_dump() | {"questions": n, "available": n, "groups": n}
    task = Task(
        info=TaskInfo.model_validate(info),
        variants=(),
        units=tuple(map(str, range(n))),
        groups=tuple(range(n)),
        subjects=tuple(
            SubjectSeen(name=name, kind="bundle", format="onnx", precision="int8") for name in rights
        ),
        answered=tuple(
            Answered(subject=name, variant="original", scores=tuple(right.astype(float).tolist()))
            for name, right in rights.items()
        ),
        summaries=(),
    )
    return Evidence(tasks=(task,), bundles=_facts(rights))


def _facts(names: Iterable[str]) -> tuple[BundleFacts, ...]:
    return tuple(BundleFacts(name=name, format="onnx", precision="int8") for name in names)


def timed(seed: int, *, processes: int = 10, repeats: int = 4, **slower: float) -> Evidence:
    """Evidence of two bundles' timings, without files: processes that scatter by 2 %."""
    times = {"fp32": 1.0, "int8": 0.7} | {name: 0.7 * factor for name, factor in slower.items()}
    found = bench(bundles=times, processes=processes, repeats=repeats, seed=seed)
    device = DeviceSeen(sheet=found.device, origin=found.source, created=found.created, tool="none")
    timings = [timing_of(found, one, one.points[0], one.name) for one in found.bundles]
    return Evidence(bundles=_facts(times), devices=(device,), timings=tuple(timings))


def flipped(draw: np.random.Generator, right: Rights, loss: float, discordant: float = 0.05) -> Rights:
    """`discordant` of all questions change sides, `loss` more to wrong than to right."""
    luck, share = draw.random(len(right)), float(right.mean())
    down, up = (discordant + loss) / 2 / share, (discordant - loss) / 2 / (1 - share)
    return np.where(right, luck >= down, luck < up)


# --- files ------------------------------------------------------------


def save(directory: Path, **found: BenchResults | EvalResults | ParityResults) -> Path:
    """`save(tmp, bench=bench(), shapes=evaluation())` writes bench.json and shapes.json."""
    writers = {
        BenchResults: bench_results.write,
        EvalResults: eval_results.write,
        ParityResults: parity_results.write,
    }
    for name, one in found.items():
        writers[type(one)](one, directory / f"{name}.json")  # type: ignore[operator]
    return directory
