"""What a native runner prints, as numbers.

In: its lines (`native/measure.h` writes them). Out: `Said`, and whether the session here computes the same.
Not here: starting it (`remote/remote_runner.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from evals.remote.runner_plan import Case

HELLO = re.compile(r"^pocketvlm-runner (\d+) (\S+) (.+)$", re.MULTILINE)
ANSWER = re.compile(
    r"^answer encode_ms (\S+) prefill_ms (\S+) first_ms (\S+) total_ms (\S+)\n"
    r"decode_ms((?: \S+)*)\ntokens((?: \d+)+)$",
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
        return Said(
            program=lines["program"].strip(),
            load_ms=float(lines["load_ms"]),
            load_peak_kib=int(lines["load_peak_kib"]),
            peak_kib=int(lines["peak_kib"]),
            logits=_logits(lines["logits"].split()),
            answers=answers,
        )
    except (KeyError, ValueError):
        return None


def agreement(case: Case, processes: Sequence[Said]) -> str:
    """Whether tokens and first logits are those of the session here, in a sentence."""
    answers = [answer.tokens for said in processes for answer in said.answers]
    away = max(abs(said.logits[i] - float(case.logits[i])) for said in processes for i in said.logits)
    near = f"the first step's largest logits are within {away:.2g} of those there"
    if away > case.logit_tolerance:
        near = (
            f"the first step's largest logits are up to {away:.2g} off, the bundle allows "
            f"{case.logit_tolerance:.2g} between processors: what is computed there is wrong"
        )
    other = next((tokens for tokens in answers if tokens != case.tokens), None)
    if other is None:
        return f"answers: all {len(answers)} have the {len(case.tokens)} tokens of the Python session; {near}"
    pairs = enumerate(zip(other, case.tokens, strict=False))
    place = next((i for i, (there, here) in pairs if there != here), len(other))
    return f"answers: from token {place + 1} of {len(case.tokens)} on not those of the Python session; {near}"


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
