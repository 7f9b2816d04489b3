"""One answer's score: the rules by name, ours and the harnesses'.

In: a question with its references, a response. Out: `Scored`: 0..1, and what was read. Not here: the rules
themselves (`evals/scorers.py`, `harness_vlmevalkit.py`, `harness_lmms.py`), judges (`asking/eval_judge.py`).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

from evals import scorers
from evals.tasks import harness_lmms as lmms
from evals.tasks import harness_vlmevalkit as vlmeval
from evals.tasks.question import Question
from runtime.errors import InputError


@dataclass(frozen=True)
class Scored:
    """`read`: what the rule took from the response, None for the whole of it or nothing. `unread`: the rule
    found no answer where it looks for one, so that a judge may look."""

    score: float
    read: str | None = None
    unread: bool = False


Rule = Callable[[Question, str], Scored]


def options_of(question: Question) -> dict[str, str]:
    """Letter to text."""
    return dict(zip(question.letters, question.options, strict=False))


def _own(name: str, question: Question, response: str) -> Scored:
    found = scorers.score(name, response, list(question.references), question.options)
    if name == "exact":
        return Scored(found, scorers.last_word(response))
    if name in ("choice", "numeric"):
        read = scorers.vote(name, response, question.options) or None
        return Scored(found, read, unread=read is None)
    return Scored(found)


def _answer(question: Question) -> str:
    return question.references[0]


def _vlmeval_mcq(question: Question, response: str) -> Scored:
    read = vlmeval.option(response, options_of(question))
    return Scored(float(read == _answer(question)), read, unread=read is None)


def _vlmeval_mathvista(question: Question, response: str) -> Scored:
    read, right = vlmeval.mathvista(response, question.row, options_of(question))
    return Scored(float(right), read, unread=read is None)


def _over_references(rule: Callable[[str, list[str]], float], question: Question, response: str) -> Scored:
    return Scored(rule(response, list(question.references)))


def _read_and_right(
    rule: Callable[[str, str], tuple[str, bool]], question: Question, response: str
) -> Scored:
    read, right = rule(response, _answer(question))
    return Scored(float(right), read, unread=not read)


def _letter(rule: Callable[[str, dict[str, str]], str | None], question: Question, response: str) -> Scored:
    read = rule(response, options_of(question))
    return Scored(float(read == _answer(question)), read, unread=not read)


def _lmms_blink(question: Question, response: str) -> Scored:
    letters = question.letters[: len(question.options)] or question.letters
    read, right = lmms.blink(response, _answer(question), letters)
    return Scored(float(right), read, unread=not read)


def _lmms_mmmu(question: Question, response: str) -> Scored:
    if question.options:
        return _letter(lmms.mmmu_option, question, response)
    read, right = lmms.mmmu_open(response, question.references)
    return Scored(float(right), read)


def _lmms_mmstar(question: Question, response: str) -> Scored:
    read = lmms.option(response)
    return Scored(float(read == _answer(question).strip().upper()), read, unread=not read)


def _lmms_mathvista(question: Question, response: str) -> Scored:
    row: dict[str, Any] = {**question.row, "answer": _answer(question)}
    read, right = lmms.mathvista(response, row, question.options)
    return Scored(float(right), read, unread=read is None)


def _lmms_equal(rule: Callable[[str, str], bool], question: Question, response: str) -> Scored:
    return Scored(float(any(rule(response, one) for one in question.references)))


RULES: dict[str, Rule] = {
    **{name: partial(_own, name) for name in scorers.SCORERS},
    "vlmevalkit.mcq": _vlmeval_mcq,
    "vlmevalkit.mathvista": _vlmeval_mathvista,
    "vlmevalkit.relaxed": partial(_over_references, vlmeval.relaxed),
    "vlmevalkit.accuracy": partial(_over_references, vlmeval.accuracy),
    "vlmevalkit.anls": partial(_over_references, vlmeval.anls),
    "vlmevalkit.vqa_score": partial(_over_references, vlmeval.vqa_score),
    "vlmevalkit.vqa_match": partial(_over_references, vlmeval.vqa_match),
    "lmms.ai2d": partial(_read_and_right, lmms.ai2d),
    "lmms.seedbench": partial(_read_and_right, lmms.seedbench),
    "lmms.blink": _lmms_blink,
    "lmms.realworldqa": partial(_read_and_right, lmms.realworldqa),
    "lmms.mmbench": partial(_letter, lmms.mmbench),
    "lmms.mmmu": _lmms_mmmu,
    "lmms.mmstar": _lmms_mmstar,
    "lmms.mathvista": _lmms_mathvista,
    "lmms.chartqa": partial(_lmms_equal, lmms.chartqa),
    "lmms.exact_match": partial(_lmms_equal, lmms.exact_match),
    "lmms.anls": partial(_over_references, lmms.anls),
    "lmms.vqav2": partial(_over_references, partial(lmms.vqa, tokenized=False)),
    "lmms.textvqa": partial(_over_references, partial(lmms.vqa, tokenized=True)),
}
"""`Task.scorer` is one of these, or `judge`: every answer goes to a judge."""

JUDGE = "judge"
Rules = Literal["pocketvlm", "vlmevalkit", "lmms-eval"]


def score(name: str, question: Question, response: str) -> Scored:
    """Raises InputError naming the question when its reference cannot be used."""
    try:
        return RULES[name](question, response)
    except ValueError as error:
        raise InputError(f"question {question.id}: {error}") from error


def check(name: str) -> str:
    """The rule's name. Raises InputError for an unknown one, with the nearest."""
    if name in RULES or name == JUDGE:
        return name
    near = difflib.get_close_matches(name, (*RULES, JUDGE), 1)
    raise InputError(f"no scorer {name!r}; wanted {near[0] if near else ', '.join((*RULES, JUDGE))}")


def rules_of(name: str) -> Rules:
    """Whose rule it is."""
    whose = {"vlmevalkit": "vlmevalkit", "lmms": "lmms-eval"}.get(name.split(".")[0], "pocketvlm")
    return cast(Rules, whose)


def right_from(name: str) -> float:
    """The score from which an answer counts as right in flips: 0.5 where people's agreement is graded, 0.9
    for an edit distance, else 1 (`evals.scorers.RIGHT_FROM`)."""
    bare = name.split(".")[-1]
    if bare in ("vqa", "vqa_score", "vqav2", "textvqa", "vqa_match"):
        return scorers.RIGHT_FROM["vqa"]
    return scorers.RIGHT_FROM.get(bare, 1.0)
