"""What runs in several processes: one accelerator, whole weights for a while, frozen models in shards.

In: Accelerate's environment. Out: an `Accelerator` set up for this package, helpers that every process
calls together. Not here: the loop, what is computed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
)
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from runtime.errors import InputError

T = TypeVar("T")
TIMEOUT_HOURS = 24
"""How long a process waits for the others: drawing a stage's responses can take hours on one of them."""


def accelerator(
    precision: Literal["float32", "bf16"] = "float32",
    *,
    trackers: Sequence[str] = (),
    directory: Path | None = None,
) -> Accelerator:
    """Accelerate as its own launcher and config file say: one process, DDP, FSDP2 or DeepSpeed ZeRO-3.

    `trackers` are Accelerate's names (tensorboard, wandb, mlflow); they write below `directory`.
    Accelerate itself turns FSDP2 on for accelerators only; here it works between CPU processes as well.
    """
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    found = Accelerator(
        cpu=not (torch.cuda.is_available() or deepspeed),
        mixed_precision="bf16" if precision == "bf16" else "no",
        log_with=list(trackers) or None,
        project_dir=None if directory is None else str(directory),
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=True),
            InitProcessGroupKwargs(timeout=timedelta(hours=TIMEOUT_HOURS)),
        ],
    )
    if deepspeed:
        config = found.state.deepspeed_plugin.deepspeed_config
        # micro-batches are ours; the loss needs no division by their number
        config.update({"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1})
        config.setdefault("zero_allow_untested_optimizer", True)
        config.setdefault("zero_force_ds_cpu_optimizer", False)
    sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if sharded and found.distributed_type == DistributedType.MULTI_CPU:
        plugin = FullyShardedDataParallelPlugin()
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # as Accelerate does itself
        found.state.distributed_type = DistributedType.FSDP
        found.state.fsdp_plugin = plugin
    if found.distributed_type == DistributedType.FSDP and not found.is_fsdp2:
        raise InputError("the Accelerate config asks for FSDP 1; set `fsdp_version: 2` in its fsdp_config")
    if found.is_fsdp2 and precision == "bf16":
        # Accelerate's own policy would also add up gradients, and give the loss, in bfloat16
        found.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=None
        )
    return found


def largest(accelerator: Accelerator, value: int) -> int:
    """The largest of the processes' values."""
    if accelerator.num_processes == 1:
        return value
    mine = torch.tensor([value], device=accelerator.device)
    return int(accelerator.gather(mine).max())


def sums(accelerator: Accelerator, figures: dict[str, float]) -> dict[str, float]:
    """Each figure summed over the processes. All of them must know the same names."""
    if accelerator.num_processes == 1:
        return figures
    names = sorted(figures)
    precise = torch.float32 if accelerator.device.type == "mps" else torch.float64
    mine = torch.tensor([figures[name] for name in names], dtype=precise, device=accelerator.device)
    return dict(zip(names, accelerator.reduce(mine, "sum").tolist(), strict=True))


def whole(accelerator: Accelerator, learner: nn.Module, call: Callable[[Any], T]) -> T:
    """`call(student)` with all of the student's weights in every process, without gradients.

    Inside, the processes may go different ways (one draws longer responses than another): nothing waits
    for the others. All of them must call this together, and have the memory for the whole student.
    `learner` is what `Accelerator.prepare` made of the `Learner`.
    """
    inner = accelerator.unwrap_model(learner, keep_torch_compile=False)
    shards = [module for module in inner.modules() if isinstance(module, FSDPModule)]
    with torch.no_grad():
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            with _gathered(learner, inner):
                return inner(call)
        if not shards:
            return inner(call)
        inner(lambda student: None)  # the first call of all sets the shards' root up
        root = shards[0]
        root.set_reshard_after_forward(False)
        for module in shards:
            module.unshard()
        try:
            return inner(call)
        finally:
            plugin = accelerator.state.fsdp_plugin
            root.set_reshard_after_forward(bool(plugin.reshard_after_forward))
            root.set_reshard_after_forward(False, recurse=False)
            for module in shards:
                module.reshard()


@contextlib.contextmanager
def _gathered(engine: Any, inner: nn.Module) -> Iterator[None]:
    """ZeRO-3's parameters as a whole, and none of the hooks that fetch and release them together."""
    import deepspeed

    offload = engine.optimizer.parameter_offload
    with deepspeed.zero.GatheredParameters(list(inner.parameters())):
        offload._remove_module_hooks()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield
        finally:
            offload.setup_zero_stage3_hooks()


class Held(nn.Module):
    """A module whose forward is a call with the model inside: hooks around it (DDP, FSDP2) see one forward,
    whatever the call does with the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, call: Callable[[Any], T]) -> T:
        return call(self.model)

    def reshard(self) -> None:
        """Under FSDP2: drop what is whole here, to be called when the shards were changed (a mask)."""
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def hold(accelerator: Accelerator, model: Any) -> Held:
    """A frozen model (teacher, reference), on this process's device; under FSDP2 its decoder in shards.

    `held(lambda model: ...)` runs a forward; under FSDP2 every process must run as many as the others.
    The vision part, embeddings and head stay whole in each process once they were used: processes may
    then encode different numbers of images.
    """
    held = Held(model.requires_grad_(False).eval())
    if not accelerator.is_fsdp2:
        return held.to(accelerator.device)
    policy = MixedPrecisionPolicy()
    decoder = {id(p) for p in model.base_model.get_decoder().parameters()}
    blocks = block_classes(model, without={id(p) for p in model.parameters()} - decoder)
    for module in reversed(list(model.modules())):
        if type(module).__name__ in blocks:
            fully_shard(module, mp_policy=policy)
    fully_shard(held, mp_policy=policy)
    return held


def block_classes(model: nn.Module, without: Collection[int] = ()) -> list[str]:
    """Class names of the model's repeated blocks, as the model itself names them; none whose blocks hold a
    parameter with an id in `without`."""
    wanted = set(getattr(model, "_no_split_modules", None) or ())
    left_out = {
        type(module).__name__
        for module in model.modules()
        if type(module).__name__ in wanted and any(id(p) in without for p in module.parameters())
    }
    return sorted({type(module).__name__ for module in model.modules()} & wanted - left_out)
