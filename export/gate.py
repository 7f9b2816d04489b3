"""The gate: the written parts, run as a device runs them, must reproduce the checkpoint.

In: a session over files just written, and what the checkpoint answers (`gate_expected.py`). Out: measured
figures, or a ParityError that says which figure broke which limit. Not here: the measuring
(`evals/parity/parity.py`), the proof about rounded weights (`audit.py`), what is shown (`gate_cases.py`) and
allowed (`gate_limits.py`).

Order: prompt ids, pixels, image features, teacher-forced logits over prefill and decode steps, a conversation
that goes on from its cache (`gate_turns.py`), rows of a batch (`gate_batch.py`), greedy text.
float32 is held against transformers. A rounded bundle cannot be: correct int4 may be far from float32. It is
held against its float twin (same weights, float arithmetic), whose only difference is rounded activations,
after `audit.py` has proved that the weights are the checkpoint's, rounded. Ids and pixels are compared with
the checkpoint's in every precision. The twin answers first and is closed before the bundle is opened.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import onnx_ir as ir

from evals.parity.parity import NEAR_TIE, ParityCase, ParityResult, Side, compare_sides, side
from export import audit, gate_batch, gate_turns, proof, storage
from export.calibrate import Calibration
from export.checkpoint import Checkpoint
from export.gate_cases import FORCED_STEPS, Once, make_cases, pictures
from export.gate_expected import GREEDY_TOKENS, Expected, Greedy, row_marks
from export.gate_limits import (
    BATCH_BLOCKS,
    BATCH_EXACT,
    BATCH_SHARED,
    FP32_LIMITS,
    LATER_FP32,
    LATER_ROUNDED,
    ROUNDED_LIMITS,
    Limit,
    hold,
    rel_diff,
    rms_error,
)
from runtime.errors import ParityError
from runtime.generation import GenerationOptions
from runtime.image import prepare
from runtime.image_spec import ImageSpec
from runtime.manifest import Manifest, Parity
from runtime.prompt import load_tokenizer
from runtime.session import Session, usual_context

__all__ = [
    "FORCED_STEPS",
    "FP32_LIMITS",
    "ROUNDED_LIMITS",
    "Limit",
    "check_float",
    "check_prompts",
    "check_quantized",
    "make_cases",
    "pictures",
    "reference_name",
]

BATCH_STEPS = 3
T = TypeVar("T")


class GateSession(Once, Session):
    """A session that looks at each picture of the cases once."""


Found = dict[Limit, float]
"""Figures with the limits that they were held to."""


def check_float(
    checkpoint: Checkpoint,
    staged: Path,
    draft: Manifest,
    expected: Expected,
    geometry: ImageSpec | None = None,
) -> Parity:
    """Hold the float32 parts in `staged` against the checkpoint. Raises ParityError (or BundleError).

    `geometry`: the image section that the checkpoint's processor follows, if the draft's brings pictures to
    one size; the prompt's segments are proved by it.
    """
    _check_embedding_rows(expected, staged, draft)
    cases = expected.cases
    with GateSession.from_manifest(staged, draft, threads=1, max_context=room(draft, expected)) as session:
        check_prompts(checkpoint, staged, draft, geometry or draft.image)
        result = measure(expected.sides, session, cases, FP32_LIMITS, "checkpoint")
        more = check_later(session, expected.later, (LATER_FP32, rel_diff), "checkpoint")
        more |= _check_batch(session, staged, draft, cases)
        answers = [
            _check_greedy(session, case, wanted) for case, wanted in zip(cases, expected.answers, strict=True)
        ]
        _check_batch_answers(session, cases, answers)
    return Parity(
        reference=reference_name(),
        cases=result.cases,
        figures={**result.figures(), **{limit.figure: got for limit, got in more.items()}},
        limits={limit.figure: limit.most for limit in (*FP32_LIMITS, *more)},
    )


def check_quantized(
    checkpoint: Checkpoint,
    originals: Mapping[str, ir.Model],
    staged: Path,
    draft: Manifest,
    expected: Expected,
    scratch: Path,
    calibration: Calibration | None = None,
    twin_of: Callable[[ir.Model], audit.Twin] = audit.float_twin,
    geometry: ImageSpec | None = None,
    allowed: Sequence[Limit] = ROUNDED_LIMITS,
) -> Parity:
    """Audit the written parts against the float graphs, then run them against their float twins.

    The figures without prefix compare with the checkpoint: they are reported, not limited, because what
    rounding costs is for the accuracy evaluation to judge. Raises ParityError.
    """
    figures = {}
    cases = expected.cases
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        for role in originals:
            part = draft.part(role)
            figures[f"{role}_weight_error_steps"] = _audited(
                originals[role], staged, folder, part.path, calibration, twin_of
            )
            storage.release(checkpoint.parameters)
        shutil.copyfile(staged / draft.tokenizer.file.path, folder / draft.tokenizer.file.path)
        check_prompts(checkpoint, staged, draft, geometry or draft.image)
        twin_sides, twin_later = _run(lambda: _ask_twin(folder, draft, expected))
    storage.release(checkpoint.parameters)
    with GateSession.from_manifest(staged, draft, threads=1, max_context=room(draft, expected)) as session:
        sides = _run(lambda: [side(session, case) for case in cases])
        result = measure(expected.sides, sides, cases, (), "checkpoint")  # ids and pixels; the rest is told
        against_twin = measure(twin_sides, sides, cases, allowed, "float twin")
        later = check_later(session, twin_later, (LATER_ROUNDED, rms_error), "float twin")
        rows = _check_batch(session, staged, draft, cases)
    twin_figures = {f"twin_{key}": value for key, value in against_twin.figures().items()}
    twin_figures |= {f"twin_{limit.figure}": got for limit, got in later.items()}
    figures |= {limit.figure: got for limit, got in rows.items()}
    limits = {f"twin_{limit.figure}": limit.most for limit in (*allowed, *later)}
    limits |= {limit.figure: limit.most for limit in rows}
    return Parity(
        reference=f"{reference_name()}; twin: the same rounded weights in float32",
        cases=result.cases,
        figures={**result.figures(), **twin_figures, **figures},
        limits=limits,
    )


def _audited(
    original: ir.Model,
    staged: Path,
    folder: Path,
    path: str,
    calibration: Calibration | None,
    twin_of: Callable[[ir.Model], audit.Twin],
) -> float:
    """Prove one part, write its float twin into `folder`; the largest weight error, in grid steps."""
    twin = twin_of(_read_part(staged, path))
    found = audit.same_but_rounded(original, twin, path, calibration)
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    storage.save(twin.model, folder / path, beside=True)
    return found


def _ask_twin(
    folder: Path, draft: Manifest, expected: Expected
) -> tuple[list[Side], gate_turns.Later | None]:
    """What the float twins answer to the cases and the conversation."""
    two = any(part.role == "decoder_prefill" for part in draft.parts)  # their weights differ by rounding
    manifest = audit.twin_manifest(draft)
    with GateSession.from_manifest(folder, manifest, threads=1, max_context=room(draft, expected)) as twin:
        sides = [side(twin, case) for case in expected.cases]
        if (later := expected.later) is None:
            return sides, None
        gate_turns.check_ids(twin, later)
        if two:
            return sides, replace(later, logits=gate_turns.going_on(twin, later.talk))
        afresh = replace(later, logits=gate_turns.afresh(twin, later.talk))
        # rounding would hide a token too few in the cache
        check_later(twin, afresh, (LATER_FP32, rel_diff), "float twin afresh")
        return sides, afresh


def _read_part(staged: Path, path: str) -> ir.Model:
    try:
        return ir.external_data.load_to_model(ir.load(staged / path))
    except (OSError, ValueError, RuntimeError) as error:
        raise ParityError(
            f"gate: {path}: cannot be read back ({type(error).__name__}); export again"
        ) from error


def room(draft: Manifest, expected: Expected) -> int:
    """Tokens of the longest case or conversation and of what is made after it; never fewer than a session's
    own. Two pictures of many tiles are more than a session has room for unless it is asked."""
    prompts = [len(each.ids) for each in expected.sides]
    if expected.later is not None:
        prompts += [len(ids) for ids in expected.later.prompts]
    usual = usual_context(draft.limits.context, draft.image.max_tokens)
    return min(draft.limits.context, max(usual, max(prompts) + GREEDY_TOKENS + FORCED_STEPS))


def reference_name() -> str:
    return f"transformers {importlib.metadata.version('transformers')}, float32, teacher-forced"


def _check_embedding_rows(expected: Expected, staged: Path, draft: Manifest) -> None:
    """Every row of the table, exactly: the cases use only a few ids, so the chain cannot see the others."""
    import onnxruntime

    part = draft.part("embed_tokens")
    count = len(expected.rows)
    run = onnxruntime.InferenceSession(staged / part.path, providers=["CPUExecutionProvider"]).run
    length = part.inputs[0].shape[1]
    step = length if isinstance(length, int) else 8192
    for start in range(0, count, step):
        ids = np.arange(start, start + step) % count  # a graph of fixed shape takes no fewer
        feeds = {part.inputs[0].name: ids[None].astype(part.inputs[0].dtype)}
        rows = run([part.outputs[0].name], feeds)[0][0]
        for token, mark in zip(ids, row_marks(rows), strict=True):
            if mark != expected.rows[token]:
                raise ParityError(f"gate: {part.path}: the embedding of id {token} is not the checkpoint's")


def check_prompts(checkpoint: Checkpoint, staged: Path, draft: Manifest, image: ImageSpec) -> None:
    """On the tokenizer just written, by the operations that the manifest lists."""
    tokenizer = load_tokenizer(staged / draft.tokenizer.file.path)
    proof.prove(checkpoint, draft.prompt, tokenizer, lambda each: prepare(each, image), draft.limits.images)


def measure(
    reference: Sequence[Side],
    candidate: Session | Sequence[Side],
    cases: Sequence[ParityCase],
    limits: Sequence[Limit],
    against: str,
) -> ParityResult:
    """Compare, judging case by case, so that the message can name the case. Raises ParityError."""

    def judge(case: ParityCase, result: ParityResult) -> None:
        _judge(result, limits, against, case.name)

    found: Iterable[Side] = (
        (side(candidate, case) for case in cases) if isinstance(candidate, Session) else candidate
    )
    return _run(lambda: compare_sides(reference, found, cases, judge))


def _run(step: Callable[[], T]) -> T:
    """What `step` gives. onnxruntime has a class for each status; whatever it raises, the chain is broken."""
    try:
        return step()
    except ParityError:
        raise
    except Exception as error:
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
    hold(result.figures(), limits, case, against)


def check_later(
    session: Session,
    wanted: gate_turns.Later | None,
    judged: tuple[Limit, Callable[[Any, Any], float]],
    against: str,
) -> Found:
    """A conversation over one cache against logits of it; nothing for a bundle of one turn.

    Raises ParityError when ids or logits differ.
    """
    limit, measured = judged
    if wanted is None:
        return {}
    _run(lambda: gate_turns.check_ids(session, wanted))
    found = {limit: measured(wanted.logits, _run(lambda: gate_turns.going_on(session, wanted.talk)))}
    hold({limit.figure: found[limit]}, [limit], "later turns", against)
    return found


def _check_batch(session: Session, staged: Path, draft: Manifest, cases: Sequence[ParityCase]) -> Found:
    """Rows of a batch against each alone; nothing for graphs of one row or without two rows that may join."""
    if draft.static is not None:
        return {}
    rows = gate_batch.rows_of(session, cases)
    if len(rows) < 2:
        return {}
    ops = {node.op_type for node in ir.load(staged / draft.part("decoder").path).graph}
    kinds = {"DynamicQuantizeLinear": BATCH_SHARED, "MatMulNBits": BATCH_BLOCKS}
    limit = next((limit for op, limit in kinds.items() if op in ops), BATCH_EXACT)
    decoder = gate_batch.BatchDecoder(session)
    alone, together = _run(lambda: gate_batch.compare_rows(decoder, rows, cases[0].forced[:BATCH_STEPS]))
    found = {limit: rms_error(alone, together)}
    hold({limit.figure: found[limit]}, [limit], "batch", "rows alone")
    return found


def _check_batch_answers(
    session: Session, cases: Sequence[ParityCase], answers: Sequence[Sequence[int]]
) -> None:
    """What is asked side by side is answered as one by one."""
    options = GenerationOptions(max_new_tokens=GREEDY_TOKENS)
    found = _run(lambda: session.ask_batch([(case.image, case.question) for case in cases], options))
    for case, answer, wanted in zip(cases, found, answers, strict=True):
        if not _same(answer.token_ids, wanted, lambda place: _near_tie(session, case, wanted[:place])):  # noqa: B023
            _differs(case, answer.token_ids, wanted, "those of it alone")


def _check_greedy(session: Session, case: ParityCase, wanted: Greedy) -> list[int]:
    """The bundle's text equals the checkpoint's, token by token; returns its ids."""
    got = session.ask(case.image, case.question, GenerationOptions(max_new_tokens=GREEDY_TOKENS)).token_ids
    if not _same(got, wanted.ids, wanted.near_tie):
        _differs(case, got, wanted.ids, "the checkpoint's")
    return got


def _same(got: Sequence[int], wanted: Sequence[int], near_tie: Callable[[int], bool]) -> bool:
    """Whether answers are equal, or part at a place where either token may be chosen."""
    if list(got) == list(wanted):
        return True
    place = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), None)
    return place is not None and near_tie(place)


def _near_tie(session: Session, case: ParityCase, tokens: Sequence[int]) -> bool:
    """Whether the session's two best logits after `tokens` are so near that either may be chosen."""
    forced = ParityCase(case.name, case.question, case.image, tuple(tokens))
    low, high = np.sort(side(session, forced).logits[-1])[-2:]
    return bool(high - low < NEAR_TIE)


def _differs(case: ParityCase, got: Sequence[int], wanted: Sequence[int], whose: str) -> NoReturn:
    raise ParityError(
        f"gate: case {case.name!r}: greedy tokens {list(got)} differ from {whose} {list(wanted)}; "
        "a part is wrong, no bundle was written"
    )
