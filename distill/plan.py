"""What a recipe will take, told before anything runs: parameters, memory, disk, tokens, time.

In: a recipe, configurations, tokenizer and processor files. Out: a `Plan`. No weight is loaded.
Not here: how a step's memory is found (`distill/symbolic.py`), tables for people (`distill/plan_tables.py`).

Memory is that of one process, at the peak of each phase: what lies there anyway by arithmetic over the
model's own tensors, what a micro-batch adds by running the step's code on tensors without values.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict

from distill import checks, symbolic, tree
from distill.checks import Checkpoint
from distill.data import Dataset, Sample, SampleError, open_data
from distill.encoding import Encoder, Prompt
from distill.images import ImageSource
from distill.masking import maskable
from distill.optim import Optimizing, build, parts
from distill.processes import block_classes
from distill.recipe import Hf, ModelJudge, OpenAI, Recipe, Teacher
from distill.student import plain, vision_parameters
from distill.symbolic import Beside, Step
from runtime.errors import InputError

FP32 = 4
LOOKED_AT = 16
"""Samples of the data whose prompts stand for all of them."""
JSON_ID_BYTES, JSON_MU_BYTES = 7, 11
"""A token id and a log-prob of six decimals in a pool's JSON, commas counted."""
STATES_KEPT = 2
"""A training state is written before the one before it is removed."""
Strategy = Literal["ddp", "fsdp"]
Progress = Callable[[str], None]


class _Result(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSize(_Result):
    role: str
    name: str
    parameters: int
    trainable: int
    dtype: str


class Amount(_Result):
    what: str
    bytes: int


class Memory(_Result):
    """Bytes in one process at the peak of a phase."""

    phase: str
    parts: tuple[Amount, ...]

    @property
    def total(self) -> int:
        return sum(part.bytes for part in self.parts)


class Work(_Result):
    """Tokens of a stage, and its seconds at the throughput that the recipe states."""

    what: str
    tokens: int
    seconds: float


class Plan(_Result):
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
    asked = _Asked.of(recipe)
    count = processes or recipe.throughput.devices
    say("models")
    models = _Models(recipe, found)
    memory = _MemoryPlan(recipe, models, asked, count, cast(Strategy, strategy))
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


# --- what is asked ----------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """How many questions there are, how many without a label, how long prompts and responses are."""

    questions: int
    unlabelled: int
    known: bool
    prompt: Prompt  # of mean length
    longest: Prompt
    response_tokens: int
    notes: tuple[str, ...]

    @classmethod
    def of(cls, recipe: Recipe) -> _Asked:
        stated, notes = recipe.throughput, []
        encoder = Encoder.load(
            recipe.student.checkpoint, revision=recipe.student.revision, max_pixels=recipe.data.max_pixels
        )
        length = stated.mean_response_tokens or recipe.pool.sampling.max_new_tokens
        if stated.mean_response_tokens is None:
            notes.append(
                f"responses are reckoned with {length} tokens, the longest allowed; "
                "set throughput.mean_response_tokens"
            )
        try:
            data = open_data(recipe.data.train, seed=recipe.seed)
            prompts = _looked_at(data, encoder)
            count, known = len(data), True
            sizes = [len(part) for part in data.parts]
        except InputError as error:
            prompts, known, count = [], False, stated.questions or 1000
            sizes = [count // len(recipe.data.train)] * len(recipe.data.train)
            notes.append(f"the data cannot be read yet ({error}); reckoned with {count} questions")
        if not prompts:
            notes.append("prompts are reckoned with throughput.mean_prompt_tokens and pixels_per_image")
            prompts = [
                blank_prompt(
                    encoder, stated.images_per_row, stated.pixels_per_image, stated.mean_prompt_tokens
                )
            ]
        prompts.sort(key=lambda prompt: len(prompt.ids))
        labels = [source.labels for source in recipe.data.train]
        hidden = sum(
            0 if kept == "all" else size if kept == "none" else max(0, size - int(kept))
            for kept, size in zip(labels, sizes, strict=True)
        )
        return cls(count, hidden, known, prompts[len(prompts) // 2], prompts[-1], length, tuple(notes))


def _looked_at(data: Dataset, encoder: Encoder) -> list[Prompt]:
    """Prompts of a few samples, spread over the data; those that fail are reported by the run."""
    found = []
    for place in range(0, len(data), max(1, len(data) // LOOKED_AT)):
        try:
            found.append(encoder.encode(data[place]))
        except (SampleError, InputError):
            continue
    return found


def blank_prompt(encoder: Encoder, images: int, pixels: int, tokens: int) -> Prompt:
    """A prompt with `images` empty pictures of `pixels`, filled up with text to `tokens` ids (never cut)."""
    side = max(1, round(pixels**0.5))
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (127, 127, 127)).save(buffer, "PNG")
    content: list[dict[str, str]] = [{"type": "image"}] * images + [{"type": "text", "text": "?"}]
    source = ImageSource(data=buffer.getvalue())
    prompt = encoder.encode(Sample("blank", ({"role": "user", "content": content},), (source,) * images))
    return Prompt(prompt.ids + prompt.ids[-1:] * max(0, tokens - len(prompt.ids)), prompt.vision, prompt.key)


# --- models -----------------------------------------------------------


class _Models:
    """The recipe's models without values, and the bytes that they take."""

    def __init__(self, recipe: Recipe, found: checks.Checkpoints) -> None:
        self.recipe = recipe
        self.student = symbolic.trainee(symbolic.empty_model(found.student.config), recipe.train)
        self.teachers = [
            symbolic.empty_model(each.config, _dtype(settings, each))
            for settings, each in zip(recipe.teachers, found.teachers, strict=True)
        ]
        needed = recipe.objective.switches.needs_reference
        self.reference_by_adapters = needed and recipe.train.lora is not None
        self.reference = (
            symbolic.empty_model(found.student.config) if needed and recipe.train.lora is None else None
        )

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.student.parameters() if p.requires_grad]

    @property
    def state_bytes(self) -> int:
        """Of the optimizer: two fp32 numbers a weight (AdamW), one for the matrices of Muon."""
        optimizer = build(self.student, Optimizing(optimizer=self.recipe.train.optimizer))
        return sum(
            (1 if isinstance(part, torch.optim.Muon) else 2) * p.numel() * FP32
            for part in parts(optimizer)
            for group in part.param_groups
            for p in group["params"]
        )

    def kept_bytes(self, number: int) -> int:
        """What a mask keeps aside: the values up to r_max, and a bit a weight (METHOD 1)."""
        mask = self.recipe.teachers[number].mask
        if mask is None or not mask.largest:
            return 0
        touched = [each.values() for each in maskable(self.teachers[number], mask.tensors).values()]
        return sum(int(mask.largest * v.numel()) * v.element_size() + -(-v.numel() // 8) for v in touched)

    def sizes(self) -> tuple[ModelSize, ...]:
        recipe = self.recipe
        rows: list[tuple[str, str, Any, int]] = [
            ("student", recipe.student.checkpoint, self.student, sum(p.numel() for p in self.trained))
        ]
        for number, (settings, model) in enumerate(zip(recipe.teachers, self.teachers, strict=True)):
            role = "teacher" if len(self.teachers) == 1 else f"teacher {number}"
            rows.append((role, settings.checkpoint, model, 0))
        if self.reference is not None:
            rows.append(("reference", recipe.student.checkpoint, self.reference, 0))
        return tuple(
            ModelSize(
                role=role,
                name=name,
                parameters=sum(p.numel() for p in model.parameters()),
                trainable=trainable,
                dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            )
            for role, name, model, trainable in rows
        )


def _dtype(settings: Teacher, checkpoint: Checkpoint) -> torch.dtype:
    """The type of a teacher's weights: as the recipe says, or as the checkpoint was written."""
    if settings.dtype != "auto":
        return getattr(torch, settings.dtype)
    stated = getattr(checkpoint.config, "dtype", None) or getattr(
        checkpoint.config.get_text_config(), "dtype", None
    )
    return getattr(torch, stated) if isinstance(stated, str) else stated or torch.float32


# --- memory -----------------------------------------------------------


class _MemoryPlan:
    """Bytes of one process in each phase."""

    def __init__(
        self, recipe: Recipe, models: _Models, asked: _Asked, processes: int, strategy: Strategy
    ) -> None:
        self.recipe, self.models, self.asked = recipe, models, asked
        self.processes, self.sharded = processes, strategy == "fsdp" and processes > 1
        self.notes: list[str] = []

    def training(self) -> Memory:
        """A step with gradients of an earlier micro-batch, where a step has several."""
        recipe, models = self.recipe, self.models
        rows = self._rows()
        step = self._step(rows)
        share = self.processes if self.sharded else 1
        gradients = symbolic.tensor_bytes(models.trained)
        together = recipe.objective.together != "one"
        frozen = [symbolic.weight_bytes(model) for model in models.teachers]
        kept = [models.kept_bytes(number) for number in range(len(frozen))]
        found = [
            Amount(what="student, fp32 weights", bytes=symbolic.weight_bytes(models.student) // share),
            Amount(what="gradients", bytes=gradients // share),
            Amount(what="optimizer states", bytes=models.state_bytes // share),
        ]
        if self.processes > 1 and not self.sharded:
            found.append(Amount(what="gradients in DDP's buckets", bytes=gradients))
        if self.sharded:
            found.append(Amount(what="student's gathered blocks", bytes=self._gathered(models.student, True)))
        held = [self._held(model, size) for model, size in zip(models.teachers, frozen, strict=True)]
        largest = max(range(len(held)), key=lambda i: held[i] + kept[i] // share)
        counted = range(len(held)) if together else [largest]
        name = "teachers" if together else "teacher" if len(held) == 1 else f"teacher {largest}, the largest"
        if recipe.signal.kind == "live" and recipe.objective.switches.needs_teacher:
            found.append(Amount(what=f"{name}, weights", bytes=sum(held[i] for i in counted)))
            found.append(
                Amount(what="masked weights kept aside", bytes=sum(kept[i] for i in counted) // share)
            )
        if models.reference is not None:
            whole = symbolic.weight_bytes(models.reference)
            found.append(Amount(what="reference", bytes=self._held(models.reference, whole)))
        if step is not None:
            found += [
                Amount(what="activations", bytes=step.activations),
                Amount(what="copies of weights in bf16", bytes=0 if self.sharded else step.casts),
                Amount(what="chunks of log-probs", bytes=step.loss),
                Amount(what="working space", bytes=step.working),
            ]
        return Memory(phase="training", parts=tuple(each for each in found if each.bytes))

    def _rows(self) -> list[tree.Row]:
        """As many questions as a micro-batch of `tokens_per_device` takes, at least one, at most a step's."""
        pool = self.recipe.pool
        count = max(1, pool.teacher_responses + pool.student_responses)
        prompt = self.asked.prompt
        answer = (prompt.ids[-1],) * self.asked.response_tokens
        row = [tree.Group(prompt, tuple((*answer[:-1], n) for n in range(count)))]
        width = len(prompt.ids) + count * (len(answer) - 1)
        if self.recipe.train.sharing == tree.NAIVE:
            width = count * (len(prompt.ids) + len(answer) - 1)
        own = -(-self.recipe.train.questions_per_step // self.processes)
        rows = max(1, min(own, self.recipe.train.tokens_per_device // width))
        self.accumulates = rows < own
        if width > self.recipe.train.tokens_per_device:
            self.notes.append(
                f"one question with its responses is {width} tokens, train.tokens_per_device is "
                f"{self.recipe.train.tokens_per_device}: a micro-batch holds one question"
            )
        return [row] * rows

    def _step(self, rows: Sequence[tree.Row]) -> Step | None:
        recipe, models = self.recipe, self.models
        switches = recipe.objective.switches
        live = recipe.signal.kind == "live" and switches.needs_teacher
        teachers = models.teachers if recipe.objective.together != "one" else models.teachers[-1:]
        train = recipe.train
        found, why = symbolic.try_or_none(
            lambda: symbolic.micro_batch(
                models.student,
                rows,
                [Beside(model, rows) for model in teachers] if live else [],
                Beside(models.reference, rows) if models.reference is not None else None,
                train,
                kind=switches.divergence_kind,
                alpha=switches.alpha,
                reference_by_adapters=models.reference_by_adapters,
                accumulates=self.accumulates,
                cached_features=not any(p.requires_grad for p in vision_parameters(plain(models.student))),
            )
        )
        if found is None:
            self.notes.append(f"activations are not counted: the model cannot be run without values ({why})")
        return found

    def _held(self, model: Any, whole: int) -> int:
        """A frozen model in one process: under FSDP2 its decoder in shards, the rest whole."""
        if not self.sharded:
            return whole
        decoder = symbolic.tensor_bytes(model.base_model.get_decoder().parameters())
        return whole - decoder + decoder // self.processes + self._blocks(model)

    def _gathered(self, model: Any, gradients: bool) -> int:
        """What FSDP2 holds whole at a time: everything outside of blocks, and two blocks; their gradients."""
        size = 2 if self.recipe.train.precision == "bf16" else FP32
        bare = plain(model)
        inside = self._block_parameters(bare)
        blocks = sum(sorted((sum(p.numel() for p in each) for each in inside), reverse=True)[:2])
        ids = {id(p) for each in inside for p in each}
        outside = sum(p.numel() for p in bare.parameters() if id(p) not in ids)
        return size * (outside + blocks) * (2 if gradients else 1)

    def _blocks(self, model: Any) -> int:
        sizes = [symbolic.tensor_bytes(each) for each in self._block_parameters(model)]
        return sum(sorted(sizes, reverse=True)[:2])

    @staticmethod
    def _block_parameters(model: Any) -> list[list[torch.nn.Parameter]]:
        names = set(block_classes(model))
        return [list(m.parameters()) for m in model.modules() if type(m).__name__ in names]

    # --- drawing ------------------------------------------------------

    def drawing(self) -> list[Memory]:
        """Teacher and student as they draw responses in this process; a server has a memory of its own."""
        pool, found = self.recipe.pool, []
        for number, model in enumerate(self.models.teachers):
            if isinstance(pool.engine, Hf) and pool.teacher_responses:
                kept = Amount(what="masked weights kept aside", bytes=self.models.kept_bytes(number))
                name = "teacher" if len(self.models.teachers) == 1 else f"teacher {number}"
                found.append(self._drawer(name, model, pool.engine, pool.teacher_responses, kept))
        if isinstance(pool.engine_of_student, Hf) and pool.student_responses:
            rest = Amount(
                what="optimizer states",
                bytes=self.models.state_bytes // (self.processes if self.sharded else 1),
            )
            bare = plain(self.models.student)
            found.append(self._drawer("student", bare, pool.engine_of_student, pool.student_responses, rest))
        return found

    def _drawer(self, name: str, model: Any, engine: Hf, count: int, more: Amount) -> Memory:
        settings = self.recipe.pool.sampling
        config = model.config.get_text_config()
        tokens = engine.rows * (len(self.asked.longest.ids) + count * settings.max_new_tokens)
        logits = engine.rows * count * config.vocab_size * FP32 * 2  # raw and processed
        found = (
            Amount(what="weights", bytes=symbolic.weight_bytes(model)),
            more,
            Amount(what="key-value cache", bytes=tokens * cache_bytes(model)),
            Amount(what="logits of a step", bytes=logits),
        )
        return Memory(phase=f"drawing, {name}", parts=tuple(each for each in found if each.bytes))


def cache_bytes(model: Any) -> int:
    """Bytes of keys and values of one token, in all layers with attention."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers = sum("attention" in kind for kind in kinds)
    return 2 * layers * heads * head * next(model.parameters()).element_size()


# --- disk, tokens, time -----------------------------------------------


def _disk(recipe: Recipe, models: _Models, asked: _Asked) -> tuple[Amount, ...]:
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


def _work(recipe: Recipe, asked: _Asked, devices: int) -> tuple[Work, ...]:
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
