"""What one measuring process is told, and what it tells back.

In and out: validated records, as JSON between the processes. Not here: the measuring
(`evals/bench/bench_child.py`), who starts it (`evals/bench/bench_run.py`).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from evals.bench.bench_conditions import Bandwidth, Disturbance, Energy
from evals.bench.bench_results import Load, Memory, Sustained, Times
from evals.records import Amount, Count, Record

WARM_LOADS = 3


class Task(Record):
    """One bundle, one picture, one question, one process. Bandwidth needs no bundle.

    page_cache: as the parent left it. seconds: of a sustained run, an energy measurement, or reading memory.
    """

    kind: Literal["latency", "sustained", "energy", "bandwidth"]
    bundle: str | None = None
    image: str | None = None
    question: str = ""
    threads: Annotated[int, Field(ge=1)]
    providers: tuple[str, ...] = ()
    max_context: Annotated[int, Field(ge=1)] | None = None
    warmup: Count = 0
    repeats: Annotated[int, Field(ge=1)] = 1
    decode_tokens: Annotated[int, Field(ge=1)] = 16
    page_cache: Literal["warm", "dropped", "unknown"] = "unknown"
    seconds: Amount = 0.0


class Outcome(Record):
    """What the process saw. `units`: part -> (what ran it, why not the preferred one)."""

    started: str | None = Field(default=None, description="ISO 8601, UTC")
    prompt_tokens: Count = 0
    image_tokens: Count = 0
    state_bytes: Count | None = None
    max_context: Count | None = None
    units: dict[str, tuple[str, str]] = Field(default_factory=dict)
    load: Load = Load()
    times: Times = Times()
    memory: Memory | None = None
    disturbance: Disturbance | None = None
    harness_share: Amount | None = None
    sustained: Sustained | None = None
    energy: Energy | None = None
    bandwidth: Bandwidth | None = None
