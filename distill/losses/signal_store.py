"""Teacher signal on disk: computed once, read at every later pass without the teacher (METHOD 5).

In: signals of responses. Out: sealed shards in a directory of their own teacher and mask ratio, and from
them the signal of any batch. Not here: the teacher's forward, who asks for what.

    <root>/<teacher>-<facts>/key.json       what the directory belongs to
    <root>/<teacher>-<facts>/head.safetensors   `hidden` only: the teacher's LM head, which no mask touches
    <root>/<teacher>-<facts>/00-00000.safetensors, .json    a shard of rank 0 and its seal, written last

A shard without a seal is written anew; what was not sealed when a process was killed is computed again.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from distill.losses.lm_head import Head, row_blocks
from distill.losses.signal import Approximation, LiveSignal, Signal, TopKSignal, approximation
from runtime import files
from runtime.errors import StateError

SHARD_MIB = 64
OPEN_SHARDS = 64


def entry_key(sample: str, ids: Sequence[int]) -> str:
    """Names one response to one sample; a response that comes up again finds its signal again."""
    text = f"{sample}\n{' '.join(map(str, ids))}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Key:
    """What a store belongs to. `teacher` is the hash of the *unmasked* weights; `facts` holds whatever else
    changes what the teacher says: which tensors are masked, its prompt, limits on pixels."""

    teacher: str
    ratio: float
    kind: Literal["topk", "hidden"]
    vocab: int
    k: int = 64
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        kept = f"top{self.k}" if self.kind == "topk" else "hidden"
        return f"{self.teacher[:12]}-r{self.ratio:g}-{kept}-{files.sha256_json(asdict(self))[:8]}"


@dataclass(frozen=True)
class _Seal:
    """A shard's contents: `names` (n, 2) halves of the keys, `places` (n, 3) shard number, start, stop."""

    names: np.ndarray
    places: np.ndarray
    error: Approximation
    sha256: str

    @classmethod
    def read(cls, path: Path, number: int) -> _Seal:
        seal = files.read_json(path)
        keys = [bytes.fromhex(key) for key in seal["keys"]]
        names = np.frombuffer(b"".join(keys), ">u8").reshape(-1, 2).astype(np.uint64)
        stops = np.cumsum(seal["lengths"], dtype=np.int64)
        starts = stops - np.asarray(seal["lengths"], np.int64)
        places = np.stack([np.full(len(keys), number), starts, stops], 1)
        return cls(names, places, Approximation(**seal["error"]), seal["sha256"])


class SignalStore:
    """Append-only signals of one teacher at one ratio.

    `vocab` of the key is the part of the vocabulary that teacher and student share. Several processes may
    write at once, each with its `rank`; `refresh` shows what the others have sealed since.
    """

    def __init__(self, root: Path, key: Key, *, rank: int = 0, shard_mib: float = SHARD_MIB) -> None:
        self.key, self.rank = key, rank
        self.directory = root / key.name
        self.shard_bytes = int(shard_mib * 2**20)
        self._claim()
        self._pending: dict[str, dict[str, torch.Tensor]] = {}
        self._pending_error, self._pending_bytes = Approximation(), 0
        self._seals: dict[Path, _Seal] = {}
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._head: Head | None = None
        self.refresh()

    def _claim(self) -> None:
        path, wanted = self.directory / "key.json", json.loads(json.dumps(asdict(self.key)))
        if not path.exists():
            files.write_json(path, wanted)
        found = files.read_json(path)
        if found != wanted:
            raise StateError(f"{path}: belongs to {found}, wanted {wanted}; delete this directory")

    def refresh(self) -> None:
        """Read the seals of every process."""
        for path in sorted(self.directory.glob("*-*.json")):
            if path not in self._seals:
                self._seals[path] = _Seal.read(path, len(self._seals))
        seals = list(self._seals.values())
        self.error = sum((seal.error for seal in seals), Approximation())
        self._names = np.concatenate([np.zeros((0, 2), np.uint64), *(seal.names for seal in seals)])
        self._places = np.concatenate([np.zeros((0, 3), np.int64), *(seal.places for seal in seals)])
        order = np.argsort(self._names[:, 0], kind="stable")
        self._names, self._places = self._names[order], self._places[order]

    def __len__(self) -> int:
        return len(self._names) + len(self._pending)

    def __contains__(self, key: str) -> bool:
        return key in self._pending or self._find(key) is not None

    def _find(self, key: str) -> tuple[int, int, int] | None:
        high, low = np.frombuffer(bytes.fromhex(key), ">u8")
        place = int(np.searchsorted(self._names[:, 0], np.uint64(high)))
        while place < len(self._names) and self._names[place, 0] == high:
            if self._names[place, 1] == low:
                shard, start, stop = self._places[place].tolist()
                return shard, start, stop
            place += 1
        return None

    # --- writing ------------------------------------------------------

    @torch.no_grad()
    def add(self, keys: Sequence[str], lengths: Sequence[int], signal: Signal) -> None:
        """Keep the signal of some responses, `lengths` tokens each, in the signal's order."""
        if sum(lengths) != signal.tokens:
            raise StateError(f"{self.directory}: {signal.tokens} tokens for responses of {sum(lengths)}")
        start = 0
        for key, length in zip(keys, lengths, strict=True):
            if key not in self:
                kept, error = self._kept(signal, start, start + length)
                self._pending[key] = kept
                self._pending_error += error
                self._pending_bytes += sum(tensor.nbytes for tensor in kept.values())
            start += length
            if self._pending_bytes >= self.shard_bytes:
                self.seal()

    def _kept(self, signal: Signal, start: int, stop: int) -> tuple[dict[str, torch.Tensor], Approximation]:
        if self.key.kind == "hidden":
            if not isinstance(signal, LiveSignal):
                raise StateError(f"{self.directory}: hidden states can be kept of a live signal only")
            self._write_head(signal.head)
            hidden = signal.hidden_th[start:stop].cpu().contiguous().clone()
            return {"hidden": hidden}, Approximation(tokens=stop - start)
        found, error = [], Approximation()
        for rows in row_blocks(stop - start, self.key.vocab):
            exact = signal.chunk(start + rows.start, start + rows.stop, self.key.vocab)
            kept = TopKSignal.of(exact, self.key.k)
            error += approximation(exact, kept.chunk(0, len(exact)), self.key.k)
            found.append(kept)
        ids = torch.cat([one.ids_tk for one in found]).cpu()
        return {"ids": ids, "log_probs": torch.cat([one.log_prob_tk for one in found]).cpu()}, error

    def seal(self) -> None:
        """Write what is pending as one shard; its seal comes last."""
        if not self._pending:
            return
        taken = self.directory.glob(f"{self.rank:02d}-*.json")
        number = max((int(path.stem.split("-")[1]) for path in taken), default=-1) + 1
        path = self.directory / f"{self.rank:02d}-{number:05d}.safetensors"
        entries = list(self._pending.values())
        data = save({name: torch.cat([entry[name] for entry in entries]) for name in entries[0]})
        _write(path, data)
        files.write_json(
            path.with_suffix(".json"),
            {
                "keys": list(self._pending),
                "lengths": [len(next(iter(entry.values()))) for entry in entries],
                "sha256": hashlib.sha256(data).hexdigest(),
                "error": asdict(self._pending_error),
            },
        )
        self._pending, self._pending_bytes, self._pending_error = {}, 0, Approximation()
        self.refresh()

    def _write_head(self, head: Head) -> None:
        path = self.directory / "head.json"
        if path.exists():
            return
        linear = head.linear
        if linear is None:
            raise StateError(
                f"{self.directory}: this teacher's LM head is no plain linear layer that is whole in this "
                "process, so hidden states cannot be kept; use signal.kind: topk"
            )
        tensors = {
            name: value.detach().cpu().contiguous().clone() for name, value in linear.named_parameters()
        }
        data = save(tensors)
        _write(path.with_suffix(".safetensors"), data)
        seal = {"scale": head.scale, "softcap": head.softcap, "sha256": hashlib.sha256(data).hexdigest()}
        files.write_json(path, seal)

    # --- reading ------------------------------------------------------

    def signal(self, keys: Sequence[str], device: torch.device | str = "cpu") -> Signal:
        """The signal of some responses, one after another. Raises StateError where one was never sealed."""
        found = []
        for key in keys:
            place = self._find(key)
            if place is None:
                raise StateError(
                    f"{self.directory}: no signal for response {key}; the pool has changed since the cache "
                    "was made, run the same command again to complete it"
                )
            shard, start, stop = place
            tensors = self._shard(shard)
            found.append({name: tensors.get_slice(name)[start:stop] for name in tensors.keys()})  # noqa: SIM118
        if self.key.kind == "hidden":
            head = self._stored_head(device)
            assert isinstance(head.module, nn.Linear)
            states = [one["hidden"] for one in found] or [torch.zeros(0, head.module.in_features)]
            return LiveSignal(torch.cat(states).to(device, head.module.weight.dtype), head)
        ids = [one["ids"] for one in found] or [torch.zeros(0, self.key.k, dtype=torch.int32)]
        values = [one["log_probs"] for one in found] or [torch.zeros(0, self.key.k, dtype=torch.float16)]
        return TopKSignal(torch.cat(ids).to(device), torch.cat(values).to(device), self.key.vocab)

    def _shard(self, number: int) -> Any:
        """An open shard, its seal checked when it is first opened."""
        if number not in self._open:
            seal = list(self._seals)[number]
            path = seal.with_suffix(".safetensors")
            _check(path, self._seals[seal].sha256)
            self._open[number] = safe_open(path, "pt").__enter__()
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def _stored_head(self, device: torch.device | str) -> Head:
        if self._head is None:
            path = self.directory / "head.json"
            seal = files.read_json(path)
            _check(path.with_suffix(".safetensors"), seal["sha256"])
            with safe_open(path.with_suffix(".safetensors"), "pt", device=str(device)) as tensors:
                # copied, for a file's tensors are not aligned, and matrix products then round differently
                weight = tensors.get_tensor("weight").clone()
                bias = tensors.get_tensor("bias").clone() if "bias" in tensors.keys() else None  # noqa: SIM118
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
            linear.weight = nn.Parameter(weight, requires_grad=False)
            if bias is not None:
                linear.bias = nn.Parameter(bias, requires_grad=False)
            self._head = Head(linear, seal["scale"], seal["softcap"])
        return self._head

    def report(self, divergence: float = math.log(2)) -> dict[str, float]:
        """Tokens, bytes, and how far the kept distributions are from the teacher's, per token.

        `error_nats` bounds the error of a mean JSD that training measured as `divergence` nats.
        """
        size = sum(path.stat().st_size for path in self.directory.glob("*.safetensors"))
        means = {**self.error.means, "error_nats": self.error.bound(divergence)}
        return {"tokens": self.error.tokens, "responses": len(self._names), "mib": size / 2**20, **means}

    def missing(self, keys: Iterator[str] | Sequence[str]) -> list[str]:
        """Which of some responses have no sealed signal yet."""
        return [key for key in dict.fromkeys(keys) if self._find(key) is None]


def _check(path: Path, expected: str) -> None:
    found = files.sha256_file(path) if path.exists() else "none"
    if found != expected:
        raise StateError(
            f"{path}: sha256 {found[:12]}, its seal says {expected[:12]}; delete the file and the .json "
            "beside it, and run again"
        )


def _write(path: Path, data: bytes) -> None:
    try:
        files.write_bytes(path, data)
    except OSError as error:
        free = shutil.disk_usage(path.parent).free
        raise StateError(
            f"{path}: {len(data) / 2**20:.1f} MiB could not be written ({error.strerror}), "
            f"{free / 2**20:.1f} MiB are free; make space and run again, nothing that was sealed is lost"
        ) from error
