"""Masks under FSDP2: two processes mask their shards exactly as one process masks the whole weights."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.multiprocessing.spawn import spawn
from transformers import AutoModelForImageTextToText

from distill.masks.masking import Masker
from distill.masks.materialised import materialised
from runtime.errors import CheckpointError

RATIOS = (0.5, 0.13, 0.0, 0.29, 0.5, 0.0)
WORLD = 2


class Odd(nn.Module):
    """Matrices whose rows may not divide by two: 5, 1 (the second rank has nothing), 8; full of ties."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.decoder = nn.ModuleDict()
        for name, shape in {"five": (5, 7), "one": (1, 9), "eight": (8, 26)}.items():
            linear = nn.Linear(shape[1], shape[0], bias=False)
            few = torch.randint(-4, 5, shape, generator=draw) / 4 * (-1) ** torch.arange(shape[0])[:, None]
            linear.weight = nn.Parameter(few.to(dtype))
            self.decoder[name] = linear
        self.head = nn.Linear(2, 2, bias=False, dtype=dtype)
        nn.init.ones_(self.head.weight)
        self.config = SimpleNamespace(name_or_path="odd")

    @property
    def base_model(self) -> Odd:
        return self

    def get_decoder(self) -> nn.Module:
        return self.decoder

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def get_input_embeddings(self) -> nn.Module:
        return self.head


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def same_at_every_ratio(sharded: Any, plain: Any) -> None:
    """Both are masked at ratio after ratio; every tensor stays equal bit for bit."""
    ours, theirs = Masker(sharded, max(RATIOS)), Masker(plain, max(RATIOS))
    for ratio in RATIOS:
        ours.set(ratio)
        theirs.set(ratio)
        expected = plain.state_dict()
        for name, tensor in sharded.state_dict().items():
            assert torch.equal(bits(whole(tensor)), bits(expected[name])), (name, ratio)
        assert ours.measure() == theirs.measure(), "zeros are counted over all ranks"
    kept = torch.tensor([ours.kept_bytes, ours.weight_bytes], dtype=torch.float64)
    distributed.all_reduce(kept)
    started = WORLD * len(theirs.measure())  # a started byte of bits per tensor and rank
    copies = kept[1] / theirs.weight_bytes
    assert copies in (1, 2) and kept[0] <= copies * theirs.kept_bytes + started


def check_odd_shapes(rank: int, path: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        plain = Odd(dtype)
        sharded = fully_shard(copy.deepcopy(plain), mesh=init_device_mesh("cpu", (WORLD,)))
        mine = cast(DTensor, sharded.decoder["one"].weight).to_local()
        assert mine.numel() == (9 if rank == 0 else 0), "an empty shard is among them"
        same_at_every_ratio(sharded, plain)


def check_other_layouts(rank: int, path: str) -> None:
    """Replicas of a shard, and shards by columns: the runs of a rank then alternate with the other's."""
    for shape in ((1, WORLD), (WORLD, 1)):
        plain = Odd(torch.bfloat16)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards"))
        same_at_every_ratio(fully_shard(copy.deepcopy(plain), mesh=mesh), plain)
    plain = Odd(torch.bfloat16)
    del plain.decoder["five"], plain.decoder["one"]
    sharded = copy.deepcopy(plain)
    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(sharded, mesh=mesh, shard_placement_fn=lambda p: Shard(p.ndim - 1))
    assert cast(DTensor, sharded.decoder["eight"].weight).placements == (Shard(1),)
    same_at_every_ratio(sharded, plain)


def check_a_real_model(rank: int, path: str) -> None:
    """A checkpoint, sharded by Accelerate's own function; a forward before leaves gathered weights around."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plain = AutoModelForImageTextToText.from_pretrained(path).eval()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    state = SimpleNamespace(fsdp_plugin=plugin)
    accelerator = SimpleNamespace(state=state, mixed_precision="no", is_main_process=rank == 0)
    sharded: Any = fsdp2_prepare_model(accelerator, copy.deepcopy(plain))
    same_at_every_ratio(sharded, plain)
    served_as_one_process_would(sharded, plain, Path(path).parent / "served")
    ids = torch.arange(5, 15)[None]
    masked, expected = Masker(sharded, 0.5), Masker(plain, 0.5)
    with torch.no_grad():
        full = plain(input_ids=ids).logits
        assert torch.equal(sharded(input_ids=ids).logits, full)
        masked.set(0.5)
        expected.set(0.5)
        assert torch.equal(sharded(input_ids=ids).logits, plain(input_ids=ids).logits)
        assert not torch.equal(plain(input_ids=ids).logits, full)


def served_as_one_process_would(sharded: Any, plain: Any, directory: Path) -> None:
    """The checkpoint that two processes write together has the whole masked weights."""
    nothing: Any = SimpleNamespace(save_pretrained=lambda directory: None)
    ours, theirs = Masker(sharded, 0.4), Masker(plain, 0.4)
    ours.set(0.4)
    theirs.set(0.4)
    with materialised(ours, nothing, directory, "tiny", shard_bytes=100_000) as found:
        read = AutoModelForImageTextToText.from_pretrained(found.path).state_dict()
        assert found.sparsity == theirs.sparsity
        assert all(torch.equal(read[name], tensor) for name, tensor in plain.state_dict().items())
        distributed.barrier()
    ours.set(0)
    theirs.set(0)
    distributed.barrier()
    assert not directory.exists()


def check_refusals(rank: int, path: str) -> None:
    """Two sharded dimensions (FSDP2 over tensor parallelism) are refused, not masked wrongly."""
    model = Odd(torch.float32)
    mesh = init_device_mesh("cpu", (1, WORLD))
    model.decoder["eight"].weight = nn.Parameter(
        distribute_tensor(model.decoder["eight"].weight.data, mesh, [Shard(0), Shard(1)])
    )
    with pytest.raises(CheckpointError, match=r"decoder.eight.weight: placed as .*no tensor parallelism"):
        Masker(cast(Any, model), 0.2)


CHECKS = (check_odd_shapes, check_other_layouts, check_a_real_model, check_refusals)


def _work(rank: int, path: str, meeting: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD)
    for check in CHECKS:
        check(rank, path)
    Path(f"{meeting}-{rank}").touch()
    distributed.destroy_process_group()


def test_two_processes_mask_as_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    spawn(_work, (str(tiny_checkpoint), str(tmp_path / "meeting")), nprocs=WORLD)
    assert all(Path(f"{tmp_path}/meeting-{rank}").exists() for rank in range(WORLD)), "every check ran"
