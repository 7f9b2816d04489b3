"""Weight precision as ordered rules per part: the data, the named precisions, and a user's own in YAML.

In: a name (`int4`, `int4-b64-gptq-kv8`) or the path of a YAML file. Out: a `Policy`. Not here: rounding
(`quantize.py`); this module imports neither onnx nor torch.

The first rule that matches a node decides. A label is `OPERATOR:name`, as in
`MatMul:text.layers.0.mlp.down_proj`; the LM head is `MatMul:*head`, and the KV cache is decided at the
attention nodes, `GroupQueryAttention:*`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from runtime import files
from runtime.errors import InputError, MissingExtra

Scheme = Literal[
    "keep",
    "fp16",
    "int8-dynamic",
    "int8-row",
    "int8-block32",
    "int8-block64",
    "int8-block128",
    "int4-block32",
    "int4-block64",
    "int4-block128",
    "int4-block32-gptq",
    "int4-block64-gptq",
    "int4-block128-gptq",
    "int8-kv",
]
PartName = Literal["*", "vision_encoder", "embed_tokens", "decoder", "decoder_prefill"]

SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
_BLOCKS = re.compile(r"int([48])-block(32|64|128)(-gptq)?")


@dataclass(frozen=True)
class Rule:
    """Nodes of `part` whose `op_type:name` matches `node` get `scheme`. Patterns as in fnmatch."""

    part: str
    node: str
    scheme: Scheme


@dataclass(frozen=True)
class Policy:
    """`name` goes into the bundle's name and manifest."""

    name: str
    rules: tuple[Rule, ...]

    @property
    def prefill(self) -> bool:
        """Whether the bundle gets a second decoder graph for prompts: a rule names it."""
        return any(rule.part == "decoder_prefill" for rule in self.rules)

    @property
    def calibrated(self) -> bool:
        """Whether a scheme needs activations of real prompts."""
        return any(rule.scheme == "int8-kv" or rule.scheme.endswith("-gptq") for rule in self.rules)


@dataclass(frozen=True)
class Blocks:
    """A scheme of MatMulNBits, taken apart."""

    bits: int
    size: int
    gptq: bool


def blocks_of(scheme: str) -> Blocks | None:
    """None when the scheme has no blocks."""
    found = _BLOCKS.fullmatch(scheme)
    return None if found is None else Blocks(int(found[1]), int(found[2]), found[3] is not None)


# --- named precisions -------------------------------------------------

_KEEP = Rule("*", "*", "keep")
_ROWS = Rule("embed_tokens", "Gather:*", "int8-row")
_VISION8 = Rule("vision_encoder", "MatMul:*", "int8-dynamic")

POLICIES: dict[str, tuple[Rule, ...]] = {
    "fp32": (_KEEP,),
    "fp16": (Rule("*", "*", "fp16"),),
    "int8": (_ROWS, Rule("*", "MatMul:*", "int8-dynamic"), _KEEP),
    "int8-blocks": (_ROWS, Rule("decoder", "MatMul:*", "int8-block32"), _VISION8, _KEEP),
    # int4 vision loses 29 % (relative error) for no gain in speed, so vision stays at 8 bits
    "int4": (_ROWS, Rule("decoder", "MatMul:*", "int4-block32"), _VISION8, _KEEP),
}
"""Base names; `NAMES` tells what may follow them."""

NAMES = (
    "fp32, fp16, int8, int8-blocks, int4; then -b64 or -b128 (int4, int8-blocks), -gptq (int4), "
    "-fp16 (int4, int8-blocks), -kv8, -prefill8 (int4, int8-blocks)"
)
_NAME = re.compile(
    r"(?P<base>fp32|fp16|int8-blocks|int8|int4)(?P<size>-b(?:32|64|128))?(?P<gptq>-gptq)?(?P<half>-fp16)?"
    r"(?P<kv>-kv8)?(?P<prefill>-prefill8)?"
)


def resolve(precision: str) -> Policy:
    """The policy of a name or of a YAML file. Raises InputError naming what is known."""
    if precision.endswith((".yaml", ".yml")):
        return read(Path(precision))
    return named(precision)


def named(precision: str) -> Policy:
    """`int4`: blocks of 32; `-b64`, `-b128`: larger; `-gptq`: calibrated weights; `-fp16`: the rest float16;
    `-kv8`: int8 KV cache; `-prefill8`: a second decoder graph for prompts, in int8."""
    found = _NAME.fullmatch(precision)
    if found is None or not _fits(found):
        near = difflib.get_close_matches(precision, [*POLICIES, "int4-b64", "int4-gptq", "int4-kv8"], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"precision {precision!r} is not known; {hint}choose from {NAMES}")
    rules = list(POLICIES[found["base"]])
    if found["size"]:
        rules = [_resized(rule, int(found["size"][2:])) for rule in rules]
    if found["gptq"]:
        rules = [
            Rule(r.part, r.node, f"{r.scheme}-gptq") if r.scheme.startswith("int4") else r  # type: ignore[arg-type]
            for r in rules
        ]
    if found["half"]:
        rules = [*(rule for rule in rules if rule.part == "decoder"), Rule("*", "*", "fp16")]
    if found["kv"]:
        rules.insert(0, Rule("decoder", "GroupQueryAttention:*", "int8-kv"))
    if found["prefill"]:
        rules = [*_second_decoder(rules), *rules]
    return Policy(precision, tuple(rules))


def _second_decoder(rules: Sequence[Rule]) -> list[Rule]:
    """A graph for prompts: int8 products, which are faster over many tokens than unpacking small blocks.

    The states are the decoder's. So is the LM head, which sees one token.
    """
    shared = [r for r in rules if r.part == "decoder"]
    states = [Rule("decoder_prefill", r.node, r.scheme) for r in shared if r.scheme == "int8-kv"]
    blocks = next(r.scheme.removesuffix("-gptq") for r in shared if blocks_of(r.scheme))
    head = Rule("decoder_prefill", "MatMul:*head", blocks)  # type: ignore[arg-type]
    return [*states, head, Rule("decoder_prefill", "MatMul:*", "int8-dynamic")]


def _fits(name: re.Match[str]) -> bool:
    blocks = name["base"] in ("int4", "int8-blocks")
    sized = blocks or not (name["size"] or name["half"] or name["prefill"])
    return sized and (name["base"] == "int4" or not name["gptq"])


def _resized(rule: Rule, size: int) -> Rule:
    return Rule(rule.part, rule.node, re.sub(r"block\d+", f"block{size}", rule.scheme))  # type: ignore[arg-type]


# --- a user's own -----------------------------------------------------

Spec = TypeVar("Spec", bound=BaseModel)


class RuleSpec(BaseModel):
    """One rule as written; `part` and `node` default to every part and node."""

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
        under = () if spec.base is None else named(spec.base).rules
    except InputError as error:
        raise InputError(f"{path}: base: {error}") from None
    return Policy(spec.name, (*own, *under))


def dump(policy: Policy, path: Path) -> Path:
    """Write a policy as YAML that `read` takes, comments aside."""
    import yaml

    rows = [{"part": rule.part, "node": rule.node, "scheme": rule.scheme} for rule in policy.rules]
    files.write_text(path, yaml.safe_dump({"name": policy.name, "rules": rows}, sort_keys=False))
    return path


def read_spec(
    path: Path, spec: type[Spec], rule: type[BaseModel], literals: Mapping[str, Sequence[str]]
) -> Spec:
    """A file of rules as `spec`, whose rules are `rule`; `literals`: what those keys may be.

    Raises InputError that names the file, the key and the nearest right one.
    """
    try:
        import yaml
    except ImportError as error:
        raise MissingExtra("pyyaml", "export") from error
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path}: wanted a mapping with name and rules, got {type(raw).__name__}")
    try:
        found = TypeAdapter(spec).validate_python({"name": path.stem, **raw})
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise InputError(f"{path}: {_explain(fault, spec, rule, literals)}") from None
    if not raw.get("rules") and raw.get("base") is None:
        raise InputError(f"{path}: has neither base nor rules; write at least one rule")
    return found


def _explain(
    fault: Any, spec: type[BaseModel], rule: type[BaseModel], literals: Mapping[str, Sequence[str]]
) -> str:
    place = [str(key) for key in fault["loc"]]
    where = ".".join(place)
    if fault["type"] == "extra_forbidden":
        known = list((rule if place[0] == "rules" and len(place) > 1 else spec).model_fields)
        return f"{where}: unknown key{_near(place[-1], known)}"
    if fault["type"] == "missing":
        return f"{where}: this key is missing"
    if fault["type"] == "literal_error":
        known = list(literals[place[-1]])
        return f"{where}: {fault['input']!r} is not known{_near(str(fault['input']), known)}"
    return f"{where}: {fault['msg'].lower()}, got {fault['input']!r}"


def _near(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
