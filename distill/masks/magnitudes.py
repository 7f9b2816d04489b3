"""The k smallest magnitudes of a tensor, exactly, also where its values are spread over processes.

In: a tensor, whole or an FSDP2 shard of one. Out: which of the local values are among the tensor's k
smallest. Not here: why (`distill/masks/masking.py`).

A float's magnitude orders as its bit pattern without the sign, so a histogram over bit patterns gives
the threshold exactly: one pass over 2^15 bins in 16-bit floats, two passes (2^16, then 2^15) in 32-bit.
Ranks add up their histograms. Equal magnitudes at the threshold go by place in the whole tensor (row by
row), so a sharded tensor is split exactly as the unsharded one. Work goes in pieces of `PIECE` values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import distributed
from torch.distributed.tensor import DTensor, Replicate, Shard

from runtime.errors import CheckpointError

PIECE = 1 << 21  # values a pass touches at a time; a multiple of 8
# bits of the pattern, sign included, as an integer type, and the digits that a histogram resolves in turn
PATTERNS: dict[torch.dtype, tuple[torch.dtype, tuple[int, ...]]] = {
    torch.bfloat16: (torch.int16, (15,)),
    torch.float16: (torch.int16, (15,)),
    torch.float32: (torch.int32, (16, 15)),
}


@dataclass(frozen=True)
class Layout:
    """How this process's values lie in the whole tensor: `runs` runs, each after those of lower ranks."""

    count: int  # values of the whole tensor
    runs: int = 1
    group: Any = None  # processes that hold the other shards
    device: str = ""  # where that group communicates

    def total(self, counts: torch.Tensor) -> torch.Tensor:
        """Sum of integer counts over the shards."""
        if self.group is None:
            return counts
        summed = counts.to(self.device)
        distributed.all_reduce(summed, group=self.group)
        return summed.to(counts.device)

    def first(self, mine_b: torch.Tensor, wanted: int) -> int:
        """How many of this process's marked values are among the tensor's first `wanted` marked ones.

        `mine_b` counts this process's marked values in each run.
        """
        if self.group is None:
            return min(wanted, int(mine_b.sum()))
        sent = mine_b.to(self.device)
        parts = [torch.empty_like(sent) for _ in range(distributed.get_world_size(self.group))]
        distributed.all_gather(parts, sent, group=self.group)
        counts_bw = torch.stack(parts, 1).cpu()
        before_bw = (counts_bw.flatten().cumsum(0)).view_as(counts_bw) - counts_bw
        rank = distributed.get_rank(self.group)
        return int(torch.minimum((wanted - before_bw).clamp_min(0), counts_bw)[:, rank].sum())


def layout(name: str, tensor: torch.Tensor) -> Layout:
    """Raises CheckpointError for tensors that cannot be masked in place, naming what to do instead."""
    if hasattr(tensor, "ds_id"):
        raise CheckpointError(
            f"{name}: masking under DeepSpeed ZeRO-3 is not supported; run the teacher under FSDP2 "
            "(fsdp_version: 2 for accelerate), or let a server answer from a materialised masked checkpoint"
        )
    if not isinstance(tensor, DTensor):
        return _whole(name, tensor)
    _whole(name, tensor.to_local())
    split = [axis for axis, placement in enumerate(tensor.placements) if type(placement) is not Replicate]
    if not split:
        return Layout(tensor.numel())
    if len(split) > 1 or type(tensor.placements[split[0]]) is not Shard:
        raise CheckpointError(
            f"{name}: placed as {tensor.placements}; masking knows whole weights and FSDP2 shards "
            "(one sharded mesh dimension, with or without replicas); give the teacher no tensor parallelism"
        )
    mesh = tensor.device_mesh
    runs = tensor.shape[: cast(Shard, tensor.placements[split[0]]).dim].numel()
    return Layout(tensor.numel(), runs, mesh.get_group(split[0]), mesh.device_type)


def _whole(name: str, tensor: torch.Tensor) -> Layout:
    if tensor.is_meta:
        raise CheckpointError(f"{name}: its values are not in memory (offloaded); load the whole teacher")
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.dtype not in PATTERNS:
        raise CheckpointError(
            f"{name}: {type(tensor).__name__} of {tensor.dtype} cannot be masked; "
            "give the original weights in bfloat16, float16 or float32"
        )
    if not tensor.is_contiguous():
        raise CheckpointError(f"{name}: strides {tensor.stride()} cannot be masked; make it contiguous")
    return Layout(tensor.numel())


def magnitudes(values_n: torch.Tensor) -> torch.Tensor:
    """(n,) bit patterns without the sign: integers that order as |w| does; both zeros are 0."""
    pattern, digits = PATTERNS[values_n.dtype]
    return values_n.view(pattern) & ((1 << sum(digits)) - 1)


def pieces(flat_n: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(first place, view) of successive pieces."""
    for start in range(0, len(flat_n), PIECE):
        yield start, flat_n[start : start + PIECE]


class Smallest:
    """Marks the `count` smallest magnitudes of a tensor, of equal ones the first in the tensor.

    `flat_n` are this process's values in the tensor's order (all that can be among the `count` smallest
    must be there, on every process together). `ends_b` are the places in `flat_n` where each run ends.
    `mark` is then called with successive pieces. Everything is collective: all ranks take part.
    """

    def __init__(self, flat_n: torch.Tensor, count: int, where: Layout, ends_b: torch.Tensor) -> None:
        self.threshold, self.left, self.local = 0, 0, 0
        if count == 0:
            return
        self.threshold, wanted = _threshold(flat_n, count, where)
        below, tied_b = 0, torch.zeros(where.runs, dtype=torch.long, device=flat_n.device)
        for start, values in pieces(flat_n):
            found = magnitudes(values)
            below += int((found < self.threshold).sum())
            tied = (found == self.threshold).nonzero()[:, 0] + start
            tied_b += torch.searchsorted(ends_b, tied, right=True).bincount(minlength=where.runs)
        self.left = where.first(tied_b, wanted)
        self.local = below + self.left

    def mark(self, values_n: torch.Tensor) -> torch.Tensor:
        """(n,) bool of the next values, in order."""
        found = magnitudes(values_n)
        chosen_n = found < self.threshold
        if self.left:
            ties = (found == self.threshold).nonzero()[: self.left, 0]
            chosen_n[ties] = True
            self.left -= len(ties)
        return chosen_n


def _threshold(flat_n: torch.Tensor, count: int, where: Layout) -> tuple[int, int]:
    """The pattern of the `count`-th smallest magnitude, and how many of that pattern are among them."""
    digits = PATTERNS[flat_n.dtype][1]
    pattern, left, shift = 0, count, sum(digits)
    for width in digits:
        above, shift = shift, shift - width
        bins = torch.zeros(1 << width, dtype=torch.long, device=flat_n.device)
        for _, values in pieces(flat_n):
            found = magnitudes(values)
            if above < sum(digits):
                found = found[found >> above == pattern]
            bins += ((found >> shift) & ((1 << width) - 1)).bincount(minlength=1 << width)
        reached = where.total(bins).cumsum(0).cpu()
        digit = int(torch.searchsorted(reached, left))
        left -= int(reached[digit - 1]) if digit else 0
        pattern = pattern << width | digit
    return pattern, left


def pack(chosen_n: torch.Tensor) -> torch.Tensor:
    """(ceil(n / 8),) uint8 from (n,) bool."""
    padded = torch.nn.functional.pad(chosen_n.to(torch.uint8), (0, -len(chosen_n) % 8)).view(-1, 8)
    return sum((padded[:, bit] << bit for bit in range(1, 8)), start=padded[:, 0].clone())


def unpack(bits: torch.Tensor, count: int) -> torch.Tensor:
    """(n,) bool from (ceil(n / 8),) uint8."""
    place = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits[:, None] >> place & 1).bool().flatten()[:count]
