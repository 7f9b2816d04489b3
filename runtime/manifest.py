"""The bundle's contract: `manifest.json` as a model.

In: JSON. Out: a checked `Manifest`. Not here: files (`runtime/bundle.py`), running anything.

Everything that a device must know about a model family is data here, in integers and token ids. Operations
are named and versioned; `docs/bundle.md` gives each to the rounding rule. `python -m runtime.manifest`
prints the JSON Schema that is published as `docs/bundle.schema.json`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, model_validator

from runtime.contract import Contract, Dtype, RelativePath, Sha256, TensorSpec
from runtime.image_spec import ImageOperation, ImageSpec, TokenGrid
from runtime.prompt_spec import PromptSpec

# --- decoder ----------------------------------------------------------


class ReplaceTokens(Contract):
    """The n-th embedding whose id is `token` becomes the n-th image feature."""

    op: Literal["replace_tokens@1"] = "replace_tokens@1"
    token: int


class Deepstack(Contract):
    """The vision part's `output` (`layers`, image tokens, hidden) goes to the decoder's `input`
    (`layers`, 1, S, hidden), zero where no image token is; the decoder adds row i after its layer i."""

    op: Literal["deepstack.add@1"] = "deepstack.add@1"
    layers: int = Field(gt=0)
    output: str
    input: str


class Positions1d(Contract):
    """Position ids 0, 1, 2, ... over the whole sequence."""

    op: Literal["positions.1d@1"] = "positions.1d@1"


class PositionsMrope(Contract):
    """Three rows of position ids (time, row, column).

    Text: all three count on from the largest position so far plus one. A view of rows x columns tokens that
    starts at p: (p, p + row, p + column) for each token in reading order. `sections` and `interleaved` say
    how the decoder's rotary embedding uses them (for readers that build their own decoder).
    """

    op: Literal["positions.mrope@1"] = "positions.mrope@1"
    sections: tuple[int, int, int]
    interleaved: bool


class CausalAttention(Contract):
    """Every token sees itself and all before it."""

    op: Literal["attention.causal@1"] = "attention.causal@1"


class ImageAttention(Contract):
    """Every token sees itself and all before it, an image token also those after it in its picture.

    The decoder's `input` (batch, S) int64 is 1 at image tokens, 0 elsewhere; image tokens side by side are
    one picture. `windows`: by layer, how many tokens one sees at most, itself and before; null: all. The
    decoder does it (a reader that brings its own decoder must).
    """

    op: Literal["attention.image_bidirectional@1"] = "attention.image_bidirectional@1"
    input: str
    windows: tuple[int | None, ...]


_ITEM_BYTES: dict[str, int] = {
    "float32": 4,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


class StateTensor(Contract):
    """One tensor that the decoder hands from step to step.

    `kv`: grows along `sequence_axis`; an empty one (sequence 0) starts a sequence. `conv`: a fixed shape,
    zeros start a sequence. `rewindable`: cutting it short undoes the last tokens; what is not can only go on.
    `in_place`: input and output may be one buffer that is longer than the sequence, whose length only the
    attention mask tells.
    """

    input: str
    output: str
    kind: Literal["kv", "conv"]
    dtype: Dtype
    shape: tuple[int | str, ...]
    sequence_axis: int | None = Field(default=None, ge=0)
    rewindable: bool
    in_place: bool = False
    padding_side: Literal["left", "right"] | None = None

    @model_validator(mode="after")
    def _axis(self) -> StateTensor:
        if (self.kind == "kv") != (self.sequence_axis is not None):
            raise ValueError(f"{self.input}: kv has a sequence_axis and conv has none")
        if self.sequence_axis is not None and self.sequence_axis >= len(self.shape):
            raise ValueError(f"sequence_axis {self.sequence_axis} is outside of shape {list(self.shape)}")
        return self

    def sizes(self, length: int, rows: int = 1) -> list[int]:
        """The shape for so many sequences of `length` tokens; the other named dimensions are the rows."""
        sizes = [size if isinstance(size, int) else rows for size in self.shape]
        if self.sequence_axis is not None:
            sizes[self.sequence_axis] = length
        return sizes

    def bytes(self, length: int, rows: int = 1) -> int:
        """What it takes then."""
        return math.prod(self.sizes(length, rows)) * _ITEM_BYTES[self.dtype]


Attention = Annotated[CausalAttention | ImageAttention, Field(discriminator="op")]
Positions = Annotated[Positions1d | PositionsMrope, Field(discriminator="op")]


class StaticCache(Contract):
    """Graphs of fixed shapes: `embed_tokens` and `decoder_prefill` take `chunk` tokens, `decoder` takes one.

    Each `state` input is a buffer as long as the context on its `sequence_axis`; the output holds the new
    tokens' entries only, which the reader copies into the buffer at their place. `past_mask` (1, 1, 1,
    context) is 0 at tokens that the buffers hold, `masked` elsewhere; among the new ones the graph is causal.
    A last chunk that is not full is padded on the right, and `logits_index` (1,) names its last token.
    """

    op: Literal["cache.static@1"] = "cache.static@1"
    chunk: int = Field(gt=0)
    masked: float = Field(lt=0, allow_inf_nan=False)


class CoremlFacts(Contract):
    """ML programs with a state that the system keeps: `embed_tokens` and `decoder` have two functions each.

    Function `prefill` takes `chunk` tokens, `decode` one; `functions` names those of each part. The decoder's
    inputs: `inputs_embeds` (1, S, hidden), `position_ids` (1 or 3, S), `start` (1,): tokens that the state
    holds, `last` (1,): the place in the chunk whose logits are wanted, and deepstack's input where there is
    one. Each `state` is as long as `context` on its `sequence_axis`. What stands in it after the tokens that
    were run is never looked at, so a sequence is cut back by a smaller `start`, except in a `conv` state,
    which zeros start. A chunk that is not full is padded on the right with zeros, position ids too; where it
    would reach beyond `context`, or a state is a `conv`, its tokens go through `decode` one by one.
    """

    op: Literal["cache.stateful@1"] = "cache.stateful@1"
    chunk: int = Field(gt=1)
    context: int = Field(gt=0)
    functions: dict[str, tuple[str, ...]]
    deployment_target: str = Field(default="iOS18", description="oldest system that opens the parts")

    @model_validator(mode="after")
    def _named(self) -> CoremlFacts:
        for role in ("embed_tokens", "decoder"):
            if missing := {"prefill", "decode"} - set(self.functions.get(role, ())):
                raise ValueError(f"functions: {role} lacks {', '.join(sorted(missing))}")
        if len(self.functions.get("vision_encoder", ())) != 1:
            raise ValueError("functions: vision_encoder needs one")
        if self.chunk > self.context:
            raise ValueError(f"chunk {self.chunk} is longer than the context {self.context}")
        return self


class Limits(Contract):
    """What a session accepts: tokens of the whole sequence, tokens of a picture, pictures, source pixels."""

    context: int = Field(gt=0)
    image_tokens: int = Field(gt=0)
    images: int = Field(ge=1)
    source_pixels: int = Field(
        gt=0, default=100_000_000, description="a larger picture is refused before decoding"
    )


# --- files ------------------------------------------------------------


class FileRef(Contract):
    """A file of the bundle with its hash."""

    path: RelativePath
    sha256: Sha256
    bytes: int = Field(ge=0)


class TokenizerSpec(Contract):
    """Text to ids and back. `tokenizers-json`: the file format of the `tokenizers` library."""

    type: Literal["tokenizers-json"]
    file: FileRef
    stop_ids: tuple[int, ...] = Field(min_length=1)


class WeightBits(Contract):
    """How many parameters a part really stores in how many bits (what a scheme leaves alone shows here)."""

    bits: int = Field(gt=0)
    parameters: int = Field(ge=0)
    scheme: str


class Fallback(Contract):
    """A node whose shape did not allow the scheme that a rule asked for, and the one it got."""

    node: str
    asked: str
    got: str
    reason: str


class OnnxFacts(Contract):
    """What an ONNX part asks of its runtime."""

    ir_version: int
    opsets: dict[str, int]
    min_onnxruntime: str | None = Field(default=None, description="oldest one that runs it on the CPU")


class Part(Contract):
    """One executable part; a directory's hash is that of its sorted per-file hashes (`digest`).

    `data`: further files that the part's file refers to by name, in the same directory (weights that did not
    fit into one file). `sha256` and `bytes` are those of the file at `path` alone. `decoder_prefill`, if it
    is there, has the inputs, outputs and states of `decoder` and runs where several tokens are fed at once.
    """

    role: Literal["vision_encoder", "embed_tokens", "decoder", "decoder_prefill", "text_model", "mmproj"]
    path: RelativePath
    sha256: Sha256
    bytes: int = Field(ge=0)
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    bits: tuple[WeightBits, ...]
    fallbacks: tuple[Fallback, ...] = ()
    onnx: OnnxFacts | None = None
    data: tuple[FileRef, ...] = ()


class Source(Contract):
    """The checkpoint the bundle was made from; `changed`: its settings that this export set otherwise."""

    name: str
    sha256: Sha256
    parameters: int = Field(ge=0)
    changed: dict[str, bool | int] = Field(default_factory=dict)


class Parity(Contract):
    """What the export gate measured against the checkpoint; every limit names a figure and held."""

    reference: str
    cases: int = Field(gt=0)
    figures: dict[str, float]
    limits: dict[str, float]

    @model_validator(mode="after")
    def _limits_have_figures(self) -> Parity:
        if missing := sorted(set(self.limits) - set(self.figures)):
            raise ValueError(f"limits without a figure: {', '.join(missing)}")
        return self


_ROLES = ["decoder", "embed_tokens", "vision_encoder"]


class Manifest(Contract):
    """The whole contract of one bundle."""

    manifest_version: Literal[1] = 1
    name: str = Field(min_length=1)
    format: Literal["onnx", "gguf", "coreml"]
    flavour: Literal["ort-fused", "portable-static"] = "ort-fused"
    precision: str
    target: str | None = Field(default=None, description="the preset that it was exported for")
    providers: tuple[str, ...] = Field(default=(), description="execution providers, the preferred one first")
    requires: tuple[str, ...]
    image: ImageSpec
    prompt: PromptSpec
    merge: ReplaceTokens
    deepstack: Deepstack | None = None
    positions: Positions
    attention: Attention
    static: StaticCache | None = None
    coreml: CoremlFacts | None = None
    state: tuple[StateTensor, ...]
    limits: Limits
    tokenizer: TokenizerSpec
    parts: tuple[Part, ...]
    source: Source
    tool_versions: dict[str, str]
    parity: Parity
    conformance: FileRef
    notes: tuple[str, ...] = Field(
        default=(), description="for people: what the checkpoint does and this bundle does not, and why"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if tuple(self.requires) != self.operations():
            raise ValueError(f"requires must name exactly the operations used: {list(self.operations())}")
        self._check_parts()
        if self.image.max_tokens > self.limits.image_tokens:
            raise ValueError(f"image.max_tokens {self.image.max_tokens} exceeds limits.image_tokens")
        if self.merge.token != self.prompt.image.token:
            raise ValueError(f"merge.token {self.merge.token} differs from prompt.image.token")
        return self

    def _check_parts(self) -> None:
        roles = sorted(part.role for part in self.parts)
        if (self.format == "coreml") != (self.coreml is not None):
            raise ValueError(f"format {self.format!r} and coreml do not go together")
        if self.coreml is not None:
            self._check_coreml(roles, self.coreml)
            return
        if self.format == "gguf":
            if roles != ["mmproj", "text_model"] or self.state or self.static:
                raise ValueError(f"gguf: parts must be one text_model and one mmproj, no state; got {roles}")
            return
        if [role for role in roles if role != "decoder_prefill"] != _ROLES or len(roles) > len(_ROLES) + 1:
            raise ValueError(
                "parts must be one vision_encoder, one embed_tokens, one decoder and at most one "
                f"decoder_prefill, got {roles}"
            )
        if (self.flavour == "portable-static") != (self.static is not None):
            raise ValueError(f"flavour {self.flavour!r} and static do not go together")
        if self.static is not None and "decoder_prefill" not in roles:
            raise ValueError("static needs a decoder_prefill part")
        self._check_prefill()

    def _check_coreml(self, roles: Sequence[str], facts: CoremlFacts) -> None:
        """Three parts, and states that are named once and are as long as the context."""
        if list(roles) != _ROLES or self.static:
            raise ValueError(f"coreml: parts must be one each of {', '.join(_ROLES)}, got {roles}")
        if not self.state or facts.context < self.limits.context:
            raise ValueError(f"coreml: needs states as long as limits.context {self.limits.context}")
        for state in self.state:
            length = None if state.sequence_axis is None else state.shape[state.sequence_axis]
            if state.input != state.output or length not in (None, facts.context):
                raise ValueError(
                    f"coreml: state {state.input} must be its own output and {facts.context} tokens long"
                )

    def _check_prefill(self) -> None:
        """A second graph over the same states: fixed shapes apart, it must be called as the first."""
        prefill, decoder = self.find_part("decoder_prefill"), self.part("decoder")
        if prefill is None or self.static is not None:
            return
        for kind in ("inputs", "outputs"):
            wanted, got = (
                {(spec.name, spec.dtype) for spec in getattr(part, kind)} for part in (decoder, prefill)
            )
            if wanted != got:
                odd = ", ".join(sorted({name for name, _ in wanted ^ got}))
                raise ValueError(f"decoder_prefill has other {kind} than decoder: {odd}")

    def operations(self) -> tuple[str, ...]:
        """The operations this manifest uses, sorted; what `requires` must hold."""
        return operations_of(
            *self.image.operations,
            self.image.tokens,
            self.merge,
            *([self.deepstack] if self.deepstack else []),
            self.positions,
            self.attention,
            *(each for each in (self.static, self.coreml) if each),
        )

    def part(self, role: str) -> Part:
        return next(part for part in self.parts if part.role == role)

    def find_part(self, role: str) -> Part | None:
        """The part of a role that a bundle may lack."""
        return next((part for part in self.parts if part.role == role), None)

    def files(self) -> Iterator[FileRef | Part]:
        """Everything with a hash, parts first, each with its data files; one that parts share comes once."""
        seen: set[str] = set()
        for part in self.parts:
            yield part
            yield from (file for file in part.data if file.path not in seen)
            seen |= {file.path for file in part.data}
        yield self.tokenizer.file
        yield self.conformance


def operations_of(*operations: Any) -> tuple[str, ...]:
    """Sorted names of operation objects; an exporter fills `requires` with it."""
    return tuple(sorted({operation.op for operation in operations}))


def known_operations() -> frozenset[str]:
    """Every operation that this runtime carries out."""
    image = get_args(get_args(ImageOperation)[0])
    schemes = (*get_args(get_args(Positions)[0]), *get_args(get_args(Attention)[0]))
    decoder = (ReplaceTokens, Deepstack, *schemes, StaticCache, CoremlFacts)
    classes: tuple[type[BaseModel], ...] = (*image, TokenGrid, *decoder)
    return frozenset(kind.model_fields["op"].default for kind in classes)


def json_schema() -> str:
    """The JSON Schema of `manifest.json` as published in docs/bundle.schema.json."""
    return json.dumps(Manifest.model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
