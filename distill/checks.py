"""What a recipe asks of its checkpoints, checked from their configuration and tokenizer files alone.

In: a recipe. Out: the checkpoints' configurations, or a CheckpointError before any weight is loaded.
Not here: loading weights; checks within the recipe (`distill/recipe.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
)

from distill.recipe import Model, Recipe
from runtime.errors import CheckpointError

PROBES = (
    "The answer is 3.14, isn't it?",
    "  two  spaces\n\nand\ta tab",
    "naïve 数学 🙂 1234567890",
    "def f(x):\n    return x ** 2",
)
"""Texts that tokenizers with equal vocabularies but other rules cut differently."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint's files say. `vocabulary` is the width of its head, padding included."""

    name: str
    revision: str | None
    config: PreTrainedConfig
    quantised: str | None

    @property
    def vocabulary(self) -> int:
        return int(self.config.get_text_config().vocab_size)


@dataclass(frozen=True)
class Checkpoints:
    """Student and teachers; `tokens` is the vocabulary that all of them share."""

    student: Checkpoint
    teachers: tuple[Checkpoint, ...]
    tokens: int


def check(recipe: Recipe) -> Checkpoints:
    """Everything about the recipe's models that can be told without weights. Raises CheckpointError."""
    student = inspect(recipe.student)
    if student.quantised:
        raise CheckpointError(
            f"{student.name}: the student is quantised ({student.quantised}); it is trained in float32, give "
            "the original weights"
        )
    teachers = []
    for number, teacher in enumerate(recipe.teachers):
        found = inspect(teacher)
        if found.quantised and teacher.mask is not None:
            raise CheckpointError(
                f"{found.name}: a quantised teacher ({found.quantised}) cannot be masked; give the original "
                f"weights, or set teachers.{number}.mask: null"
            )
        teachers.append(found)
    tokens = min(check_tokenizers(student, teacher) for teacher in teachers)
    return Checkpoints(student, tuple(teachers), tokens)


def inspect(model: Model) -> Checkpoint:
    """A checkpoint's configuration; nothing of its authors' code is run. Raises CheckpointError."""
    name, revision = model.checkpoint, model.revision
    raw = _raw_config(name, revision)
    if raw.get("model_type") not in CONFIG_MAPPING:
        raise CheckpointError(_unknown(name, raw))
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise CheckpointError(
            f"{name}: model_type {config.model_type} takes no images and text together; give a "
            "vision-language model"
        )
    quantised = raw.get("quantization_config")
    method = str(quantised.get("quant_method", "unknown method")) if quantised else None
    return Checkpoint(name, revision, config, method)


def _raw_config(name: str, revision: str | None) -> Mapping[str, Any]:
    path = Path(name)
    local = path.is_absolute() or path.exists() or name.startswith(".") or name.count("/") > 1
    if local and not (path / "config.json").is_file():
        how = "" if path.exists() else f"; there is no such directory here ({Path.cwd()})"
        demo = "; `pocketvlm demo` makes it" if name.startswith("demo-out/") else ""
        raise CheckpointError(f"{name}: is no Hugging Face checkpoint directory (no config.json){how}{demo}")
    try:
        raw, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name}: neither a local directory nor a repository that can be read "
            f"({' '.join(str(error).split()).partition('. ')[0][:200]}); give the path of a checkpoint "
            "that is here, or an account and a network that reach the hub"
        ) from error
    if not raw:
        raise CheckpointError(f"{name}: its config.json is empty or absent")
    return raw


def _unknown(name: str, raw: Mapping[str, Any]) -> str:
    kind = raw.get("model_type")
    if "auto_map" not in raw:
        return f"{name}: transformers does not know model_type {kind!r}; update it or give another checkpoint"
    base = str(raw.get("_name_or_path") or "") if Path(name).exists() else ""
    twin = f"{(base or name).rstrip('/')}-HF"
    return (
        f"{name}: model_type {kind!r} needs its authors' code (auto_map in config.json), which is never run; "
        f"use the twin in transformers' own format, by convention {twin} (or -hf)"
    )


def check_tokenizers(student: Checkpoint, teacher: Checkpoint) -> int:
    """How many token ids both share. Their heads may be padded to different widths.

    Raises CheckpointError that names the first difference.
    """
    ours, theirs = _tokenizer(student), _tokenizer(teacher)
    said = f"{teacher.name} and {student.name}: teacher and student have different tokenizers"
    advice = "distillation compares distributions token by token; take both from one family"
    ours_by_id, theirs_by_id = ({i: t for t, i in each.get_vocab().items()} for each in (ours, theirs))
    for place in sorted(ours_by_id.keys() | theirs_by_id.keys()):
        found, wanted = theirs_by_id.get(place), ours_by_id.get(place)
        if found != wanted:
            raise CheckpointError(f"{said}: id {place} is {found!r} there, {wanted!r} here; {advice}")
    for text in PROBES:
        found, wanted = (each(text, add_special_tokens=False)["input_ids"] for each in (theirs, ours))
        if found != wanted:
            raise CheckpointError(f"{said}: {text!r} is {found} there, {wanted} here; {advice}")
    tokens = max(ours_by_id) + 1
    for each in (student, teacher):
        if each.vocabulary < tokens:
            raise CheckpointError(
                f"{each.name}: its head has {each.vocabulary} rows, its tokenizer {tokens} tokens; "
                "the checkpoint is incomplete"
            )
    return tokens


def _tokenizer(checkpoint: Checkpoint) -> Any:
    try:
        return AutoTokenizer.from_pretrained(
            checkpoint.name, revision=checkpoint.revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{checkpoint.name}: its tokenizer cannot be loaded ({' '.join(str(error).split())[:160]})"
        ) from error
