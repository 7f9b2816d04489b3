"""The demo from the first stage to the report: what runs when, and what is kept.

In: a recipe, an output directory, the exporter (handed in: distill and export do not know each other).
Out: `teacher/`, `student/` (Masters), `student-sft/`, `student-kd/`, the same for `student-xs`,
`bundles/NAME/`, `report/`. Not here: what the jobs do (`distill/demo/demo.py`), the report's content.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from distill.demo import demo, demo_bundles, demo_recipe, demo_report
from distill.demo.demo import KD, MASTERS, SFT
from distill.demo.demo_recipe import Recipe
from distill.demo.demo_report import arm_metrics, best_rate, final_name
from distill.jobs import Job, Workers
from distill.masks import masking
from distill.stages import Stages
from evals import easy_vqa
from runtime import files

Export = Callable[..., Any]
"""`export.export_all(checkpoint, out_dir, precisions, to=..., name=..., image_required=...)`."""
RunJobs = Callable[[Sequence[Job]], list[Any]]


def run(out: Path, plan: Recipe, export: Export, *, command: str, smoke: bool, console: Console) -> Path:
    """Run every stage that is not finished; the report's path. Resumes after any interruption."""
    easy_vqa.load("test")  # a missing extra is named before anything starts
    with files.lock(out):
        demo_recipe.claim(out, plan)
        files.remove_stale(out)
        workers = Workers()
        try:
            stages = Stages(out, console, workers)
            _distil(out, plan, stages)
            _deliver(out, plan, export, stages)
        except BaseException:
            workers.close(kill=True)
            raise
        workers.close()
        return demo_report.write(out, plan, command=command, smoke=smoke, resumed=stages.resumed)


def _distil(out: Path, plan: Recipe, stages: Stages) -> None:
    stages.run("data", "splits by image, tokenizer", lambda run: run([_data_job(out, plan)]))
    stages.run("teacher", "the teacher, and each student's warm-up", lambda run: run(_label_jobs(out, plan)))
    stages.run("curve", "accuracy of the masked teacher", lambda run: _curve(out, plan, run))
    stages.run("pool", "responses of the masked teachers", lambda run: run(_pool_jobs(out, plan)))
    stages.run("train", "Masters and its controls, every learning rate", lambda run: _train(out, plan, run))
    stages.run("test", "every checkpoint on the test questions", lambda run: run(_test_jobs(out, plan)))


def _deliver(out: Path, plan: Recipe, export: Export, stages: Stages) -> None:
    stages.run("export", "bundles through the parity gate", lambda run: run(_export_jobs(out, plan, export)))
    stages.run("answer", "checkpoints and bundles on the same questions", lambda run: _answer(out, plan, run))
    stages.run("measure", "latency of every bundle", lambda _: demo_bundles.measure(out, plan))


def _data_job(out: Path, plan: Recipe) -> Job:
    return Job("data", demo.prepare_data, {"out": out, "recipe": plan})


def _label_jobs(out: Path, plan: Recipe) -> list[Job]:
    def job(name: str, target: Path, settings: Any, train: Any, everything: bool) -> Job:
        arguments = {"target": target, "sizes": settings.sizes, "train": train, "everything": everything}
        return Job(name, demo.train_labels, {"out": out, "recipe": plan, **arguments})

    jobs = [job("teacher", out / "teacher", plan.teacher, plan.teacher.train, True)]
    for name, student in plan.students.items():
        jobs.append(job(f"{name} warm-up", out / "work" / f"{name}-warmup", student, student.warmup, False))
    return jobs


def _curve(out: Path, plan: Recipe, run: RunJobs) -> None:
    arguments = {"out": out, "images": plan.masks.images}
    points = run([Job(f"r = {r:g}", demo.curve_point, {"ratio": r, **arguments}) for r in plan.masks.ratios])
    curve = [(point["ratio"], point["right"] / point["count"]) for point in points]
    chosen = {"points": points, "r_max": masking.choose_r_max(curve), "inert": masking.is_inert(curve)}
    files.write_json(out / "work" / "curve.json", chosen)


def _pool_jobs(out: Path, plan: Recipe) -> list[Job]:
    """Each stage's masked teacher, and the full one everywhere: its majority is the missing label."""
    jobs = []
    for stage, ratio in enumerate(demo.ratios(out, plan)):
        for asked in sorted({0.0, ratio}):
            arguments = {"out": out, "recipe": plan, "stage": stage, "ratio": asked}
            jobs.append(Job(f"stage {stage}, r = {asked:g}", demo.draw_pool, arguments))
    return jobs


def _train(out: Path, plan: Recipe, run: RunJobs) -> None:
    """Masters and KD at every rate; then SFT with the response tokens that the larger of them used."""

    def job(student: str, method: str, rate: float, tokens: float) -> Job:
        arguments = {"student": student, "method": method, "rate": rate, "tokens": tokens}
        return Job(
            f"{student} {method} lr {rate:g}", demo.train_arm, {"out": out, "recipe": plan, **arguments}
        )

    grid = [(student, rate) for student, settings in plan.students.items() for rate in settings.rates]
    run([job(student, method, rate, 0.0) for student, rate in grid for method in (MASTERS, KD)])
    used = {
        student: max(
            arm_metrics(out, s, m, rate)["tokens"] for s, rate in grid for m in (MASTERS, KD) if s == student
        )
        for student in plan.students
    }
    run([job(student, SFT, rate, used[student]) for student, rate in grid])
    for student in plan.students:
        for method in (MASTERS, KD, SFT):
            source = f"{student}-{method}-{best_rate(out, plan, student, method):g}"
            with files.new_directory(out / final_name(student, method)) as temporary:
                shutil.copytree(out / "work" / "arms" / source, temporary, dirs_exist_ok=True)


def _test_jobs(out: Path, plan: Recipe) -> list[Job]:
    named = {"teacher": out / "teacher"}
    for student in plan.students:
        named[f"{student}-warmup"] = out / "work" / f"{student}-warmup"
        for method in (MASTERS, KD, SFT):
            named[final_name(student, method)] = out / final_name(student, method)
    return [
        Job(
            name,
            demo.test,
            {"out": out, "name": name, "directory": directory, "limit": plan.measure.test_images},
        )
        for name, directory in named.items()
    ]


def _export_jobs(out: Path, plan: Recipe, export: Export) -> list[Job]:
    """One job a student, which traces once and quantizes from that trace; other formats of the first."""
    wanted = [(student, "onnx", plan.export.precisions) for student in plan.students]
    first = next(iter(plan.students))
    if plan.export.gguf and not demo_bundles.no_gguf():
        wanted.append((first, demo_bundles.GGUF, plan.export.gguf))
    if plan.export.coreml and not demo_bundles.no_coreml():
        wanted.append((first, demo_bundles.COREML, plan.export.coreml))
    return [
        Job(
            f"export {student} to {to}",
            export,
            {
                "checkpoint": out / student,
                "out_dir": out / "bundles",
                "precisions": tuple(precisions),
                "to": to,
                "name": student,
                "image_required": True,
            },
        )
        for student, to, precisions in wanted
    ]


def _answer(out: Path, plan: Recipe, run: RunJobs) -> None:
    run(demo_bundles.answer_jobs(out, plan))
    run(
        [
            Job(
                f"compare {d.name}",
                demo_bundles.agree,
                {"out": out, "plan": plan, "bundle": d.name, "student": s},
            )
            for d, s in demo_bundles.bundle_directories(out, plan).items()
        ]
    )
