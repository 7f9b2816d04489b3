"""Peak bytes of live tensors, counted exactly: no allocator, no clock, no other process in the figure."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)


class Peak(TorchDispatchMode):
    """Counts the storages that operations make inside the block, and the largest sum alive at once.

    With fake tensors (`torch._subclasses.FakeTensorMode`) sizes can be measured that no memory holds.
    What an operation allocates inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.operations = 0
        self.products = 0  # matrix products
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._known(args)
        out = function(*args, **(kwargs or {}))
        self.operations += 1
        self.products += function.overloadpacket in PRODUCTS
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return out

    def _known(self, args: Any) -> None:
        """Tensors from outside the block cost nothing."""
        for leaf in tree_leaves(args):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self._seen:
                self._seen.add(leaf.untyped_storage()._cdata)

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size
