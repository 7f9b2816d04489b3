"""What a recipe will take, told before anything runs: parameters, memory, disk, tokens, time.

In: a recipe, configurations, tokenizer and processor files. Out: a `Plan`. No weight is loaded.
Not here: memory (`distill/planning/plan_memory.py`), tables for people (`distill/planning/plan_tables.py`).

Memory is that of one process, at the peak of each phase: what lies there anyway by arithmetic over the
model's own tensors, what a micro-batch adds by running the step's code on tensors without values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from distill import checks
from distill.planning import symbolic
from distill.planning.plan_data import Asked, Models, ModelSize, Result
from distill.planning.plan_memory import Amount, Memory, MemoryPlan, Strategy
from distill.recipe import ModelJudge, OpenAI, Recipe

JSON_ID_BYTES, JSON_MU_BYTES = 7, 11
"""A token id and a log-prob of six decimals in a pool's JSON, commas counted."""
STATES_KEPT = 2
"""A training state is written before the one before it is removed."""
Progress = Callable[[str], None]


class Work(Result):
    """Tokens of a stage, and its seconds at the throughput that the recipe states."""

    what: str
    tokens: int
    seconds: float


class Plan(Result):
    recipe: str
    processes: int
    strategy: Strategy
    questions: int
    questions_known: bool
    prompt_tokens: int
    response_tokens: int
    models: tuple[ModelSize, ...]
    memory: tuple[Memory, ...]
    disk: tuple[Amount, ...]
    work: tuple[Work, ...]
    notes: tuple[str, ...]


def plan(
    recipe: Recipe, *, processes: int | None = None, strategy: str = "ddp", progress: Progress | None = None
) -> Plan:
    """The plan of a run in `processes` processes, one a device (default: `throughput.devices`).

    Raises CheckpointError and InputError for what would stop the run itself.
    """
    say = progress or (lambda _: None)
    say("checkpoints")
    found = checks.check(recipe)
    say("data")
    asked = Asked.of(recipe)
    count = processes or recipe.throughput.devices
    say("models")
    models = Models(recipe, found)
    memory = MemoryPlan(recipe, models, asked, count, cast(Strategy, strategy))
    say("a training step")
    training = memory.training()
    return Plan(
        recipe=recipe.name,
        processes=count,
        strategy=cast(Strategy, strategy),
        questions=asked.questions,
        questions_known=asked.known,
        prompt_tokens=len(asked.longest.ids),
        response_tokens=asked.response_tokens,
        models=models.sizes(),
        memory=(training, *memory.drawing()),
        disk=_disk(recipe, models, asked),
        work=_work(recipe, asked, count),
        notes=(*asked.notes, *memory.notes),
    )


# --- disk, tokens, time -----------------------------------------------


def _disk(recipe: Recipe, models: Models, asked: Asked) -> tuple[Amount, ...]:
    pool = recipe.pool
    drawn = asked.questions * (pool.teacher_responses + pool.student_responses) * recipe.train.passes
    tokens = drawn * asked.response_tokens
    student = symbolic.weight_bytes(models.student)
    trained = symbolic.tensor_bytes(models.trained)
    kept = asked.questions * (pool.teacher_responses + pool.student_responses) * asked.response_tokens
    hidden = max(model.config.get_text_config().hidden_size for model in models.teachers)
    signal = {"live": 0, "topk": kept * (recipe.signal.k * 6 + 4), "hidden": kept * hidden * 2}
    found = [
        Amount(what="pool", bytes=tokens * (JSON_ID_BYTES + JSON_MU_BYTES)),
        Amount(what="teacher signal", bytes=signal[recipe.signal.kind]),
        Amount(what="training states", bytes=STATES_KEPT * (trained + models.state_bytes)),
        Amount(what="checkpoints, best and last", bytes=2 * student),
    ]
    if isinstance(pool.engine, OpenAI) and pool.engine.command:
        masked = [m for t, m in zip(recipe.teachers, models.teachers, strict=True) if t.mask]
        found.append(
            Amount(
                what="a masked teacher for its server",
                bytes=max(map(symbolic.weight_bytes, masked), default=0),
            )
        )
    if isinstance(pool.engine_of_student, OpenAI) and pool.student_responses:
        found.append(Amount(what="the student for its server", bytes=student))
    return tuple(each for each in found if each.bytes)


def _work(recipe: Recipe, asked: Asked, devices: int) -> tuple[Work, ...]:
    pool, stated = recipe.pool, recipe.throughput
    length, questions = asked.response_tokens, asked.questions
    masked = any(teacher.mask and teacher.mask.largest for teacher in recipe.teachers)
    gate = sum(
        len(teacher.mask.gate.ratios) * teacher.mask.gate.samples
        for teacher in recipe.teachers
        if teacher.mask and teacher.mask.gate
    )
    responses = pool.teacher_responses + pool.student_responses
    by_teacher = stated.teacher_tokens_per_second * devices
    rows = [
        ("gate: masked teachers answer", gate * length, by_teacher),
        ("pool: teachers answer", questions * pool.teacher_responses * length, by_teacher),
        (
            "pool: pseudo labels of the full teacher (at most)",
            asked.unlabelled * pool.teacher_responses * length if masked else 0,
            by_teacher,
        ),
        (
            "pool: the student answers",
            questions * pool.student_responses * length * recipe.train.passes,
            stated.student_tokens_per_second * devices,
        ),
    ]
    if isinstance(recipe.judge, ModelJudge):
        judged = questions * responses * stated.judge_tokens_per_response * recipe.train.passes
        rows.append(("judge", judged, by_teacher))
    fed = questions * (len(asked.prompt.ids) + responses * length) * recipe.train.passes
    rows.append(("train", fed, stated.train_tokens_per_second * devices))
    return tuple(
        Work(what=what, tokens=tokens, seconds=tokens / rate) for what, tokens, rate in rows if tokens
    )
