"""What a native runner prints, as numbers.

In: its lines (`native/measure.h` writes them). Out: `Said`. Not here: starting it (`remote/remote_adb.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
    """

    program: str
    load_ms: float
    load_peak_kib: int
    peak_kib: int
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
            answers=answers,
        )
    except (KeyError, ValueError):
        return None


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
