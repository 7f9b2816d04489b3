"""A bench.json that holds together, with times as a test wants them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evals.bench import bench_summary
from evals.bench.bench_results import BenchResults

DEVICE = {"name": "board", "cpu": "chip", "architecture": "aarch64", "cores": 4, "os": "Linux"}


def results(ttft_ms: Sequence[float], rounds: int = 3, repeats: int = 10, **changed: Any) -> BenchResults:
    """One bundle per time to first text, `b0`, `b1`, ...; 2 ms a token; no picture."""
    bundles = [
        {
            "name": f"b{number}",
            "format": "onnx",
            "precision": "int8",
            "points": [
                {
                    "point": "a",
                    "prompt_tokens": 20,
                    "image_tokens": 0,
                    "decode_tokens": 3,
                    "runs": [
                        {
                            "round": place,
                            "order": place * len(ttft_ms) + number,
                            "load": {"cold_ms": 100, "warm_ms": [10, 10]},
                            "times": {
                                "prefill_ms": [5] * repeats,
                                "ttft_ms": [value] * repeats,
                                "decode_ms": [[2, 2, 2]] * repeats,
                                "end_to_end_ms": [value + 6] * repeats,
                            },
                        }
                        for place in range(rounds)
                    ],
                }
            ],
        }
        for number, value in enumerate(ttft_ms)
    ]
    found = {
        "schema": "pocketvlm.bench@1",
        "created": "2026-11-22T09:00:00Z",
        "tool": {"name": "test", "version": "1"},
        "source": "local",
        "device": DEVICE,
        "policy": {"rounds": rounds, "warmup": 0, "repeats": repeats, "decode_tokens": 3, "threads": 2},
        "grid": [{"id": "a", "question": "what is this?"}],
        "bundles": bundles,
    }
    return bench_summary.complete(BenchResults.model_validate({**found, **changed}))
