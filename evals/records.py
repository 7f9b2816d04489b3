"""Records that a measurement returns, and the base of every record.

In: plain values. Out: validated, immutable pydantic models that `evals/results.py` builds on.
Not here: the report's own shape, measuring, drawing.

Shares are 0..1, never percent. Units are in the names. A field that is None was not measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from evals import stats
from runtime.errors import PocketError

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]


class Record(BaseModel):
    """Base of every record: immutable, unknown keys refused, numbers finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


R = TypeVar("R", bound=Record)


def read_record(path: Path, kind: type[R], fault: type[PocketError], wanted: str, again: str) -> R:
    """The record in a JSON file. Raises `fault` naming the file, the first fault, what was wanted and what to
    do `again`."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except OSError as error:
        raise fault(f"{path}: cannot be read ({error.strerror}); {again}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise fault(
            f"{path}: {where}: {first['msg']} ({error.error_count()} faults); {wanted}: {again}"
        ) from error


class Score(Record):
    """Accuracy on `n` questions with its 95 % Wilson interval. Build one with `Score.of`."""

    right: Count
    n: Annotated[int, Field(ge=1)]
    accuracy: Share
    low: Share
    high: Share

    @classmethod
    def of(cls, right: int, n: int) -> Score:
        """Raises ValueError when n is 0 or right is not in 0..n."""
        if n == 0:
            raise ValueError("Score.of: n is 0; leave the score None and add a Missing")
        interval = stats.wilson(right, n)
        return cls(right=right, n=n, accuracy=right / n, low=interval.low, high=interval.high)

    @model_validator(mode="after")
    def _consistent(self) -> Score:
        if abs(self.accuracy - self.right / self.n) > 1e-9 or not self.low <= self.accuracy <= self.high:
            raise ValueError(
                f"score: accuracy {self.accuracy} in [{self.low}, {self.high}] is not {self.right}/{self.n}"
            )
        return self


class Comparison(Record):
    """Candidate against reference on the same questions. `difference` is candidate minus reference.

    low and high: 95 % bootstrap over whole images. p_value: exact McNemar, two-sided.
    """

    student: str
    reference: str
    candidate: str
    n: Annotated[int, Field(ge=1)]
    right_to_wrong: Count
    wrong_to_right: Count
    difference: Annotated[float, Field(ge=-1, le=1)]
    low: float
    high: float
    p_value: Share


class Percentiles(Record):
    """p50, p90 and p99 of `n` repeats, in the field's unit. Under n = 100, p99 is the largest or near it."""

    p50: Amount
    p90: Amount
    p99: Amount
    n: Annotated[int, Field(ge=1)]

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        p50, p90, p99 = (stats.percentile(values, q) for q in (50, 90, 99))
        return cls(p50=p50, p90=p90, p99=p99, n=len(values))


class Device(Record):
    """Where the figures were taken. `extra` holds what a device adds (power mode, thermal state)."""

    cpu: str
    cores: Annotated[int, Field(ge=1)]
    memory_mib: Amount | None
    os: str
    python: str
    governor: str | None = Field(None, description="CPU frequency governor, where readable")
    packages: dict[str, str] = {}
    extra: dict[str, str] = {}


class Latency(Record):
    """One bundle measured in fresh processes; docs/evaluation.md says what each figure covers.

    peak_rss_mib: VmHWM of the measuring process, largest of the rounds; base_rss_mib: what Python and its
    libraries took before the bundle was opened. ttft_ms is measured whole, never summed. Every repeat
    decodes exactly `decode_tokens` tokens, stop tokens ignored. Tokens a second are at the median time.
    """

    threads: Annotated[int, Field(ge=1)]
    rounds: Annotated[int, Field(ge=1)]
    warmup: Count
    repeats: Annotated[int, Field(ge=1)]
    prompt_tokens: Count
    image_tokens: Count
    decode_tokens: Count
    page_cache: Literal["warm", "dropped"]
    load_cold_ms: Percentiles
    load_warm_ms: Percentiles
    preprocess_ms: Percentiles
    encode_ms: Percentiles
    prefill_ms: Percentiles
    ttft_ms: Percentiles
    decode_ms: Percentiles
    end_to_end_ms: Percentiles
    prefill_tok_s: Amount
    decode_tok_s: Amount
    base_rss_mib: Amount
    peak_rss_mib: Amount
    disk_bytes: Count
    device: Device


class LatencyRatio(Record):
    """A bundle's median over the first bundle's, from interleaved rounds, with a 95 % interval."""

    metric: str
    reference: str
    ratio: Amount
    low: Amount
    high: Amount


class Parity(Record):
    """Bundle against checkpoint, teacher-forced, as the export gate measured it.

    KL in nats per position; logit differences in logits; feature difference over the picture's largest
    feature. Build one from a manifest with `Parity.of`.
    """

    positions: Count
    kl_mean: Amount
    kl_median: Amount
    kl_p99: Amount
    logit_max_diff: Amount
    top1_agreement: Share
    feature_max_diff: Amount | None = None
    pixel_max_diff: Amount | None = None
    ids_equal: bool = True
    near_ties: Count = 0
    passed: bool

    @classmethod
    def of(cls, figures: Mapping[str, float], limits: Mapping[str, float]) -> Parity:
        """From a manifest's `parity.figures` and `parity.limits`; figures without a field are dropped."""
        known = {name: figures[name] for name in cls.model_fields if name in figures}
        passed = all(figures[name] <= limit for name, limit in limits.items())
        return cls.model_validate({**known, "passed": passed})


class Flip(Record):
    """A question that bundle and checkpoint answer differently. margin: gap of the top two logits at the
    first token that differs, in the reference."""

    id: str
    question: str
    reference: str
    checkpoint_text: str
    bundle_text: str
    margin: Amount | None = None
    near_tie: bool = False


class Agreement(Record):
    """Answers of a bundle against its checkpoint's on the same `n` questions.

    low and high bound `difference` (bundle minus checkpoint accuracy; bootstrap over images).
    near_ties counts differing items whose margin is below `tie_margin`; `differing` may be cut to a few.
    """

    n: Annotated[int, Field(ge=1)]
    same: Count
    right_to_wrong: Count
    wrong_to_right: Count
    difference: Annotated[float, Field(ge=-1, le=1)]
    low: float
    high: float
    p_value: Share
    near_ties: Count
    tie_margin: Amount = 1e-4
    differing: list[Flip] = Field(default_factory=list)
