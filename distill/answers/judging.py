"""R_acc of responses, by rule or by a judge (METHOD 4; Sec. 3.3).

In: samples with responses, references (labels or voted), a judge. Out: a reward per response; rows that audit
a judge. Not here: the rules (`evals/scorers.py`), what a judge is asked (`evals/judge.py`), drawing, the
distillation reward (`distill/losses/rewards.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from distill.answers.engines import Engine
from distill.answers.responses import Pool, Reference, Response
from distill.forward.sampling import Sampling
from distill.inputs.data import Sample, SampleError
from distill.inputs.encoding import Encoder
from evals import answers, judge_audit, scorers
from evals.client import Ask, Client
from evals.judge import Generate, Item, Judge, Messages, Verdict

Text = Callable[[Sequence[int]], str]
Judges = Judge | Mapping[str, Judge]
"""One judge for everything, or one for each source: the paper's judge is the model that generated."""

EXPLANATION_TOKENS = 256
"""Room for a judge's two sentences and its answer tag."""


@dataclass(frozen=True)
class Rule:
    """R_acc by each sample's scorer. `right_from`: the score from which a response is right, None for the
    scorer's own (`scorers.RIGHT_FROM`); `fractions` keeps the score, which is not the paper's R_acc."""

    right_from: float | None = None
    fractions: bool = False


def correct(
    samples: Sequence[Sample],
    responses: Sequence[Response],
    by: Rule | Judges,
    *,
    references: Mapping[str, Reference],
    text: Text,
    show_images: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """R_acc of `responses[i]` to `samples[i]`, in {0, 1} unless the rule keeps fractions.

    `references` by sample id are labels, or the majority answer of the full teacher where there is none
    (`responses.reference`); with an empty one no response is right. `show_images` puts the sample's images in
    front of the judge's first call. Raises SampleError for a reference that the rule cannot use.
    """
    if isinstance(by, Rule):
        return [
            _by_rule(sample, text(response.ids), references[sample.id].text, by)
            for sample, response in zip(samples, responses, strict=True)
        ]
    verdicts = judged(
        samples, responses, by, references=references, text=text, show_images=show_images, progress=progress
    )
    return [float(verdict.score) for verdict in verdicts]


def correct_pool(
    samples: Iterable[Sample], pool: Pool, by: Rule | Judges, **options: Any
) -> dict[str, list[float]]:
    """R_acc of every response of a pool, by sample id in the pool's order; `options` as in `correct`."""
    asked = [(sample, response) for sample in samples for response in pool.get(sample.id, ())]
    found: dict[str, list[float]] = {}
    values = correct([s for s, _ in asked], [r for _, r in asked], by, **options)
    for (sample, _), value in zip(asked, values, strict=True):
        found.setdefault(sample.id, []).append(value)
    return found


def judged(
    samples: Sequence[Sample],
    responses: Sequence[Response],
    judges: Judges,
    *,
    references: Mapping[str, Reference],
    text: Text,
    show_images: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Verdict]:
    """The judge's verdict on every response, with its explanation. With a judge for each source, a response
    that both drew goes to the one that drew it more often, the teacher's on a tie."""
    found: list[Verdict | None] = [None] * len(samples)
    parts: dict[int, tuple[Judge, list[int]]] = {}
    for i, (sample, response) in enumerate(zip(samples, responses, strict=True)):
        if not references[sample.id].text.strip():
            found[i] = Verdict(0, "judged", "no reference: nobody gave an answer")
            continue
        judge = judges if isinstance(judges, Judge) else judges[_source(response)]
        parts.setdefault(id(judge), (judge, []))[1].append(i)
    for judge, places in parts.values():
        step = judge.batch if show_images else 64 * judge.batch  # the images of one step are open at a time
        for start in range(0, len(places), step):
            part = places[start : start + step]
            items = [_item(samples[i], responses[i], references, text, show_images) for i in part]
            for i, verdict in zip(part, judge.verdicts(items), strict=True):
                found[i] = verdict
            if progress is not None:
                progress(sum(verdict is not None for verdict in found), len(found))
    return [verdict for verdict in found if verdict is not None]


def audit_rows(
    samples: Sequence[Sample],
    responses: Sequence[Response],
    verdicts: Sequence[Verdict],
    *,
    text: Text,
    right_from: float | None = None,
) -> Iterator[judge_audit.Row]:
    """Rows for `pocketvlm judge-audit`: the judge's verdicts beside what the rule says of labelled, closed
    questions. Samples without a label are left out: a voted reference is no label. Length is in tokens."""
    for sample, response, verdict in zip(samples, responses, verdicts, strict=True):
        if sample.answer is None:
            continue
        said = text(response.ids)
        yield judge_audit.Row(
            id=sample.id,
            question=sample.question,
            reference=sample.answer,
            response=said,
            verdict=verdict.score,
            label=int(_by_rule(sample, said, sample.answer, Rule(right_from))),
            source="teacher" if _source(response) == "teacher" else "student",
            option=answers.option(said, sample.choices) if sample.choices else None,
            length=len(response.ids),
            how=verdict.how,
        )


def audit_pool(
    samples: Iterable[Sample], pool: Pool, judges: Judges, *, text: Text, show_images: bool = False
) -> list[judge_audit.Row]:
    """`audit_rows` of every response of a pool to a labelled question; the judge sees the label as reference.
    Verdicts that are in the judge's cache cost nothing."""
    asked = [
        (sample, response)
        for sample in samples
        if sample.answer is not None
        for response in pool.get(sample.id, ())
    ]
    whose, responses = [sample for sample, _ in asked], [response for _, response in asked]
    references = {sample.id: Reference(sample.answer or "", False, 1.0) for sample in whose}
    verdicts = judged(whose, responses, judges, references=references, text=text, show_images=show_images)
    return list(audit_rows(whose, responses, verdicts, text=text))


def check(sample: Sample) -> None:
    """Raises SampleError where the sample's scorer cannot use its label: ask before anything is drawn."""
    if sample.answer is not None:
        _by_rule(sample, "", sample.answer, Rule())


def _by_rule(sample: Sample, said: str, reference: str, rule: Rule) -> float:
    if not reference.strip():
        return 0.0
    try:
        return scorers.accuracy_reward(
            sample.scorer,
            said,
            reference,
            sample.choices,
            right_from=rule.right_from,
            fractions=rule.fractions,
        )
    except ValueError as error:
        raise SampleError(
            sample.source or sample.id, sample.index, f"{error}; mend the answer or change data.scorer"
        ) from error


def _source(response: Response) -> str:
    return max(sorted(response.counts, reverse=True), key=lambda source: response.counts[source])


def _item(
    sample: Sample, response: Response, references: Mapping[str, Reference], text: Text, show_images: bool
) -> Item:
    images = tuple(sample.open_images()) if show_images else ()
    return Item(sample.question, references[sample.id].text, text(response.ids), images)


# Who generates the judge's texts


def in_process(engine: Engine, encoder: Encoder, *, max_new_tokens: int = EXPLANATION_TOKENS) -> Generate:
    """An engine as `generate`: greedy texts. A chat that it refuses (too long) gives "", which the judge
    counts as unreadable."""
    sampling = Sampling(max_new_tokens=max_new_tokens, greedy=True)

    def generate(chats: list[Messages]) -> list[str]:
        asked = [_Chat.of(number, messages) for number, messages in enumerate(chats)]
        drawn = engine.draw(asked, 1, sampling, 0, refuse=lambda place, why: None)
        return [encoder.text(responses[0].ids) if responses else "" for responses in drawn]

    return generate


def served(client: Client, *, max_new_tokens: int = EXPLANATION_TOKENS) -> Generate:
    """A server as `generate`: greedy texts, "" for a chat that it refuses. Raises ServerError when it stays
    broken."""

    ask = Ask(max_new_tokens=max_new_tokens, greedy=True)

    def generate(chats: list[Messages]) -> list[str]:
        texts = [""] * len(chats)
        requests = ((messages, ask) for messages in chats)
        for place, choices in client.stream(requests, refused=lambda place, why: None):
            texts[place] = choices[0].text
        return texts

    return generate


@dataclass(frozen=True)
class _Chat(Sample):
    """A judge's chat as an engine takes it; its images are open already."""

    pictures: tuple[Any, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, number: int, messages: Messages) -> _Chat:
        parts = [part for message in messages for part in message["content"]]
        bare = tuple(
            {
                "role": message["role"],
                "content": [{"type": "image"} if p["type"] == "image" else p for p in message["content"]],
            }
            for message in messages
        )
        return cls(f"judge-{number}", bare, pictures=tuple(p["image"] for p in parts if p["type"] == "image"))

    def open_images(self) -> list[Image.Image]:
        return [
            image if isinstance(image, Image.Image) else Image.open(image).convert("RGB")
            for image in self.pictures
        ]
