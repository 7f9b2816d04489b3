"""`gate.yaml`: the limits that a bundle must keep to be shipped. Its JSON Schema is docs/gate.schema.json.

In: YAML. Out: a `Gate`: ordered rules, each one quantity with a least or a largest value. Not here: how a
quantity is read from the evidence (`ship/ship_quantities.py`), the verdict (`ship/ship_checks.py`).
`python -m evals.ship.ship_gate` prints the JSON Schema.

A rule holds for every candidate, and on every device, task, variant and grid point that its selectors match;
selectors are shell patterns (`*`, `blur-*`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import ConfigDict, Field, model_validator

from evals.asking.eval_results import ORIGINAL
from evals.records import Amount, Record

SCHEMA: Literal["pocketvlm.gate@1"] = "pocketvlm.gate@1"
Quantity = Literal[
    "accuracy_percent", "accuracy_drop_points", "failed_questions",
    "prompts_equal_percent", "images_equal_percent", "pixel_max_diff", "kl_mean_nats", "kl_p99_nats",
    "top1_percent", "perplexity_ratio", "greedy_prefix_percent",
    "download_mb", "disk_mb",
    "load_cold_ms", "load_warm_ms", "preprocess_ms", "encode_ms", "prefill_ms", "ttft_ms", "decode_ms",
    "end_to_end_ms", "prefill_tok_s", "decode_tok_s", "peak_rss_mib", "load_peak_rss_mib",
    "joule_per_answer", "millijoule_per_token", "sustained_slowdown_percent",
]  # fmt: skip
Scope = Literal["task", "parity", "bundle", "device"]


@dataclass(frozen=True)
class Kind:
    """What a quantity is called, how its numbers are written, where it comes from and which rules fit it."""

    quantity: Quantity
    label: str
    scope: Scope
    unit: str
    timed: bool = False

    @property
    def selectors(self) -> frozenset[str]:
        """Keys of a rule that mean something for this quantity."""
        own = {
            "task": {"task", "variant"},
            "parity": set[str](),
            "bundle": set[str](),
            "device": {"device", "point"},
        }[self.scope]
        if self.quantity == "accuracy_drop_points":
            own = own | {"reference"}
        return frozenset(own | ({"percentile"} if self.quantity in PERCENTILES else set()))


PERCENTILES = (
    "load_cold_ms", "load_warm_ms", "preprocess_ms", "encode_ms", "prefill_ms", "ttft_ms", "decode_ms",
    "end_to_end_ms",
)  # fmt: skip
KINDS: tuple[Kind, ...] = (
    Kind("accuracy_percent", "accuracy", "task", "%"),
    Kind("accuracy_drop_points", "accuracy lost", "task", "points"),
    Kind("failed_questions", "questions that could not be asked", "task", ""),
    Kind("prompts_equal_percent", "prompts with equal ids", "parity", "%"),
    Kind("images_equal_percent", "pictures with equal pixels", "parity", "%"),
    Kind("pixel_max_diff", "largest pixel difference", "parity", ""),
    Kind("kl_mean_nats", "mean KL", "parity", "nats"),
    Kind("kl_p99_nats", "KL, 99th percentile", "parity", "nats"),
    Kind("top1_percent", "same best token", "parity", "%"),
    Kind("perplexity_ratio", "perplexity over the checkpoint's", "parity", "×"),
    Kind("greedy_prefix_percent", "equal start of greedy answers", "parity", "%"),
    Kind("download_mb", "download", "bundle", "MB"),
    Kind("disk_mb", "size on disk", "bundle", "MB"),
    Kind("load_cold_ms", "first load", "device", "ms", True),
    Kind("load_warm_ms", "loading again", "device", "ms", True),
    Kind("preprocess_ms", "preprocessing", "device", "ms", True),
    Kind("encode_ms", "image encoding", "device", "ms", True),
    Kind("prefill_ms", "prefill", "device", "ms", True),
    Kind("ttft_ms", "time to first text", "device", "ms", True),
    Kind("decode_ms", "time of one token", "device", "ms", True),
    Kind("end_to_end_ms", "time to last token", "device", "ms", True),
    Kind("prefill_tok_s", "prefill speed", "device", "tok/s", True),
    Kind("decode_tok_s", "decode speed", "device", "tok/s", True),
    Kind("peak_rss_mib", "peak memory", "device", "MiB"),
    Kind("load_peak_rss_mib", "peak memory while loading", "device", "MiB"),
    Kind("joule_per_answer", "energy of an answer", "device", "J", True),
    Kind("millijoule_per_token", "energy of a token", "device", "mJ", True),
    Kind("sustained_slowdown_percent", "slowdown of a sustained run", "device", "%", True),
)
BY_QUANTITY = {kind.quantity: kind for kind in KINDS}
assert set(BY_QUANTITY) == set(get_args(Quantity))


class Rule(Record):
    """One limit. `name`: what the page calls it, where the quantity's own name says too little."""

    quantity: Quantity
    min: float | None = None
    max: float | None = None
    name: str = ""
    bundle: str = Field(default="*", description="which candidates")
    task: str = Field(default="*", description="which tasks")
    variant: str = Field(default=ORIGINAL, description="which variants of a task: blur-*, ...")
    reference: Literal["checkpoint", "teacher"] = Field(default="checkpoint", description="what was lost to")
    device: str = Field(default="*", description="which devices")
    point: str = Field(default="*", description="which grid points (picture and question)")
    percentile: Literal[50, 90, 99] = Field(default=50, description="of all repeats")

    @model_validator(mode="after")
    def _makes_sense(self) -> Rule:
        if self.min is None and self.max is None:
            raise ValueError(f"{self.quantity}: wanted min or max")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"{self.quantity}: min {self.min:g} is above max {self.max:g}")
        free = {"quantity", "min", "max", "name", "bundle"} | self.kind.selectors
        fields = type(self).model_fields
        changed = {key for key in self.model_fields_set if getattr(self, key) != fields[key].default}
        if strange := sorted(changed - free):
            fitting = ", ".join(sorted(self.kind.selectors)) or "none"
            raise ValueError(f"{self.quantity}: {strange[0]} does not select it (selectors: {fitting})")
        return self

    @property
    def kind(self) -> Kind:
        return BY_QUANTITY[self.quantity]

    def fits(self, **names: str) -> bool:
        """Whether the selectors match: `fits(task="easy-vqa", variant="blur-3")`."""
        return all(fnmatchcase(name, getattr(self, selector)) for selector, name in names.items())


class Tolerance(Record):
    """What `report --compare` forgives: a change must be beyond chance and beyond this."""

    accuracy_points: Amount = 0
    slowdown_percent: Amount = 0
    memory_percent: Amount = 0
    bytes_percent: Amount = 1
    parity_percent: Amount = Field(default=10, description="a rise of mean KL, relative")
    parity_nats: Amount = Field(default=1e-4, description="a rise of mean KL, absolute")


class CompareRules(Record):
    """For `report --compare`. control: bundles measured both times that did not change, runtime included;
    what happened to them happened to the machine, and is taken off the others' timings. missing fail: what
    only the old side measured, or measured otherwise, counts as a regression; tell: it is told.
    """

    tolerance: Tolerance = Tolerance()
    control: tuple[str, ...] = ()
    missing: Literal["tell", "fail"] = "tell"


class Gate(Record):
    """All of gate.yaml.

    candidates: patterns of bundle names. devices: which must be served; none: all that were measured.
    require any: a passing candidate for every device; all: every candidate on every device.
    evidence bound: the 95 % interval must lie within the limit; estimate: the figure alone decides.
    missing fail: a limit on something that was not measured is not kept; ignore: it is told and passed over.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True, title=SCHEMA
    )

    schema_name: Literal["pocketvlm.gate@1"] = Field(default=SCHEMA, alias="schema")
    name: str = ""
    candidates: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)
    devices: tuple[str, ...] = ()
    require: Literal["any", "all"] = "any"
    prefer: Literal["size", "speed", "accuracy"] = Field(
        default="size", description="which of several passing candidates is named"
    )
    evidence: Literal["bound", "estimate"] = "bound"
    missing: Literal["fail", "ignore"] = "fail"
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)]
    compare: CompareRules = CompareRules()


DEFAULT = Gate(
    name="default rules",
    rules=(
        Rule(quantity="accuracy_drop_points", max=1.0),
        Rule(quantity="failed_questions", max=0),
    ),
)
"""Used without a gate.yaml: what needs no knowledge of the product."""


def read(path: Path) -> Gate:
    """Read gate.yaml. Raises InputError naming the file, the key and the nearest right one; MissingExtra
    without PyYAML."""
    from evals import strict

    return strict.validate(Gate, strict.load_yaml(path, "gate"), path)


def json_schema() -> str:
    """The JSON Schema of gate.yaml as published in docs/gate.schema.json."""
    return json.dumps(Gate.model_json_schema(by_alias=True), indent=2) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
