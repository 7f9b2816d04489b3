"""The models of one process: teachers under their masks, the student and its reference.

In: a recipe, Accelerate. Out: loaded models with how they read prompts. At most one teacher is whole in
memory at a time. Not here: serving a model to other processes (`distill/answers/answering.py`), training.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.integrations import deepspeed

from distill import recipe
from distill.forward import sharing, tree
from distill.forward.feature_store import FeatureStore
from distill.forward.sharing import Shape
from distill.inputs.data import Sample
from distill.inputs.encoding import Encoder
from distill.inputs.prompt_cache import CachedEncoder
from distill.masks.masking import EMBEDDINGS, VISION, Masker, Rule
from distill.recipe import Recipe
from distill.training import processes, student
from distill.training.parts import FrozenModel
from runtime import files
from runtime.errors import CheckpointError, InputError


@dataclass(frozen=True)
class Whole:
    """A teacher that is whole in this process, frozen, on its device; `masker` None: it is never masked."""

    number: int
    model: PreTrainedModel
    masker: Masker | None
    encoder: Encoder
    sharing: str
    on_cpu: bool = False  # only to be written down and proved, not to draw with

    def at(self, ratio: float) -> PreTrainedModel:
        """The teacher under a mask of `ratio`."""
        if self.masker is not None:
            self.masker.set(ratio)
        elif ratio:
            raise InputError(f"teacher {self.number}: asked for a mask of {ratio}, its recipe has none")
        return self.model


def load(settings: recipe.Model, dtype: str | None = None) -> PreTrainedModel:
    """A checkpoint's weights on the CPU, in `dtype` (default: the recipe's). None of its code is run."""
    try:
        with _whole_tensors():
            found = AutoModelForImageTextToText.from_pretrained(
                settings.checkpoint,
                revision=settings.revision,
                dtype=dtype or settings.dtype,
                trust_remote_code=False,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{settings.checkpoint}: cannot be loaded ({' '.join(str(error).split())[:200]})"
        ) from error
    return cast(PreTrainedModel, found.eval())


@contextlib.contextmanager
def _whole_tensors() -> Iterator[None]:
    """Under ZeRO-3 transformers loads every model in shards (`zero.Init`), of which no mask can be taken; the
    student is sharded when Accelerate prepares it."""
    before = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = before


def reader(plan: Recipe, model: recipe.Model) -> CachedEncoder:
    """How a checkpoint reads prompts: each builds them with its own processor (METHOD 3)."""
    found = CachedEncoder.load(
        model.checkpoint,
        revision=model.revision,
        max_prompt_tokens=plan.data.max_prompt_tokens,
        max_pixels=plan.data.max_pixels,
    )
    assert isinstance(found, CachedEncoder)
    return found


class Models:
    """What a run loads, and when it lets go of it. `probe`: a sample to try how a model shares prefixes."""

    def __init__(self, plan: Recipe, accelerator: Accelerator, probe: Sample | None = None) -> None:
        self.plan, self.accelerator, self.probe = plan, accelerator, probe
        self._readers: dict[tuple[str, str | None], CachedEncoder] = {}
        self.encoder: Encoder = self.reader(plan.student)
        self._whole: Whole | None = None
        self._identities: dict[int, str] = {}
        self._modes: dict[tuple[str, Shape | None], str] = {}
        self.shape: Shape | None = None
        """What a question of the pool looks like, once it is drawn: which way of sharing is cheapest."""
        self.reasons: dict[str, str] = {}

    def reader(self, model: recipe.Model) -> CachedEncoder:
        """How a checkpoint reads prompts: one encoder for all that read alike, so that they share prompts."""
        place = (model.checkpoint, model.revision)
        if place not in self._readers:
            found = reader(self.plan, model)
            known = (each for each in self._readers.values() if each.reading == found.reading)
            self._readers[place] = next(known, found)
        return self._readers[place]

    def readers(self) -> list[CachedEncoder]:
        """The different ones of student and teachers, the student's first."""
        every = [self.reader(model) for model in (self.plan.student, *self.plan.teachers)]
        return list({id(each): each for each in every}.values())

    # --- teachers -----------------------------------------------------

    def whole(self, number: int, *, on_cpu: bool = False) -> Whole:
        """Teacher `number` in this process, on its device to draw and judge with, or on the CPU to be written
        for a server. Another one in memory is let go first."""
        device = torch.device("cpu") if on_cpu else self.accelerator.device
        known = self._whole
        if known is None or known.number != number or known.on_cpu != on_cpu:
            self.release()
            settings = self.plan.teachers[number]
            model = load(settings).requires_grad_(False).to(cast(Any, device))
            mask = settings.mask
            masker = masked(model, mask.asked, mask) if mask and mask.asked else None
            encoder = self.reader(settings)
            mode = "" if on_cpu else self._mode(f"teacher {number}", model, encoder, gradients=False)
            self._whole = known = Whole(number, model, masker, encoder, mode, on_cpu)
        return known

    def free_devices(self) -> None:
        """Nothing of a teacher stays on a device: a server is about to need it."""
        if self._whole is None or not self._whole.on_cpu:
            self.release()

    def frozen(self, number: int, ratio: float) -> FrozenModel:
        """Teacher `number` under its mask for the training steps; under FSDP2 in shards."""
        settings = self.plan.teachers[number]
        if self.accelerator.is_fsdp2:
            return self._sharded(number, ratio)
        whole = self.whole(number)
        whole.at(ratio)
        mode = self._mode(f"teacher {number}", whole.model, whole.encoder, gradients=False)
        held = processes.hold(self.accelerator, whole.model)
        cache = FeatureStore() if self._vision_stays(settings) else None
        return FrozenModel(held, whole.encoder, sharing=mode, cache=cache, weight=settings.weight)

    def _sharded(self, number: int, ratio: float) -> FrozenModel:
        self.release()
        settings = self.plan.teachers[number]
        model, encoder = load(settings), self.reader(settings)
        mode = self._mode(f"teacher {number}", model, encoder, gradients=False)
        held = processes.hold(self.accelerator, model)
        mask = settings.mask
        if mask and mask.largest:
            masked(model, ratio, mask).set(ratio)
        cache = FeatureStore() if self._vision_stays(settings) else None
        return FrozenModel(held, encoder, sharing=mode, cache=cache, weight=settings.weight)

    @staticmethod
    def _vision_stays(settings: recipe.Teacher) -> bool:
        """Whether its image features are the same in every phase."""
        return settings.mask is None or not {VISION, EMBEDDINGS} & set(settings.mask.tensors)

    def identity(self, number: int) -> str:
        """What a teacher's weights are: a hash of its files (of a directory), or repository and revision."""
        settings = self.plan.teachers[number]
        if number not in self._identities:
            self._identities[number] = files.sha256_json(identity(settings))
        return self._identities[number]

    def release(self) -> None:
        """Let go of the teacher in memory."""
        if self._whole is None and not torch.cuda.is_available():
            return
        self._whole = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # --- student ------------------------------------------------------

    def student(self) -> Any:
        """The student to train: fp32 master weights (METHOD 6), frozen parts, adapters, checkpointing."""
        train = self.plan.train
        model = load(self.plan.student, "float32")
        found: Any = model
        if train.lora is not None:
            torch.manual_seed(self.plan.seed)  # adapters begin at random: the same in every process and run
            found = student.with_lora(model, train.lora.rank, train.lora.alpha, train.lora.targets)
        if train.freeze:
            student.freeze(found, train.freeze)
        if train.gradient_checkpointing:
            student.checkpointed(model)
        return found

    def reference(self, mode: str) -> FrozenModel | None:
        """A frozen copy of the initial student where the objective needs one and adapters do not give it."""
        if self.plan.train.lora is not None or not self.plan.objective.switches.needs_reference:
            return None
        held = processes.hold(self.accelerator, load(self.plan.student, "float32"))
        return FrozenModel(held, sharing=mode, cache=FeatureStore())

    def student_mode(self, model: Any) -> str:
        """How the student shares prefixes: as the recipe says, or found by a probe."""
        chosen = self.plan.train.sharing
        if chosen != "auto":
            return chosen
        return self._mode("student", student.plain(model), self.encoder, gradients=True)

    def _mode(self, name: str, model: PreTrainedModel, encoder: Encoder, *, gradients: bool) -> str:
        if self.probe is None:
            return tree.TREE
        if (name, self.shape) not in self._modes:
            row = [tree.Group(encoder.encode(self.probe))]
            mode, reason = sharing.choose(model, encoder, row, gradients=gradients, shape=self.shape)
            self._modes[name, self.shape] = mode
            self.reasons[name] = f"{mode} ({reason})"
        return self._modes[name, self.shape]

    def fallbacks(self) -> Sequence[str]:
        """Why a model does not share prefixes as a tree, in words."""
        return [f"{name}: {why}" for name, why in self.reasons.items() if not why.startswith(tree.TREE)]


def masked(model: PreTrainedModel, r_max: float, mask: recipe.Mask) -> Masker:
    """A masker of what the recipe says, up to `r_max`."""
    rules = [Rule(rule.tensors, rule.scale) for rule in mask.rules]
    return Masker(model, r_max, mask.tensors, rules=rules)


def identity(settings: recipe.Model) -> dict[str, Any]:
    """JSON-ready facts that are equal exactly where the weights and their reading are."""
    path = Path(settings.checkpoint)
    if not path.is_dir():
        return {"repository": settings.checkpoint, "revision": settings.revision, "dtype": settings.dtype}
    kept = sorted(f for f in path.iterdir() if f.suffix in (".safetensors", ".json", ".jinja", ".model"))
    return {"files": {f.name: files.sha256_file(f) for f in kept}, "dtype": settings.dtype}
