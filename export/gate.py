"""The gate: the written parts, run as a device runs them, must reproduce the checkpoint.

In: a session over files just written, and the checkpoint's reference session. Out: measured figures, or a
ParityError that says which figure broke which limit. Not here: the measuring (`evals/parity/parity.py`), the
proof about rounded weights (`audit.py`), what is shown (`gate_cases.py`) and allowed (`gate_limits.py`).

Order: prompt ids, pixels, image features, teacher-forced logits over prefill and decode steps, a conversation
that goes on from its cache (`gate_turns.py`), rows of a batch (`gate_batch.py`), greedy text.
float32 is held against transformers. A rounded bundle cannot be: correct int4 may be far from float32. It is
held against its float twin (same weights, float arithmetic), whose only difference is rounded activations,
after `audit.py` has proved that the weights are the checkpoint's, rounded. Ids and pixels are compared with
the checkpoint's in every precision.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir

from evals.parity.parity import NEAR_TIE, ParityCase, ParityResult, Steps, compare
from evals.torch_session import TorchSession
from export import audit, gate_batch, gate_turns, proof, storage
from export.calibrate import Calibration
from export.checkpoint import Checkpoint
from export.gate_cases import FORCED_STEPS, Once, make_cases, pictures
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
from runtime.session import Session

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

GREEDY_TOKENS = 16
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
    reference: TorchSession,
    cases: Sequence[ParityCase],
    geometry: ImageSpec | None = None,
) -> Parity:
    """Hold the float32 parts in `staged` against the checkpoint. Raises ParityError (or BundleError).

    `geometry`: the image section that the checkpoint's processor follows, if the draft's brings pictures to
    one size; the prompt's segments are proved by it.
    """
    _check_embedding_rows(checkpoint, staged, draft)
    with GateSession.from_manifest(staged, draft, threads=1) as session:
        check_prompts(checkpoint, staged, draft, geometry or draft.image)
        result = _measure(reference, session, cases, FP32_LIMITS, "checkpoint")
        more = _check_later(
            session,
            cases,
            lambda talk: gate_turns.by_transformers(reference, session, talk),
            (LATER_FP32, rel_diff),
            "checkpoint",
        )
        more |= _check_batch(session, staged, draft, cases)
        answers = [_check_greedy(reference, session, case) for case in cases]
        _check_batch_answers(reference, session, cases, answers)
    return Parity(
        reference=reference_name(),
        cases=result.cases,
        figures={**result.figures(), **{limit.figure: got for limit, got in more.items()}},
        limits={limit.figure: limit.most for limit in (*FP32_LIMITS, *more)},
    )


def check_quantized(
    originals: Mapping[str, ir.Model],
    staged: Path,
    draft: Manifest,
    reference: TorchSession,
    cases: Sequence[ParityCase],
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
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        for role in originals:  # one twin at a time in memory: it has every weight in float32
            part = draft.part(role)
            twin = twin_of(_read_part(staged, part.path))
            figures[f"{role}_weight_error_steps"] = audit.same_but_rounded(
                originals[role], twin, part.path, calibration
            )
            path = Path(folder) / part.path
            path.parent.mkdir(parents=True, exist_ok=True)
            storage.save(twin.model, path, beside=True)
            del twin
            storage.release()
        shutil.copyfile(staged / draft.tokenizer.file.path, Path(folder) / draft.tokenizer.file.path)
        checkpoint = Checkpoint(reference.path, reference.model, reference.processor)
        check_prompts(checkpoint, staged, draft, geometry or draft.image)
        with (
            GateSession.from_manifest(Path(folder), audit.twin_manifest(draft), threads=1) as twin_session,
            GateSession.from_manifest(staged, draft, threads=1) as session,
        ):
            against_twin = _measure(twin_session, session, cases, allowed, "float twin")
            two = any(
                part.role == "decoder_prefill" for part in draft.parts
            )  # their weights differ by rounding
            twin_logits = gate_turns.going_on if two else gate_turns.afresh
            later = _check_later(
                session,
                cases,
                lambda talk: twin_logits(twin_session, talk),
                (LATER_ROUNDED, rms_error),
                "float twin",
            )
            if not two:
                _check_later(  # rounding would hide a token too few in the cache
                    twin_session,
                    cases,
                    lambda talk: gate_turns.afresh(twin_session, talk),
                    (LATER_FP32, rel_diff),
                    "float twin afresh",
                )
            rows = _check_batch(session, staged, draft, cases)
            result = _measure(reference, session, cases, (), "checkpoint")  # ids and pixels; the rest is told
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


def _read_part(staged: Path, path: str) -> ir.Model:
    try:
        return ir.external_data.load_to_model(ir.load(staged / path))
    except (OSError, ValueError, RuntimeError) as error:
        raise ParityError(
            f"gate: {path}: cannot be read back ({type(error).__name__}); export again"
        ) from error


def reference_name() -> str:
    return f"transformers {importlib.metadata.version('transformers')}, float32, teacher-forced"


def _check_embedding_rows(checkpoint: Checkpoint, staged: Path, draft: Manifest) -> None:
    """Every row of the table, exactly: the cases use only a few ids, so the chain cannot see the others."""
    import onnxruntime
    import torch

    part = draft.part("embed_tokens")
    embed = checkpoint.model.get_input_embeddings()  # its rows may be scaled
    count = len(embed.weight)
    run = onnxruntime.InferenceSession(staged / part.path, providers=["CPUExecutionProvider"]).run
    length = part.inputs[0].shape[1]
    step = length if isinstance(length, int) else 8192
    for start in range(0, count, step):
        ids = np.arange(start, start + step) % count  # a graph of fixed shape takes no fewer
        rows = run([part.outputs[0].name], {part.inputs[0].name: ids[None].astype(part.inputs[0].dtype)})[0][
            0
        ]
        with torch.no_grad():
            wanted = embed(torch.from_numpy(ids)).numpy()
        if not np.array_equal(rows, wanted):
            wrong = int(ids[(rows != wanted).any(axis=1)][0])
            raise ParityError(f"gate: {part.path}: the embedding of id {wrong} is not the checkpoint's")


def check_prompts(checkpoint: Checkpoint, staged: Path, draft: Manifest, image: ImageSpec) -> None:
    """On the tokenizer just written, by the operations that the manifest lists."""
    tokenizer = load_tokenizer(staged / draft.tokenizer.file.path)
    proof.prove(checkpoint, draft.prompt, tokenizer, lambda each: prepare(each, image), draft.limits.images)


def _measure(
    reference: Steps, session: Steps, cases: Sequence[ParityCase], limits: Sequence[Limit], against: str
) -> ParityResult:
    """Compare, judging case by case, so that the message can name the case."""

    def judge(case: ParityCase, result: ParityResult) -> None:
        _judge(result, limits, against, case.name)

    return _run(lambda: compare(reference, session, cases, judge))


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


def _check_later(
    session: Session,
    cases: Sequence[ParityCase],
    wanted: Callable[[gate_turns.Conversation], Any],
    judged: tuple[Limit, Callable[[Any, Any], float]],
    against: str,
) -> Found:
    """A conversation over one cache against the logits `wanted` of it; nothing for a bundle of one turn."""
    limit, measure = judged
    talk = gate_turns.choose(session, cases)
    if talk is None:
        return {}
    found = {limit: measure(wanted(talk), _run(lambda: gate_turns.going_on(session, talk)))}
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
    reference: TorchSession,
    session: Session,
    cases: Sequence[ParityCase],
    answers: Sequence[Sequence[int]],
) -> None:
    """What is asked side by side is answered as one by one."""
    options = GenerationOptions(max_new_tokens=GREEDY_TOKENS)
    found = _run(lambda: session.ask_batch([(case.image, case.question) for case in cases], options))
    for case, answer, wanted in zip(cases, found, answers, strict=True):
        _same_answer(reference, case, answer.token_ids, wanted, "those of it alone")


def _check_greedy(reference: TorchSession, session: Session, case: ParityCase) -> list[int]:
    """The bundle's text equals the checkpoint's, token by token; returns its ids."""
    options = GenerationOptions(max_new_tokens=GREEDY_TOKENS)
    got = session.ask(case.image, case.question, options).token_ids
    wanted = reference.generate(case.image, case.question, GREEDY_TOKENS)
    _same_answer(reference, case, got, wanted, "the checkpoint's")
    return got


def _same_answer(
    reference: TorchSession, case: ParityCase, got: Sequence[int], wanted: Sequence[int], whose: str
) -> None:
    """Equal ids; a place where the two best logits differ by less than 1e-4 ends the comparison."""
    if list(got) == list(wanted):
        return
    place = next((i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), None)
    if place is not None and reference.margin(case.image, case.question, wanted[:place]) < NEAR_TIE:
        return
    raise ParityError(
        f"gate: case {case.name!r}: greedy tokens {list(got)} differ from {whose} {list(wanted)}; "
        "a part is wrong, no bundle was written"
    )
