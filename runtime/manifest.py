"""The bundle's contract: `manifest.json` as a model.

In: JSON. Out: a checked `Manifest`. Not here: files (`runtime/bundle.py`), running anything.

Everything that a device must know about a model family is data here, in integers and token ids. Operations
are named and versioned; `docs/bundle.md` gives each to the rounding rule. `python -m runtime.manifest`
prints the JSON Schema that is published as `docs/bundle.schema.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Dtype = Literal["float32", "float16", "int64", "int32", "int8", "uint8", "bool"]
Filter = Literal["bilinear", "bicubic", "lanczos"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _confined(path: str) -> str:
    pure = PurePosixPath(path)
    if (
        not path
        or pure.is_absolute()
        or ".." in pure.parts
        or "\\" in path
        or ":" in path
        or str(pure) != path
    ):
        raise ValueError(f"path {path!r} must be relative, with forward slashes, and stay inside the bundle")
    return path


RelativePath = Annotated[str, AfterValidator(_confined)]


class Contract(BaseModel):
    """Base of every object in the manifest: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


# --- image: operations in the order of their use ----------------------


class ExifRotate(Contract):
    """Files only: turn the picture upright by its EXIF orientation (1-8)."""

    op: Literal["exif_rotate@1"] = "exif_rotate@1"


class ToRgb(Contract):
    """8-bit RGB. Transparency is dropped (the stored colour stays) or laid over white."""

    op: Literal["to_rgb@1"] = "to_rgb@1"
    file_alpha: Literal["drop", "white"]
    pixels_alpha: Literal["drop", "white"]


class ResizeLongestEdge(Contract):
    """Scale the longest edge to `longest_edge`, at most `cap`; an odd other edge grows by one."""

    op: Literal["resize_longest_edge@1"] = "resize_longest_edge@1"
    longest_edge: int = Field(gt=0)
    cap: int = Field(gt=0)
    filter: Filter


class ResizeExact(Contract):
    """Stretch to exactly `height` x `width`, whatever the aspect."""

    op: Literal["resize_exact@1"] = "resize_exact@1"
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    filter: Filter


class Normalise(Contract):
    """float32 `(byte - subtract) / divide` by channel; both numbers are in units of bytes (0-255)."""

    op: Literal["normalise@1"] = "normalise@1"
    subtract: tuple[float, float, float]
    divide: tuple[float, float, float]


# Tiling (`tile.*@1`: grid choice and tie-break) and patchify order join with the families that need them.
ImageOperation = Annotated[
    ExifRotate | ToRgb | ResizeLongestEdge | ResizeExact | Normalise,
    Field(discriminator="op"),
]


class TensorSpec(Contract):
    """A tensor at a part's border; a dimension is a number or the name of one that varies."""

    name: str
    dtype: Dtype
    shape: tuple[int | str, ...]


class ImageSpec(Contract):
    """How a picture becomes the vision part's input, and how many tokens it then takes."""

    operations: tuple[ImageOperation, ...]
    layout: Literal["NCHW"]
    pixels: TensorSpec
    tokens: int = Field(gt=0, description="image tokens of one picture")

    @model_validator(mode="after")
    def _order(self) -> ImageSpec:
        kinds = [operation.op.split("@")[0] for operation in self.operations]
        bare = [kind for kind in kinds if not kind.startswith("resize_")]
        if (
            bare not in (["exif_rotate", "to_rgb", "normalise"], ["to_rgb", "normalise"])
            or kinds[-1] != bare[-1]
        ):
            raise ValueError(f"operations must be [exif_rotate,] to_rgb, resizes, normalise; got {kinds}")
        if kinds[: len(bare) - 1] != bare[:-1]:
            raise ValueError(f"operations must resize after to_rgb; got {kinds}")
        if len(self.pixels.shape) != 4:
            raise ValueError(f"pixels must have 4 dimensions, got {list(self.pixels.shape)}")
        return self


# --- prompt -----------------------------------------------------------


class Ids(Contract):
    """Fixed token ids."""

    kind: Literal["ids"] = "ids"
    ids: tuple[int, ...]


class ImageSlot(Contract):
    """Where one picture's `prompt.image` goes."""

    kind: Literal["image"] = "image"


class QuestionSlot(Contract):
    """`before + question + after`, tokenised as one string without special tokens added."""

    kind: Literal["question"] = "question"
    before: str = ""
    after: str = ""


Segment = Annotated[Ids | ImageSlot | QuestionSlot, Field(discriminator="kind")]


class ImageTokens(Contract):
    """One picture in the prompt: `before`, then `token` as many times as `image.tokens`, then `after`.

    Row and tile segments join here with the families that tile.
    """

    before: tuple[int, ...]
    token: int
    after: tuple[int, ...]


class PromptSpec(Contract):
    """Token ids of a conversation's first turn; the exporter proves them equal to the chat template.

    `system` (may be empty) + `user` + `assistant` is what the decoder is given; `assistant` opens the answer.
    `user_without_image` is null when a picture is needed. Segments of later turns join with multi-turn.
    """

    image: ImageTokens
    system: tuple[int, ...] = ()
    user: tuple[Segment, ...]
    user_without_image: tuple[Segment, ...] | None = None
    assistant: tuple[int, ...]
    refused_text: tuple[str, ...] = Field(
        default=(),
        description="strings a question must not contain (the checkpoint's processor refuses them too)",
    )

    @model_validator(mode="after")
    def _slots(self) -> PromptSpec:
        kinds = [segment.kind for segment in self.user]
        if kinds.count("image") != 1 or kinds.count("question") != 1:
            raise ValueError(f"user must hold one image slot and one question slot, got {kinds}")
        if self.user_without_image is not None:
            kinds = [segment.kind for segment in self.user_without_image]
            if kinds.count("image") or kinds.count("question") != 1:
                raise ValueError(
                    f"user_without_image must hold one question slot and no image slot, got {kinds}"
                )
        return self


# --- decoder ----------------------------------------------------------


class ReplaceTokens(Contract):
    """The n-th embedding whose id is `token` becomes the n-th image feature. Deepstack joins as its own."""

    op: Literal["replace_tokens@1"] = "replace_tokens@1"
    token: int


class Positions1d(Contract):
    """Position ids 0, 1, 2, ... over the whole sequence. M-RoPE joins as `positions.mrope@1`."""

    op: Literal["positions.1d@1"] = "positions.1d@1"


class CausalAttention(Contract):
    """Every token sees itself and all before it. Windows and bidirectional images join as their own."""

    op: Literal["attention.causal@1"] = "attention.causal@1"


class StateTensor(Contract):
    """One tensor that the decoder hands from step to step; an empty one (sequence 0) starts a sequence.

    `in_place`: input and output may be one buffer that is longer than the sequence, whose length only the
    attention mask tells. `kind` gets `conv` with the first family that has such a state.
    """

    input: str
    output: str
    kind: Literal["kv"]
    dtype: Dtype
    shape: tuple[int | str, ...]
    sequence_axis: int = Field(ge=0)
    rewindable: bool
    in_place: bool = False
    padding_side: Literal["left", "right"]

    @model_validator(mode="after")
    def _axis(self) -> StateTensor:
        if self.sequence_axis >= len(self.shape):
            raise ValueError(f"sequence_axis {self.sequence_axis} is outside of shape {list(self.shape)}")
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


class OnnxFacts(Contract):
    """What an ONNX part asks of its runtime."""

    ir_version: int
    opsets: dict[str, int]


class Part(Contract):
    """One executable part; a directory's hash is that of its sorted per-file hashes (`digest`)."""

    role: Literal["vision_encoder", "embed_tokens", "decoder"]
    path: RelativePath
    sha256: Sha256
    bytes: int = Field(ge=0)
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    bits: tuple[WeightBits, ...]
    onnx: OnnxFacts | None = None


class Source(Contract):
    """The checkpoint the bundle was made from."""

    name: str
    sha256: Sha256
    parameters: int = Field(ge=0)


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


class Manifest(Contract):
    """The whole contract of one bundle."""

    manifest_version: Literal[1] = 1
    name: str = Field(min_length=1)
    format: Literal["onnx"]
    precision: str
    requires: tuple[str, ...]
    image: ImageSpec
    prompt: PromptSpec
    merge: ReplaceTokens
    positions: Positions1d
    attention: CausalAttention
    state: tuple[StateTensor, ...]
    limits: Limits
    tokenizer: TokenizerSpec
    parts: tuple[Part, ...]
    source: Source
    tool_versions: dict[str, str]
    parity: Parity
    conformance: FileRef

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        if tuple(self.requires) != self.operations():
            raise ValueError(f"requires must name exactly the operations used: {list(self.operations())}")
        roles = sorted(part.role for part in self.parts)
        if roles != ["decoder", "embed_tokens", "vision_encoder"]:
            raise ValueError(
                f"parts must be one vision_encoder, one embed_tokens and one decoder, got {roles}"
            )
        if self.image.tokens > self.limits.image_tokens:
            raise ValueError(f"image.tokens {self.image.tokens} exceeds limits.image_tokens")
        if self.merge.token != self.prompt.image.token:
            raise ValueError(f"merge.token {self.merge.token} differs from prompt.image.token")
        return self

    def operations(self) -> tuple[str, ...]:
        """The operations this manifest uses, sorted; what `requires` must hold."""
        return operations_of(*self.image.operations, self.merge, self.positions, self.attention)

    def part(self, role: str) -> Part:
        return next(part for part in self.parts if part.role == role)

    def files(self) -> Iterator[FileRef | Part]:
        """Everything with a hash, parts first."""
        yield from self.parts
        yield self.tokenizer.file
        yield self.conformance


def operations_of(*operations: Any) -> tuple[str, ...]:
    """Sorted names of operation objects; an exporter fills `requires` with it."""
    return tuple(sorted({operation.op for operation in operations}))


def known_operations() -> frozenset[str]:
    """Every operation that this runtime carries out."""
    image = get_args(get_args(ImageOperation)[0])
    classes: tuple[type[BaseModel], ...] = (*image, ReplaceTokens, Positions1d, CausalAttention)
    return frozenset(kind.model_fields["op"].default for kind in classes)


def json_schema() -> str:
    """The JSON Schema of `manifest.json` as published in docs/bundle.schema.json."""
    return json.dumps(Manifest.model_json_schema(), indent=2) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
