"""Opens a Hugging Face checkpoint directory: safetensors only, no remote code, one clear line when not.

In: a path. Out: a `Checkpoint` (model in float32 on the CPU, processor, task, hash). Not here: what a
family looks like inside (`families/`).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from evals.asking.subjects import checkpoint_sha256
from evals.torch_session import TOKENIZER, quiet_transformers, take_template, take_tokenizer
from export import weights
from runtime.errors import CheckpointError, MissingExtra

TASK = "image-text-to-text"
_OLDER_TASK = "image-to-text"  # what optimum calls some of them; their loader is the same
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_ADAPTER = "adapter_config.json"
_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint. `model` is a PreTrainedModel in eval mode, `processor` what AutoProcessor gave.

    `notes`: what of the directory is not in it, for the manifest.
    """

    path: Path
    model: Any
    processor: Any
    notes: tuple[str, ...] = ()

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def model_type(self) -> str:
        return str(self.config.model_type)

    @cached_property
    def parameters(self) -> int:
        """Distinct parameters: a tied matrix counts once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def sha256(self) -> str:
        """Hash of the sorted `HASH  NAME` lines of weights, configuration, tokenizer and template."""
        return checkpoint_sha256(self.path)

    def forget(self) -> None:
        """Free the weights; configuration, modules, buffers, processor and `parameters` stay."""
        import torch

        assert self.parameters  # counted while tied matrices are one
        for module in self.model.modules():
            for name, each in module._parameters.items():
                if each is not None:
                    module._parameters[name] = torch.nn.Parameter(each.to("meta"), requires_grad=False)


def read_config(path: Path) -> dict[str, Any]:
    """The checkpoint's `config.json`, after everything that can be refused before torch is imported.

    Raises CheckpointError: no directory or configuration, remote code, weights absent, partial or pickled.
    """
    if not path.is_dir():
        kind = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path}: {kind}; expected a Hugging Face checkpoint directory")
    config_path = path / "config.json"
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no config.json; {_instead(path)}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config_path}: cannot be read as JSON ({error}); copy it again") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{config_path}: has no model_type; expected a transformers configuration")
    if "auto_map" in config:
        raise CheckpointError(
            f"{config_path}: auto_map asks for code shipped with the checkpoint, which is never run; take "
            f"the same model for transformers itself, often published as {path.resolve().name}-hf or -HF"
        )
    _check_weights(path)
    if isinstance(quantized := config.get("quantization_config"), dict):
        raise CheckpointError(
            f"{config_path}: weights quantized by {quantized.get('quant_method', 'some tool')}; export "
            "the model in 16 or 32 bits (merge an adapter into the base as it was), and give --precision"
        )
    _check_beside(path)
    return config


def _instead(path: Path) -> str:
    """What to do about a directory without a configuration."""
    if (path / _ADAPTER).is_file():
        return f"it is an adapter of {_base_of(path)}; {weights.MERGE}"
    steps = [each for each in path.glob("checkpoint-*") if (each / "config.json").is_file()]
    numbers = [(int(number), each) for each in steps if (number := each.name.rpartition("-")[2]).isdigit()]
    if numbers:
        return (
            f"it has {len(numbers)} checkpoints of a training in it; take one, {max(numbers)[1]} is the last"
        )
    return "expected a Hugging Face checkpoint directory"


def _base_of(path: Path) -> str:
    try:
        return str(json.loads((path / _ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return "another model"


def _check_beside(path: Path) -> None:
    """Refuse files beside the weights that transformers would heed or pass over without a word."""
    if (path / _ADAPTER).is_file():
        raise CheckpointError(
            f"{path}: a whole model and {_ADAPTER}, which transformers would put on top of it; if it is "
            f"merged already, move the adapter's files away; if not, {weights.MERGE}"
        )
    generation = path / "generation_config.json"
    try:
        if generation.is_file() and not isinstance(json.loads(generation.read_text(encoding="utf-8")), dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{generation}: cannot be read as JSON ({error}); copy it again") from error


def _check_weights(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    if index.exists() and (path / "model.safetensors").is_file():
        raise CheckpointError(
            f"{path}: model.safetensors and {index.name} are two models, and transformers takes the first; "
            "move the older one away"
        )
    if index.exists():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index}: is no index of shards ({error}); copy it again") from error
        if missing := [name for name in shards if not (path / name).is_file()]:
            raise CheckpointError(
                f"{path}: {len(missing)} of {len(shards)} weight shards missing ({missing[0]}); copy them"
            )
        return
    if (path / "model.safetensors").is_file():
        return
    if (path / _ADAPTER).is_file():
        raise CheckpointError(f"{path}: no model.safetensors; {_instead(path)}")
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{path}: weights only as pickle ({pickles[0]}), which can run code and is not read; "
            "save the model again with save_pretrained (safetensors)"
        )
    raise CheckpointError(f"{path}: no model.safetensors; expected the weights beside config.json")


def load(path: Path) -> Checkpoint:
    """Load model and processor from a checked directory, offline. Raises CheckpointError or MissingExtra."""
    read_config(path)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor
    except ImportError as error:
        raise MissingExtra(error.name or "torch", "export") from error
    common = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet_transformers():
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                path, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **common
            )
            processor = AutoProcessor.from_pretrained(path, **common)
    except Exception as error:  # transformers, safetensors and tokenizers each raise classes of their own
        next_step = "copy it again, or save it again with save_pretrained"
        if not (path / "tokenizer.json").is_file():
            next_step = "it has no tokenizer.json; copy that of the model it was trained from"
        raise CheckpointError(
            f"{path}: transformers cannot load it: {first_line(error)}; {next_step}"
        ) from error
    model, info = loaded
    _check_task(path, model)
    notes = (*weights.check(path, model, info), *_passed_over(path, processor))
    if not take_template(processor):
        raise CheckpointError(
            f"{path}: no chat template in chat_template.jinja, chat_template.json or tokenizer_config.json; "
            "copy that of the model it was trained from"
        )
    if changed := take_tokenizer(path / TOKENIZER, processor):
        kind = type(processor.tokenizer).__name__
        notes += (f"{' and '.join(changed)} of {TOKENIZER} taken, where transformers puts {kind}'s own",)
    _fix_rope(model)
    return Checkpoint(path, model.eval().requires_grad_(False), processor, notes)


def _passed_over(path: Path, processor: Any) -> tuple[str, ...]:
    """Notes on files that say otherwise than those that transformers prefers: an edit there does nothing."""

    def of(name: str) -> dict[str, Any]:
        try:
            found = json.loads((path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    templates = {
        name: of(name).get("chat_template") for name in ("chat_template.json", "tokenizer_config.json")
    }
    if (path / _TEMPLATE).is_file():
        templates[_TEMPLATE] = (path / _TEMPLATE).read_text(encoding="utf-8")
    notes = [
        f"{name} has another chat template than the one taken"
        for name, text in templates.items()
        if isinstance(text, str) and text.strip() != str(processor.chat_template).strip()
    ]
    taken, other = of("processor_config.json").get("image_processor"), of("preprocessor_config.json")
    if isinstance(taken, dict):
        differ = sorted(name for name in taken.keys() & other.keys() if taken[name] != other[name])
        if settings := [name for name in differ if not name.endswith(("_type", "_class"))]:
            notes.append(
                f"processor_config.json is taken, preprocessor_config.json has other {', '.join(settings)}"
            )
    return tuple(notes)


def _fix_rope(model: Any) -> None:
    """Rotary modules of type `dynamic` become default ones.

    Up to max_position_embeddings, beyond which no bundle goes, both give the same; but the first looks at the
    positions each time, which cannot be traced.
    """
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, dict):  # by kind of layer
            module.rope_type = {layer: _static(each) for layer, each in kind.items()}
        elif kind is not None:
            module.rope_type = _static(kind)


def _static(kind: str) -> str:
    return "default" if kind == "dynamic" else kind


def _check_task(path: Path, model: Any) -> None:
    """optimum's TasksManager names the task from the model class.

    From a local directory it can only tell the library ("cannot infer the task from a local directory"),
    so the loaded model is asked instead.
    """
    try:
        from optimum.exporters.tasks import TasksManager
    except ImportError as error:
        raise MissingExtra(error.name or "optimum", "export") from error
    task = TasksManager.infer_task_from_model(model)
    if task not in (TASK, _OLDER_TASK):
        raise CheckpointError(f"{path}: is a checkpoint for {task}; only {TASK} can be exported")


def first_line(error: Exception) -> str:
    """What another library says, for a message of one line; its class where it says nothing."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]
