"""A Core ML bundle written by hand around the tiny checkpoint's image rules, prompt and tokenizer.

Its model is nobody's, but small enough to say in one line what it must answer: every token adds its embedding
times its position plus one (and deepstack's features) to a sum, and the logits are that sum over all tokens
so far. Values are small whole numbers, so float16 is exact and tests compare exactly. With `conv` the sum is
kept as such, in a state that cannot go back and ends at `last`; without, it is made from a cache each time.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime import bundle
from runtime.manifest import (
    CoremlFacts,
    Deepstack,
    Manifest,
    Part,
    StateTensor,
    operations_of,
)
from tests.runtime import mil_writer as write

HIDDEN, CHUNK, CONTEXT, IMAGE_TOKENS = 8, 4, 102, 16
Array = NDArray[Any]


def table(vocabulary: int) -> Array:
    """Embeddings (vocabulary, HIDDEN) of -1, 0 and 1."""
    return np.random.default_rng(1).integers(-1, 2, (vocabulary, HIDDEN)).astype(np.float16)


def head(vocabulary: int) -> Array:
    """(vocabulary, HIDDEN) of 0 and a few 1: sums stay below 2048, where float16 has every whole number."""
    return (np.random.default_rng(2).random((vocabulary, HIDDEN)) < 0.25).astype(np.float16)


def expected(embeds: Array, positions: Array) -> Array:
    """The sum (HIDDEN,) that logits are made of, for embeds (S, HIDDEN) with deepstack at positions (S,)."""
    return (embeds * (positions[:, None] + 1)).sum(axis=0)


def embed_tokens(path: Path, vocabulary: int) -> Path:
    weights = write.Weights()
    value = weights.add(table(vocabulary), "float16")

    def body(count: int) -> bytes:
        kind: write.Type = ("float16", (1, count, HIDDEN))
        steps = [
            write.const("table", value, ("float16", (vocabulary, HIDDEN))),
            write.number("axis", 0),
            write.operation(
                "gather", {"x": "table", "indices": "input_ids", "axis": "axis"}, {"inputs_embeds": kind}
            ),
        ]
        return write.function({"input_ids": ("int32", (1, count))}, steps, ["inputs_embeds"])

    return write.package(path, write.model({"prefill": body(CHUNK), "decode": body(1)}, "decode"), weights)


def vision_encoder(path: Path, pixels: tuple[int, ...]) -> Path:
    """Features (IMAGE_TOKENS, HIDDEN): 1 where one of a stretch's first pixels is positive, else 0."""
    width = int(np.prod(pixels)) // IMAGE_TOKENS
    weights = write.Weights()
    value = weights.add(np.eye(HIDDEN, width, dtype=np.float16), "float16")
    wide: write.Type = ("float16", (IMAGE_TOKENS, width))
    features: write.Type = ("float16", (IMAGE_TOKENS, HIDDEN))
    steps = [
        write.number("shape", [IMAGE_TOKENS, width]),
        write.number("zero", np.float16(0), "float16"),
        write.const("fp16", write.immediate("fp16", "string"), ("string", ())),
        write.const("weight", value, ("float16", (HIDDEN, width))),
        write.operation("reshape", {"x": "pixel_values", "shape": "shape"}, {"flat": wide}),
        write.operation("linear", {"x": "flat", "weight": "weight"}, {"some": features}),
        write.operation("greater", {"x": "some", "y": "zero"}, {"bright": ("bool", features[1])}),
        write.operation("cast", {"x": "bright", "dtype": "fp16"}, {"image_features": features}),
    ]
    body = write.function({"pixel_values": ("float16", pixels)}, steps, ["image_features"])
    return write.package(path, write.model({"main": body}), weights)


def decoder(path: Path, vocabulary: int, *, conv: bool, layers: int) -> Path:
    weights = write.Weights()
    value = weights.add(head(vocabulary), "float16")
    bodies = {
        name: _decoder_function(count, vocabulary, value, conv, layers)
        for name, count in (("prefill", CHUNK), ("decode", 1))
    }
    return write.package(path, write.model(bodies, "decode"), weights)


def _decoder_function(count: int, vocabulary: int, value: bytes, conv: bool, layers: int) -> bytes:
    tokens: write.Type = ("float16", (1, count, HIDDEN))
    cache: write.Type = ("float16", (1, HIDDEN) if conv else (1, CONTEXT, HIDDEN))
    inputs: dict[str, write.Type] = {
        "inputs_embeds": tokens,
        "position_ids": ("int32", (1, count)),
        "start": ("int32", (1,)),
        "last": ("int32", (1,)),
    }
    if layers:
        inputs["deepstack_embeds"] = ("float16", (layers, 1, count, HIDDEN))
    weighted = [
        write.const("head", value, ("float16", (vocabulary, HIDDEN))),
        write.const("fp16", write.immediate("fp16", "string"), ("string", ())),
        write.number("one", np.float16(1), "float16"),
        write.number("first_axis", [0]),
        write.number("second_axis", [1]),
        write.number("last_axis", [2]),
        write.operation("cast", {"x": "position_ids", "dtype": "fp16"}, {"place": ("float16", (1, count))}),
        write.operation("add", {"x": "place", "y": "one"}, {"next": ("float16", (1, count))}),
        write.operation(
            "expand_dims", {"x": "next", "axes": "last_axis"}, {"factor": ("float16", (1, count, 1))}
        ),
    ]
    source = "inputs_embeds"
    if layers:
        weighted += [
            write.operation("reduce_sum", {"x": "deepstack_embeds", "axes": "first_axis"}, {"stack": tokens}),
            write.operation("add", {"x": "inputs_embeds", "y": "stack"}, {"with_stack": tokens}),
        ]
        source = "with_stack"
    weighted.append(write.operation("mul", {"x": source, "y": "factor"}, {"new": tokens}))
    steps = [*weighted, *(_conv_sum(count, cache) if conv else _cached_sum(count, cache))]
    steps += [
        write.operation("linear", {"x": "sum", "weight": "head"}, {"row": ("float16", (1, vocabulary))}),
        write.operation(
            "expand_dims", {"x": "row", "axes": "second_axis"}, {"logits": ("float16", (1, 1, vocabulary))}
        ),
    ]
    return write.function(inputs, steps, ["logits"], states={"cache": cache})


def _conv_sum(count: int, cache: write.Type) -> list[bytes]:
    """sum = old + (new + 1) over the tokens up to `last`; the ones tell how many there were."""
    places: write.Type = ("int32", (count,))
    return [
        write.number("places", np.arange(count)),
        write.operation("read_state", {"input": "cache"}, {"old": cache}),
        write.operation("add", {"x": "new", "y": "one"}, {"more": ("float16", (1, None, HIDDEN))}),
        write.operation("less_equal", {"x": "places", "y": "last"}, {"seen": ("bool", places[1])}),
        write.operation("cast", {"x": "seen", "dtype": "fp16"}, {"mask": ("float16", places[1])}),
        write.operation(
            "expand_dims", {"x": "mask", "axes": "second_axis"}, {"tall": ("float16", (count, 1))}
        ),
        write.operation("mul", {"x": "more", "y": "tall"}, {"shown": ("float16", (1, None, HIDDEN))}),
        write.operation("reduce_sum", {"x": "shown", "axes": "second_axis"}, {"all": cache}),
        write.operation("add", {"x": "old", "y": "all"}, {"sum": cache}),
        write.operation("write_state", {"input": "cache", "data": "sum"}, {}),
    ]


def _cached_sum(count: int, cache: write.Type) -> list[bytes]:
    """The new rows behind `start`, then the sum of those up to `start + last`."""
    places: write.Type = ("int32", (CONTEXT,))
    return [
        write.number("axis", 0),
        write.number("zeros", [0]),
        write.number("count", [count]),
        write.number("ends", [HIDDEN]),
        write.number("ones", [1]),
        write.number("places", np.arange(CONTEXT)),
        write.operation("add", {"x": "start", "y": "count"}, {"stop": ("int32", (1,))}),
        write.operation(
            "concat", {"values": ["zeros", "start", "zeros"], "axis": "axis"}, {"begin": ("int32", (3,))}
        ),
        write.operation(
            "concat", {"values": ["ones", "stop", "ends"], "axis": "axis"}, {"end": ("int32", (3,))}
        ),
        write.operation("read_state", {"input": "cache"}, {"old": cache}),
        write.operation(
            "slice_update", {"x": "old", "update": "new", "begin": "begin", "end": "end"}, {"held": cache}
        ),
        write.operation("write_state", {"input": "cache", "data": "held"}, {}),
        write.operation("add", {"x": "start", "y": "last"}, {"until": ("int32", (1,))}),
        write.operation("less_equal", {"x": "places", "y": "until"}, {"seen": ("bool", places[1])}),
        write.operation("cast", {"x": "seen", "dtype": "fp16"}, {"mask": ("float16", places[1])}),
        write.operation(
            "expand_dims", {"x": "mask", "axes": "second_axis"}, {"tall": ("float16", (CONTEXT, 1))}
        ),
        write.operation("mul", {"x": "held", "y": "tall"}, {"shown": cache}),
        write.operation(
            "reduce_sum", {"x": "shown", "axes": "second_axis"}, {"sum": ("float16", (1, HIDDEN))}
        ),
    ]


def write_bundle(onnx_bundle: Path, out: Path, *, conv: bool = False, layers: int = 0) -> Path:
    """A bundle whose text, picture and conformance files are those of an ONNX bundle."""
    shutil.copytree(onnx_bundle, out, ignore=shutil.ignore_patterns("onnx"))
    old = bundle.read(onnx_bundle)
    pixels = tuple(
        1 if isinstance(size, str) else size for size in old.part("vision_encoder").inputs[0].shape
    )
    vocabulary = old.part("decoder").outputs[0].shape[-1]
    assert isinstance(vocabulary, int)
    made = {
        "vision_encoder": vision_encoder(out / "coreml/vision_encoder.mlpackage", pixels),
        "embed_tokens": embed_tokens(out / "coreml/embed_tokens.mlpackage", vocabulary),
        "decoder": decoder(out / "coreml/decoder.mlpackage", vocabulary, conv=conv, layers=layers),
    }
    bundle.write(_manifest(old, out, made, conv, layers), out)
    return out


def _manifest(old: Manifest, out: Path, made: dict[str, Path], conv: bool, layers: int) -> Manifest:
    facts = CoremlFacts(
        chunk=CHUNK,
        context=CONTEXT,
        functions={
            "vision_encoder": ("main",),
            "embed_tokens": ("prefill", "decode"),
            "decoder": ("prefill", "decode"),
        },
    )
    deepstack = (
        Deepstack(layers=layers, output="deepstack_features", input="deepstack_embeds") if layers else None
    )
    parts = tuple(_part(out, role, path, bool(layers)) for role, path in made.items())
    state = StateTensor(
        input="cache",
        output="cache",
        kind="conv" if conv else "kv",
        dtype="float16",
        shape=(1, HIDDEN) if conv else (1, CONTEXT, HIDDEN),
        sequence_axis=None if conv else 1,
        rewindable=not conv,
    )
    used = (
        *old.image.operations,
        old.image.tokens,
        old.merge,
        deepstack,
        old.positions,
        old.attention,
        facts,
    )
    changed = {
        "name": "by-hand",
        "format": "coreml",
        "precision": "fp16",
        "providers": ("ALL",),
        "coreml": facts.model_dump(),
        "deepstack": deepstack and deepstack.model_dump(),
        "parts": [part.model_dump() for part in parts],
        "state": [state.model_dump()],
        "limits": {**old.limits.model_dump(), "context": CONTEXT},
        "requires": operations_of(*(each for each in used if each is not None)),
    }
    return Manifest.model_validate({**old.model_dump(), **changed})


def _part(out: Path, role: str, path: Path, deepstack: bool) -> Part:
    sha256, size = bundle.digest(path)
    inputs: dict[str, tuple[str, list[Any]]] = {
        "vision_encoder": {"pixel_values": ("float16", [1, 3, 64, 64])},
        "embed_tokens": {"input_ids": ("int32", [1, "tokens"])},
        "decoder": {
            "inputs_embeds": ("float16", [1, "tokens", HIDDEN]),
            "position_ids": ("int32", [1, "tokens"]),
            "start": ("int32", [1]),
            "last": ("int32", [1]),
            **({"deepstack_embeds": ("float16", ["layers", 1, "tokens", HIDDEN])} if deepstack else {}),
        },
    }[role]
    output = {"vision_encoder": "image_features", "embed_tokens": "inputs_embeds", "decoder": "logits"}[role]
    return Part.model_validate(
        {
            "role": role,
            "path": path.relative_to(out).as_posix(),
            "sha256": sha256,
            "bytes": size,
            "inputs": [
                {"name": name, "dtype": dtype, "shape": shape} for name, (dtype, shape) in inputs.items()
            ],
            "outputs": [{"name": output, "dtype": "float16", "shape": ["any"]}],
            "bits": [{"bits": 16, "parameters": 1, "scheme": "float16"}],
        }
    )
