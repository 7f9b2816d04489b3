"""Writes ONNX bundles: parts, tokenizer, conformance vectors, and last the manifest, after the gate.

In: a checkpoint directory and precisions. Out: bundle directories. Not here: tracing (`graphs.py`), rounding
(`quantize.py`), the checks (`gate.py`, `audit.py`).

A bundle is built in a temporary directory beside its target and renamed when everything holds; a failed or
killed export leaves the target as it was. The graphs are traced once for all precisions.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from evals.parity.parity import ParityCase
from evals.torch_session import TorchSession
from export import (
    browser_package,
    calibrate,
    gate,
    gate_expected,
    genai,
    genai_check,
    layout,
    limits,
    proof,
    space,
    static,
    storage,
    target,
)
from export.checkpoint import Checkpoint, load, read_config
from export.decoder import IR_VERSION
from export.families import Family, check_type, family_of, without_tiles
from export.gate_cases import GateReference
from export.gate_expected import Expected
from export.graphs import ROLES, trace_all
from export.quantize import Policy, fallbacks, quantize, resolve, suffix, weight_bits
from export.quantize_facts import min_onnxruntime
from export.static_decoder import StaticSizes
from export.targets import Plan
from runtime import bundle, conformance
from runtime.contract import TensorSpec
from runtime.errors import CheckpointError
from runtime.image import ImageInput
from runtime.image_spec import ImageSpec, Normalise
from runtime.manifest import (
    CausalAttention,
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
from runtime.prompt_spec import PromptSpec
from runtime.session import Session, usual_context

Progress = Callable[[str], None]
"""Called with one line at the start of every step."""

_FILES = {
    "vision_encoder": "vision_encoder",
    "embed_tokens": "embed_tokens",
    "decoder_prefill": "decoder_prefill",
    "decoder": "decoder_model_merged",
}
PLAIN = "fp32"
"""The traced parts in the directory of what is thrown away in the end."""

_COPIED = ("config.json", "generation_config.json")
_TOOLS = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "optimum")
_DTYPES = {"FLOAT": "float32", "FLOAT16": "float16", "INT64": "int64", "INT32": "int32", "INT8": "int8"}

_LOGIT_SPREAD, _ROUNDED_SPREAD = 1e-4, 0.05
"""Conformance tolerance over the largest logit: order of summation; integer kernels differ by processor."""


@dataclass(frozen=True)
class Facts:
    """What every precision of one checkpoint shares.

    `geometry`: the image section that the checkpoint's processor follows; another than `image` only where a
    static plan gives pictures of any size one size.
    """

    checkpoint: Checkpoint
    family: Family
    image: ImageSpec
    prompt: PromptSpec
    graphs: Mapping[str, ir.Model]
    reference: TorchSession
    cases: Sequence[ParityCase]
    say: Progress
    images: int = 1
    notes: tuple[str, ...] = ()
    changed: Mapping[str, bool | int] = field(default_factory=dict)
    plan: Plan = field(default_factory=Plan)
    context: int = 0
    geometry: ImageSpec | None = None
    examples: Sequence[ParityCase] = ()
    """What calibrated schemes look at; the gate's cases when there is none."""
    expected: Expected | None = None
    """What the gate compares with; None where a format has a gate of its own over the live reference."""


def export_onnx(
    checkpoint: Path,
    targets: Mapping[str, Path],
    *,
    names: Mapping[str, str],
    sample_images: Sequence[ImageInput] = (),
    image_required: bool = False,
    plan: Plan | None = None,
    examples: Sequence[calibrate.Example] = (),
    progress: Progress | None = None,
) -> list[Path]:
    """Write one bundle per precision in `targets`, in that order. Raises PocketError; see the gate.

    `examples`: pictures with questions that calibrated schemes look at.
    """
    for precision, path in targets.items():
        resolve(precision)
        target.check(path)
    say = progress or (lambda _: None)
    say("reading the checkpoint")
    check_type(checkpoint, str(read_config(checkpoint)["model_type"]))
    loaded = load(checkpoint)
    policies = {path: resolve(precision) for precision, path in targets.items()}
    check_cache(loaded, list(policies.values()))
    space.check(loaded, policies)
    with tempfile.TemporaryDirectory(prefix="pocketvlm-export-") as folder, space.told(Path(folder)):
        facts = prepare(
            loaded,
            sample_images,
            say,
            image_required=image_required,
            plan=plan,
            examples=examples,
        )
        facts = on_disk(facts, Path(folder))
        facts.reference.close()
        loaded.forget()
        storage.release()
        return write_bundles(facts, targets, names, Path(folder))


def check_cache(checkpoint: Checkpoint, policies: Sequence[Policy]) -> None:
    """Raises CheckpointError for int8 keys and values where calibration cannot see them."""
    causal = isinstance(family_of(checkpoint).attention(checkpoint), CausalAttention)
    for policy in policies:
        if not causal and any(rule.scheme == "int8-kv" for rule in policy.rules):
            raise CheckpointError(
                f"{checkpoint.path}: int8 keys and values ({policy.name}) are not offered where a picture's "
                "tokens see each other; leave -kv8 out"
            )


def on_disk(facts: Facts, scratch: Path) -> Facts:
    """The facts with graphs whose weights lie in files in `scratch`, so that those in memory can be freed."""
    plain = scratch / PLAIN
    write_files(facts, plain, facts.graphs, beside=True)
    graphs = {role: storage.mapped(plain / _part_path(role, model)) for role, model in facts.graphs.items()}
    return replace(facts, graphs=graphs)


def write_bundles(
    facts: Facts, targets: Mapping[str, Path], names: Mapping[str, str], scratch: Path
) -> list[Path]:
    """One bundle per precision from graphs that are traced already and lie in `scratch` (`on_disk`)."""
    if "fp32" not in targets:
        # the rounded parts are judged by the float graphs, so these pass the gate in any case
        facts.say("fp32: parity gate of the traced parts")
        _check_float(facts, scratch / PLAIN, draft_manifest(facts, scratch / PLAIN, "fp32", "fp32"))
        storage.release()
    order = sorted(targets, key=lambda precision: precision != "fp32")
    for precision in order:
        with target.staging(targets[precision]) as staged:
            build(facts, staged, precision, names[precision], scratch)
    return list(targets.values())


def prepare(
    checkpoint: Checkpoint,
    samples: Sequence[ImageInput],
    say: Progress,
    *,
    image_required: bool = False,
    plan: Plan | None = None,
    examples: Sequence[calibrate.Example] = (),
    trace: bool = True,
    expect: bool = True,
) -> Facts:
    """Trace the float32 graphs (unless a format needs none) and record what the reference answers.

    Without `plan.split_images` a checkpoint that cuts pictures into tiles is taken without them, and its
    reference too. A conversation takes at most `plan.max_images` pictures, fewer where the context ends.
    """
    plan = plan or Plan()
    changed = {} if plan.split_images else without_tiles(checkpoint)
    family = family_of(checkpoint)
    if plan.static and trace:
        static.check_decoder(family.decoder_shape(checkpoint))
    changed |= limits.hold(checkpoint, family, plan.max_image_tokens)
    geometry = limits.narrowed(family.image(checkpoint), plan.max_image_tokens)
    prompt = family.prompt(checkpoint)
    image = static.fixed_views(geometry, plan.max_image_tokens) if plan.static else geometry
    if image_required:
        prompt = prompt.model_copy(update={"user_without_image": None})
    context = limits.context(checkpoint, family, image, plan.max_context)
    room = context // image.max_tokens
    # before the costly steps; the gate repeats it on the written tokenizer
    claims = proof.settle(checkpoint, prompt, geometry, max(1, min(plan.max_images, room)))
    prompt = claims.prompt
    for note in claims.notes:
        say(f"note: {note}")
    kind = GateReference if image == geometry else limits.presized(image)
    reference = kind(checkpoint.path, model=checkpoint.model, processor=checkpoint.processor)
    if not reference.stop_ids:
        raise CheckpointError(
            f"{checkpoint.path}: generation_config.json has no eos_token_id: an answer would not end; add it"
        )
    say("reference answers")
    cases = gate.make_cases(
        reference,
        samples,
        text_only=prompt.user_without_image is not None,
        images=claims.images,
        asked=proof.questions_of(checkpoint),
    )
    expected = None
    if expect:
        room = usual_context(context, image.max_tokens)
        expected = gate_expected.record(reference, cases, prompt, claims.images, room)
    if not trace:
        graphs = {}
    elif plan.static:
        say("tracing the parts")
        graphs = static.trace_all(checkpoint, family, image, StaticSizes(context, plan.chunk, plan.masked))
    else:
        say("tracing the parts")
        graphs = trace_all(checkpoint, family)
    return Facts(
        checkpoint,
        family,
        image,
        prompt,
        graphs,
        reference,
        cases,
        say,
        images=claims.images,
        notes=claims.notes,
        changed=changed,
        plan=plan,
        context=context,
        geometry=geometry,
        examples=calibrate.answered(reference, examples),
        expected=expected,
    )


def build(facts: Facts, staged: Path, precision: str, name: str, scratch: Path) -> None:
    """Fill `staged` with a whole bundle; the manifest is the last file."""
    policy = resolve(precision)
    precision, exact = policy.name, all(rule.scheme == "keep" for rule in policy.rules)
    calibration = None
    if policy.calibrated:
        facts.say(f"{precision}: calibrating on {len(facts.examples or facts.cases)} prompts")
        calibration = calibration_of(facts, scratch)
    facts.say(f"{precision}: writing parts")
    floats = {role: facts.graphs[role] for role in ROLES}
    if policy.prefill:  # before the decoder, whose inputs and outputs are the contract's
        floats = {**floats, "decoder_prefill": facts.graphs["decoder"], "decoder": floats.pop("decoder")}
    graphs = {}
    for role, model in floats.items():
        graphs[role] = quantize(model, role, policy.rules, calibration)
        storage.release()
    twice = [
        f"{parts} store {count} bytes twice: one matrix in two orders"
        for parts, count in storage.shared_bytes(graphs).items()
    ]
    elsewhere = genai.wanted(facts.family, facts.checkpoint, facts.plan.target)
    write_files(facts, staged, graphs, beside=elsewhere)
    del graphs  # the gate needs the memory
    storage.release()
    draft = draft_manifest(facts, staged, precision, name)
    draft = draft.model_copy(update={"notes": (*draft.notes, *twice)})
    layout.write_config(staged, draft.parts)
    facts.say(f"{precision}: parity gate")
    if exact:
        parity = _check_float(facts, staged, draft)
    else:
        parity = gate.check_quantized(
            facts.checkpoint, floats, staged, draft, expected_of(facts), scratch, calibration
        )
    facts.say(f"{precision}: conformance vectors")
    vectors = write_conformance(facts, staged, draft, _LOGIT_SPREAD if exact else _ROUNDED_SPREAD)
    if elsewhere:
        facts.say(f"{precision}: files for onnxruntime-genai")
        genai.write(staged, draft, facts.family, facts.checkpoint)
        genai_check.check(staged, draft, facts.cases, exact=exact)
    if draft.target == browser_package.TARGET:
        browser_package.write(staged, draft)
    bundle.write(draft.model_copy(update={"parity": parity, "conformance": vectors}), staged)
    bundle.read(staged)


def calibration_of(facts: Facts, scratch: Path) -> calibrate.Calibration:
    """What flows through the float decoder on the examples, or on the gate's own prompts."""
    folder = scratch / PLAIN
    if not folder.exists():
        write_files(facts, folder, facts.graphs, beside=True)
    draft = draft_manifest(facts, folder, "fp32", "calibration")
    with Session.from_manifest(folder, draft, threads=1) as session:
        graphs, cases = facts.graphs, facts.examples or facts.cases
        return calibrate.collect(session, graphs["embed_tokens"], graphs["decoder"], cases)


def _check_float(facts: Facts, staged: Path, draft: Manifest) -> Parity:
    return gate.check_float(facts.checkpoint, staged, draft, expected_of(facts))


def expected_of(facts: Facts) -> Expected:
    """What the checkpoint answers, which `prepare` recorded."""
    assert facts.expected is not None
    return facts.expected


# --- files ------------------------------------------------------------


def write_files(facts: Facts, staged: Path, graphs: Mapping[str, ir.Model], *, beside: bool = False) -> None:
    """Parts in the onnx-community layout, and what transformers.js reads beside them."""
    (staged / "onnx").mkdir(parents=True)
    for role, model in graphs.items():
        storage.save(model, staged / _part_path(role, model), beside=beside)
    write_companions(facts, staged)


def write_companions(facts: Facts, staged: Path) -> None:
    """The tokenizer, and what loaders of the ecosystem read beside the parts."""
    layout.write_processor(staged, facts.checkpoint.processor)
    for name in _COPIED:
        source = facts.checkpoint.path / name
        if source.is_file():
            shutil.copyfile(source, staged / name)


def _part_path(role: str, model: ir.Model) -> str:
    """The layout has no second decoder for prompts, so no suffix for it either."""
    return f"onnx/{_FILES[role]}{'' if role == 'decoder_prefill' else suffix(model)}.onnx"


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


# --- manifest ---------------------------------------------------------


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
        parts = tuple(_part(staged, role) for role in _FILES if role in ROLES or _written(staged, role))
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
    return sorted((staged / "onnx").glob(f"{_FILES[role]}*.onnx"))


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
