"""What every arm of `benchmarks/distill.py` shares: the batch it works on, how it is timed and weighed.

In: a directory that `setup.py` wrote. Out: the same questions for every arm, one JSON line of measurements.
Imports torch alone: the arms run in environments of their own.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

STUDENT, TEACHER, BATCH = "student", "teacher", "batch.pt"
LR, CLIP = 1e-6, 1.0  # both arms: AdamW (fused), constant rate, gradients clipped at this norm


@dataclass(frozen=True)
class Shape:
    """A step: `questions` questions of `prompt` tokens (`image` of them stand for one image), each with
    `responses` responses of `response` tokens, of which `distinct` differ (the first ones are repeated)."""

    prompt: int
    response: int
    image: int
    questions: int
    responses: int = 8
    distinct: int = 8

    @property
    def name(self) -> str:
        return f"({self.prompt:,}, {self.response})"


@dataclass(frozen=True)
class Asked:
    """One question: prompt ids, the processor's vision tensors, and all of its responses in order."""

    ids: tuple[int, ...]
    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor
    responses: tuple[tuple[int, ...], ...]


def read(work: Path) -> list[Asked]:
    return [Asked(**asked) for asked in torch.load(work / BATCH, weights_only=True)]


def write(work: Path, batch: list[Asked]) -> None:
    torch.save([vars(asked) for asked in batch], work / BATCH)


@dataclass
class Record:
    """Seconds of each step after the first `warmup`, and memory: MiB of the process with its models loaded,
    and the most it held during the measured steps."""

    warmup: int
    loaded_mib: float = 0.0
    peak_mib: float = 0.0
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    _last: float = 0.0
    _seen: int = 0

    def start(self) -> None:
        """Call when everything is loaded, before the first step."""
        self.loaded_mib = resident("VmRSS")
        self._last = time.perf_counter()

    def step(self, loss: float) -> None:
        """Call at the end of every step."""
        now = time.perf_counter()
        self._seen += 1
        if self._seen > self.warmup:
            self.seconds.append(now - self._last)
            self.losses.append(loss)
        elif self._seen == self.warmup:
            Path("/proc/self/clear_refs").write_text("5")  # the highest memory counts from here
        self._last = time.perf_counter()

    def finish(self, **more: Any) -> None:
        """Print the one line that the driver reads."""
        self.peak_mib = resident("VmHWM")
        found = {key: value for key, value in asdict(self).items() if not key.startswith("_")}
        print("RESULT " + json.dumps({**found, **more}), flush=True)


def resident(field_name: str) -> float:
    """MiB that Linux tells of this process: VmRSS is now, VmHWM the most since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(field_name)).split()[1]) / 1024


def save_gradient(path: Path, named: Any) -> None:
    """Write every parameter's gradient under its name."""
    torch.save({name: p.grad.clone() for name, p in named if p.grad is not None}, path)
