"""What a native runner on a phone is to do, prepared here by the session's own code.

In: a bundle, a picture, a question. Out: a `Case`: the runner's plan (lines of words), its files (plain
little-endian numbers), and the tokens that the session here answers with. Not here: the runners
(`remote/native`), bringing it to a phone (`remote/remote_adb.py`), reading what they print
(`remote/runner_output.py`).

The phone gets ids, positions and pixels, so that what it computes is the bundle's parts and nothing else:
its tokens must be those of the session here. The plan is made of the manifest alone and names no family.
docs/devices.md lists what is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime import bundle as bundles
from runtime import conformance, open_bundle
from runtime.errors import InputError
from runtime.generation import GenerationOptions
from runtime.image import PreparedImage
from runtime.manifest import Manifest, StateTensor, TensorSpec
from runtime.onnx_state import step_inputs, types_input
from runtime.sequence import positions_of
from runtime.session import Session

VERSION = 1
"""Of the plan; PLAN_VERSION in `native/plan.h`."""

BACKENDS = {"onnx": "onnxruntime", "gguf": "llama.cpp"}
"""Formats that a runner is there for, and what it runs them with."""

BUNDLE, CASE = "bundle", "case"
"""Folders of the bundle's parts and of the case's files, below the runner's working directory."""


@dataclass(frozen=True)
class Case:
    """One measurement. `files`: by their path on the phone; `parts`: files of the bundle, by theirs.

    What the session here answers, stop or not: `tokens`, and the first step's `logits` (vocabulary,).
    `logit_tolerance`: by how much the bundle lets logits differ between processors.
    """

    plan: str
    files: dict[str, bytes]
    parts: dict[str, Path]
    tokens: tuple[int, ...]
    logits: NDArray[np.float32]
    logit_tolerance: float
    prompt_tokens: int
    image_tokens: int
    state_bytes: int
    max_context: int


@dataclass(frozen=True)
class Policy:
    """How often and how long: answers that do not count, answers that do, tokens after the first one."""

    warmup: int
    repeats: int
    decode_tokens: int
    threads: int


def refusal(manifest: Manifest) -> str:
    """Why no runner runs such a bundle; empty when one does. Of the parts only what the manifest says."""
    if manifest.format not in BACKENDS:
        return f"is {manifest.format}; a phone behind adb runs {' and '.join(BACKENDS)} bundles"
    if manifest.format == "gguf":
        return ""
    if manifest.static is not None:
        return f"has graphs of fixed shapes ({manifest.flavour}); the runner drives ort-fused ones"
    if odd := [state.input for state in manifest.state if state.kind == "kv" and not state.in_place]:
        return f"its state {odd[0]} cannot lie in place; export it again"
    steps = step_inputs(manifest)
    vocabulary = _output(manifest, "decoder", "logits").shape[-1]
    if "num_logits_to_keep" not in steps or not isinstance(vocabulary, int):
        return "its decoder gives the logits of all tokens; export it again"
    if odd := [name for name, found, wanted in _types(manifest) if found != wanted]:
        return f"its tensor {odd[0]} has a type that the runner has no buffer of"
    return ""


def make(bundle: Path, image: Path, question: str, policy: Policy) -> Case:
    """Prepare a case and answer it here, with as many threads as there: llama.cpp's rounding depends on them.

    Raises InputError, BundleError, MissingExtra.
    """
    manifest = bundles.read(bundle, verify=False)
    if why := refusal(manifest):
        raise InputError(f"{bundle}: {why}")
    with open_bundle(bundle, threads=policy.threads, spin=False, reuse=False) as session:
        picture = session.prepare(image)
        ids = session.prompt_ids(question, [picture])
        session.check_length(ids, policy.decode_tokens)
        options = GenerationOptions(max_new_tokens=policy.decode_tokens + 1, ignore_stop=True)
        features = [session.encode_image(picture)]
        logits = session.prefill(ids, features)
        answer = session.complete(ids, features, options)
        files = _files(session, ids, picture)
        lines = [
            f"pocketvlm-plan {VERSION}",
            f"backend {BACKENDS[manifest.format]}",
            *_policy(policy, session.max_context),
            *_parts(manifest),
            *(_onnx(manifest, session.max_context) if manifest.format == "onnx" else ()),
            *_prompt(session, ids, picture),
        ]
        return Case(
            plan="\n".join(lines) + "\n",
            files=files,
            parts={f"{BUNDLE}/{path}": bundles.locate(bundle, path) for path in _paths(manifest)},
            tokens=tuple(answer.token_ids),
            logits=logits,
            logit_tolerance=max(case.logit_tolerance for case in conformance.read(bundle)),
            prompt_tokens=len(ids),
            image_tokens=picture.tokens,
            state_bytes=session.kv_bytes,
            max_context=session.max_context,
        )


# --- lines ----------------------------------------------------------------


def _policy(policy: Policy, context: int) -> Iterator[str]:
    yield f"threads {policy.threads}"
    yield f"warmup {policy.warmup}"
    yield f"repeats {policy.repeats}"
    yield f"tokens {policy.decode_tokens + 1}"
    yield f"context {context}"


def _parts(manifest: Manifest) -> Iterator[str]:
    for part in manifest.parts:
        yield f"part {part.role} {BUNDLE}/{part.path}"


def _onnx(manifest: Manifest, context: int) -> Iterator[str]:
    """Names and sizes of what goes into the parts and comes out."""
    embed, deepstack = manifest.part("embed_tokens"), manifest.deepstack
    yield f"embed {_word(embed.inputs[0].name)} {_word(embed.outputs[0].name)}"
    yield f"hidden {embed.outputs[0].shape[-1]}"
    yield f"vocabulary {_output(manifest, 'decoder', 'logits').shape[-1]}"
    yield "feature image_features"
    if deepstack:
        yield f"feature {_word(deepstack.output)}"
        yield f"deepstack {_word(deepstack.input)} {deepstack.layers}"
    types = types_input(manifest)
    if types:
        yield f"image_types {_word(types)}"
    for name, spec in step_inputs(manifest).items():
        if name not in (types, deepstack and deepstack.input):
            yield f"step {name} {len(spec.shape)}"
    for state in manifest.state:
        yield _state(state, context)


def _state(state: StateTensor, context: int) -> str:
    names = f"{_word(state.input)} {_word(state.output)}"
    return f"state {names} {state.kind} {state.dtype} {_shape(state.sizes(context))}"


def _prompt(session: Session, ids: NDArray[np.int64], picture: PreparedImage) -> Iterator[str]:
    """The picture's pixels, the ids and where they stand."""
    manifest = session.manifest
    yield f"image_token {manifest.merge.token}"
    for number, arrays in enumerate(_inputs(manifest, picture)):
        yield "view"
        for place, (name, array) in enumerate(arrays.items()):
            yield f"input {_word(name)} {array.dtype} {_shape(array.shape)} {_input_file(number, place)}"
    grids = [view.grid for view in picture.views]
    positions, following = positions_of(manifest, ids, grids)
    yield f"ids {len(ids)} {CASE}/ids.bin"
    yield f"positions {len(positions)} {len(ids)} {CASE}/positions.bin"
    yield f"next_position {following}"


def _files(session: Session, ids: NDArray[np.int64], picture: PreparedImage) -> dict[str, bytes]:
    positions, _ = positions_of(session.manifest, ids, [view.grid for view in picture.views])
    found = {
        _input_file(number, place): _bytes(array)
        for number, arrays in enumerate(_inputs(session.manifest, picture))
        for place, array in enumerate(arrays.values())
    }
    return {**found, f"{CASE}/ids.bin": _bytes(ids), f"{CASE}/positions.bin": _bytes(positions)}


def _inputs(manifest: Manifest, picture: PreparedImage) -> list[dict[str, NDArray[np.generic]]]:
    """Of each view what the vision part takes, in its types."""
    if manifest.format == "gguf":
        return [{"pixel_bytes": view.inputs["pixel_bytes"]} for view in picture.views]
    specs = manifest.part("vision_encoder").inputs
    return [
        {spec.name: view.inputs[spec.name].astype(spec.dtype) for spec in specs} for view in picture.views
    ]


def _types(manifest: Manifest) -> Iterator[tuple[str, str, str]]:
    """(name, its type, the type that the runner has a buffer of) of what is no state and no pixels."""
    embed, deepstack = manifest.part("embed_tokens"), manifest.deepstack
    yield embed.inputs[0].name, embed.inputs[0].dtype, "int64"
    features = ["image_features", *([deepstack.output] if deepstack else [])]
    for role, names in (("embed_tokens", [embed.outputs[0].name]), ("vision_encoder", features)):
        for name in names:
            yield name, _output(manifest, role, name).dtype, "float32"
    yield "logits", _output(manifest, "decoder", "logits").dtype, "float32"
    for name, spec in step_inputs(manifest).items():
        is_float = name == "inputs_embeds" or (deepstack is not None and name == deepstack.input)
        yield name, spec.dtype, "float32" if is_float else "int64"


def _output(manifest: Manifest, role: str, name: str) -> TensorSpec:
    return next(spec for spec in manifest.part(role).outputs if spec.name == name)


def _paths(manifest: Manifest) -> list[str]:
    """Files of the parts, their data too; one that parts share comes once."""
    return list(
        dict.fromkeys(path for part in manifest.parts for path in (part.path, *(d.path for d in part.data)))
    )


def _input_file(view: int, place: int) -> str:
    return f"{CASE}/view-{view}-{place}.bin"


def _shape(sizes: Sequence[int]) -> str:
    return " ".join(map(str, [len(sizes), *sizes]))


def _bytes(array: NDArray[np.generic]) -> bytes:
    """Little-endian, C order."""
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()


def _word(name: str) -> str:
    """A name that a line of words can hold. Raises InputError."""
    if name.split() != [name]:
        raise InputError(
            f"bundle: a tensor is called {name!r}, the runner takes no spaces in names; export it again"
        )
    return name
