"""Runs the demo on a recipe small enough for a test: `python -m tests.distill.demo_driver OUT`."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from distill.demo import demo_recipe

TINY = {
    "data": {"validation_images": 12, "labelled_questions": 200},
    "teacher": {"train": {"steps": 12, "images": 8}},
    "masks": {"ratios": [0.0, 0.5], "images": 6, "stages": 2},
    "pool": {"limit_rows": 60},
    "measure": {"test_images": 12, "answers": 12, "latency_rounds": 1, "latency_repeats": 2},
    "export": {"precisions": ["fp32"], "gguf": ["q8_0"], "coreml": ["fp16"]},
}


def tiny() -> demo_recipe.Recipe:
    raw = yaml.safe_load((demo_recipe.RECIPES / "demo.yaml").read_text())
    raw.pop("smoke")
    raw = demo_recipe.merged(raw, TINY)
    student = demo_recipe.merged(
        raw["students"]["student"], {"warmup": {"steps": 6, "images": 8}, "rates": [1e-3]}
    )
    raw["students"] = {"student": student}
    return demo_recipe.Recipe.model_validate(raw)


if __name__ == "__main__":  # workers import this module too: what is heavy stays here
    from rich.console import Console

    from distill.demo import demo_run
    from export import export_all

    console = Console(stderr=True)
    demo_run.run(Path(sys.argv[1]), tiny(), export_all, command="test", smoke=True, console=console)
