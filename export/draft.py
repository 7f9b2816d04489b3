"""The manifest of files that are written, before parity is known; conformance vectors.

In: `Facts`, a directory with parts. Out: a `Manifest` to be completed, its vectors. Not here: writing parts.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from evals.parity.parity import ParityCase
from export import layout, static, storage
from export.decoder import IR_VERSION
from export.facts import Facts
from export.graphs import ROLES
from export.quantize import fallbacks, weight_bits
from export.quantize_facts import min_onnxruntime
from runtime import bundle, conformance
from runtime.contract import TensorSpec
from runtime.errors import CheckpointError
from runtime.image_spec import Normalise
from runtime.manifest import (
    CoremlFacts,
    FileRef,
    Limits,
    Manifest,
    OnnxFacts,
    Parity,
    Part,
    ReplaceTokens,
    Source,
    StateTensor,
    StaticCache,
    TokenizerSpec,
    operations_of,
)
from runtime.session import Session

FILES = {
    "vision_encoder": "vision_encoder",
    "embed_tokens": "embed_tokens",
    "decoder_prefill": "decoder_prefill",
    "decoder": "decoder_model_merged",
}
"""Names of ONNX parts by role, as onnx-community's, without their suffixes."""

LOGIT_SPREAD, ROUNDED_SPREAD = 1e-4, 0.05
"""Conformance tolerance over the largest logit: order of summation; integer kernels differ by processor."""

_TOOLS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "optimum")
_DTYPES = {"FLOAT": "float32", "FLOAT16": "float16", "INT64": "int64", "INT32": "int32", "INT8": "int8"}


def draft_manifest(
    facts: Facts,
    staged: Path,
    precision: str,
    name: str,
    *,
    parts: Sequence[Part] | None = None,
    fixed: StaticCache | None = None,
    to: Literal["onnx", "gguf", "coreml"] = "onnx",
    stateful: tuple[CoremlFacts, tuple[StateTensor, ...]] | None = None,
) -> Manifest:
    """The manifest of the files in `staged`, with parity and conformance still to come.

    `parts`, `fixed`: those of graphs with fixed shapes (`static_bundle.py`); `stateful`: ML programs and
    their states (`coreml.py`).
    """
    image, prompt = facts.image, facts.prompt
    merge = ReplaceTokens(token=prompt.image.token)
    positions, attention = facts.family.positions(facts.checkpoint), facts.family.attention(facts.checkpoint)
    # llama.cpp keeps deepstack features with the others
    deepstack = facts.family.deepstack(facts.checkpoint) if to != "gguf" else None
    programs, states = stateful or (None, None)
    if parts is None:
        parts = tuple(_part(staged, role) for role in FILES if role in ROLES or _written(staged, role))
    used = (*image.operations, image.tokens, merge, deepstack, positions, attention, fixed, programs)
    return Manifest(
        name=name,
        format=to,
        flavour=facts.plan.flavour,
        precision=precision,
        target=facts.plan.target,
        providers=facts.plan.providers,
        requires=operations_of(*(each for each in used if each is not None)),
        image=image,
        prompt=prompt,
        merge=merge,
        deepstack=deepstack,
        positions=positions,
        attention=attention,
        static=fixed,
        coreml=programs,
        state=states or (static.states(parts[-1].inputs) if fixed is not None else _state(parts[-1])),
        limits=Limits(context=facts.context, image_tokens=image.max_tokens, images=facts.images),
        tokenizer=TokenizerSpec(
            type="tokenizers-json",
            file=bundle.file_ref(staged, "tokenizer.json"),
            stop_ids=facts.reference.stop_ids,
        ),
        parts=tuple(parts),
        source=Source(
            name=facts.checkpoint.path.resolve().name,
            sha256=facts.checkpoint.sha256,
            parameters=facts.checkpoint.parameters,
            changed=dict(facts.changed),
        ),
        notes=facts.notes,
        tool_versions={tool: importlib.metadata.version(tool) for tool in _TOOLS},
        parity=Parity(reference="not measured yet", cases=1, figures={}, limits={}),
        conformance=FileRef(path=conformance.CASES_PATH, sha256="0" * 64, bytes=0),
    )


def _written(staged: Path, role: str) -> list[Path]:
    return sorted((staged / "onnx").glob(f"{FILES[role]}*.onnx"))


def _part(staged: Path, role: str) -> Part:
    """Facts read back from the written file, not from what was meant to be written."""
    path = _written(staged, role)[0]
    return part_of(staged, role, path, storage.data_files(path))


def part_of(staged: Path, role: str, path: Path, data: Sequence[Path]) -> Part:
    """Facts read back from the graph file at `path`, whose further weights are in `data`."""
    model = ir.load(path)
    if model.ir_version is None or model.ir_version > IR_VERSION:
        raise CheckpointError(f"{path}: IR version {model.ir_version}, at most {IR_VERSION} expected")
    sha256, size = bundle.digest(path)
    return Part(
        role=role,  # type: ignore[arg-type]
        path=path.relative_to(staged).as_posix(),
        sha256=sha256,
        bytes=size,
        inputs=tuple(map(_tensor, model.graph.inputs)),
        outputs=tuple(map(_tensor, model.graph.outputs)),
        bits=weight_bits(model),
        fallbacks=fallbacks(model),
        onnx=OnnxFacts(
            ir_version=model.ir_version,
            opsets={k or "ai.onnx": v for k, v in model.opset_imports.items()},
            min_onnxruntime=min_onnxruntime(model),
        ),
        data=tuple(bundle.file_ref(staged, file.relative_to(staged).as_posix()) for file in data),
    )


def _tensor(value: ir.Value) -> TensorSpec:
    assert value.dtype is not None
    kind: Any = _DTYPES[value.dtype.name]
    return TensorSpec(name=str(value.name), dtype=kind, shape=layout.dimensions(value))


def _state(decoder: Part) -> tuple[StateTensor, ...]:
    """One entry per cache tensor; inputs and outputs pair by layer and kind."""
    found = []
    for spec in decoder.inputs:
        if spec.name.startswith("past_key_values."):
            found.append(
                StateTensor(
                    input=spec.name,
                    output=spec.name.replace("past_key_values.", "present."),
                    kind="kv",
                    dtype=spec.dtype,
                    shape=spec.shape,
                    sequence_axis=2,
                    rewindable=True,
                    in_place=True,
                    padding_side="right",
                )
            )
        elif spec.name.startswith("past_conv."):
            found.append(
                StateTensor(
                    input=spec.name,
                    output=spec.name.replace("past_conv.", "present_conv."),
                    kind="conv",
                    dtype=spec.dtype,
                    shape=spec.shape,
                    rewindable=False,
                )
            )
    return tuple(found)


def write_conformance(facts: Facts, staged: Path, draft: Manifest, spread: float) -> FileRef:
    """Two pictures: a file to be turned upright and one with transparency."""
    wanted = [(case.name, case) for case in facts.cases if isinstance(case.image, bytes)][:2]
    # one step of a byte, where sin() differs in the filter
    step = max((1 / min(op.divide) for op in facts.image.operations if isinstance(op, Normalise)), default=1)
    with Session.from_manifest(staged, draft, threads=1) as session:
        vectors = [conformance.record(session, name, _bytes(case), case.question) for name, case in wanted]
    peak = max(float(abs(vector.logits).max()) for vector in vectors)
    return conformance.write(
        staged,
        vectors,
        pixels_tolerance=1.01 * step,
        logit_tolerance=peak * spread,
    )


def _bytes(case: ParityCase) -> bytes:
    assert isinstance(case.image, bytes)
    return case.image
