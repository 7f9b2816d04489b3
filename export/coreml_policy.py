"""Weight precision of ML programs as ordered rules per part: the data, the named ones, a user's own in YAML.

In: a name (`int4`, `pal4`) or the path of a YAML file. Out: a `Policy`. Not here: compression
(`coreml_compress.py`); this module imports neither torch nor coremltools.

The first rule that matches a weight decides. A weight's label is `OPERATION:name`, the operation that reads
it and its place in the checkpoint's module, as in `linear:text_layers_0_mlp_down_proj`; the LM head is
`linear:head`, the token table `gather:*` of `embed_tokens`, the rotary tables `gather:*` of `decoder`.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from export.quantize_policy import read_spec
from runtime.errors import InputError

Scheme = Literal[
    "keep",
    "int8",
    "int4-block16",
    "int4-block32",
    "int4-block64",
    "int4-block128",
    "pal8-group16",
    "pal6-group16",
    "pal4-group8",
    "pal4-group16",
    "pal4-group32",
]
PartName = Literal["*", "vision_encoder", "embed_tokens", "decoder"]

SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
_SIZED = re.compile(r"(int4|pal8|pal6|pal4)-(?:block|group)(\d+)")

LEAST_VISION_BITS = 8
_ROTARY = "gather:*"


@dataclass(frozen=True)
class Rule:
    """Weights of `part` whose label matches `weight` get `scheme`. Patterns as in fnmatch."""

    part: str
    weight: str
    scheme: Scheme


@dataclass(frozen=True)
class Policy:
    """`name` goes into the bundle's name and manifest; `base`: what arithmetic and unruled weights are in."""

    name: str
    rules: tuple[Rule, ...]
    base: Literal["float16", "float32"] = "float16"

    @property
    def compresses(self) -> bool:
        return any(rule.scheme != "keep" for rule in self.rules)

    def scheme(self, part: str, label: str) -> Scheme:
        """What the first rule says that matches; a weight without a rule stays."""
        for rule in self.rules:
            if rule.part in ("*", part) and fnmatch.fnmatchcase(label, rule.weight):
                return rule.scheme
        return "keep"


@dataclass(frozen=True)
class Sized:
    """A scheme taken apart: `size` weights of a row share a scale (int4), rows share a table (pal)."""

    kind: str
    bits: int
    size: int


def sized(scheme: str) -> Sized | None:
    """None for `keep` and `int8` (a scale for each row)."""
    found = _SIZED.fullmatch(scheme)
    return None if found is None else Sized(found[1][:3], int(found[1][3]), int(found[2]))


def bits(scheme: Scheme) -> int:
    """Bits of a stored weight; `keep` counts as 16."""
    found = sized(scheme)
    return found.bits if found else {"keep": 16, "int8": 8}[scheme]


# --- named precisions -------------------------------------------------

_KEEP = Rule("*", "*", "keep")
_TABLE = Rule("embed_tokens", "gather:*", "int8")
_VISION = (Rule("vision_encoder", "linear:*", "int8"), Rule("vision_encoder", "conv:*", "int8"))


def _decoder(scheme: Scheme) -> tuple[Rule, ...]:
    """Matrices of the decoder in a scheme, the rest at 8 bits; rotary tables and short convolutions stay."""
    return (_TABLE, *_VISION, Rule("decoder", "linear:*", scheme), _KEEP)


POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        Policy("fp32", (_KEEP,), "float32"),
        Policy("fp16", (_KEEP,)),
        Policy("int8", _decoder("int8")),
        Policy("int4", _decoder("int4-block32")),
        Policy("int4-b16", _decoder("int4-block16")),
        Policy("int4-b64", _decoder("int4-block64")),
        Policy("int4-b128", _decoder("int4-block128")),
        Policy("pal8", _decoder("pal8-group16")),
        Policy("pal6", _decoder("pal6-group16")),
        Policy("pal4", _decoder("pal4-group16")),
    )
}
"""Linear ones first: palettes in a program with a state are a known hazard, see `hazards`."""

NAMES = tuple(POLICIES)


def resolve(precision: str) -> Policy:
    """The policy of a name or of a YAML file. Raises InputError naming what is known."""
    if precision.endswith((".yaml", ".yml")):
        return read(Path(precision))
    found = POLICIES.get(precision)
    if found is None:
        near = difflib.get_close_matches(precision, NAMES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(
            f"precision {precision!r} is not known with --to coreml; {hint}choose from {', '.join(NAMES)}"
        )
    return found


# --- a user's own -----------------------------------------------------


class RuleSpec(BaseModel):
    """One rule as written; `part` and `node` (a weight's label) default to every part and weight."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    part: PartName = "*"
    node: str = Field(default="*", min_length=1)
    scheme: Scheme


class PolicySpec(BaseModel):
    """`name` and ordered `rules`, optionally laid over the named precision `base`."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    base: str | None = None
    rules: tuple[RuleSpec, ...] = ()


def read(path: Path) -> Policy:
    """A policy from YAML. Raises InputError that names the file, the key and the nearest right one."""
    spec = read_spec(path, PolicySpec, RuleSpec, {"scheme": SCHEMES, "part": get_args(PartName)})
    own = tuple(Rule(rule.part, rule.node, rule.scheme) for rule in spec.rules)
    try:
        under = POLICIES["fp16"] if spec.base is None else resolve(spec.base)
    except InputError as error:
        raise InputError(f"{path}: base: {error}") from None
    return Policy(spec.name, (*own, *under.rules), under.base)


# --- what is known to go wrong on devices -----------------------------


def hazards(schemes: Mapping[tuple[str, str], Scheme]) -> list[str]:
    """Sentences about what was asked for and is known to fail; `schemes` by (part, label of a weight).

    None of the named linear precisions has one.
    """
    chosen = [(part, label, scheme) for (part, label), scheme in schemes.items() if scheme != "keep"]
    found = []
    if any(part == "decoder" and scheme.startswith("pal") for part, _, scheme in chosen):
        found.append(
            "decoder: palettes beside a state: crashes of the Neural Engine after 100 to 200 predictions "
            "were reported for coremltools' palettised stateful models; int8 and int4 have no palettes"
        )
    if any(part == "decoder" and fnmatch.fnmatchcase(label, _ROTARY) for part, label, _ in chosen):
        found.append("decoder: rounded rotary tables turn later positions by another angle than trained")
    if low := [s for part, _, s in chosen if part == "vision_encoder" and bits(s) < LEAST_VISION_BITS]:
        found.append(
            f"vision_encoder: {low[0]}: below {LEAST_VISION_BITS} bits features were a third off (ONNX)"
        )
    return found
