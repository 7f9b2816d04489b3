"""The gate: the written parts, run as a device runs them, must reproduce the checkpoint.

In: a session over files just written, and the checkpoint's reference session. Out: measured figures, or a
ParityError that says which figure broke which limit. Not here: the measuring (`evals/parity.py`), the
proof about rounded weights (`audit.py`).

Order: prompt ids, pixels, image features, teacher-forced logits over prefill and decode steps, greedy text.
float32 is held against transformers. A rounded bundle cannot be: correct int4 may be far from float32. It is
held against its float twin (same weights, float arithmetic), whose only difference is rounded activations,
after `audit.py` has proved that the weights are the checkpoint's, rounded.
"""

from __future__ import annotations

import importlib.metadata
import io
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from PIL import Image

from evals.parity import NEAR_TIE, ParityCase, ParityResult, Steps, compare, greedy_forced
from evals.torch_session import TorchSession
from export import audit, proof, storage
from export.calibrate import Calibration
from export.checkpoint import Checkpoint
from runtime.errors import InputError, ParityError
from runtime.generation import GenerationOptions
from runtime.image import ImageInput, load, prepare
from runtime.image_spec import ImageSpec
from runtime.manifest import Limits, Manifest, Parity
from runtime.prompt import load_tokenizer
from runtime.session import Session

FORCED_STEPS = 8
GREEDY_TOKENS = 16


@dataclass(frozen=True)
class Limit:
    """A figure of `ParityResult` and the most it may be, with the reason for that number."""

    figure: str
    most: float
    reason: str


FP32_LIMITS = (
    Limit("feature_max_diff", 1e-4, "float32 sums in another order: 1e-6 to 1e-5 seen, growing with depth"),
    Limit("logit_rel_diff", 1e-4, "the same, through vision and text; 1.2e-4 absolute seen at 30 layers"),
)

ROUNDED_LIMITS = (
    Limit("feature_rms_error", 0.25, "uint8 activations per tensor: 1-5 % seen, more with outlier channels"),
    Limit("logit_rms_error", 0.25, "the same through both models; unrelated logits give about 1.4"),
)


def pictures() -> list[tuple[str, ImageInput]]:
    """Pictures that exercise the preprocessing: large, tall, EXIF-rotated, alpha as file and in memory."""
    rotated = _drawn(96, 160, seed=3)
    exif = rotated.getexif()
    exif[0x0112] = 6
    clear = _drawn(120, 90, seed=4).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    return [
        ("large", _drawn(1024, 768, seed=1)),
        ("tall", _drawn(333, 777, seed=2)),
        ("rotated-file", _png(rotated, exif=exif)),
        ("alpha-file", _png(clear)),
        ("alpha", clear),
    ]


def _drawn(width: int, height: int, seed: int) -> Image.Image:
    """Smooth colours, blocks and noise: every resampling error shows."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / (7 + 5 * c) + seed) * np.cos(y / (11 + 3 * c)) for c in range(3)]
    blocks = random.integers(0, 160, (height // 16 + 1, width // 16 + 1, 3)).repeat(16, 0).repeat(16, 1)
    values = (
        48 * np.stack(waves, -1) + blocks[:height, :width] + random.integers(0, 48, (height, width, 3)) + 48
    )
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def _png(picture: Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG", **options)
    return out.getvalue()


def make_cases(
    reference: TorchSession, samples: Sequence[ImageInput], *, text_only: bool, images: int = 1
) -> list[ParityCase]:
    """Cases over our own pictures and the user's, two in one turn and none, each with forced tokens."""
    for sample in samples:
        load(sample, Limits.model_fields["source_pixels"].default)  # one clear line for what is no picture
    own = [(name, image) for name, image in pictures() if name != "alpha" or _taken(reference, image)]
    found = [*own, *((f"sample-{index}", sample) for index, sample in enumerate(samples))]
    questions = [question for question in proof.QUESTIONS if question.strip()]
    cases = [
        ParityCase(name, questions[index % len(questions)], image)
        for index, (name, image) in enumerate(found)
    ]
    if images > 1:
        cases.append(ParityCase("two-pictures", questions[1], [found[1][1], found[0][1]]))
    if text_only:
        cases.append(ParityCase("no-picture", questions[0]))
    vocab = int(reference.model.config.text_config.vocab_size)
    image_token = int(reference.model.config.image_token_id)
    random = np.random.default_rng(0)
    done = []
    for case in cases:
        extra = [int(i) for i in random.integers(0, vocab, FORCED_STEPS) if i != image_token]
        done.append(greedy_forced(reference, case, FORCED_STEPS, extra))
    return done


def _taken(reference: TorchSession, image: ImageInput) -> bool:
    """Whether the checkpoint's processor takes it: some refuse transparency in memory, and a bundle need not."""
    try:
        reference.prepare(image)
    except InputError:
        return False
    return True


def check_float(
    checkpoint: Checkpoint,
    staged: Path,
    draft: Manifest,
    reference: TorchSession,
    cases: Sequence[ParityCase],
    geometry: ImageSpec | None = None,
) -> Parity:
    """Hold the float32 parts in `staged` against the checkpoint. Raises ParityError (or BundleError).

    `geometry`: the image section that the checkpoint's processor follows, if the draft's brings pictures to
    one size; the prompt's segments are proved by it.
    """
    _check_embedding_rows(checkpoint, staged, draft)
    with Session.from_manifest(staged, draft, threads=1) as session:
        _check_prompts(checkpoint, staged, draft, geometry or draft.image)
        result = _measure(reference, session, cases, FP32_LIMITS, "checkpoint")
        for case in cases:
            _check_greedy(reference, session, case)
    limits = {limit.figure: limit.most for limit in FP32_LIMITS}
    return Parity(reference=_name(), cases=result.cases, figures=result.figures(), limits=limits)


def check_quantized(
    originals: Mapping[str, ir.Model],
    staged: Path,
    draft: Manifest,
    reference: TorchSession,
    cases: Sequence[ParityCase],
    scratch: Path,
    calibration: Calibration | None = None,
    twin_of: Callable[[ir.Model], audit.Twin] = audit.float_twin,
) -> Parity:
    """Audit the written parts against the float graphs, then run them against their float twins.

    The figures without prefix compare with the checkpoint: they are reported, not limited, because what
    rounding costs is for the accuracy evaluation to judge. Raises ParityError.
    """
    twins = {}
    figures = {}
    for role in originals:
        part = draft.part(role)
        twin = twin_of(_read_part(staged, part.path))
        figures[f"{role}_weight_error_steps"] = audit.same_but_rounded(
            originals[role], twin, part.path, calibration
        )
        twins[role] = twin.model
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        for role, model in twins.items():
            path = Path(folder) / draft.part(role).path
            path.parent.mkdir(parents=True, exist_ok=True)
            storage.save(model, path)
        shutil.copyfile(staged / draft.tokenizer.file.path, Path(folder) / draft.tokenizer.file.path)
        with (
            Session.from_manifest(Path(folder), audit.twin_manifest(draft), threads=1) as twin_session,
            Session.from_manifest(staged, draft, threads=1) as session,
        ):
            against_twin = _measure(twin_session, session, cases, ROUNDED_LIMITS, "float twin")
            result = compare(reference, session, cases)
    twin_figures = {f"twin_{key}": value for key, value in against_twin.figures().items()}
    limits = {f"twin_{limit.figure}": limit.most for limit in ROUNDED_LIMITS}
    return Parity(
        reference=f"{_name()}; twin: the same rounded weights in float32",
        cases=result.cases,
        figures={**result.figures(), **twin_figures, **figures},
        limits=limits,
    )


def _read_part(staged: Path, path: str) -> ir.Model:
    try:
        return ir.external_data.load_to_model(ir.load(staged / path))
    except (OSError, ValueError, RuntimeError) as error:
        raise ParityError(
            f"gate: {path}: cannot be read back ({type(error).__name__}); export again"
        ) from error


def _name() -> str:
    return f"transformers {importlib.metadata.version('transformers')}, float32, teacher-forced"


def _check_embedding_rows(checkpoint: Checkpoint, staged: Path, draft: Manifest) -> None:
    """Every row of the table, exactly: the cases use only a few ids, so the chain cannot see the others."""
    import onnxruntime

    part = draft.part("embed_tokens")
    table = checkpoint.model.get_input_embeddings().weight.numpy()
    run = onnxruntime.InferenceSession(staged / part.path, providers=["CPUExecutionProvider"]).run
    length = part.inputs[0].shape[1]
    step = length if isinstance(length, int) else 8192
    for start in range(0, len(table), step):
        ids = np.arange(start, start + step) % len(table)  # a graph of fixed shape takes no fewer
        rows = run([part.outputs[0].name], {part.inputs[0].name: ids[None].astype(part.inputs[0].dtype)})[0][0]
        if not np.array_equal(rows, table[ids]):
            wrong = int(ids[(rows != table[ids]).any(axis=1)][0])
            raise ParityError(f"gate: {part.path}: the embedding of id {wrong} is not the checkpoint's")


def _check_prompts(checkpoint: Checkpoint, staged: Path, draft: Manifest, image: ImageSpec) -> None:
    """On the tokenizer just written, by the operations that the manifest lists."""
    tokenizer = load_tokenizer(staged / draft.tokenizer.file.path)
    proof.prove(checkpoint, draft.prompt, tokenizer, lambda each: prepare(each, image), draft.limits.images)


def _measure(
    reference: Steps, session: Steps, cases: Sequence[ParityCase], limits: Sequence[Limit], against: str
) -> ParityResult:
    """Compare, judging case by case, so that the message can name the case."""

    def judge(case: ParityCase, result: ParityResult) -> None:
        _judge(result, limits, against, case.name)

    try:
        return compare(reference, session, cases, judge)
    except ParityError:
        raise
    except Exception as error:  # onnxruntime has a class for each status; whatever it is, the chain is broken
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ParityError(f"gate: the parts do not run as a chain: {first}") from error


def _judge(result: ParityResult, limits: Sequence[Limit], against: str, case: str) -> None:
    if not result.ids_equal:
        raise ParityError(
            f"gate: case {case!r}: prompt ids differ from the {against}'s; wrong prompt segments"
        )
    if not result.pixels_equal:
        raise ParityError(
            f"gate: case {case!r}: pixels differ from the {against}'s by up to {result.pixel_max_diff:.3g}; "
            "wrong image operations, so later figures would mean nothing"
        )
    figures = result.figures()
    for limit in limits:
        got = figures[limit.figure]
        if not got <= limit.most:
            raise ParityError(
                f"gate: case {case!r}: {limit.figure} against the {against} is {got:.3g}, at most "
                f"{limit.most:.3g} allowed ({limit.reason}); a part is wrong, no bundle was written"
            )


def _check_greedy(reference: TorchSession, session: Session, case: ParityCase) -> None:
    """The bundle's text equals the checkpoint's, token by token; a tie within 1e-4 ends the comparison."""
    options = GenerationOptions(max_new_tokens=GREEDY_TOKENS)
    got = session.ask(case.image, case.question, options).token_ids
    wanted = reference.generate(case.image, case.question, GREEDY_TOKENS)
    if got == wanted:
        return
    place = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), None)
    if place is not None and reference.margin(case.image, case.question, wanted[:place]) < NEAR_TIE:
        return
    raise ParityError(
        f"gate: case {case.name!r}: greedy tokens {got} differ from the checkpoint's {wanted}; "
        "a part is wrong, no bundle was written"
    )
