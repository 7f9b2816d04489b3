"""What a pool holds, in figures: how many distinct responses, how long, how many finished, how many right.

In: parts of a pool, verdicts on their responses. Out: a line a (part, source), as JSON and as a table.
Not here: judging; drawing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from distill.answers.responses import Pool, Response
from runtime import files

PHASE_WIDTH = 12
"""Columns for a phase's name in the table."""


@dataclass(frozen=True)
class Part:
    """The responses that one teacher at one mask ratio, and the student of that stage, gave.

    `correct`: sample id -> R_acc of each of its responses in order, None where nothing was judged. `pseudo`:
    ids of samples whose reference is no label; their accuracy is agreement with the majority, told apart.
    """

    name: str
    ratio: float
    responses: Pool
    correct: Mapping[str, Sequence[float]] | None = None
    pseudo: Collection[str] = frozenset()


@dataclass(frozen=True)
class Line:
    """Figures of one source in one part; shares and means weigh a response as often as it was drawn.

    `accuracy` is over labelled questions, `accuracy_pseudo` over those whose reference was voted.
    """

    part: str
    ratio: float
    source: str
    questions: int
    responses: int
    distinct_per_question: float
    tokens: int
    tokens_mean: float
    tokens_p95: float
    finished_share: float
    retokenised_share: float
    mu_share: float
    accuracy: float | None
    accuracy_pseudo: float | None


def statistics(parts: Sequence[Part]) -> list[Line]:
    """A line for every source of every part, in order."""
    lines = []
    for part in parts:
        sources = dict.fromkeys(s for some in part.responses.values() for r in some for s in r.counts)
        lines += [_line(part, source) for source in sources]
    return lines


def _line(part: Part, source: str) -> Line:
    drawn = [
        (sample, place, response, response.counts[source])
        for sample, some in part.responses.items()
        for place, response in enumerate(some)
        if response.counts.get(source)
    ]
    responses = [response for _, _, response, _ in drawn]
    count_r = np.array([count for *_, count in drawn], dtype=np.int64)
    length_r = np.array([len(response.ids) for response in responses])
    questions = len({sample for sample, *_ in drawn})
    return Line(
        part=part.name,
        ratio=part.ratio,
        source=source,
        questions=questions,
        responses=int(count_r.sum()),
        distinct_per_question=len(drawn) / questions,
        tokens=int(length_r @ count_r),
        tokens_mean=float(np.average(length_r, weights=count_r)),
        tokens_p95=float(np.percentile(np.repeat(length_r, count_r), 95)),
        finished_share=_share(count_r, [r.finished for r in responses]),
        retokenised_share=_share(count_r, [r.retokenised for r in responses]),
        mu_share=_share(count_r, [r.mu is not None for r in responses]),
        accuracy=_accuracy(part, drawn, pseudo=False),
        accuracy_pseudo=_accuracy(part, drawn, pseudo=True),
    )


def _share(count_r: np.ndarray, holds: Sequence[bool]) -> float:
    return float(np.average(holds, weights=count_r))


def _accuracy(part: Part, drawn: Sequence[tuple[str, int, Response, int]], *, pseudo: bool) -> float | None:
    if part.correct is None:
        return None
    judged = [
        (part.correct[sample][place], count)
        for sample, place, _, count in drawn
        if sample in part.correct and (sample in part.pseudo) == pseudo
    ]
    if not judged:
        return None
    values, counts = zip(*judged, strict=True)
    return float(np.average(values, weights=counts))


def write(path: Path, lines: Sequence[Line]) -> None:
    """The lines as a JSON list of objects."""
    files.write_json(path, [asdict(line) for line in lines])


def table(lines: Sequence[Line]) -> Table:
    """The lines for people, in 80 columns but for large numbers. Accuracy against votes is in brackets."""
    out = Table(title="Response pool", title_justify="left", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    again = any(line.retokenised_share for line in lines)
    heads = ["phase", "mask", "by", "asked", "drawn", "distinct", "tokens", "p95", "ended", "right"]
    for head in [*heads[:9], "re-tok.", *heads[9:]] if again else heads:
        left = head in ("phase", "by")
        out.add_column(
            head,
            justify="left" if left else "right",
            no_wrap=True,
            overflow="ellipsis",
            max_width=PHASE_WIDTH if head == "phase" else None,
        )
    for line in lines:
        out.add_row(
            line.part.removesuffix(f" r {line.ratio:g}"),
            f"{line.ratio:.2f}",
            line.source,
            _short(line.questions),
            _short(line.responses),
            f"{line.distinct_per_question:.2f}",
            f"{line.tokens_mean:.1f}",
            f"{line.tokens_p95:.0f}",
            f"{line.finished_share:.0%}",
            *([f"{line.retokenised_share:.0%}"] if again else []),
            _told(line),
        )
    return out


def _short(count: int) -> str:
    return f"{count:,}" if count < 1_000_000 else f"{count / 1e6:.2f} M"


def _told(line: Line) -> str:
    told = [] if line.accuracy is None else [f"{line.accuracy:.1%}"]
    if line.accuracy_pseudo is not None:
        told.append(f"({line.accuracy_pseudo:.1%})")
    return " ".join(told) or "not judged"
