"""What each precision costs on trained weights: one easy-VQA checkpoint of width 256, every precision.

    python benchmarks/quantization.py --out quantization-out [--questions 4000] [--quick]

Random weights say nothing about compression: their int4 looks terrible, and a calibration finds no
structure. So a checkpoint is trained first, with the demo's own steps, tokenizer and pictures, on all
training images but the validation ones. Then each precision is exported through the gate and answers the same
test questions, greedily, in free text. The reference is the float32 bundle, which the gate holds against the
checkpoint.

Markdown on stdout, `results.json` in the output directory, progress on stderr. A step that is done is not
done again. Calibrated precisions look at validation pictures only; test questions choose nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))
if str(Path(__file__).parent) in sys.path:  # run as a file: its onnx.py would stand for the onnx package
    sys.path.remove(str(Path(__file__).parent))

from distill import fresh
from distill.demo import demo, demo_recipe
from distill.demo.demo_recipe import LabelTraining, Recipe
from evals import easy_vqa
from evals.accuracy import AccuracyResult, compare_methods, evaluate
from evals.easy_vqa import Question
from evals.parity.parity import ParityCase, compare
from export import auto, auto_data, onnx, target
from export.auto_data import examples
from export.checkpoint import load
from export.quantize_policy import resolve
from runtime import bundle, files, open_bundle

PRECISIONS = (
    "fp32", "fp16", "int8", "int8-blocks", "int4", "int4-b64", "int4-b128",
    "int4-gptq", "int4-b64-gptq", "int4-b128-gptq", "fp32-kv8", "int4-b64-gptq-kv8",
)  # fmt: skip
KL_QUESTIONS = 64
CALIBRATION_QUESTIONS = 32


@dataclass(frozen=True)
class Setup:
    """Sizes of the model, its training, and how much is asked."""

    sizes: dict[str, dict[str, int]]
    train: LabelTraining
    questions: int


FULL = Setup(
    {
        "vision_config": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4},
        "text_config": {
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    },
    LabelTraining(steps=550, images=40, questions=3, lr=2e-3),
    4000,
)
QUICK = Setup(
    {
        "vision_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
        },
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        },
    },
    LabelTraining(steps=60, images=16, questions=3, lr=3e-3),
    60,
)


def train(out: Path, recipe: Recipe, setup: Setup) -> Path:
    """`out/checkpoint`, trained from nothing; validation images are left out."""
    checkpoint = out / "checkpoint"
    if not (out / "work" / "split.json").exists():
        demo.prepare_data(out, recipe)
    demo.train_labels(out, recipe, checkpoint, setup.sizes, setup.train, everything=True)
    return checkpoint


def export(out: Path, checkpoint: Path, precisions: Sequence[str]) -> dict[str, Path]:
    """A bundle for each precision; what is there stays."""
    targets = {each: out / "bundles" / resolve(each).name for each in precisions}
    missing = {each: path for each, path in targets.items() if not (path / bundle.MANIFEST_NAME).exists()}
    if not missing:
        return targets
    asked = demo.data(out, "train").by_image
    calibration = [q for image in demo.split(out).validation for q in asked[image]]
    for path in missing.values():
        target.check(path)
    facts = onnx.prepare(
        load(checkpoint),
        (),
        say,
        image_required=True,
        examples=examples(calibration, CALIBRATION_QUESTIONS),
    )
    onnx.write_bundles(facts, missing, {each: path.name for each, path in missing.items()})
    return targets


def answer(out: Path, name: str, path: Path, questions: Sequence[Question]) -> AccuracyResult:
    """Free greedy answers to the questions, kept for the next run."""
    kept = out / "answers" / f"{name}-{len(questions)}.json"
    if kept.exists():
        return AccuracyResult.read(kept)
    say(f"{name}: {len(questions)} questions")
    with open_bundle(path, spin=False) as session:
        found = evaluate(session, questions)
    kept.parent.mkdir(parents=True, exist_ok=True)
    found.write(kept)
    return found


def divergence(reference: Path, path: Path, cases: Sequence[ParityCase]) -> dict[str, float]:
    """KL in nats and top-1 agreement, float32 to rounded, on questions about pictures and their answers."""
    with open_bundle(reference, spin=False) as before, open_bundle(path, spin=False) as after:
        found = compare(before, after, cases)
    return {"kl_mean_nats": found.kl_mean, "kl_p99_nats": found.kl_p99, "top1": found.top1_agreement}


def measure(out: Path, bundles: dict[str, Path], questions: Sequence[Question]) -> list[dict[str, Any]]:
    """One row per precision, float32 first."""
    reference = answer(out, "fp32", bundles["fp32"], questions)
    asked = list(zip(questions, reference.predictions, strict=True))[
        :: max(1, len(questions) // KL_QUESTIONS)
    ]
    cases = [ParityCase(str(q.id), q.question, q.image_path, tuple(found.token_ids)) for q, found in asked][
        :KL_QUESTIONS
    ]
    rows = []
    for name, path in bundles.items():
        found = answer(out, name, path, questions)
        manifest = bundle.read(path)
        compared = compare_methods("checkpoint", ("fp32", name), reference, found)
        rows.append(
            {
                "precision": name,
                "bytes": {part.role: part.bytes for part in manifest.parts},
                "cache_bytes": auto.cache_bytes(manifest),
                "right": found.score.right,
                "comparison": compared.model_dump(),
                "fallbacks": [each.model_dump() for part in manifest.parts for each in part.fallbacks],
                **divergence(bundles["fp32"], path, cases),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "| precision | vision kB | embed kB | decoder kB | cache kB | right | drop, points (95 %) | to wrong "
        "| to right | KL mean, mnats | top-1 |",
        "|---|---:|---:|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        size, found = row["bytes"], row["comparison"]
        cells = [
            row["precision"],
            *(f"{size[role] / 1e3:.0f}" for role in ("vision_encoder", "embed_tokens", "decoder")),
            f"{row['cache_bytes'] / 1e3:.0f}",
            f"{row['right']}/{found['n']}",
            f"{-100 * found['difference'] + 0:+.2f} "
            f"({-100 * found['high'] + 0:+.2f} to {-100 * found['low'] + 0:+.2f})",
            str(found["right_to_wrong"]),
            str(found["wrong_to_right"]),
            f"{1e3 * row['kl_mean_nats']:.3f}",
            f"{row['top1']:.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(out: Path, precisions: Sequence[str], setup: Setup, seed: int = 0) -> dict[str, Any]:
    """Train, export, ask, compare; the content of `results.json`."""
    recipe = demo_recipe.read(Path(fresh.__file__).parent / "recipes" / "demo.yaml", seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    with files.lock(out):
        checkpoint = train(out, recipe, setup)
        bundles = export(out, checkpoint, list(dict.fromkeys(["fp32", *precisions])))
        questions = auto_data.spread(easy_vqa.load("test"), setup.questions)
        found = {
            "setup": {**asdict(setup), "train": setup.train.model_dump()},
            "seed": seed,
            "rows": measure(out, bundles, questions),
        }
        files.write_json(out / "results.json", found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="output directory; a temporary one when it is not given")
    parser.add_argument("--questions", type=int, help="test questions to ask")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="separated by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny model, few steps and questions")
    given = parser.parse_args()
    setup = QUICK if given.quick else FULL
    if given.questions:
        setup = Setup(setup.sizes, setup.train, given.questions)
    with tempfile.TemporaryDirectory(prefix="pocketvlm-quantization-") as scratch:
        found = run(given.out or Path(scratch), given.precisions.split(","), setup, given.seed)
    print("\n".join(table(found["rows"])))
    print(json.dumps({"setup": found["setup"], "seed": found["seed"]}))


if __name__ == "__main__":
    main()
