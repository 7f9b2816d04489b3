"""Training state that any number of processes can continue, and the student as a Hugging Face checkpoint.

In: a prepared learner and its optimizer. Out: `state-STEP/` directories (torch.distributed.checkpoint: one
code path for one process, DDP and FSDP2), checkpoint directories. Not here: when to save.

A state is written under a temporary name and renamed by the main process when every process has written
its part. The state before it is removed last: a kill at any moment leaves a whole one.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from distill.training import optim
from distill.training.processes import Held
from runtime import files
from runtime.errors import StateError

Log = list[dict[str, float]]
STATE = "state-"
PROGRESS = "progress.json"
OPTIONS = StateDictOptions(ignore_frozen_params=True)


def states(directory: Path) -> list[Path]:
    """The whole states below `directory`, the newest last."""
    return sorted(path for path in directory.glob(f"{STATE}*") if path.is_dir())


def save(
    directory: Path, accelerator: Accelerator, learner: nn.Module, optimizer: Any, step: int, log: Log
) -> None:
    """Save what the loop needs to go on before `step`. Every process calls this."""
    final = directory / f"{STATE}{step:08d}"
    temporary = directory / f"{files.TEMP_PREFIX}{final.name}"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        cast(Any, learner).save_checkpoint(str(temporary), tag="deepspeed")
    else:
        model, state = get_state_dict(_inner(accelerator, learner), optim.parts(optimizer), options=OPTIONS)
        with _quiet():
            content = {"model": model, "optimizer": state}
            dcp.save(content, checkpoint_id=temporary, no_dist=_alone(accelerator))
    if accelerator.is_main_process:
        progress = {"step": step, "processes": accelerator.num_processes, "log": log}
        files.write_text(temporary / PROGRESS, json.dumps(progress))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        publish(temporary, final)
    accelerator.wait_for_everyone()


def publish(temporary: Path, final: Path) -> None:
    """Give a finished state its name, then remove the ones before it."""
    if not final.exists():
        temporary.replace(final)
    for old in states(final.parent):
        if old != final:
            _discard(old)


def _discard(path: Path) -> None:
    """A state that is being removed no longer looks like one."""
    doomed = path.with_name(f"{files.TEMP_PREFIX}{path.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.replace(doomed)
    shutil.rmtree(doomed)


def restore(directory: Path, accelerator: Accelerator, learner: nn.Module, optimizer: Any) -> tuple[int, Log]:
    """Load the newest state into learner and optimizer: its step and log, or (0, []). Every process calls it.

    The state may come from another number of processes, sharded or not (not so with DeepSpeed).
    """
    found = states(directory)
    if not found:
        return 0, []
    newest = found[-1]
    progress = files.read_json(newest / PROGRESS)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if progress["processes"] != accelerator.num_processes:
            raise StateError(
                f"{newest}: saved by {progress['processes']} processes under DeepSpeed, "
                f"now {accelerator.num_processes}; launch as many as then, or use FSDP2"
            )
        cast(Any, learner).load_checkpoint(str(newest), tag="deepspeed")
        return progress["step"], progress["log"]
    inner, plain = _inner(accelerator, learner), optim.parts(optimizer)
    model, state = get_state_dict(inner, plain, options=OPTIONS)
    saved = _saved_keys(newest)
    unknown = [name for name in model if f"model.{name}" not in saved]
    if unknown:
        raise StateError(
            f"{newest}: holds no {unknown[0]} (and {len(unknown) - 1} more); the student or what is frozen "
            "has changed since; use the recipe it was made with, or another directory"
        )
    wanted = {"model": model, "optimizer": state}
    planner = DefaultLoadPlanner(allow_partial_load=True)
    with _quiet():
        dcp.load(wanted, checkpoint_id=newest, planner=planner, no_dist=_alone(accelerator))
    loose = replace(OPTIONS, strict=False)  # a state has no frozen parameters, and what it has was checked
    set_state_dict(inner, plain, model_state_dict=model, optim_state_dict=state, options=loose)
    _forget_unsaved(inner, plain, saved)
    optim.refresh(optimizer)
    return progress["step"], progress["log"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """One process is what we mean: torch need not say that it assumes so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _saved_keys(path: Path) -> set[str]:
    return set(dcp.FileSystemReader(path).read_metadata().state_dict_metadata)


def _forget_unsaved(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], saved: set[str]) -> None:
    """Loading makes a state for every parameter. One that had never seen a gradient had none: as before."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    known = {name.removeprefix("optimizer.state.").rsplit(".", 1)[0] for name in saved}
    for optimizer in optimizers:
        for parameter in list(optimizer.state):
            if names[id(parameter)] not in known:
                del optimizer.state[parameter]


def forget(directory: Path) -> None:
    """Remove the training states: the run is finished and will not be continued."""
    for state in states(directory):
        _discard(state)


def full_state(accelerator: Accelerator, learner: nn.Module) -> dict[str, torch.Tensor]:
    """The student's whole state dict on the CPU, gathered; on other than the main process it may be empty.
    Every process calls this."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        engine: Any = accelerator.deepspeed_engine_wrapped
        found = accelerator.get_state_dict(engine.engine) or {}
        return {name.removeprefix("model."): tensor for name, tensor in found.items()}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    student = _student(accelerator, learner)
    return cast(dict[str, torch.Tensor], get_model_state_dict(student, options=options))


def write_model(
    out: Path,
    accelerator: Accelerator,
    learner: nn.Module,
    processor: ProcessorMixin | None = None,
    *,
    lora: Literal["merge", "adapter"] = "merge",
) -> Path:
    """Write the student as a Hugging Face checkpoint directory, in one piece. Every process calls this.

    `learner`: the prepared one, or the model that `loop.fit` was given.

    With LoRA `merge` writes the merged model, which loads anywhere; `adapter` writes peft's adapter only.
    """
    state = full_state(accelerator, learner)
    if accelerator.is_main_process:
        student = _student(accelerator, learner)
        with files.new_directory(out) as temporary:
            if not hasattr(student, "peft_config") or lora == "adapter":
                for name, source in (getattr(student, "all_tied_weights_keys", None) or {}).items():
                    if name in state and source in state:
                        state[name] = state[source]  # gathered apart; as one tensor it is written once
                student.save_pretrained(temporary, state_dict=state)
            else:
                merged(student, state).save_pretrained(temporary)
            if processor is not None:
                processor.save_pretrained(temporary)
    accelerator.wait_for_everyone()
    return out


def merged(student: Any, state: Mapping[str, torch.Tensor]) -> PreTrainedModel:
    """A plain model on the CPU: the base of a peft model with its adapters added to the weights."""
    from peft import get_peft_model

    base = student.get_base_model()
    fresh = AutoModelForImageTextToText.from_config(base.config, dtype=torch.float32)
    copy = get_peft_model(cast(Any, fresh), student.peft_config[student.active_adapter])
    copy.load_state_dict(state)
    return cast(Any, copy).merge_and_unload()


def without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """A student that is whole in this process, as a plain model on the CPU of its own: what LoRA adapters
    (in place in `model`) add is in the weights."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    state = {}
    for name, value in model.state_dict().items():
        owner, _, rest = name.partition(".base_layer.")
        if not any(name.startswith(f"{layer}.") for layer in layers):
            state[name] = value
        elif rest:
            layer = cast(Any, layers[owner])
            adapters = [] if rest != "weight" or layer.disable_adapters else layer.active_adapters
            total = value + sum(layer.get_delta_weight(adapter) for adapter in adapters)
            state[f"{owner}.{rest}"] = total
    plain = AutoModelForImageTextToText.from_config(model.config, dtype=model.dtype)
    plain.load_state_dict({name: value.detach().cpu() for name, value in state.items()})
    if model.generation_config is not None:
        plain.generation_config = model.generation_config
    return cast(PreTrainedModel, plain)


def _inner(accelerator: Accelerator, learner: nn.Module) -> Any:
    return accelerator.unwrap_model(learner, keep_torch_compile=False)


def _student(accelerator: Accelerator, module: nn.Module) -> Any:
    """The model in a learner, prepared or not, or a model that `loop.fit` has trained."""
    inner = _inner(accelerator, module)
    return inner.model if isinstance(inner, Held) else inner


def _alone(accelerator: Accelerator) -> bool:
    return accelerator.num_processes == 1


def validations(log: Iterable[dict[str, float]]) -> list[tuple[int, float]]:
    """(step, value) of every validation in a log, value higher is better."""
    return [(int(entry["step"]), entry["validation"]) for entry in log if "validation" in entry]
