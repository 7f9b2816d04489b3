"""What a native runner prints, as numbers.

In: its lines (`native/measure.h` writes them). Out: `Said`, and whether the session here computes the same.
Not here: starting it (`remote/remote_runner.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from evals.remote.runner_plan import Case

HELLO = re.compile(r"^pocketvlm-runner (\d+) (\S+) (.+)$", re.MULTILINE)
TIME = r"(\d+(?:\.\d+)?)"
ANSWER = re.compile(
    rf"^answer encode_ms {TIME} prefill_ms {TIME} first_ms {TIME} total_ms {TIME}\n"
    r"decode_ms((?: \d+(?:\.\d+)?)*)\ntokens((?: \d+)+)$",
    re.MULTILINE,
)


class Runner(NamedTuple):
    """What `--version` says."""

    plan_version: int
    backend: str
    version: str


@dataclass(frozen=True)
class Timed:
    """One answer. first_ms, total_ms: from before the encoding to the first and to the last token."""

    encode_ms: float
    prefill_ms: float
    first_ms: float
    total_ms: float
    decode_ms: tuple[float, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Said:
    """One process. `program`: the file that runs, as the kernel knows it: an emulator's, where one runs it.

    load_peak_kib, peak_kib: VmHWM after opening and at the end; 0 where the system does not say.
    `logits`: the largest ones of the first step, by id.
    """

    program: str
    load_ms: float
    load_peak_kib: int
    peak_kib: int
    logits: dict[int, float]
    answers: tuple[Timed, ...]


def hello(said: str) -> Runner | None:
    """Who answered to `--version`; None when it is no runner of ours."""
    found = HELLO.search(said)
    return Runner(int(found[1]), found[2], found[3].strip()) if found else None


def read(said: str) -> Said | None:
    """None when it did not get to its end, or printed what no runner prints."""
    lines = dict(line.split(" ", 1) for line in said.splitlines() if " " in line)
    answers = tuple(_timed(found) for found in ANSWER.findall(said))
    if "done" not in said.splitlines() or not answers:
        return None
    try:
        found = Said(
            program=lines["program"].strip(),
            load_ms=float(lines["load_ms"]),
            load_peak_kib=int(lines["load_peak_kib"]),
            peak_kib=int(lines["peak_kib"]),
            logits=_logits(lines["logits"].split()),
            answers=answers,
        )
    except (KeyError, ValueError):
        return None
    figures = (found.load_ms, found.load_peak_kib, found.peak_kib)
    return found if found.logits and all(0 <= each < math.inf for each in figures) else None


def agreement(case: Case, processes: Sequence[Said]) -> str:
    """Whether tokens and first logits are those of the session here, in a sentence."""
    answers = [answer.tokens for said in processes for answer in said.answers]
    away = max(_away(case, said) for said in processes)
    near = f"the first step's largest logits are within {away:.2g} of that session's"
    if not away <= case.logit_tolerance:
        near = (
            f"the first step's largest logits are up to {away:.2g} off that session's, "
            f"more than the {case.logit_tolerance:.2g} that the bundle allows between processors"
        )
    equal = sum(tokens == case.tokens for tokens in answers)
    head = f"answers: {equal} of {len(answers)} have the {len(case.tokens)} tokens of the Python session"
    if equal < len(answers):
        other = next(tokens for tokens in answers if tokens != case.tokens)
        pairs = enumerate(zip(other, case.tokens, strict=False))
        place = next((i for i, (there, here) in pairs if there != here), min(len(other), len(case.tokens)))
        head += f", the first of the others leaves them at token {place + 1}"
    return f"{head}; {near}"


def _away(case: Case, said: Said) -> float:
    """The largest difference of a logit; infinite where the session has no such token."""
    known = all(token < len(case.logits) for token in said.logits)
    return max(abs(logit - float(case.logits[i])) for i, logit in said.logits.items()) if known else math.inf


def _logits(words: Sequence[str]) -> dict[int, float]:
    return {int(token): float(value) for token, value in zip(words[::2], words[1::2], strict=True)}


def _timed(found: Sequence[str]) -> Timed:
    encode, prefill, first, total, decode, tokens = found
    return Timed(
        encode_ms=float(encode),
        prefill_ms=float(prefill),
        first_ms=float(first),
        total_ms=float(total),
        decode_ms=tuple(map(float, decode.split())),
        tokens=tuple(map(int, tokens.split())),
    )
