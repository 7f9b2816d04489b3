"""Models made here: small ones from random weights, trained on the labels of a built-in task.

In: sizes, a source of labelled questions. Out: a checkpoint directory as Hugging Face loads it. They stand
for the pretrained teachers and student of an ablation that a CPU can afford; a real recipe names
checkpoints. Not here: distillation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoProcessor, PreTrainedTokenizerFast

from distill import fresh, models, recipe
from distill.demo.demo_recipe import Tokens, merged
from distill.inputs.data import Sample, open_data
from distill.inputs.prompt_cache import CachedEncoder
from distill.losses.objective import Objective
from distill.strict import Positive, Rate, Strict
from distill.training import loop, processes
from distill.training.learner import Context
from distill.training.optim import Optimizing
from distill.training.steps import LabelSteps
from evals import digits
from runtime import files
from runtime.errors import InputError

TARGETS: dict[str, Callable[[str], Mapping[int, str]]] = {"digits": digits.explained}
"""Built-in tasks whose responses name what they read before the answer."""
PROCESSOR = "processor"


class LabelTraining(Strict):
    """Supervised training: `questions` a step, AdamW's peak rate `lr` (Muon's is 20/3 of it)."""

    steps: Positive
    questions: Positive
    lr: Rate


class MadeModel(Strict):
    """A model from random weights. `labels`: questions that have theirs, and a target that explains it.

    `per_seed`: made anew for every seed (a student), or once for all of them (a teacher)."""

    sizes: dict[str, dict[str, int]]
    labels: recipe.Source
    train: LabelTraining
    per_seed: bool = False


class Made(Strict):
    """Architecture, tokenizer and processor in Hugging Face's own words, and the models that share them."""

    tokenizer: Tokens
    chat_template: str
    processor: dict[str, Any]
    init: tuple[tuple[str, float], ...] = ()
    architecture: dict[str, Any]
    student: str
    teachers: tuple[str, ...]
    models: dict[str, MadeModel]


def labelled(source: recipe.Source, seed: int) -> list[tuple[Sample, str]]:
    """The source's questions that keep their label, each with its explained target."""
    if source.format not in TARGETS or not source.split:
        raise InputError(f"made.models: labels come from {', '.join(TARGETS)}, got {source.format}")
    targets = TARGETS[source.format](source.split)
    found = [sample for sample in open_data([source], seed=seed) if sample.answer is not None]
    return [(sample, targets[sample.index]) for sample in found]


def write_processor(made: Made, out: Path) -> None:
    """Tokenizer (trained on the student's labelled questions), chat template and processor settings."""
    if out.exists():
        return
    texts = [
        f"User:{sample.question}\nAssistant: {target}"
        for sample, target in labelled(made.models[made.student].labels, 0)
    ]
    tokenizer = fresh.train_tokenizer(texts, made.tokenizer.special, made.tokenizer.vocab_size)
    with files.new_directory(out) as directory:
        fresh.write_processor(tokenizer, made.processor, made.chat_template, directory)


def make(made: Made, name: str, seed: int, processor: Path, out: Path) -> Path:
    """Train model `name` from random weights into `out`; resumes. `processor` is `write_processor`'s."""
    if out.exists():
        return out
    model, work = made.models[name], out.parent / f"{out.name}.work"
    tokenizer = AutoProcessor.from_pretrained(processor).tokenizer
    initial = _initial(made, model, seed, tokenizer, work / "initial")
    fit_labels(model.labels, model.train, initial, seed, out, work)
    return out


def _initial(made: Made, model: MadeModel, seed: int, tokenizer: PreTrainedTokenizerFast, out: Path) -> Path:
    return fresh.write_checkpoint(
        out,
        merged(made.architecture, model.sizes),
        tokenizer,
        made.processor,
        made.chat_template,
        rules=made.init,
        seed=seed,
    )


def fit_labels(
    source: recipe.Source, train: LabelTraining, start: Path, seed: int, out: Path, work: Path
) -> dict[str, float]:
    """Cross-entropy on the labelled questions from the checkpoint `start` into the checkpoint `out`."""
    pairs = labelled(source, seed)
    target = {sample.id: text for sample, text in pairs}
    accelerator = processes.accelerator()
    encoder = CachedEncoder.load(str(start))
    model = models.load(recipe.Model(checkpoint=str(start)), "float32")
    passes = -(-train.steps * train.questions // len(pairs)) + 1
    steps = LabelSteps(
        [sample for sample, _ in pairs],
        Context(encoder, Objective()),
        target=lambda sample: target[sample.id],
        questions_per_step=min(train.questions, len(pairs)),
        tokens_per_device=1 << 20,
        passes=passes,
        steps=train.steps,
        seed=seed,
        accelerator=accelerator,
    )
    settings = Optimizing.muon(lr=train.lr)
    started = time.monotonic()
    log = loop.fit(model, steps, settings, work, accelerator=accelerator)
    with files.new_directory(out) as directory:
        model.save_pretrained(directory)
        encoder.processor.save_pretrained(directory)
    return {"tokens": sum(entry["tokens"] for entry in log), "seconds": time.monotonic() - started}
