"""What each precision costs on trained weights: one easy-VQA checkpoint of width 256, every precision.

    python benchmarks/quantization.py --out quantization-out [--to gguf] [--questions 4000] [--quick]

Random weights say nothing about compression: their int4 looks terrible, and a calibration finds no
structure. So a checkpoint is trained first, with the demo's own steps, tokenizer and pictures, on all
training images but the validation ones. Then each precision is exported through the gate and answers the same
test questions, greedily, in free text. The reference is the float32 bundle, which the gate holds against the
checkpoint.

Markdown on stdout, `results.json` (GGUF: `results-gguf.json`) in the output directory, progress on stderr. A
step that is done is not done again. Calibrated precisions look at validation pictures only; test questions
choose nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
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
from evals.stats import bootstrap_difference
from evals.torch_session import TorchSession
from export import auto, auto_data, export_all, gguf_kinds, onnx, target
from export.auto_data import examples
from export.quantize_policy import resolve
from runtime import bundle, files, open_bundle

PRECISIONS = (
    "fp32", "fp16", "int8", "int8-blocks", "int4", "int4-b64", "int4-b128",
    "int4-gptq", "int4-b64-gptq", "int4-b128-gptq", "fp32-kv8", "int4-b64-gptq-kv8",
)  # fmt: skip
GGUF = (
    "gguf-f16", "gguf-q8_0",
    *(f"gguf-{kind}{mark}" for kind in gguf_kinds.QUANTIZED for mark in ("", "-imatrix", "-imatrix-text")),
)  # fmt: skip
"""`-imatrix`: columns weighed by prompts with pictures; `-imatrix-text`: by the same without them."""
KL_QUESTIONS = 400
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
    """An ONNX bundle for each precision; what is there stays."""
    targets = {each: out / "bundles" / resolve(each).name for each in precisions}
    missing = {each: path for each, path in targets.items() if not (path / bundle.MANIFEST_NAME).exists()}
    if not missing:
        return targets
    names = {each: path.name for each, path in missing.items()}
    given = calibration(out)
    onnx.export_onnx(checkpoint, missing, names=names, image_required=True, examples=given, progress=say)
    return targets


def calibration(out: Path) -> list[tuple[Path, str]]:
    """Validation pictures with questions."""
    asked = demo.data(out, "train").by_image
    return examples([q for image in demo.split(out).validation for q in asked[image]], CALIBRATION_QUESTIONS)


def export_gguf(out: Path, checkpoint: Path, precisions: Sequence[str]) -> dict[str, Path]:
    """A GGUF bundle for each precision; what is there stays."""
    targets: dict[str, Path] = {}
    for mark, seen in (("", False), ("-imatrix", True)):
        kinds = [each.removeprefix("gguf-").removesuffix(mark) for each in precisions if each.endswith(mark)]
        kinds = [kind for kind in kinds if kind in gguf_kinds.KINDS]
        folder = out / f"gguf{mark}"
        found = {kind: folder / f"m-gguf-{kind}" for kind in kinds}
        targets |= {f"gguf-{kind}{mark}": path for kind, path in found.items()}
        if missing := [kind for kind, path in found.items() if not (path / bundle.MANIFEST_NAME).exists()]:
            given = {"examples": calibration(out), "request": gguf_kinds.Request(importance=True)}
            common: dict[str, Any] = {"to": "gguf", "name": "m", "image_required": True, "progress": say}
            export_all(checkpoint, folder, missing, **common, **(given if seen else {}))
    for name in (each for each in precisions if each.endswith("-imatrix-text")):
        targets[name] = out / "gguf-imatrix-text" / name
        if not (targets[name] / bundle.MANIFEST_NAME).exists():
            blind(out, checkpoint, targets[name.removesuffix("-imatrix-text")], targets[name])
    return {each: targets[each] for each in precisions}


def blind(out: Path, checkpoint: Path, plain: Path, path: Path) -> None:
    """`plain` with its text model quantized again, by what the calibration's questions alone feed it."""
    from export import gguf_importance, llamacpp
    from export.gguf import plan_files
    from export.gguf_write import write

    files_ = plan_files(checkpoint)
    cases = [ParityCase(str(at), question) for at, (_, question) in enumerate(calibration(out))]
    columns = gguf_importance.collect(TorchSession(checkpoint), cases, files_.text)
    manifest = bundle.read(plain)
    part = manifest.part("text_model")
    with target.staging(path) as staged:
        shutil.copytree(plain, staged, dirs_exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="pocketvlm-quantization-") as scratch:
            base = Path(scratch) / "f32.gguf"
            write(files_.text, files_.source, base, "f32")
            llamacpp.quantize(base, staged / part.path, manifest.precision, rules=(), importance=columns)
        sha256, size = bundle.digest(staged / part.path)
        changed = part.model_copy(update={"sha256": sha256, "bytes": size})
        parts = tuple(changed if each.role == part.role else each for each in manifest.parts)
        bundle.write(manifest.model_copy(update={"parts": parts}), staged)


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


def divergence(reference: Path, path: Path, cases: Sequence[ParityCase]) -> dict[str, Any]:
    """Float32 to rounded, on questions about pictures and their answers: KL in nats, its interval over
    questions, top-1 agreement."""
    each: list[float] = []
    with open_bundle(reference, spin=False) as before, open_bundle(path, spin=False) as after:
        found = compare(before, after, cases, lambda _, alone: each.append(alone.kl_mean))
    between = bootstrap_difference([0.0] * len(each), each)
    return {
        "kl_mean_nats": sum(each) / len(each),
        "kl_low_nats": between.low,
        "kl_high_nats": between.high,
        "top1": found.top1_agreement,
    }


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
        "| precision | vision kB | text kB | cache kB | right | drop, points (95 %) | to wrong "
        "| to right | KL, mnats (95 %) | top-1 |",
        "|---|---:|---:|---:|---:|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        size, found = row["bytes"], row["comparison"]
        vision = size.get("vision_encoder", 0) + size.get("mmproj", 0)
        cells = [
            row["precision"],
            f"{vision / 1e3:.0f}",
            f"{(sum(size.values()) - vision) / 1e3:.0f}",
            f"{row['cache_bytes'] / 1e3:.0f}",
            f"{row['right']}/{found['n']}",
            f"{-100 * found['difference'] + 0:+.2f} "
            f"({-100 * found['high'] + 0:+.2f} to {-100 * found['low'] + 0:+.2f})",
            str(found["right_to_wrong"]),
            str(found["wrong_to_right"]),
            f"{1e3 * row['kl_mean_nats']:.2f} "
            f"({1e3 * row['kl_low_nats']:.2f} to {1e3 * row['kl_high_nats']:.2f})",
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
        ours = [each for each in precisions if not each.startswith("gguf-")]
        bundles = export(out, checkpoint, list(dict.fromkeys(["fp32", *ours])))
        bundles |= export_gguf(out, checkpoint, [each for each in precisions if each not in ours])
        questions = auto_data.spread(easy_vqa.load("test"), setup.questions)
        found = {
            "setup": {**asdict(setup), "train": setup.train.model_dump()},
            "seed": seed,
            "rows": measure(out, bundles, questions),
        }
        files.write_json(
            out / ("results-gguf.json" if len(ours) < len(precisions) else "results.json"), found
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="output directory; a temporary one when it is not given")
    parser.add_argument("--questions", type=int, help="test questions to ask")
    parser.add_argument("--to", choices=("onnx", "gguf"), default="onnx", help="whose precisions")
    parser.add_argument("--precisions", help="separated by commas, instead of all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny model, few steps and questions")
    given = parser.parse_args()
    setup = QUICK if given.quick else FULL
    if given.questions:
        setup = Setup(setup.sizes, setup.train, given.questions)
    with tempfile.TemporaryDirectory(prefix="pocketvlm-quantization-") as scratch:
        every = PRECISIONS if given.to == "onnx" else GGUF
        asked = given.precisions.split(",") if given.precisions else every
        found = run(given.out or Path(scratch), asked, setup, given.seed)
    print("\n".join(table(found["rows"])))
    print(json.dumps({"setup": found["setup"], "seed": found["seed"]}))


if __name__ == "__main__":
    main()
