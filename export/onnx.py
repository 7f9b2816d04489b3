"""Writes ONNX bundles: parts, tokenizer, conformance vectors, and last the manifest, after the gate.

In: a checkpoint directory and precisions. Out: bundle directories. Not here: tracing (`graphs.py`), rounding
(`quantize.py`), the checks (`gate.py`, `audit.py`).

A bundle is built in a temporary directory beside its target and renamed when everything holds; a failed or
killed export leaves the target as it was. The graphs are traced once for all precisions.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from export import browser_package, calibrate, gate, genai, genai_check, layout, space, storage, target
from export.checkpoint import Checkpoint, load, read_config
from export.draft import FILES, LOGIT_SPREAD, ROUNDED_SPREAD, draft_manifest, write_conformance
from export.facts import Facts, Progress, expected_of, prepare
from export.families import check_type, family_of
from export.graphs import ROLES
from export.quantize import Policy, quantize, resolve, suffix
from export.targets import Plan
from runtime import bundle
from runtime.errors import CheckpointError
from runtime.image import ImageInput
from runtime.manifest import CausalAttention, Manifest, Parity
from runtime.session import Session

PLAIN = "fp32"
"""The traced parts in the directory of what is thrown away in the end."""

_COPIED = ("config.json", "generation_config.json")


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
        storage.release(loaded.parameters)
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
        storage.release(facts.checkpoint.parameters)
    order = sorted(targets, key=lambda precision: precision != "fp32")
    for precision in order:
        with target.staging(targets[precision]) as staged:
            build(facts, staged, precision, names[precision], scratch)
    return list(targets.values())


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
        storage.release(facts.checkpoint.parameters)
    twice = [
        f"{parts} store {count} bytes twice: one matrix in two orders"
        for parts, count in storage.shared_bytes(graphs).items()
    ]
    elsewhere = genai.wanted(facts.family, facts.checkpoint, facts.plan.target)
    write_files(facts, staged, graphs, beside=elsewhere)
    del graphs  # the gate needs the memory
    storage.release(facts.checkpoint.parameters)
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
    vectors = write_conformance(facts, staged, draft, LOGIT_SPREAD if exact else ROUNDED_SPREAD)
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
    return f"onnx/{FILES[role]}{'' if role == 'decoder_prefill' else suffix(model)}.onnx"
