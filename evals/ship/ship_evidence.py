"""What is known about bundles, joined from all files: by bundle, device and task.

In: validated bench.json, eval.json and parity.json. Out: one `Evidence`, part of `report.json`.
Not here: reading files (`evals/ship/ship_load.py`), limits (`evals/ship/ship_gate.py`), drawing.

Raw answers and single repeats stay in their files. What a later comparison needs is kept: the score of every
unit of a task, and the percentiles of every process. Shares are 0..1, units are in the names, None was not
measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from evals.asking.eval_results import Summary, TaskInfo, Variant
from evals.bench.bench_conditions import Bandwidth, DeviceSheet, Energy, Reason
from evals.bench.bench_results import BundlePart, Ceiling, Origin, Position, Roofline, Spread, Sustained
from evals.parity.parity_results import Asked, Candidate, Greedy, Numerics, Preprocessing, Reference
from evals.records import Amount, Count, Record, Share

Metric = Literal[
    "load_cold_ms", "load_warm_ms", "preprocess_ms", "encode_ms", "prefill_ms", "ttft_ms", "decode_ms",
    "end_to_end_ms", "peak_rss_mib", "load_peak_rss_mib",
]  # fmt: skip
Picture = Annotated[str, Field(pattern=r"^data:image/(png|jpeg|webp);base64,[A-Za-z0-9+/=]+$")]


class Source(Record):
    """A file that was read. `file`: its name, without the directory it lay in."""

    file: str
    schema_name: str
    created: str
    sha256: str


class BundleFacts(Record):
    """A bundle, whoever measured it. sha256: of its manifest, by which files are joined where they tell it;
    source_sha256: of the checkpoint it was made from."""

    name: str
    sha256: str | None = None
    source_sha256: str | None = None
    format: str
    precision: str
    target: str | None = None
    parts: tuple[BundlePart, ...] = ()
    disk_bytes: Count | None = None
    download_bytes: Count | None = None
    state_bytes: Count | None = None
    max_context: Count | None = None
    ceilings: tuple[Ceiling, ...] = ()

    @property
    def size_bytes(self) -> int | None:
        """What a device downloads; where that is unknown, what lies on the disk."""
        return self.download_bytes if self.download_bytes is not None else self.disk_bytes


class DeviceSeen(Record):
    """A device of the fleet. emulated: its times are another machine's, and no limit on time is judged."""

    sheet: DeviceSheet
    origin: Origin
    emulated: bool = False
    emulated_why: str | None = None
    bandwidth: Bandwidth | None = None
    created: str
    tool: str
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.sheet.name


class Measure(Record):
    """One metric of a bundle at a grid point: all repeats, and p50 and p90 of each process (fresh start).

    A metric that is one value per process has one repeat in each.
    """

    metric: Metric
    spread: Spread
    process_p50: tuple[Amount, ...]
    process_p90: tuple[Amount, ...]


class Timing(Record):
    """A bundle on a device at one grid point. `conditions`: how it was measured, in words."""

    device: str
    bundle: str
    point: str
    picture: str = ""
    picture_sha256: str | None = None
    question: str
    conditions: str
    threads: Count | None = None
    page_cache: str = "unknown"
    prompt_tokens: Count
    image_tokens: Count
    decode_tokens: Count
    measures: tuple[Measure, ...]
    prefill_tok_s: Amount | None = None
    decode_tok_s: Amount | None = None
    decode_by_position: tuple[Position, ...] = ()
    units: dict[str, str] = Field(default_factory=dict, description="part: provider or compute unit")
    base_rss_mib: Amount | None = None
    mapped_mib: Amount | None = None
    other_share: Share | None = Field(None, description="largest share of the machine that others used")
    harness_share: Amount | None = Field(None, description="largest share that the timing itself took")
    energy: Energy | None = None
    roofline: Roofline | None = None
    sustained: Sustained | None = None

    def measure(self, metric: str) -> Measure | None:
        return next((one for one in self.measures if one.metric == metric), None)

    def p50(self, metric: str) -> float | None:
        found = self.measure(metric)
        return found.spread.p50 if found else None


class SubjectSeen(Record):
    """A model that answered a task. bundle: its name in `Evidence.bundles`, for kind bundle."""

    name: str
    kind: Literal["checkpoint", "teacher", "bundle"]
    format: str
    precision: str
    sha256: str | None = None
    bytes: Count | None = None


class Answered(Record):
    """A subject's scores in one variant, one per unit of the task; None where it was not asked."""

    subject: str
    variant: str
    scores: tuple[Share | None, ...]


class Task(Record):
    """One task, all subjects. units and groups (image numbers) are aligned with every `Answered.scores`."""

    info: TaskInfo
    variants: tuple[Variant, ...]
    units: tuple[str, ...]
    groups: tuple[Count, ...]
    subjects: tuple[SubjectSeen, ...]
    answered: tuple[Answered, ...]
    summaries: tuple[Summary, ...]

    @model_validator(mode="after")
    def _aligned(self) -> Task:
        lengths = {"groups": len(self.groups)}
        lengths |= {f"scores of {one.subject}, {one.variant}": len(one.scores) for one in self.answered}
        for what, length in lengths.items():
            if length != len(self.units):
                raise ValueError(f"task {self.info.name}: {length} {what} for {len(self.units)} units")
        return self

    @property
    def name(self) -> str:
        return self.info.name

    def subject(self, name: str) -> SubjectSeen | None:
        return next((one for one in self.subjects if one.name == name), None)

    def scores(self, subject: str, variant: str) -> tuple[float | None, ...] | None:
        wanted = (subject, variant)
        return next((one.scores for one in self.answered if (one.subject, one.variant) == wanted), None)

    def summary(self, subject: str, variant: str) -> Summary | None:
        wanted = (subject, variant, "")
        return next((s for s in self.summaries if (s.subject, s.variant, s.category) == wanted), None)


class ParitySeen(Record):
    """A bundle against its checkpoint on the same forced tokens; the records are those of parity.json."""

    bundle: str
    reference: Reference
    asked: Asked
    backend: str
    emulated: bool = False
    emulated_why: str = ""
    preprocessing: Preprocessing | None = None
    numerics: tuple[Numerics, ...] = ()
    same_inputs: Numerics | None = None
    greedy: Greedy | None = None
    error: str | None = None

    @classmethod
    def of(cls, candidate: Candidate, reference: Reference, asked: Asked, bundle: str) -> ParitySeen:
        same = ("backend", "emulated", "preprocessing", "same_inputs", "greedy", "error")
        return cls(
            bundle=bundle, reference=reference, asked=asked, emulated_why=candidate.emulated_reason,
            numerics=tuple(candidate.numerics), **{name: getattr(candidate, name) for name in same},
        )  # fmt: skip

    @property
    def main(self) -> Numerics | None:
        """The figures along the reference's own greedy answers, else along the labels."""
        by_forced = {one.forced: one for one in self.numerics}
        return by_forced.get("reference-greedy") or by_forced.get("label")


class FlipSeen(Record):
    """A question that a bundle answers differently than the reference. picture: a data URI, where kept."""

    task: str
    variant: str
    bundle: str
    reference_subject: str
    id: str
    question: str
    references: tuple[str, ...]
    before: str
    after: str
    before_score: Share
    after_score: Share
    picture: Picture | None = None


class Evidence(Record):
    """Everything that the verdict, the page and a later comparison rest on."""

    sources: tuple[Source, ...] = ()
    bundles: tuple[BundleFacts, ...] = ()
    devices: tuple[DeviceSeen, ...] = ()
    timings: tuple[Timing, ...] = ()
    tasks: tuple[Task, ...] = ()
    parity: tuple[ParitySeen, ...] = ()
    flips: tuple[FlipSeen, ...] = ()
    flips_left_out: Count = 0
    missing: tuple[Reason, ...] = ()

    def bundle(self, name: str) -> BundleFacts | None:
        return next((one for one in self.bundles if one.name == name), None)

    def timing(self, device: str, bundle: str, point: str) -> Timing | None:
        wanted = (device, bundle, point)
        return next((t for t in self.timings if (t.device, t.bundle, t.point) == wanted), None)

    def timings_of(self, device: str, bundle: str) -> list[Timing]:
        """In the order of the grid."""
        return [t for t in self.timings if (t.device, t.bundle) == (device, bundle)]


def unlike(old: object, new: object, keys: Sequence[str]) -> str | None:
    """The first attribute that differs, in words; None when all are equal."""
    for key in keys:
        before, now = getattr(old, key), getattr(new, key)
        if before != now:
            return f"{key.replace('_', ' ')} differs: {before!s:.80} before, {now!s:.80} now"
    return None
