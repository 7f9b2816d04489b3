"""The demo's distillation: from nothing to trained students on easy-VQA, stage by stage.

In: a recipe and an output directory. Out: HF checkpoint directories (`teacher/`, `student/`, ...), the
pool, and `work/*.json` with what was measured on the way. Not here: export, bundles, the report.

    data -> teacher (and the students' warm-ups) -> curve -> pool -> train -> test

Every job writes its result last and in one piece; a job whose result is there is not run again.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from distill import fresh, jobs
from distill.demo import plans, pool, vqa
from distill.demo.demo_recipe import LabelTraining, Recipe
from distill.demo.pool import Row
from distill.losses.objective import Objective
from distill.masks import masking
from distill.training import loop
from evals import easy_vqa, scorers
from runtime import files

SFT, KD, MASTERS = "sft", "kd", "masters"


def load(directory: Path) -> PreTrainedModel:
    return cast(PreTrainedModel, AutoModelForImageTextToText.from_pretrained(directory).eval())


def frozen(directory: Path) -> PreTrainedModel:
    return load(directory).requires_grad_(False)


@functools.lru_cache(maxsize=2)
def data(out: Path, split: str) -> vqa.VqaData:
    """A split as this run's processor prepares it; kept for the life of the process."""
    return vqa.embedded(split, AutoProcessor.from_pretrained(out / "work" / "processor"))


def split(out: Path) -> vqa.Split:
    saved = files.read_json(out / "work" / "split.json")
    return vqa.Split(**{name: tuple(images) for name, images in saved.items()})


def prepare_data(out: Path, recipe: Recipe) -> None:
    """Split the images, train the tokenizer on the labelled part, write the processor once."""
    questions = easy_vqa.load("train")
    parts = vqa.split_by_image(
        questions,
        validation_images=recipe.data.validation_images,
        labelled_questions=recipe.data.labelled_questions,
        seed=recipe.seed,
    )
    labelled = set(parts.labelled)
    seen = [q for q in questions if q.image_id in labelled]
    known = easy_vqa.facts(seen)
    texts = [f"User:{q.question}\nAssistant: {easy_vqa.explained(q, known)}" for q in seen]
    tokenizer = fresh.train_tokenizer(texts, recipe.tokenizer.special, recipe.tokenizer.vocab_size)
    with files.new_directory(out / "work" / "processor") as directory:
        fresh.write_processor(tokenizer, recipe.processor, recipe.chat_template, directory)
    files.write_json(out / "work" / "split.json", asdict(parts))


def new_model(
    out: Path, recipe: Recipe, sizes: dict[str, dict[str, int]], directory: Path
) -> PreTrainedModel:
    """A randomly initialised model of these sizes with the run's processor, written to `directory`."""
    processor = AutoProcessor.from_pretrained(out / "work" / "processor")
    fresh.write_checkpoint(
        directory,
        recipe.config(sizes),
        processor.tokenizer,
        recipe.processor,
        recipe.chat_template,
        rules=recipe.init,
        seed=recipe.seed,
    )
    return load(directory)


def save(model: PreTrainedModel, out: Path, directory: Path) -> None:
    """Write a checkpoint directory in one piece: weights, configuration, processor."""
    with files.new_directory(directory) as temporary:
        model.save_pretrained(temporary)
        AutoProcessor.from_pretrained(out / "work" / "processor").save_pretrained(temporary)


def _label_plan(
    out: Path, images: Sequence[int], train: LabelTraining, seed: int, known_from: Sequence[int]
) -> plans.LabelPlan:
    """Supervised steps on `images`; the facts that explain answers come from `known_from` alone."""
    vqa_data = data(out, "train")
    known = easy_vqa.facts([q for image in known_from for q in vqa_data.by_image[image]])
    return plans.LabelPlan(
        vqa_data,
        images,
        lambda question: easy_vqa.explained(vqa_data.question[question], known),
        steps=train.steps,
        images_per_step=train.images,
        questions_per_image=train.questions,
        seed=seed,
    )


def train_labels(
    out: Path,
    recipe: Recipe,
    target: Path,
    sizes: dict[str, dict[str, int]],
    train: LabelTraining,
    everything: bool,
) -> None:
    """The teacher (`everything`: all images but validation) or a student's warm-up (labelled images)."""
    if target.exists():
        return
    work = out / "work" / f"{target.name}.work"
    parts = split(out)
    images = parts.labelled + parts.unlabelled if everything else parts.labelled
    model = new_model(out, recipe, sizes, work / "initial")
    plan = _label_plan(out, images, train, recipe.seed, images)
    started = time.monotonic()
    log = loop.fit(model, plan, loop.Optimizing.muon(train.lr), work, progress=jobs.report)
    _write_metrics(work, model, out, log, time.monotonic() - started)
    save(model, out, target)


def _write_metrics(
    work: Path, model: PreTrainedModel, out: Path, log: list[dict[str, float]], seconds: float
) -> dict[str, Any]:
    right, count = validate(model, out, split(out).validation)
    found = {
        "validation": [right, count],
        "tokens": sum(entry["tokens"] for entry in log),
        "seconds": seconds,
        "log": log,
    }
    files.write_json(work / "metrics.json", found)
    return found


def validate(model: PreTrainedModel, out: Path, images: Sequence[int]) -> tuple[int, int]:
    """Right answers and questions on images of the training split."""
    vqa_data = data(out, "train")
    texts = vqa.answers(model, vqa_data, list(images))
    right = sum(scorers.exact(text, vqa_data.question[question].answer) for question, text in texts.items())
    return right, len(texts)


def curve_point(out: Path, ratio: float, images: int) -> dict[str, float]:
    """The teacher's validation accuracy under a mask of `ratio`."""
    teacher = frozen(out / "teacher")
    masker = masking.Masker(teacher, ratio)
    masker.set(ratio)
    right, count = validate(teacher, out, split(out).validation[:images])
    return {"ratio": ratio, "sparsity": masker.sparsity, "right": right, "count": count}


def rows(out: Path, recipe: Recipe) -> list[Row]:
    """Every question about every training image, a few to a row, rows shuffled: the pool's questions."""
    vqa_data, parts = data(out, "train"), split(out)
    draw = np.random.default_rng([recipe.seed, 4])
    size = recipe.pool.questions_per_row
    found: list[Row] = []
    for _ in range(recipe.pool.passes):
        visits = []
        for image in sorted(parts.labelled + parts.unlabelled):
            asked = draw.permutation([q.id for q in vqa_data.by_image[image]]).tolist()
            visits += [Row(image, tuple(asked[i : i + size])) for i in range(0, len(asked), size)]
        found += [visits[i] for i in draw.permutation(len(visits))]
    return found[: recipe.pool.limit_rows]


def ratios(out: Path, recipe: Recipe) -> tuple[float, ...]:
    """The mask ratio of each stage, from the r_max that the curve chose down to 0 (METHOD 2, Eq. 3)."""
    r_max = files.read_json(out / "work" / "curve.json")["r_max"]
    count = recipe.masks.stages
    return masking.schedule(r_max, r_max / (count - 1)) if r_max else (0.0,) * count


def pool_name(stage: int, ratio: float) -> str:
    """Directory of what the teacher, masked at `ratio`, answered to a stage's questions."""
    return f"stage-{stage}" if ratio else f"full-{stage}"


def stages(out: Path, recipe: Recipe) -> list[plans.Stage]:
    """Equal shares of the rows for each mask ratio. At ratio 0 the stage's pool is the full teacher's."""
    every = rows(out, recipe)
    cuts = np.linspace(0, len(every), recipe.masks.stages + 1).astype(int)
    return [
        plans.Stage(ratio, tuple(every[cuts[i] : cuts[i + 1]]), out / "work" / "pool" / pool_name(i, ratio))
        for i, ratio in enumerate(ratios(out, recipe))
    ]


def draw_pool(out: Path, recipe: Recipe, stage: int, ratio: float) -> None:
    """Let the teacher, masked at `ratio`, answer the questions of a stage."""
    directory = out / "work" / "pool" / pool_name(stage, ratio)
    done = directory / "done.json"
    if done.exists():
        return
    teacher = frozen(out / "teacher")
    masker = masking.Masker(teacher, ratio)
    masker.set(ratio)
    pool.draw(
        teacher,
        data(out, "train"),
        stages(out, recipe)[stage].rows,
        recipe.pool.teacher_responses,
        "teacher",
        directory,
        seed=int(np.random.SeedSequence([recipe.seed, 5, stage, round(ratio * 1000)]).generate_state(1)[0]),
        progress=jobs.report,
    )
    files.write_json(done, {"ratio": ratio, "sparsity": masker.sparsity})


def references(out: Path, recipe: Recipe) -> dict[int, str]:
    """The reference answer of every pool question: its label on the labelled images, elsewhere the
    majority answer of the unmasked teacher (METHOD 4)."""
    vqa_data = data(out, "train")
    found = {}
    for stage in range(recipe.masks.stages):
        for question, responses in pool.load(out / "work" / "pool" / f"full-{stage}", "teacher").items():
            found[question] = pool.majority(responses, vqa_data.text, scorers.last_word)
    for image in split(out).labelled:
        found.update({q.id: q.answer for q in vqa_data.by_image[image]})
    return found


def train_arm(out: Path, recipe: Recipe, student: str, method: str, rate: float, tokens: float) -> None:
    """One student, one method, one learning rate, from the shared warm-up. `tokens` sizes SFT only."""
    target = out / "work" / "arms" / f"{student}-{method}-{rate:g}"
    if target.exists():
        return
    work = target.parent / f"{target.name}.work"
    settings = recipe.students[student]
    model = load(out / "work" / f"{student}-warmup")
    plan: loop.Plan
    if method == SFT:
        plan = _sft_plan(out, recipe, student, tokens)
    else:
        switches = getattr(Objective, recipe.objective.preset)()
        switches = replace(switches, **recipe.objective.change)
        if method == KD:
            switches = replace(switches, rl=0.0, kl_beta=0.0)
        teacher = frozen(out / "teacher")
        every = stages(out, recipe)
        plan = plans.PoolPlan(
            data(out, "train"),
            every,
            teacher,
            masking.Masker(teacher, max(stage.ratio for stage in every)),
            frozen(out / "work" / f"{student}-warmup"),
            references(out, recipe),
            switches,
            work,
            rows_per_step=settings.rows_per_step,
            student_responses=recipe.pool.student_responses,
            seed=recipe.seed,
        )
    started = time.monotonic()
    log = loop.fit(model, plan, loop.Optimizing.muon(rate), work, progress=jobs.report)
    _write_metrics(work, model, out, log, time.monotonic() - started)
    save(model, out, target)


def _sft_plan(out: Path, recipe: Recipe, student: str, tokens: float) -> plans.LabelPlan:
    """As many steps as the pool arms take, and as many response tokens in all as the larger of them used."""
    parts, vqa_data = split(out), data(out, "train")
    settings = recipe.students[student]
    steps = sum(math.ceil(len(stage.rows) / settings.rows_per_step) for stage in stages(out, recipe))
    asked = [q for image in parts.labelled for q in vqa_data.by_image[image]]
    known = easy_vqa.facts(asked)
    length = float(np.mean([len(vqa_data.response(easy_vqa.explained(q, known))) for q in asked]))
    images = max(1, round(tokens / steps / length / settings.warmup.questions))
    train = settings.warmup.model_copy(update={"steps": steps, "images": images})
    return _label_plan(out, parts.labelled, train, recipe.seed + 1, parts.labelled)


def test(out: Path, name: str, directory: Path, limit: int | None = None) -> None:
    """Free answers of a checkpoint to every test question, once, after everything was chosen."""
    target = out / "work" / "test" / f"{name}.json"
    if target.exists():
        return
    vqa_data = data(out, "test")
    texts = vqa.answers(load(directory), vqa_data, sorted(vqa_data.by_image)[:limit])
    files.write_json(target, {str(question): text for question, text in sorted(texts.items())})
