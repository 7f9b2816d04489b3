"""Bytes of one process at the peak of each phase of a run.

In: a recipe, its models without values, how long prompts and responses are. Out: `Memory` of training and of
drawing. Not here: how a step's memory is found (`distill/planning/symbolic.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from distill.forward import tree
from distill.planning import symbolic
from distill.planning.plan_data import FP32, Asked, Models, Result, text_start, variant
from distill.planning.symbolic import Beside, Step
from distill.recipe import Hf, Recipe
from distill.training.processes import block_classes
from distill.training.student import plain, vision_parameters

Strategy = Literal["ddp", "fsdp"]


class Amount(Result):
    what: str
    bytes: int


class Memory(Result):
    """Bytes in one process at the peak of a phase."""

    phase: str
    parts: tuple[Amount, ...]

    @property
    def total(self) -> int:
        return sum(part.bytes for part in self.parts)


class MemoryPlan:
    """Bytes of one process in each phase."""

    def __init__(
        self, recipe: Recipe, models: Models, asked: Asked, processes: int, strategy: Strategy
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
        responses = tuple((*answer[:-1], n) for n in range(count))
        placeholder = tree.image_token(plain(self.models.student))
        together = self.recipe.data.together if placeholder in prompt.ids else 1
        row = [tree.Group(variant(prompt, placeholder, n), responses) for n in range(together)]
        tail = together * (len(prompt.ids) - text_start(prompt, placeholder))
        fed = together * count * (len(answer) - 1)
        width = len(prompt.ids) + fed if together == 1 else len(prompt.ids) + tail + fed
        if self.recipe.train.sharing == tree.NAIVE:
            width = together * count * (len(prompt.ids) + len(answer) - 1)
        own = max(1, self.recipe.train.questions_per_step // (together * self.processes))
        rows = max(1, min(own, self.recipe.train.tokens_per_device // width))
        self.accumulates = rows < own
        if width > self.recipe.train.tokens_per_device:
            self.notes.append(
                f"a row ({together} questions with their responses) is {width} tokens, "
                f"train.tokens_per_device {self.recipe.train.tokens_per_device}: a micro-batch holds one row"
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
        questions = self.recipe.data.together
        tokens = engine.rows * (len(self.asked.longest.ids) + questions * count * settings.max_new_tokens)
        logits = engine.rows * questions * count * config.vocab_size * FP32 * 2  # raw and processed
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
