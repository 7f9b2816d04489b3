"""Can a judge be trusted? Its verdicts against labels: agreement, and what beside the label moves them.

In: rows with a verdict and a label. Out: `AuditResult` (JSON by pydantic), a table. Not here: asking a judge
(`evals/judge.py`), the statistics themselves (`evals/agreement.py`).

Three biases are looked for, each among rows of equal label and again among the wrong ones alone: by length
(do longer responses pass more easily?), by the option letter that a response chooses, by source (teacher or
student). Length is compared within a source, and source within a quarter of lengths, so that one bias is not
reported as the other. All p-values are adjusted together (Holm); an effect below `smallest_effect` is not
flagged however sure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from evals import agreement, stats
from evals.agreement import IntArray, Shift
from evals.judge_rows import Row, read, write
from evals.stats import FloatArray
from runtime.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["AuditResult", "Bias", "Kappa", "Row", "Share", "audit", "read", "schema", "table", "write"]

FORMAT: Literal["pocketvlm-judge-audit/1"] = "pocketvlm-judge-audit/1"
LEAST_ROWS = 20
"""A bias is tested only where both sides have this many rows."""
LEAST_CLUSTERS = 30
"""With fewer questions than this, rows count as independent."""


class _Result(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Share(_Result):
    """`count` of `n` rows, with the Wilson interval."""

    count: int
    n: int
    share: float
    low: float
    high: float


class Kappa(_Result):
    """Cohen's kappa with a bootstrap interval over questions; 0 where verdicts or labels are all the same."""

    value: float
    low: float
    high: float


class Bias(_Result):
    """One tested bias.

    `effect` is the change of P(verdict = 1) at equal labels, as a share: from the shortest response to the
    longest (`length`), from other letters to `level` (`option`), from student to teacher (`source`). What
    moves the verdict `among` the `wrong` responses is what a student could be rewarded for.
    """

    kind: Literal["length", "option", "source"]
    level: str | None = None
    among: Literal["all", "wrong"]
    n: int
    effect: float
    low: float
    high: float
    z: float
    p_value: float
    p_adjusted: float
    flagged: bool


class AuditResult(_Result):
    """What an audit found. `flags` are sentences, one a fault; `flagged` is whether there are any."""

    format: Literal["pocketvlm-judge-audit/1"] = FORMAT
    rows: int
    questions: int
    agreement: Share
    kappa: Kappa
    false_positive: Share
    false_negative: Share
    unparsable: int
    biases: tuple[Bias, ...]
    skipped: tuple[str, ...]
    flags: tuple[str, ...]
    flagged: bool
    alpha: float
    smallest_effect: float
    least_agreement: float


def audit(
    rows: Sequence[Row | dict[str, Any]],
    *,
    alpha: float = 0.05,
    smallest_effect: float = 0.05,
    least_agreement: float = 0.8,
    resamples: int = 2000,
    seed: int = 0,
) -> AuditResult:
    """Audit a judge on labelled rows.

    `alpha` bounds the chance that an unbiased judge is flagged for any bias. Agreement is flagged when its
    whole interval lies below `least_agreement`, kappa when its interval does not lie above 0.
    Raises InputError without rows.
    """
    found = [row if isinstance(row, Row) else Row.model_validate(row) for row in rows]
    if not found:
        raise InputError("judge-audit: no rows; wanted responses with a verdict and a label")
    question_n = agreement.numbered([row.id or row.question for row in found])
    questions = int(question_n.max()) + 1
    few = questions < LEAST_CLUSTERS
    tester = _Tester(found, np.arange(len(found)) if few else question_n)
    tester.run()
    if few:
        tester.skipped.append(f"dependence within a question: only {questions}, rows count as independent")
    adjusted = agreement.holm([test.shift.p_value for test in tester.done])
    biases = tuple(
        _bias(test, p, p < alpha and abs(test.shift.effect) >= smallest_effect)
        for test, p in zip(tester.done, adjusted, strict=True)
    )
    verdict_n, label_n = tester.verdict_n, tester.label_n
    table = np.bincount(2 * verdict_n + label_n, minlength=4)
    between = agreement.kappa_interval(verdict_n, label_n, tester.cluster_n, resamples=resamples, seed=seed)
    agreed = _share(int(table[0] + table[3]), len(found))
    kappa = Kappa(value=float(agreement.kappa(table)), low=between.low, high=between.high)
    flags = [
        *_agreement_flags(agreed, kappa, label_n, least_agreement),
        *(_says(b) for b in biases if b.flagged),
    ]
    return AuditResult(
        rows=len(found),
        questions=questions,
        agreement=agreed,
        kappa=kappa,
        false_positive=_share(int(table[2]), int(table[0] + table[2])),
        false_negative=_share(int(table[1]), int(table[1] + table[3])),
        unparsable=sum(row.how == "unparsable" for row in found),
        biases=biases,
        skipped=tuple(tester.skipped),
        flags=tuple(flags),
        flagged=bool(flags),
        alpha=alpha,
        smallest_effect=smallest_effect,
        least_agreement=least_agreement,
    )


@dataclass(frozen=True)
class _Test:
    kind: Literal["length", "option", "source"]
    level: str | None
    among: Literal["all", "wrong"]
    n: int
    shift: Shift


class _Tester:
    """Runs every test that the rows allow; `skipped` says why others were not run."""

    def __init__(self, rows: Sequence[Row], cluster_n: IntArray) -> None:
        self.rows, self.cluster_n = rows, cluster_n
        self.verdict_n = np.asarray([row.verdict for row in rows], np.int64)
        self.label_n = np.asarray([row.label for row in rows], np.int64)
        self.length_n = agreement.ranks([row.size for row in rows])
        self.done: list[_Test] = []
        self.skipped: list[str] = []

    def run(self) -> None:
        sources = [row.source for row in self.rows]
        by_source_n = agreement.numbered(sources)
        everyone = np.ones(len(self.rows), bool)
        halves = self.length_n > 0.5  # what counts as two sides of a length
        self._test("length", None, self.length_n, halves, by_source_n, everyone)
        quarter_n = np.minimum((4 * self.length_n).astype(np.int64), 3)
        teacher_n = np.asarray([source == "teacher" for source in sources])
        known_n = np.asarray([source is not None for source in sources])
        self._test("source", None, teacher_n.astype(float), teacher_n, quarter_n, known_n)
        options = [row.option for row in self.rows]
        lettered_n = np.asarray([option is not None for option in options])
        letters = sorted({option for option in options if option is not None})
        for letter in letters:
            chosen_n = np.asarray([option == letter for option in options])
            self._test("option", letter, chosen_n.astype(float), chosen_n, by_source_n, lettered_n)
        if not letters:
            self.skipped.append("option: no row has an option letter")

    def _test(
        self, kind: Any, level: str | None, exposure_n: FloatArray, side_n: Any, stratum_n: Any, keep_n: Any
    ) -> None:
        among: Literal["all", "wrong"]
        for among, part_n in (("all", keep_n), ("wrong", keep_n & (self.label_n == 0))):
            sides = int((side_n & part_n).sum()), int((~side_n & part_n).sum())
            if min(sides) < LEAST_ROWS:
                name = f"{kind} {level}" if level else kind
                which = "wrong responses" if among == "wrong" else "rows"
                self.skipped.append(
                    f"{name}: {sides[0]} and {sides[1]} {which} to compare; wanted {LEAST_ROWS}"
                )
                continue
            strata = agreement.numbered(list(zip(self.label_n[part_n], stratum_n[part_n], strict=True)))
            clusters = agreement.numbered(self.cluster_n[part_n].tolist())
            shift = agreement.shift(self.verdict_n[part_n], exposure_n[part_n], strata, clusters)
            self.done.append(_Test(kind, level, among, sum(sides), shift))


def _bias(test: _Test, p_adjusted: float, flagged: bool) -> Bias:
    return Bias(
        kind=test.kind,
        level=test.level,
        among=test.among,
        n=test.n,
        effect=test.shift.effect,
        low=test.shift.interval.low,
        high=test.shift.interval.high,
        z=test.shift.z,
        p_value=test.shift.p_value,
        p_adjusted=p_adjusted,
        flagged=flagged,
    )


def _share(count: int, n: int) -> Share:
    interval = stats.wilson(count, n)
    return Share(count=count, n=n, share=count / n if n else 0.0, low=interval.low, high=interval.high)


def _agreement_flags(agreed: Share, kappa: Kappa, label_n: IntArray, least: float) -> Iterator[str]:
    if agreed.high < least:
        yield (
            f"the judge agrees with {agreed.share:.0%} of the labels "
            f"({agreed.low:.0%} to {agreed.high:.0%}), below {least:.0%}"
        )
    if kappa.low <= 0:
        same = (
            f"; every label is {label_n[0]}, so this file cannot tell"
            if len(set(label_n.tolist())) == 1
            else ""
        )
        yield (
            f"the judge is not shown to be better than chance: kappa {kappa.value:.2f} "
            f"({kappa.low:.2f} to {kappa.high:.2f}){same}"
        )


def _says(bias: Bias) -> str:
    easier = "more" if bias.effect > 0 else "less"
    wrong = "wrong " if bias.among == "wrong" else ""
    what = {
        "length": f"longer {wrong}responses pass {easier} easily",
        "option": f"{wrong}responses that choose {bias.level} pass {easier} easily",
        "source": f"the teacher's {wrong}responses pass {easier} easily than the student's",
    }[bias.kind]
    return (
        f"{what}: {100 * bias.effect:+.0f} points{'' if wrong else ' at equal labels'} "
        f"({100 * bias.low:+.0f} to {100 * bias.high:+.0f}, p {bias.p_adjusted:.1g})"
    )


def table(result: AuditResult) -> Table:
    """Agreement, errors and biases with their 95 % intervals; flagged lines are marked."""
    from rich.table import Table

    shown = Table(title=f"{result.rows} verdicts on {result.questions} questions", title_justify="left")
    for column in ("", "among", "value", "95 % interval", "adj. p", ""):
        shown.add_column(column, justify="left" if column in ("", "among") else "right", no_wrap=True)
    for name, among, share in (
        ("agreement", "all", result.agreement),
        ("passed", "wrong", result.false_positive),
        ("failed", "right", result.false_negative),
    ):
        shown.add_row(name, among, f"{share.share:.1%}", f"{share.low:.1%} to {share.high:.1%}", "", "")
    kappa = result.kappa
    shown.add_row(
        "Cohen's kappa", "all", f"{kappa.value:.2f}", f"{kappa.low:.2f} to {kappa.high:.2f}", "", ""
    )
    shown.add_section()
    for bias in result.biases:
        name = {
            "length": "longest - shortest",
            "option": f"option {bias.level} - others",
            "source": "teacher - student",
        }[bias.kind]
        effect, interval = (
            f"{100 * bias.effect:+.1f} points",
            f"{100 * bias.low:+.1f} to {100 * bias.high:+.1f}",
        )
        mark = "biased" if bias.flagged else ""
        shown.add_row(name, bias.among, effect, interval, f"{bias.p_adjusted:.1g}", mark)
    return shown


def schema() -> dict[str, Any]:
    """JSON Schema of `AuditResult`."""
    return AuditResult.model_json_schema()
