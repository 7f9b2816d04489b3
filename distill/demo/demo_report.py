"""The demo's answers and its report: what was measured, put into the report's contract.

In: a finished run's directories and `work/*.json`. Out: `work/answers/`, `report/`.
Not here: drawing the page (`evals/report.py`), timing a bundle (`evals/bench/latency.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from distill.demo import demo, demo_bundles, pool
from distill.demo.demo import KD, MASTERS, SFT
from distill.demo.demo_recipe import Recipe
from distill.demo.plans import NORMS_EVERY
from evals import accuracy, easy_vqa, gather, scorers
from evals.accuracy import AccuracyResult
from evals.bench import latency
from evals.bench.device import describe
from evals.records import Agreement, Comparison, Score
from evals.report import write_report
from evals.results import (
    Bundle,
    Data,
    GridPoint,
    LedgerRow,
    MaskCurve,
    MaskPoint,
    Method,
    Missing,
    Model,
    Pool,
    PoolPart,
    Results,
    Run,
    Split,
    TrainingCurve,
)  # fmt: skip
from runtime import files
from runtime.files import Ledger
from runtime.installation import program_version

WARMUP = "warmup"
METHODS = {
    WARMUP: ("Warm-up", "The shared start: supervised on the labelled part."),
    SFT: ("Labels only (SFT)", "Control: the labelled part alone, as many steps and response tokens."),
    KD: ("Pool + divergence", "Control: the same pool and masks, the divergence alone, no RL."),
    MASTERS: ("Masters", "Masks restored step by step, offline GRPO plus the divergence."),
}
CURVES = {
    "loss": "loss",
    "divergence": "divergence_nats",
    "r_acc": "r_acc",
    "r_distill": "r_distill",
    "zero_variance": "zero_variance_share",
    "grad_share_rl": "grad_share_rl",
    "grad_share_divergence": "grad_share_divergence",
    "grad_share_reference": "grad_share_reference_kl",
    "mask_ratio": "mask_ratio",
}
PER_POINT = NORMS_EVERY  # steps that one point of a curve averages


def final_name(student: str, method: str) -> str:
    """Directory of a chosen student: Masters is the product and has the plain name."""
    return student if method == MASTERS else f"{student}-{method}"


def arm_metrics(out: Path, student: str, method: str, rate: float) -> dict[str, Any]:
    """What an arm measured: validation [right, count], tokens, seconds, log."""
    return files.read_json(out / "work" / "arms" / f"{student}-{method}-{rate:g}.work" / "metrics.json")


def best_rate(out: Path, plan: Recipe, student: str, method: str) -> float:
    """The learning rate with the most right validation answers; the smaller one of equals."""
    return max(
        sorted(plan.students[student].rates),
        key=lambda rate: arm_metrics(out, student, method, rate)["validation"][0],
    )


# --- the report -------------------------------------------------------


def write(out: Path, plan: Recipe, *, command: str, smoke: bool, resumed: set[str]) -> Path:
    """Collect everything and write `report/index.html` and `report/results.json`."""
    return write_report(collect(out, plan, command=command, smoke=smoke, resumed=resumed), out / "report")


def collect(out: Path, plan: Recipe, *, command: str, smoke: bool, resumed: set[str]) -> Results:
    """The whole report as data. `resumed` names the stages that an earlier run finished."""
    ledger = Ledger(out / "ledger.jsonl").entries()
    tests = _tests(out)
    return Results(
        run=Run(
            name=plan.name,
            version=program_version(),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            seed=plan.seed,
            smoke=smoke,
            recipe_sha256=plan.sha256,
            command=command,
            seconds=sum(entry["seconds"] for entry in ledger),
            peak_rss_mib=max(entry["peak_rss_mib"] for entry in ledger),
        ),
        data=_data(out),
        models=_models(out, plan, tests),
        methods=[_method(out, plan, s, m, tests) for s in plan.students for m in METHODS],
        comparisons=[_comparison(plan, s, m, tests) for s in plan.students for m in (WARMUP, SFT, KD)],
        mask_curve=_mask_curve(out),
        training=[_training(out, plan, s, m) for s in plan.students for m in (SFT, KD, MASTERS)],
        pool=_pool(out, plan, ledger),
        bundles=_bundles(out, plan),
        examples=_examples(out, plan, tests),
        ledger=[
            LedgerRow(
                stage=entry["stage"],
                seconds=entry["seconds"],
                peak_rss_mib=entry["peak_rss_mib"],
                resumed=entry["stage"] in resumed,
            )
            for entry in ledger
        ],
        device=describe(),
        missing=[
            *demo_bundles.missing(plan),
            Missing(what="A phone or a Jetson board", why="all timings are of this computer's CPU"),
            Missing(what="Energy", why="no meter is read"),
        ],
        caveats=[
            "One seed: differences between methods below a few points may be luck of the seed.",
            "The teacher saw every training label; it stands for one whose data you do not have.",
            "Timings are from a computer that may be shared; compare the ratios, which are interleaved.",
        ],
    )


def _tests(out: Path) -> dict[str, AccuracyResult]:
    questions = easy_vqa.load("test")
    found = {}
    for path in sorted((out / "work" / "test").glob("*.json")):
        texts = files.read_json(path)
        given = [q for q in questions if str(q.id) in texts]
        found[path.stem] = AccuracyResult.of(given, [texts[str(q.id)] for q in given])
    return found


def _data(out: Path) -> Data:
    parts = demo.split(out)
    train, test = easy_vqa.load("train"), easy_vqa.load("test")

    def row(name: str, images: Sequence[int], labelled: bool, use: str) -> Split:
        chosen = set(images)
        count = sum(q.image_id in chosen for q in train)
        return Split(name=name, images=len(chosen), questions=count, labelled=labelled, use=use)

    return Data(
        name="easy-VQA",
        source="PyPI package easy-vqa",
        splits=[
            row("labelled", parts.labelled, True, "warm-up, SFT; references in the pool"),
            row(
                "unlabelled", parts.unlabelled, False, "pool; the reference is the teacher's majority answer"
            ),
            row("validation", parts.validation, True, "mask curve and learning rates, nothing else"),
            Split(
                name="test",
                images=len({q.image_id for q in test}),
                questions=len(test),
                labelled=True,
                use="this report, after everything was chosen",
            ),
        ],
        note="Split by image. The teacher was trained on the labels of the labelled and unlabelled parts.",
    )


def _models(out: Path, plan: Recipe, tests: dict[str, AccuracyResult]) -> list[Model]:
    teacher = _parameters(out / "teacher")
    config = files.read_json(out / "teacher" / "config.json")
    found = [
        Model(
            name="teacher",
            role="teacher",
            path="teacher",
            parameters=teacher,
            bytes=(out / "teacher" / "model.safetensors").stat().st_size,
            ratio=1.0,
            architecture=config["architectures"][0],
            test=tests["teacher"].score,
        )
    ]
    for student, settings in plan.students.items():
        size = _parameters(out / student)
        found.append(
            Model(
                name=settings.label,
                role="student",
                path=student,
                parameters=size,
                bytes=(out / student / "model.safetensors").stat().st_size,
                ratio=teacher / size,
                architecture=config["architectures"][0],
                test=None,
            )
        )
    return found


def _parameters(checkpoint: Path) -> int:
    from safetensors import safe_open

    with safe_open(checkpoint / "model.safetensors", "numpy") as tensors:
        return sum(int(np.prod(tensors.get_slice(name).get_shape())) for name in tensors.keys())  # noqa: SIM118


def _test_name(student: str, method: str) -> str:
    return f"{student}-warmup" if method == WARMUP else final_name(student, method)


def _method(out: Path, plan: Recipe, student: str, method: str, tests: dict[str, AccuracyResult]) -> Method:
    label, description = METHODS[method]
    settings = plan.students[student]
    if method == WARMUP:
        found = files.read_json(out / "work" / f"{student}-warmup.work" / "metrics.json")
        rate, grid = settings.warmup.lr, []
    else:
        rate = best_rate(out, plan, student, method)
        found = arm_metrics(out, student, method, rate)
        grid = [
            GridPoint(
                learning_rate=r, validation=Score.of(*arm_metrics(out, student, method, r)["validation"])
            )
            for r in settings.rates
        ]
    return Method(
        student=settings.label,
        method=method,  # type: ignore[arg-type]
        label=label,
        description=description,
        test=tests[_test_name(student, method)].score,
        validation=Score.of(*found["validation"]),
        learning_rate=rate,
        grid=grid,
        student_tokens=int(found["tokens"]),
        seconds=found["seconds"],
    )


def _comparison(plan: Recipe, student: str, method: str, tests: dict[str, AccuracyResult]) -> Comparison:
    return accuracy.compare_methods(
        plan.students[student].label,
        (method, MASTERS),
        tests[_test_name(student, method)],
        tests[_test_name(student, MASTERS)],
    )


def _mask_curve(out: Path) -> MaskCurve:
    curve = files.read_json(out / "work" / "curve.json")
    return MaskCurve(
        split="validation",
        points=[
            MaskPoint(ratio=p["ratio"], sparsity=p["sparsity"], score=Score.of(p["right"], p["count"]))
            for p in curve["points"]
        ],
        r_max=curve["r_max"],
        rule="the largest r that loses at most 3 points",
        inert=curve["inert"],
    )


def _training(out: Path, plan: Recipe, student: str, method: str) -> TrainingCurve:
    """Means over PER_POINT steps; gradient shares are measured once in as many."""
    log = arm_metrics(out, student, method, best_rate(out, plan, student, method))["log"]
    starts = range(0, len(log), PER_POINT)
    lines: dict[str, Any] = {}
    for key, name in CURVES.items():
        if any(key in entry for entry in log):
            found = [[entry[key] for entry in log[i : i + PER_POINT] if key in entry] for i in starts]
            lines[name] = [float(np.mean(values)) if values else None for values in found]
    steps = [int(log[min(i + PER_POINT, len(log)) - 1]["step"]) + 1 for i in starts]
    return TrainingCurve(student=plan.students[student].label, method=method, steps=steps, **lines)


def _pool(out: Path, plan: Recipe, ledger: list[dict[str, Any]]) -> Pool:
    """What was drawn for the chosen Masters run of the first student: masked teachers and the student."""
    student = next(iter(plan.students))
    rate = best_rate(out, plan, student, MASTERS)
    work = out / "work" / "arms" / f"{student}-{MASTERS}-{rate:g}.work"
    truth = demo.references(out, plan)
    text = demo.data(out, "train").text
    parts = []
    for i, stage in enumerate(demo.stages(out, plan)):
        drawn = pool.load(stage.pool, "teacher")
        parts.append(_pool_part("teacher", stage.ratio, drawn, truth, text))
        own = work / f"responses-{i}"
        if own.exists():
            parts.append(_pool_part("student", None, pool.load(own, "student"), truth, text))
    questions = sum(part.questions for part in parts if part.source == "teacher")
    labelled = {q.id for image in demo.split(out).labelled for q in demo.data(out, "train").by_image[image]}
    return Pool(
        questions=questions,
        responses=sum(part.responses for part in parts),
        distinct_per_question=sum(part.distinct_per_question * part.questions for part in parts) / questions,
        tokens=sum(part.tokens for part in parts),
        seconds=next(entry["seconds"] for entry in ledger if entry["stage"] == "pool"),
        pseudo_labelled=len(set(truth) - labelled),
        parts=parts,
    )


def _pool_part(
    source: Any, ratio: float | None, drawn: pool.Responses, truth: dict[int, str], text: Any
) -> PoolPart:
    every = [(q, response) for q, responses in drawn.items() for response in responses]
    right = sum(r.count * scorers.exact(text(r.ids), truth[q]) for q, r in every)
    total = sum(r.count for _, r in every)
    return PoolPart(
        source=source,
        ratio=ratio,
        questions=len(drawn),
        responses=total,
        distinct_per_question=len(every) / len(drawn),
        tokens=sum(r.count * len(r.ids) for _, r in every),
        score=Score.of(right, total),
    )


def _bundles(out: Path, plan: Recipe) -> list[Bundle]:
    timed = {
        one["bundle"]: latency.Measured.model_validate(one)
        for one in files.read_json(out / "work" / "latency.json")
    }
    found = []
    for directory, student in demo_bundles.bundle_directories(out, plan).items():
        answers = out / "work" / "answers"
        found.append(
            gather.bundle_record(
                directory,
                student=plan.students[student].label,
                method=MASTERS,
                path=f"bundles/{directory.name}",
                test=AccuracyResult.read(answers / f"{directory.name}.json").score,
                agreement=Agreement.model_validate_json(
                    (answers / f"{directory.name}.agreement.json").read_bytes()
                ),
                measured=timed.get(directory.name),
            )
        )
    return found


def _examples(out: Path, plan: Recipe, tests: dict[str, AccuracyResult]) -> list[Any]:
    student = next(iter(plan.students))
    label = plan.students[student].label
    shown = {"teacher": tests["teacher"], f"{label} labels only": tests[f"{student}-sft"]}
    shown[f"{label} Masters"] = tests[student]
    for precision in plan.export.precisions:
        name = f"{student}-onnx-{precision}"
        shown[f"{precision} bundle"] = AccuracyResult.read(out / "work" / "answers" / f"{name}.json")
    return gather.examples(demo_bundles.asked(plan), shown, seed=plan.seed)
