"""Writes Core ML bundles: three `.mlpackage`s, tokenizer, conformance vectors, and last the manifest.

In: a checkpoint directory and precisions (`fp16`, `int4`, a YAML of rules). Out: bundle directories.
Not here: the parts (`coreml_parts.py`), conversion (`coreml_convert.py`), compression (`coreml_compress.py`),
the checks (`coreml_gate.py`).

Functions are converted once for each arithmetic (float16, float32), compressed for each precision, then
merged: `prefill` and `decode` of one package share their weights.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from export import (
    coreml_compress,
    coreml_convert,
    coreml_decoder,
    coreml_gate,
    coreml_package,
    coreml_policy,
    onnx,
    space,
    swift_package,
    target,
)
from export.checkpoint import load, read_config
from export.coreml_compress import Choice
from export.coreml_parts import ROLES, Parts, parts_of
from export.coreml_policy import Policy
from export.draft import draft_manifest, write_conformance
from export.facts import Facts, Progress, prepare
from export.families import check_type
from export.static_decoder import StaticSizes
from export.targets import Plan, plan_for
from runtime import bundle
from runtime.image import ImageInput
from runtime.manifest import CoremlFacts, Fallback, Manifest, Part, StateTensor

_TOOLS = ("torch", "transformers", "coremltools")
_SEQUENCE_AXIS = 2


def export_coreml(
    checkpoint: Path,
    targets: Mapping[str, Path],
    *,
    names: Mapping[str, str],
    sample_images: Sequence[ImageInput] = (),
    image_required: bool = False,
    plan: Plan | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write one bundle per precision in `targets`. Raises PocketError; see the gate."""
    policies = {precision: coreml_policy.resolve(precision) for precision in targets}
    for path in targets.values():
        target.check(path)
    coreml_convert.tools()
    plan = plan or plan_for(None, to="coreml")
    say = progress or (lambda _: None)
    say("reading the checkpoint")
    family = check_type(checkpoint, str(read_config(checkpoint)["model_type"]))
    loaded = load(checkpoint)
    coreml_decoder.check_shape(family.decoder_shape(loaded), str(checkpoint))  # before the costly steps
    parameters = space.stored_parameters(loaded)
    space.ask((path, _bytes(policies[precision], parameters)) for precision, path in targets.items())
    facts = prepare(loaded, sample_images, say, image_required=image_required, plan=plan, trace=False)
    sizes = StaticSizes(facts.context, plan.chunk, plan.masked)
    parts = parts_of(loaded, facts.family, facts.image, sizes)
    with target.workspace(next(iter(targets.values()))) as scratch:
        work = Work(facts, parts, scratch)
        # what is not compressed first: the others are held against it
        for precision in sorted(targets, key=lambda each: policies[each].compresses):
            with target.staging(targets[precision]) as staged:
                work.build(staged, policies[precision], names[precision])
    return list(targets.values())


def _bytes(policy: Policy, parameters: int) -> int:
    """About the most that a bundle takes with what stands beside it meanwhile: its functions apart (two of
    the decoder) and merged; both again when they are compressed."""
    width = 2 if policy.base == "float16" else 4
    return parameters * width * (5 if policy.compresses else 3)


@dataclass(frozen=True)
class Written:
    """What a part became: its manifest entry and the choices for the weights of its functions."""

    part: Part
    choices: tuple[Choice, ...]


class Work:
    """Bundles of one checkpoint; what several precisions need is made once, in `scratch`."""

    def __init__(self, facts: Facts, parts: Parts, scratch: Path) -> None:
        self.facts, self.parts, self.scratch = facts, parts, scratch
        self._plain: dict[str, tuple[Path, Manifest]] = {}

    def build(self, staged: Path, policy: Policy, name: str) -> None:
        """Fill `staged` with a whole bundle; the manifest is the last file."""
        facts = self.facts
        plain = self._passed(policy) if policy.compresses else None
        facts.say(f"{policy.name}: writing packages")
        written = [self._write(staged, role, policy) for role in ROLES]
        onnx.write_companions(facts, staged)
        draft = self._draft(staged, name, policy, written)
        for note in draft.notes[len(facts.notes) :]:
            facts.say(f"note: {note}")
        swift_package.write(staged, draft)
        facts.say(f"{policy.name}: parity gate")
        parity = coreml_gate.check(facts, staged, draft, policy, plain)
        if not policy.compresses and policy.base not in self._plain:
            kept = self.scratch / f"plain-{policy.base}"
            shutil.copytree(staged / "coreml", kept / "coreml")
            self._plain[policy.base] = kept, draft
        facts.say(f"{policy.name}: conformance vectors")
        vectors = write_conformance(facts, staged, draft, coreml_gate.SPREAD)
        bundle.write(draft.model_copy(update={"parity": parity, "conformance": vectors}), staged)
        bundle.read(staged)

    def _passed(self, policy: Policy) -> tuple[Path, Manifest]:
        """The packages of this arithmetic without compression, through the gate."""
        if policy.base not in self._plain:
            folder = self.scratch / f"plain-{policy.base}"
            plain = next(each for each in coreml_policy.POLICIES.values() if _is_plain(each, policy.base))
            written = [self._write(folder, role, plain) for role in ROLES]
            onnx.write_companions(self.facts, folder)
            draft = self._draft(folder, plain.name, plain, written)
            self.facts.say(f"{plain.name}: parity gate of what will be compressed")
            coreml_gate.check(self.facts, folder, draft, plain, None)
            self._plain[policy.base] = folder, draft
        return self._plain[policy.base]

    def _write(self, staged: Path, role: str, policy: Policy) -> Written:
        """Convert (once), compress and merge the functions of a part."""
        choices: list[Choice] = []
        sources = {}
        for name in self.parts.of(role):
            source = self._converted(role, name, policy)
            found = coreml_compress.choose(source, role, policy)
            if any(choice.scheme != "keep" for choice in found):
                source = self._compressed(source, found)
            choices += found
            sources[name] = source
        path = coreml_convert.merge(sources, staged / "coreml" / f"{role}.mlpackage")
        return Written(_part(staged, role, path, choices), tuple(choices))

    def _compressed(self, source: Path, choices: list[Choice]) -> Path:
        """The function with its weights as chosen; policies that choose alike share it."""
        chosen = repr([(choice.weight.name, choice.scheme) for choice in choices])
        key = hashlib.sha256(f"{source} {chosen}".encode()).hexdigest()[:16]
        out = self.scratch / "compressed" / f"{source.stem}-{key}.mlpackage"
        return out if out.exists() else coreml_compress.compress(source, choices, out)

    def _converted(self, role: str, name: str, policy: Policy) -> Path:
        """The function on disk before any compression."""
        path = self.scratch / policy.base / f"{role}-{name}.mlpackage"
        if not path.exists():
            self.facts.say(f"{policy.base}: converting {role} {name}")
            where = f"{self.facts.checkpoint.path}: {role}"
            model = coreml_convert.convert(self.parts.of(role)[name], where, policy.base)
            coreml_convert.save(model, path)
        return path

    def _draft(self, staged: Path, name: str, policy: Policy, written: Sequence[Written]) -> Manifest:
        """The manifest of the packages in `staged`, with parity and conformance still to come."""
        facts = self.facts
        found = coreml_package.functions(staged / written[-1].part.path)
        kept = CoremlFacts(
            chunk=facts.plan.chunk,
            context=facts.context,
            functions={role: tuple(self.parts.of(role)) for role in ROLES},
            deployment_target=coreml_convert.TARGET,
        )
        draft = draft_manifest(
            facts,
            staged,
            policy.name,
            name,
            parts=[each.part for each in written],
            to="coreml",
            stateful=(kept, states(next(iter(found.values())))),
        )
        schemes = {
            (str(each.part.role), choice.weight.label): choice.asked
            for each in written
            for choice in each.choices
        }
        tools = {tool: importlib.metadata.version(tool) for tool in _TOOLS}
        notes = (*facts.notes, *coreml_policy.hazards(schemes))
        # Core ML's compute units; execution providers are onnxruntime's
        return draft.model_copy(update={"tool_versions": tools, "notes": notes, "providers": ("ALL",)})


def _is_plain(policy: Policy, base: str) -> bool:
    return not policy.compresses and policy.base == base


def _part(staged: Path, role: str, path: Path, choices: Sequence[Choice]) -> Part:
    """Facts read back from the written package."""
    found = list(coreml_package.functions(path).values())
    inputs, outputs = coreml_package.tensors(found)
    sha256, size = bundle.digest(path)
    fallbacks: dict[str, Fallback] = {}
    for choice in choices:
        if (fallback := choice.fallback()) is not None:
            fallbacks[fallback.node] = fallback
    return Part(
        role=role,  # type: ignore[arg-type]
        path=path.relative_to(staged).as_posix(),
        sha256=sha256,
        bytes=size,
        inputs=inputs,
        outputs=outputs,
        bits=coreml_package.stored(found),
        fallbacks=tuple(fallbacks.values()),
    )


def states(decoder: coreml_package.Function) -> tuple[StateTensor, ...]:
    """The states of a decoder's function; a short convolution's cannot go back."""
    return tuple(
        StateTensor(
            input=name,
            output=name,
            kind="conv" if name == coreml_decoder.CONVOLUTIONS else "kv",
            dtype=kind.dtype,  # type: ignore[arg-type]
            shape=tuple(int(size or 0) for size in kind.shape),
            sequence_axis=None if name == coreml_decoder.CONVOLUTIONS else _SEQUENCE_AXIS,
            rewindable=name != coreml_decoder.CONVOLUTIONS,
            in_place=True,
            padding_side="right",
        )
        for name, kind in coreml_package.states(decoder).items()
    )
