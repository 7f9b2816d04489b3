"""The gate of GGUF bundles: llama.cpp on the written files must reproduce the checkpoint.

In: files just written, the checkpoint's reference session. Out: measured figures, or a ParityError that says
what broke. Not here: the measuring (`evals/parity/parity.py`), the ONNX gate (`gate.py`).

In this order: the prompt's segments; pixels up to where llama.cpp takes over; tokenizer on many texts; image
features; logits on the checkpoint's own features, which hold the text model alone to a narrow limit. ggml
computes a vision model's first convolution and GELU in float16 tables, so features of float32 files differ
more than the text model's logits do. A type of 8 bits or fewer says little by its logits: then the float32
files are held to their own limits, and its weights against theirs.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import Tokenizer

from evals.parity.parity import ParityResult, Side, compare_sides, side
from export import gate, proof
from export.facts import Facts
from export.gate import Limit
from export.gguf_vocabulary import BLANK, composer, unread_flags, written_blanks
from runtime import bundle
from runtime.errors import ParityError
from runtime.gguf_library import FIDELITY, TextModel
from runtime.gguf_session import GgufBackend
from runtime.image import ImageFeatures, prepare
from runtime.image_spec import ImageSpec
from runtime.manifest import Manifest, Parity
from runtime.prompt import load_tokenizer
from runtime.providers import RunSettings
from runtime.session import Session

SPREAD = 0.05
"""Conformance tolerance over the largest logit: flash attention and a float16 cache in use."""

TEXTS = 400
_VISION_RMS = {"f32": 0.02, "f16": 0.02, "q8_0": 0.25}
_TEXT_RMS = {"f32": 5e-3, "f16": 0.02, "bf16": 0.25, "q8_0": 0.25}
"""f32, on random weights: 2e-6, and up to 2e-3 where llama.cpp computes otherwise (docs/gguf.md)."""
_WEIGHT_RMS = {"q8_0": 0.01, "q6_k": 0.03, "q5_k_m": 0.06, "q4_k_m": 0.12, "q4_0": 0.14, "iq4_nl": 0.14}
"""Root mean square of a tensor's rounding over its own; about half of a step of a grid of that many bits."""

_PIECES = (
    " ", "  ", "\n", "\n\n", "\t", "\r\n", "a", "The", "the", "red circle", "naïve", "漢字", "🙂", "0", "12",
    "345", "1,234.5", "don't", "I'LL", "we've", "(x)", "--", "...", "é", "e\u0301", "\u200d", "ﬁ", "ß",
    "<", ">", "_",
)  # fmt: skip


def record(facts: Facts) -> tuple[Side, ...]:
    """What the checkpoint gives for each case: the same for files of every type."""
    reference = _WithoutPixels(facts.reference)
    return tuple(side(reference, case) for case in facts.cases)


def check(
    facts: Facts,
    wanted: Sequence[Side],
    staged: Path,
    draft: Manifest,
    kind: str,
    base: Mapping[str, Path],
) -> Parity:
    """Hold the files in `staged` against what the checkpoint gave. `base`: by role the float32 files of
    rounded ones.

    What small types cost in answers is for the evaluation to judge: below 8 bits the text model's logits have
    no limit, its weights have. Raises ParityError or BundleError.
    """
    paths = {str(part.role): bundle.locate(staged, part.path) for part in draft.parts}
    assert facts.geometry is not None
    gate.check_prompts(facts.checkpoint, staged, draft, facts.geometry)
    _check_pixels(facts, facts.geometry)
    figures: dict[str, float] = {}
    for role, plain in base.items():
        figures[f"{role}_weight_rms_error"] = same_but_rounded(plain, paths[role], kind)
    text, whole = _measure(facts, wanted, staged, draft)
    limits = {}
    for result, limit in (
        (whole, _vision_limit(draft)),
        *([(text, _text_limit(kind))] if kind in _TEXT_RMS else []),
    ):
        _judge(result, limit)
        limits[limit.figure if result is whole else f"text_{limit.figure}"] = limit.most
    return Parity(
        reference=f"{gate.reference_name()}; llama.cpp without flash attention, float32 cache",
        cases=whole.cases,
        figures={
            **whole.figures(),
            **{f"text_{name}": value for name, value in text.figures().items()},
            **figures,
        },
        limits=limits,
    )


def check_base(facts: Facts, wanted: Sequence[Side], base: Mapping[str, Path], draft: Manifest) -> None:
    """Hold the float32 files of both roles, in one directory, against the checkpoint. Raises ParityError.

    `draft`: the manifest of files that are rounded from them; all but its parts is theirs, too.
    """
    parts = tuple(part.model_copy(update={"path": base[part.role].name}) for part in draft.parts)
    directory, draft = base["text_model"].parent, draft.model_copy(update={"parts": parts})
    text, whole = _measure(facts, wanted, directory, draft)
    reason = "the float32 file that this type is rounded from"
    _judge(whole, Limit("feature_rms_error", _VISION_RMS["f32"], reason))
    _judge(text, Limit("logit_rms_error", _TEXT_RMS["f32"], reason))


def _measure(
    facts: Facts, wanted: Sequence[Side], directory: Path, draft: Manifest
) -> tuple[ParityResult, ParityResult]:
    """(text model on the checkpoint's features, both parts) of the files in `directory`."""
    tokenizer = load_tokenizer(facts.checkpoint.path / "tokenizer.json")
    backend = GgufBackend(directory, draft, RunSettings(threads=1), context_of(facts, draft), FIDELITY)
    with Session(draft, backend, tokenizer, max_context=draft.limits.context, reuse=False) as session:
        check_tokenizer(tokenizer, backend.text, facts.checkpoint.path)
        given = (_OnReferenceFeatures(session, facts.reference), _WithoutPixels(session))
        text, whole = (
            compare_sides(wanted, (side(each, case) for case in facts.cases), facts.cases) for each in given
        )
    return text, whole


def context_of(facts: Facts, draft: Manifest) -> int:
    """Room for the gate's longest case, not for the whole context."""
    longest = draft.limits.images * draft.limits.image_tokens + 1024
    return min(draft.limits.context, longest)


def _vision_limit(draft: Manifest) -> Limit:
    most = {bits.scheme for bits in draft.part("mmproj").bits}
    kind = "q8_0" if "q8_0" in most else "f16"
    return Limit("feature_rms_error", _VISION_RMS[kind], "float16 convolution and GELU tables; 8 bit weights")


def _text_limit(kind: str) -> Limit:
    return Limit("logit_rms_error", _TEXT_RMS[kind], "the text model alone: weights of this type")


def _judge(result: ParityResult, limit: Limit) -> None:
    got = result.figures()[limit.figure]
    if not result.ids_equal:
        raise ParityError("gate: prompt ids differ from the checkpoint's; wrong prompt segments")
    if not got <= limit.most:
        raise ParityError(
            f"gate: {limit.figure} against the checkpoint is {got:.3g}, at most {limit.most:.3g} allowed "
            f"({limit.reason}); a file is wrong, no bundle was written"
        )


# --- sessions that leave something out --------------------------------


class _WithoutPixels:
    """A session whose pictures are not compared: its pixels are bytes, proved apart."""

    def __init__(self, session: Any) -> None:
        self.session = session

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def prepare(self, source: Any) -> Any:
        return _Unseen(self.session.prepare(source))

    def prompt_ids(self, question: str, images: Sequence[Any]) -> Any:
        return self.session.prompt_ids(question, [each.prepared for each in images])

    def encode_image(self, image: Any) -> Any:
        return self.session.encode_image(image.prepared)


class _OnReferenceFeatures(_WithoutPixels):
    """A session whose text model gets the checkpoint's own image features."""

    def __init__(self, session: Session, reference: Any) -> None:
        super().__init__(session)
        self.reference = reference

    def prepare(self, source: Any) -> Any:
        return _Unseen(self.session.prepare(source), source)

    def encode_image(self, image: Any) -> ImageFeatures:
        found = self.reference.encode_image(self.reference.prepare(image.source))
        grids = tuple(view.grid for view in image.prepared.views)
        return ImageFeatures(found.tokens, grids, found.deepstack)


class _Unseen:
    """A prepared picture without pixels to compare."""

    pixels = (np.zeros(1),)

    def __init__(self, prepared: Any, source: Any = None) -> None:
        self.prepared, self.source = prepared, source


# --- parts of the proof -----------------------------------------------


def _check_pixels(facts: Facts, geometry: ImageSpec) -> None:
    """The operations before llama.cpp's own, with normalisation after them, equal the processor's."""
    for case in facts.cases:
        for image in case.images:
            ours = np.concatenate([view.ravel() for view in prepare(image, geometry).pixels])
            theirs = np.concatenate([view.ravel() for view in facts.reference.prepare(image).pixels])
            if ours.shape != theirs.shape or not np.array_equal(ours, theirs):
                raise ParityError(f"gate: case {case.name!r}: pixels differ from the checkpoint's processor")


def check_tokenizer(tokenizer: Tokenizer, text: TextModel, path: Path) -> int:
    """llama.cpp's ids equal the tokenizer's on many texts; their number. Raises ParityError with the text.

    What llama.cpp is known not to have is left out, and the export says so: rules of added tokens, and
    composing characters, which is done before. Left out, too, are runs of the sign that a tokenizer writes
    for a blank, which to llama.cpp are tokens of blanks, and longer runs of blanks than there are tokens for.
    """
    chosen = random.Random(0)
    compose = composer(tokenizer)
    blanks, added = written_blanks(tokenizer), tokenizer.get_added_tokens_decoder().values()
    special = [
        token.content.replace(BLANK, " ") if token.content in blanks else token.content for token in added
    ]
    odd = [*unread_flags(tokenizer), *blanks, *(" " * (len(text) + 1) for text in blanks[-1:])]
    known = chosen.sample(range(tokenizer.get_vocab_size()), min(TEXTS, tokenizer.get_vocab_size()))
    # texts of the vocabulary's own words: merges across the borders of a wrong rule show
    pieces = [*_PIECES, *special, *(tokenizer.decode([i], skip_special_tokens=False) for i in known)]
    texts = [
        *proof.QUESTIONS,
        *("".join(chosen.choices(pieces, k=chosen.randint(1, 12))) for _ in range(TEXTS)),
    ]
    for each in texts:
        if any(text in each for text in odd):
            continue
        wanted = tokenizer.encode(each, add_special_tokens=False).ids
        if (got := text.tokenize(compose.normalize_str(each) if compose else each)) != wanted:
            raise ParityError(
                f"{path}: llama.cpp reads {each!r} as ids {got[:12]}, the tokenizer as {wanted[:12]}; "
                "its pre-tokenizer has no counterpart there"
            )
    return len(texts)


def same_but_rounded(base: Path, quantized: Path, kind: str) -> float:
    """The largest rounding of a tensor, rms over rms; names and shapes equal. Raises ParityError."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(quantized).tensors}
    worst = 0.0
    for plain in gguf.GGUFReader(base).tensors:
        found = tensors.pop(plain.name, None)
        if found is None or list(found.shape) != list(plain.shape):
            raise ParityError(f"{quantized.name}: {plain.name} is missing or of another shape")
        values = gguf.quants.dequantize(found.data, found.tensor_type).reshape(plain.data.shape)
        error = float(np.sqrt(np.mean((values - plain.data) ** 2) / max(np.mean(plain.data**2), 1e-30)))
        if not error <= _allowed(found.tensor_type.name.lower(), kind):
            raise ParityError(f"{quantized.name}: {plain.name} is {error:.3g} off its weights, rms over rms")
        worst = max(worst, error)
    if tensors:
        raise ParityError(f"{quantized.name}: holds {next(iter(tensors))}, which the checkpoint does not")
    return worst


def _allowed(stored: str, kind: str) -> float:
    if stored in ("f32", "f16", "bf16"):
        return {"f32": 0.0, "f16": 1e-3, "bf16": 5e-3}[stored]
    by_type = {name.removesuffix("_m"): most for name, most in _WEIGHT_RMS.items()}
    return by_type.get(stored, _WEIGHT_RMS["q4_0"] if stored[1:2] in "45" else 0.5)
