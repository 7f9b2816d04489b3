"""The bundle's contract: `manifest.json` as a model.

In: JSON. Out: a checked `Manifest`. Not here: files (`runtime/bundle.py`), running anything.

Everything that a device must know about a model family is data here, in integers and token ids. Operations
are named and versioned; `docs/bundle.md` gives each to the rounding rule. `python -m runtime.manifest`
prints the JSON Schema that is published as `docs/bundle.schema.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, model_validator

from runtime.contract import Contract, RelativePath, Sha256, TensorSpec
from runtime.decoder_spec import (  # noqa: F401  readers of the manifest have them from here
    Attention,
    CausalAttention,
    CoremlFacts,
    Deepstack,
    ImageAttention,
    Positions,
    Positions1d,
    PositionsMrope,
    ReplaceTokens,
    StateTensor,
    StaticCache,
)
from runtime.image_spec import ImageOperation, ImageSpec, TokenGrid
from runtime.prompt_spec import PromptSpec


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
