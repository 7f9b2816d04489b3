"""Scores of many answers: by rule, and by a judge where a task wants one or a rule cannot read the answer.

In: questions, answers, how a judge is reached. Out: `Scored`, one an answer. Not here: the rules
(`evals/tasks/scoring.py`), what a judge is asked (`evals/judge.py`, the same as of the accuracy reward).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from evals.client import Client
from evals.judge import Generate, Item, Judge
from evals.tasks import scoring
from evals.tasks.question import Question, Task
from evals.tasks.scoring import Scored
from runtime.errors import InputError

EXPLANATION_TOKENS = 256


@dataclass(frozen=True)
class Settings:
    """A judge behind an OpenAI-compatible server: `url` ends in /v1, `model` is what the server calls it."""

    url: str
    model: str
    concurrency: int = 32


class Judging:
    """Scores answers. `judge` None: by rule alone. `close` ends the connection."""

    def __init__(self, judge: Judge | None = None, close: Callable[[], None] = lambda: None) -> None:
        self.judge, self.close = judge, close

    def scores(self, scorer: str, questions: Sequence[Question], answers: Sequence[str]) -> list[Scored]:
        """By the rule `scorer`; every answer by the judge for `judge`, else those in which the rule reads no
        answer. Raises InputError for an unusable reference, ServerError."""
        pairs = list(zip(questions, answers, strict=True))
        if scorer == scoring.JUDGE:
            found = [Scored(0.0, unread=True) for _ in pairs]
        else:
            found = [scoring.score(scorer, question, answer) for question, answer in pairs]
        places = [place for place, one in enumerate(found) if one.unread]
        if self.judge is None or not places:
            return found
        items = [Item(_asked(question), _reference(question), answer) for question, answer in pairs]
        for place, verdict in zip(
            places, self.judge.verdicts([items[place] for place in places]), strict=True
        ):
            found[place] = Scored(float(verdict.score), verdict.how)
        return found


def open_judge(settings: Settings | None, cache: Path, generate: Generate | None = None) -> Judging:
    """The judge of `settings`, whose verdicts are kept in `cache`; `generate` stands for the server."""
    if settings is None:
        return Judging()
    if generate is not None:
        return Judging(Judge(generate, cache, model=settings.model))
    client = Client(settings.url, settings.model, concurrency=settings.concurrency)

    def ask(chats: list[list[dict[str, object]]]) -> list[str]:
        return client.generate(chats, max_new_tokens=EXPLANATION_TOKENS)

    return Judging(Judge(ask, cache, model=settings.model), client.close)


def check(task: Task, settings: Settings | None) -> None:
    """Raises InputError for what would fail after all questions were asked: a reference that the scorer
    cannot use, a judge that is not there."""
    scoring.check(task.scorer)
    if task.scorer == scoring.JUDGE:
        if settings is None:
            raise InputError(
                "scorer judge: wanted a judge; add --judge URL and --judge-model NAME, or another --scorer"
            )
        empty = next((one.id for one in task.questions if not _reference(one).strip()), None)
        if empty is not None:
            raise InputError(f"question {empty}: has no reference for the judge")
        return
    for one in task.questions:
        scoring.score(task.scorer, one, "")


def _asked(question: Question) -> str:
    """The question with its options, without instructions."""
    options = scoring.options_of(question)
    return "\n".join([question.question, *(f"{letter}. {text}" for letter, text in options.items())])


def _reference(question: Question) -> str:
    options = scoring.options_of(question)
    told = [f"{one}. {options[one]}" if one in options else one for one in question.references]
    return "\nor: ".join(dict.fromkeys(told))
