"""Records of where and under what a bench ran: device sheet, disturbance, energy, memory bandwidth.

In: plain values from whatever measured (Python here, a phone, a browser). Out: validated records.
Not here: reading a machine (`evals/bench/device.py`, `bench/energy.py`, `bench/bandwidth.py`), the file that
holds them (`evals/bench/bench_results.py`).

A field that is null was not measured or does not exist there. Shares are 0..1. 1 MiB = 1,048,576 bytes,
1 GB = 1,000,000,000 bytes.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from evals.records import Amount, Count, Record, Share

Positive = Annotated[float, Field(gt=0)]
Kind = Literal["server", "desktop", "laptop", "phone", "tablet", "board", "browser", "unknown"]
EnergySource = Literal["rapl", "power_rails", "tegrastats", "battery", "platform"]


class Reason(Record):
    """Something a reader may look for that was not measured, and why."""

    what: Annotated[str, Field(min_length=1)]
    why: Annotated[str, Field(min_length=1)]


class CoreCluster(Record):
    """Cores that share a frequency policy (big and little cores are clusters of their own)."""

    cpus: Annotated[tuple[Count, ...], Field(min_length=1)]
    min_mhz: Amount | None = None
    max_mhz: Amount | None = None
    governor: str | None = Field(
        default=None, description="frequency governor, such as performance or schedutil"
    )


class Temperature(Record):
    zone: str
    celsius: float


class DeviceSheet(Record):
    """What ran the bench. `name` is what a fleet matrix calls the device; the same device, the same name.

    cores: physical cores usable by the process; cpus: hardware threads usable. quota_cpus: limit of a
    container, where there is one. features: instruction sets that decide speed (avx2, avx512_vnni, dotprod).
    """

    name: Annotated[str, Field(min_length=1)]
    kind: Kind = "unknown"
    model: str | None = Field(default=None, description="product name of the board, phone or computer")
    cpu: str
    architecture: str = Field(description="aarch64, x86_64, arm64, wasm32, ...")
    cores: Annotated[int, Field(ge=1)]
    cpus: Annotated[int, Field(ge=1)] | None = None
    quota_cpus: Positive | None = None
    clusters: tuple[CoreCluster, ...] = ()
    features: tuple[str, ...] = ()
    last_cache_bytes: Count | None = Field(default=None, description="last-level cache, all of it")
    memory_mib: Amount | None = None
    swap_mib: Amount | None = None
    accelerators: tuple[str, ...] = Field(default=(), description="GPUs and NPUs that the system names")
    os: str
    kernel: str | None = None
    virtual_machine: str | None = Field(default=None, description="hypervisor; null: none seen")
    container: str | None = Field(default=None, description="container engine; null: none seen")
    governor: str | None = None
    boost: bool | None = Field(
        default=None, description="whether the processor may exceed its base frequency"
    )
    power_mode: str | None = Field(
        default=None, description="nvpmodel mode, low power mode, platform profile"
    )
    power_source: Literal["mains", "battery"] | None = None
    battery_share: Share | None = None
    temperatures: tuple[Temperature, ...] = ()
    thermal_state: Literal["nominal", "fair", "serious", "critical"] | None = None
    language: str | None = Field(
        default=None, description="language runtime and its version, such as CPython 3.11.9"
    )
    packages: dict[str, str] = Field(
        default_factory=dict, description="versions of runtimes and libraries that did the work"
    )
    providers: tuple[str, ...] = Field(
        (), description="execution providers or compute units that are available"
    )
    extra: dict[str, str] = Field(default_factory=dict)


class Disturbance(Record):
    """What else happened on the machine during one run; shares are of all its hardware threads' time.

    other_share: used by other processes; steal_share: taken by other virtual machines; own_share: used here.
    throttle_events: thermal throttling counted by the processor during the run.
    """

    own_share: Share | None = None
    other_share: Share | None = None
    steal_share: Share | None = None
    throttle_events: Count | None = None
    mhz_before: Amount | None = None
    mhz_after: Amount | None = None
    celsius_before: float | None = None
    celsius_after: float | None = None
    thermal_state_after: Literal["nominal", "fair", "serious", "critical"] | None = None


class Energy(Record):
    """Energy of whole answers run back to back, or the reason why there is none.

    scope: what the meter sees (`package-0`, `VDD_IN`, `whole device`). net_*: the idle power, measured just
    before, is taken off. An answer is image bytes in to `tokens_per_answer` tokens out.
    """

    source: EnergySource | None = None
    why_not: str | None = Field(default=None, description="why nothing was measured; null when it was")
    scope: str | None = None
    seconds: Positive | None = None
    joule: Amount | None = None
    idle_watt: Amount | None = None
    watt: Amount | None = None
    answers: Annotated[int, Field(ge=1)] | None = None
    tokens_per_answer: Count | None = None
    joule_per_answer: Amount | None = None
    net_joule_per_answer: Amount | None = Field(
        default=None, description="null: no idle power, or less than it"
    )
    millijoule_per_token: Amount | None = Field(
        default=None, description="from decoding alone, idle included"
    )
    note: str | None = None

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Energy:
        if (self.source is None) == (self.why_not is None):
            raise ValueError("energy: wanted either a source or why_not, not both and not neither")
        if self.source is not None and (self.joule is None or self.seconds is None or self.answers is None):
            raise ValueError("energy: a source needs joule, seconds and answers")
        return self


class Bandwidth(Record):
    """What the memory gave to plain reading loops on this device, just before or after the runs.

    It is the best of several loops: a lower bound of what the hardware can do.
    """

    read_gb_s: Positive = Field(description="best loop; copies count what they read and what they write")
    loop: str = Field(description="the loop that was best")
    threads: Annotated[int, Field(ge=1)]
    buffer_bytes: Annotated[int, Field(ge=1)]
    samples_gb_s: tuple[Positive, ...] = Field(description="of the best loop, one per repeat")
    loops_gb_s: dict[str, Positive] = Field(
        default_factory=dict, description="the best of each loop that was tried"
    )
