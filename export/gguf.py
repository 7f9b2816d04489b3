"""Writes GGUF bundles: text model and mmproj for llama.cpp, tokenizer, conformance, and last the manifest.

In: a checkpoint directory and types (`f16`, `q4_k_m`, ...). Out: bundle directories. Not here: conversion
(`gguf_write.py`), llama.cpp's quantization (`llamacpp.py`), the checks (`gguf_gate.py`).

The two files are what llama.cpp, Ollama and LM Studio open as they are; the manifest beside them is for our
own runtime. The vision model stays at 8 bits or more.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from export import gguf_gate, gguf_importance, gguf_modelfile, llamacpp, space, target
from export.checkpoint import load, read_config
from export.draft import draft_manifest, write_conformance
from export.facts import Facts, Progress, prepare
from export.families import other_layout
from export.families.gguf import gguf_family
from export.families.gguf_layout import UnknownNames
from export.gguf_kinds import DIRECT, Request, check
from export.gguf_plan import Plan as FilePlan
from export.gguf_source import Source, open_source
from export.gguf_vocabulary import composer, unread_flags
from export.gguf_write import stored_bytes, write
from export.targets import Plan
from runtime import bundle
from runtime.errors import CheckpointError, InputError
from runtime.image import ImageInput
from runtime.image_spec import ImageSpec, ToBytes
from runtime.manifest import Fallback, Manifest, Part
from runtime.prompt import load_tokenizer

_OTHERS = 32 * 2**20
"""Bytes of a bundle beside its tensors: tokenizers, conformance vectors."""
_NARROW = ("f32", "f16")
"""Types whose own logits say enough of their files."""
_TOOLS = ("torch", "transformers", "gguf", "llama-cpp-python")
_VISION = {"f32": "f32", "f16": "f16", "bf16": "f16"}
"""mmproj by the text model's type; q8_0 with every smaller one (q4_0 moves image features by half)."""


@dataclass(frozen=True)
class Files:
    """Plans of the two files, and where tensors come from."""

    source: Source
    text: FilePlan
    vision: FilePlan


def export_gguf(
    checkpoint: Path,
    targets: Mapping[str, Path],
    *,
    names: Mapping[str, str],
    request: Request | None = None,
    sample_images: Sequence[ImageInput] = (),
    image_required: bool = False,
    plan: Plan | None = None,
    examples: Sequence[tuple[ImageInput, str]] = (),
    progress: Progress | None = None,
) -> list[Path]:
    """Write one bundle per type in `targets`, in that order. Raises PocketError; see the gate.

    `examples`: pictures with questions for the importance matrix, instead of the gate's own.
    """
    request = request or Request()
    if examples and not request.importance:
        raise InputError("examples: nothing here is calibrated; ask for --imatrix, or leave --data out")
    if request.importance and all(check(kind) in DIRECT for kind in targets):
        raise InputError(f"imatrix: weighs nothing in {', '.join(targets)}; for types such as q4_k_m, q4_0")
    for kind, path in targets.items():
        check(kind)
        target.check(path)
    say = progress or (lambda _: None)
    say("reading the checkpoint")
    found = _planned(checkpoint)
    types = llamacpp.chosen([piece.name for piece in found.text.pieces], request.rules)
    space.ask(_needed(found, targets, types))
    facts = prepare(
        load(checkpoint),
        sample_images,
        say,
        image_required=image_required,
        plan=plan,
        examples=examples,
        trace=False,
        expect=False,
    )
    facts = replace(facts, image=as_bytes(facts.image), geometry=facts.image)
    with target.workspace(next(iter(targets.values()))) as scratch:
        work = Work(facts, found, request, scratch)
        for kind, path in targets.items():
            with target.staging(path) as staged:
                work.build(staged, check(kind), names[kind])
    return list(targets.values())


def _planned(checkpoint: Path) -> Files:
    """As `plan_files`; where names of tensors are not known and transformers cannot load them, its reason."""
    try:
        return plan_files(checkpoint)
    except UnknownNames:
        load(checkpoint)
        raise


def plan_files(checkpoint: Path) -> Files:
    """Names and layouts of both files, before any weight is read. Raises CheckpointError with the path."""
    model_type = str(read_config(checkpoint)["model_type"])
    if (refusal := other_layout(checkpoint, model_type)) is not None:
        raise refusal
    with _named(checkpoint):
        family = gguf_family(model_type)
    source = open_source(checkpoint)
    preprocessor = source.preprocessor
    with _named(checkpoint):
        return Files(
            source,
            family.text(source.config, source.names),
            family.vision(source.config, preprocessor, source.names),
        )


@contextlib.contextmanager
def _named(checkpoint: Path) -> Iterator[None]:
    """A family's refusals in this block say which checkpoint."""
    try:
        yield
    except CheckpointError as error:
        raise type(error)(f"{checkpoint}: {error}") from error


def _needed(
    files: Files, targets: Mapping[str, Path], types: Mapping[str, str]
) -> Iterator[tuple[Path, int]]:
    """(where, bytes at most) of the bundles, and of the float32 files that stand beside them meanwhile."""

    def asked(name: str) -> GGMLQuantizationType | None:
        return llamacpp.ggml_type(types[name]) if name in types else None

    first, kinds = next(iter(targets.values())), [check(kind) for kind in targets]
    for kind, path in zip(kinds, targets.values(), strict=True):
        direct = kind if kind in DIRECT else "q8_0"  # what does not fit a smaller type takes no more
        text = stored_bytes(files.text, files.source, direct, asked)
        yield path, text + stored_bytes(files.vision, files.source, _VISION.get(kind, "q8_0")) + _OTHERS
    if set(kinds) != {"f32"} or types:
        yield first, sum(stored_bytes(plan, files.source, "f32") for plan in (files.text, files.vision))


def as_bytes(image: ImageSpec) -> ImageSpec:
    """The image section up to where llama.cpp takes over: it normalises and cuts patches itself."""
    return image.model_copy(update={"operations": (*image.operations[:-2], ToBytes())})


class Work:
    """Bundles of one checkpoint; what several types need is made once, in `scratch`."""

    def __init__(self, facts: Facts, files: Files, request: Request, scratch: Path) -> None:
        self.facts, self.files, self.request, self.scratch = facts, files, request, scratch
        self._columns: Mapping[str, NDArray[np.float32]] | None = None
        self.wanted = gguf_gate.record(facts)
        self._proved = False  # that the float32 files are the checkpoint's

    def build(self, staged: Path, kind: str, name: str) -> None:
        """Fill `staged` with a whole bundle; the manifest is the last file."""
        facts = self.facts
        facts.say(f"{kind}: writing text model and mmproj")
        parts = (self._text(staged, kind, name), self._vision(staged, kind, name))
        shutil.copyfile(facts.checkpoint.path / "tokenizer.json", staged / "tokenizer.json")
        draft = self._draft(staged, kind, name, parts)
        remarks = _remarks(staged / "tokenizer.json", self.files.vision.tools_need)
        for remark in remarks:
            facts.say(f"{kind}: {remark}")
        system = gguf_modelfile.system_texts(facts.checkpoint, draft.prompt)
        gguf_modelfile.write(staged, draft, remarks, system)
        facts.say(f"{kind}: parity gate")
        base = {} if kind == "f32" else {"text_model": self._base(), "mmproj": self._base_vision()}
        if kind not in _NARROW and not self._proved:
            gguf_gate.check_base(facts, self.wanted, base, draft)
            self._proved = True
        parity = gguf_gate.check(facts, self.wanted, staged, draft, kind, base)
        facts.say(f"{kind}: conformance vectors")
        vectors = write_conformance(facts, staged, draft, gguf_gate.SPREAD)
        bundle.write(draft.model_copy(update={"parity": parity, "conformance": vectors}), staged)
        bundle.read(staged)

    def _text(self, staged: Path, kind: str, name: str) -> Part:
        path = staged / f"{name}-{kind.upper()}.gguf"
        if kind in DIRECT and not self.request.rules:
            write(self.files.text, self.files.source, path, kind)
        else:
            columns = self._importance() if self.request.importance else None
            llamacpp.quantize(self._base(), path, kind, rules=self.request.rules, importance=columns)
        return _part(staged, "text_model", path, kind)

    def _vision(self, staged: Path, kind: str, name: str) -> Part:
        wanted = _VISION.get(kind, "q8_0")
        path = staged / f"mmproj-{name}-{wanted.upper()}.gguf"
        write(self.files.vision, self.files.source, path, wanted)
        return _part(staged, "mmproj", path, wanted)

    def _base(self) -> Path:
        """The text model in float32, from which llama.cpp quantizes."""
        path = self.scratch / "text-f32.gguf"
        if not path.exists():
            write(self.files.text, self.files.source, path, "f32")
        return path

    def _base_vision(self) -> Path:
        path = self.scratch / "mmproj-f32.gguf"
        if not path.exists():
            write(self.files.vision, self.files.source, path, "f32")
        return path

    def _importance(self) -> Mapping[str, NDArray[np.float32]]:
        if self._columns is None:
            self.facts.say("importance matrix from image-conditioned prompts")
            cases = [each for each in self.facts.examples or self.facts.cases if each.images]
            self._columns = gguf_importance.collect(self.facts.reference, cases, self.files.text)
        return self._columns

    def _draft(self, staged: Path, kind: str, name: str, parts: tuple[Part, ...]) -> Manifest:
        label = f"{kind}-imatrix" if self.request.importance and kind not in DIRECT else kind
        draft = draft_manifest(self.facts, staged, label, name, parts=parts, to="gguf")
        tools = {tool: importlib.metadata.version(tool) for tool in _TOOLS}
        return draft.model_copy(update={"tool_versions": tools})


def _remarks(tokenizer: Path, needed: Sequence[str]) -> list[str]:
    """Sentences about tokens with which llama.cpp's own tools do not get along, as a session does."""
    found = load_tokenizer(tokenizer)
    remarks = [
        f"llama.cpp's own tools read {text!r} without its {flag} (docs/gguf.md)"
        for text, flag in list(unread_flags(found).items())[:1]
    ]
    if composer(found) is not None:
        remarks.append("llama.cpp's own tools do not compose characters (NFC) as the tokenizer does")
    pieces = {
        found.decode([place], skip_special_tokens=False)
        for place in range(found.get_vocab_size() if needed else 0)
    }
    if lacking := [text for text in needed if text not in pieces]:
        what = f"the tokenizer has no token {lacking[0]!r}"
        remarks.append(f"llama.cpp's own tools stop on pictures: {what} (docs/gguf.md)")
    return remarks


def _part(staged: Path, role: Literal["text_model", "mmproj"], path: Path, kind: str) -> Part:
    """Facts read back from the written file."""
    sha256, size = bundle.digest(path)
    return Part(
        role=role,
        path=path.relative_to(staged).as_posix(),
        sha256=sha256,
        bytes=size,
        inputs=(),
        outputs=(),
        bits=llamacpp.weight_bits(path),
        fallbacks=tuple(
            Fallback(node=weight, asked=kind, got=got, reason="its rows are no multiple of a block")
            for weight, got in llamacpp.fallbacks(path, kind).items()
        ),
    )
