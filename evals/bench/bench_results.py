"""`bench.json`: what bundles cost on one device. Written here, by phones, by browsers; read by the report.

In: raw times of every repeat. Out: one validated `BenchResults`, whose summaries are computed from the raw
times when a writer left them out. Not here: measuring (`evals/bench/bench_run.py`), the device's own records
(`evals/bench/bench_conditions.py`), drawing.

`python -m evals.bench.bench_results` prints the JSON Schema that is published as docs/bench.schema.json;
docs/bench.md explains it to who writes a harness in another language. Only numbers with their unit in the
name, texts, enums, lists and objects; unknown keys are refused; null means not measured (`missing`: why).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError, model_validator

from evals.bench.bench_conditions import Bandwidth, DeviceSheet, Disturbance, Energy, Reason
from evals.records import Amount, Count, Record
from runtime import files
from runtime.errors import InputError

SCHEMA: Final = "pocketvlm.bench@1"
Origin = Literal["local", "ssh", "adb", "swift", "browser", "evaluator"]
Text = Annotated[str, Field(min_length=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Spread(Record):
    """Of `n` values in the field's unit. low, high: 95 % interval of p50 from how the processes differ.

    It is null with one process. p90 is null below 10 values and p99 below 100: fewer say nothing about them.
    """

    n: Annotated[int, Field(ge=1)]
    p50: Amount
    p90: Amount | None = None
    p99: Amount | None = None
    mean: Amount
    least: Amount
    most: Amount
    low: Amount | None = None
    high: Amount | None = None


class Position(Record):
    """Decoding the token that makes the sequence `context_tokens` long, over all repeats."""

    context_tokens: Count
    n: Annotated[int, Field(ge=1)]
    p50_ms: Amount


class Summary(Record):
    """What the raw times of one bundle at one grid point come to; null where there are no times."""

    load_cold_ms: Spread | None = None
    load_warm_ms: Spread | None = None
    preprocess_ms: Spread | None = None
    encode_ms: Spread | None = None
    prefill_ms: Spread | None = None
    ttft_ms: Spread | None = None
    decode_ms: Spread | None = None
    end_to_end_ms: Spread | None = None
    prefill_tok_s: Amount | None = Field(default=None, description="prompt tokens over the median prefill")
    decode_tok_s: Amount | None = Field(default=None, description="1 over the median decode_ms")
    decode_by_position: tuple[Position, ...] = ()
    load_peak_rss_mib: Amount | None = Field(default=None, description="largest of the rounds")
    peak_rss_mib: Amount | None = Field(default=None, description="largest of the rounds")


class Memory(Record):
    """Of the measuring process alone. `meter` names what the system calls it (VmHWM, phys_footprint, ...).

    base: before the bundle is opened; load_peak: largest until it is open; run_peak: largest while answering;
    peak: the larger of both. mapped: bytes of the bundle's files that are mapped, not copied.
    """

    meter: Text
    base_rss_mib: Amount | None = None
    load_peak_rss_mib: Amount | None = None
    loaded_rss_mib: Amount | None = Field(default=None, description="after opening, before the first answer")
    run_peak_rss_mib: Amount | None = None
    peak_rss_mib: Amount | None = None
    anonymous_mib: Amount | None = Field(default=None, description="of loaded_rss: memory that no file backs")
    mapped_mib: Amount | None = None
    accelerator_mib: Amount | None = Field(
        default=None, description="memory of a GPU or NPU, apart from the CPU's"
    )


class Load(Record):
    """Opening the bundle. cold: the first time in a fresh process; warm: again in the same process.

    compile_ms, download_ms: parts of cold that a platform can tell apart (Core ML, TensorRT; a browser).
    """

    cold_ms: Amount | None = None
    warm_ms: tuple[Amount, ...] = ()
    compile_ms: Amount | None = None
    download_ms: Amount | None = None
    page_cache: Literal["warm", "dropped", "unknown"] = "unknown"


class Times(Record):
    """Raw times, one value per measured repeat, in the order they were taken. Empty: not measured.

    ttft_ms runs from the image's bytes to the first text, measured whole, never summed. decode_ms has a list
    per repeat, with a value for each decoded token in turn. end_to_end_ms ends with the last decoded token.
    """

    preprocess_ms: tuple[Amount, ...] = ()
    encode_ms: tuple[Amount, ...] = ()
    prefill_ms: tuple[Amount, ...] = ()
    ttft_ms: tuple[Amount, ...] = ()
    decode_ms: tuple[tuple[Amount, ...], ...] = ()
    end_to_end_ms: tuple[Amount, ...] = ()


class Run(Record):
    """One fresh process (phone: app start; browser: page load). `order`: its place among all runs."""

    round: Count
    order: Count
    started: str | None = Field(default=None, description="ISO 8601, UTC")
    fresh_process: bool = True
    load: Load = Load()
    times: Times
    memory: Memory | None = None
    disturbance: Disturbance | None = None
    harness_share: Amount | None = Field(
        default=None, description="time that the timing itself took, over the time it measured"
    )


class Window(Record):
    """A stretch of a sustained run."""

    start_s: Amount
    end_s: Amount
    answers: Count
    end_to_end_ms: Amount | None = Field(default=None, description="median of the stretch")
    decode_tok_s: Amount | None = None
    mhz: Amount | None = None
    celsius: float | None = None
    watt: Amount | None = None
    thermal_state: Literal["nominal", "fair", "serious", "critical"] | None = None


class Sustained(Record):
    """The same question over and over. answer_at_s, answer_ms: end and length of every kept_every-th answer.

    ratio: last quarter's median over the first quarter's, with a 95 % interval; throttled: the interval is
    above 1.05, or the processor counted throttling; null when the run was too short to tell. What a writer
    leaves out from `answers` on, the reader computes.
    """

    asked_s: Amount
    measured_s: Amount
    tokens_per_answer: Count
    answer_at_s: tuple[Amount, ...]
    answer_ms: tuple[Amount, ...]
    kept_every: Annotated[int, Field(ge=1)] = 1
    answers: Count | None = Field(default=None, description="all of them, those left out of the lists too")
    windows: tuple[Window, ...] = ()
    ratio: Amount | None = None
    low: Amount | None = None
    high: Amount | None = None
    throttled: bool | None = None
    throttle_evidence: str | None = None

    @model_validator(mode="after")
    def _paired(self) -> Sustained:
        if len(self.answer_at_s) != len(self.answer_ms):
            raise ValueError(
                f"answer_at_s has {len(self.answer_at_s)} values, answer_ms {len(self.answer_ms)}"
            )
        return self


class Roofline(Record):
    """Decoding against memory bandwidth. bytes_per_token is an estimate; `counted` says of what.

    share: bytes_per_token x decode_tok_s over the device's read_gb_s; null when the bytes fit into the last
    cache, where memory is not what bounds it.
    """

    bytes_per_token: Count
    counted: str
    context_tokens: Count
    fits_cache: bool | None = None
    share: Amount | None = None


class PointResult(Record):
    """One bundle at one grid point."""

    point: Text
    prompt_tokens: Count = Field(description="all of the prompt, image tokens included")
    image_tokens: Count
    decode_tokens: Count
    runs: Annotated[tuple[Run, ...], Field(min_length=1)]
    summary: Summary | None = Field(default=None, description="null: the reader computes it from the runs")
    energy: Energy | None = None
    roofline: Roofline | None = None
    sustained: Sustained | None = None


class BundlePart(Record):
    role: Text
    bytes: Count
    bits: Amount | None = Field(default=None, description="mean over the parameters that the manifest counts")
    unit: str | None = Field(default=None, description="provider or compute unit that ran it")
    unit_note: str | None = Field(
        default=None, description="why not the preferred one; share of its operations"
    )


class Ceiling(Record):
    """A limit of a store or browser, and whether the download stays under it; `source` says whose words."""

    name: Text
    limit_bytes: Count
    fits: bool
    source: str
    note: str = ""


class BundleResult(Record):
    """A bundle's facts and its results. sha256: of its manifest.json, by which results are joined.

    download_bytes: the files that a device needs; disk_bytes: everything in the directory; state_bytes: the
    state (KV cache) when `max_context` tokens are in it.
    """

    name: Text
    sha256: Sha256 | None = None
    source_sha256: Sha256 | None = Field(default=None, description="of the checkpoint it was made from")
    format: Literal["onnx", "gguf", "coreml"]
    precision: str
    target: str | None = None
    parts: tuple[BundlePart, ...] = ()
    disk_bytes: Count | None = None
    download_bytes: Count | None = None
    state_bytes: Count | None = None
    max_context: Count | None = None
    ceilings: tuple[Ceiling, ...] = ()
    points: tuple[PointResult, ...]
    missing: tuple[Reason, ...] = ()


class GridPoint(Record):
    """A picture and a question. The picture was made or scaled to width x height where `scaled`."""

    id: Text
    image: str | None = Field(default=None, description="file name; null: no picture")
    width: Count | None = None
    height: Count | None = None
    image_sha256: Sha256 | None = None
    scaled: bool = False
    question: str
    question_tokens: Count | None = Field(
        default=None,
        description="tokens of the question that were asked for, by the first bundle's tokenizer",
    )


class Policy(Record):
    """How it was measured. `interleaved`: bundles took turns, so that drift falls on all of them."""

    rounds: Annotated[int, Field(ge=1)]
    warmup: Count
    repeats: Annotated[int, Field(ge=1)]
    decode_tokens: Count
    threads: Annotated[int, Field(ge=1)] | None = None
    providers: tuple[str, ...] = Field(
        default=(), description="execution providers asked for; empty: the bundle's own"
    )
    max_context: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="tokens of state that were asked for; null: the session's default"
    )
    interleaved: bool = True
    rest_s: Amount = Field(default=0.0, description="waited before each process, to cool down")


class BenchRatio(Record):
    """Medians, candidate over reference, by pairs of processes of one round (geometric mean over rounds).

    low, high: 95 % interval, Student's t over rounds; null with one round.
    """

    point: Text
    metric: Text
    reference: Text
    candidate: Text
    ratio: Amount
    low: Amount | None = None
    high: Amount | None = None


class Tool(Record):
    name: Text
    version: str


class BenchResults(Record):
    """All of it. emulated: the times are not those of the device that is named (`emulated_why` says what runs
    instead); they prove that it works and what it computes, never how fast."""

    schema_id: Literal["pocketvlm.bench@1"] = Field(alias="schema")
    created: str = Field(description="ISO 8601, UTC")
    tool: Tool
    source: Origin
    emulated: bool = False
    emulated_why: str | None = None
    device: DeviceSheet
    policy: Policy
    grid: Annotated[tuple[GridPoint, ...], Field(min_length=1)]
    bandwidth: Bandwidth | None = None
    bundles: Annotated[tuple[BundleResult, ...], Field(min_length=1)]
    ratios: tuple[BenchRatio, ...] = ()
    missing: tuple[Reason, ...] = ()
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> BenchResults:
        if (self.emulated or self.source == "evaluator") != bool(self.emulated and self.emulated_why):
            raise ValueError("emulated results (an evaluator's always) need emulated: true and emulated_why")
        points, names = [point.id for point in self.grid], [bundle.name for bundle in self.bundles]
        for what, found in (("grid ids", points), ("bundle names", names)):
            if len(set(found)) < len(found):
                raise ValueError(f"{what} must differ, got {found}")
        for bundle in self.bundles:
            asked = [result.point for result in bundle.points]
            if len(set(asked)) < len(asked) or not set(asked) <= set(points):
                raise ValueError(
                    f"bundle {bundle.name}: points {asked} must be different ids of the grid {points}"
                )
        for ratio in self.ratios:
            if ratio.point not in points or not {ratio.reference, ratio.candidate} <= set(names):
                raise ValueError(f"ratio of {ratio.candidate} at {ratio.point}: no such bundle or point")
        return self

    def bundle(self, name: str) -> BundleResult | None:
        return next((bundle for bundle in self.bundles if bundle.name == name), None)


def check_place(out: Path) -> None:
    """Ask before measuring whether results can be written there. Raises InputError when they cannot."""
    if out.is_dir():
        raise InputError(f"--out {out}: is a directory; give the name of a file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InputError(f"--out {out}: cannot be written there ({out.parent} is a file)") from None
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written there ({error.strerror})") from error
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise InputError(f"--out {out}: cannot be written there (no right to write in {out.parent})")


def write(results: BenchResults, path: Path) -> Path:
    """Write bench.json whole or not at all. Raises InputError when it cannot be written there."""
    try:
        files.write_text(path, dumps(results) + "\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from error
    return path


def dumps(results: BenchResults) -> str:
    """As JSON text, with the key `schema`."""
    return results.model_dump_json(indent=1, by_alias=True)


def read(path: Path) -> BenchResults:
    """Read and check a bench.json of any origin. Raises InputError naming the file and the first fault."""
    try:
        found: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: is no JSON ({error})") from error
    name = found.get("schema") if isinstance(found, dict) else None
    if name != SCHEMA:
        raise InputError(f"{path}: schema is {name!r}, this version reads {SCHEMA!r}")
    try:
        return BenchResults.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InputError(
            f"{path}: {where}: {first['msg']} ({error.error_count()} faults); see docs/bench.md"
        ) from error


def json_schema() -> str:
    """The JSON Schema as published in docs/bench.schema.json."""
    return json.dumps(BenchResults.model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
