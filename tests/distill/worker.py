"""One process of a distributed run that a test starts, with the environment of Accelerate's launcher.

The first process writes the job's result with torch.save. Not imported by what is tested.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from distill.forward import tree
from distill.training import checkpoints, loop, optim, processes
from tests.distill import learning

DDP: dict[str, str] = {}
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""The launcher's environment for each way of sharing, beside ranks and addresses."""


def run(environment: Mapping[str, str], job: str, out: Path, arguments: Mapping[str, Any]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    log = out.with_name(f"{out.name}.{environment.get('RANK', '0')}.log").open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    found = JOBS[job](arguments)
    if environment.get("RANK", "0") == "0":
        torch.save(found, out)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _pool(arguments: Mapping[str, Any], accelerator: Any) -> learning.Pool:
    more = {
        name: arguments[name] for name in ("tokens", "per_step", "text_only", "frozen") if name in arguments
    }
    return learning.Pool(
        Path(arguments["student"]), Path(arguments["teacher"]), Path(arguments["work"]),
        accelerator=accelerator, **more,
    )  # fmt: skip


def _settings(arguments: Mapping[str, Any]) -> optim.Optimizing:
    if arguments.get("optimizer") == "muon":
        return optim.Optimizing.muon(3e-3, warmup_steps=3)
    return optim.Optimizing(lr=1e-3, weight_decay=0.01)


def fit(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Train; the weights, gathered, and the log. `die_after` steps: SIGKILL in every process."""
    accelerator = processes.accelerator(arguments.get("precision", "float32"))
    pool = _pool(arguments, accelerator)
    model = pool.model
    if lora := arguments.get("lora"):
        from distill.training.student import with_lora

        torch.manual_seed(3)
        model = with_lora(model, 4, 8.0, "all-linear" if lora is True else lora)
        pool.context.lora, pool.context.reference = True, None
    drawn: list[float] = []

    def load(phase: int, student: Any) -> Any:
        """As if it drew: the processes run the student differently often."""
        prompt = pool.encoder.encode(learning.sample(1))
        batch = tree.pack(student, [[tree.Group(prompt, (prompt.ids[:4],))]], pool.encoder.pad_id)
        for _ in range(accelerator.process_index + 1):
            log_probs_tv = tree.log_probs(student, batch)
        drawn.append(float(log_probs_tv.max(-1).values.sum()))
        return original(phase, student)

    original, pool.steps.load = pool.steps.load, load

    def progress(done: int, *_: object) -> None:
        if done == arguments.get("die_after"):
            os.kill(os.getpid(), signal.SIGKILL)

    learners: list[Any] = []
    saved = checkpoints.restore

    def spy(directory: Path, accelerator: Any, prepared: Any, optimizer: Any) -> Any:
        learners.append(prepared)
        return saved(directory, accelerator, prepared, optimizer)

    checkpoints.restore = spy
    log = loop.fit(
        model, pool.steps, _settings(arguments), Path(arguments["work"]), accelerator=accelerator,
        save_every=arguments.get("save_every", 2), norms_every=arguments.get("norms_every", 0),
        progress=progress,
    )  # fmt: skip
    state = checkpoints.full_state(accelerator, learners[0])
    if "model" in arguments:
        checkpoints.write_model(Path(arguments["model"]), accelerator, learners[0], pool.encoder.processor)
    kind = accelerator.distributed_type.value
    return {"weights": {k: v.clone() for k, v in state.items()}, "log": log, "drawn": drawn, "kind": kind}


def gradients(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Loss and gradient of step 0, gathered, without an optimizer step."""
    accelerator = processes.accelerator(arguments.get("precision", "float32"))
    pool = _pool(arguments, accelerator)
    run = loop._Run(pool.model, pool.steps, _settings(arguments), Path(arguments["work"]), accelerator, 0)
    run.learner.train()
    run._prepare(0)
    parts = pool.steps.parts(0)
    figures = run._backward(parts)
    found = {}
    for name, parameter in accelerator.unwrap_model(run.learner).named_parameters():
        if parameter.grad is not None:
            grad: Any = parameter.grad
            found[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()
    shards = sum(isinstance(module, FSDPModule) for module in accelerator.unwrap_model(run.learner).modules())
    return {"gradients": found, "figures": figures, "parts": len(parts), "shards": shards}


JOBS = {"fit": fit, "gradients": gradients}
