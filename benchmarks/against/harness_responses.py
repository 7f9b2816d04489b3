"""Options, references and responses of `harness_scores.py`, drawn so that every branch of a rule is met."""

from __future__ import annotations

import random
from typing import Any

Row = dict[str, Any]
WORDS = (
    "red circle",
    "a blue square",
    "Cat",
    "teal",
    "None of them",
    "3 apples",
    "Dog house",
    "the sun",
    "42",
)

LETTERED = (
    "{l}", "{l}.", "({l})", "{l})", "{l}: {t}", "{l}. {t}", "Answer: {l}", "The answer is {l}", "**{l}**",
    "the answer is **{l}**.", "The correct answer is ({l}).", "Option {l}", "I think it is {l}, not {m}",
    "{l} or {m}", "{t}", "It is {t}", "It must be {t} because of the light", "{T}", "A {t} is what I see",
    "Both {t} and {u}", "none", "", " ", "Z", "{l} {m}", "Sorry, I can't help with images of people yet.",
    "{l}\nbecause {t}", "{low}", "answer is {low}", "So, the answer is {l}\n\n", "[{l}]", "{l},",
    "We compare {l} with {m}. In the end we choose option ({l})", "{l} is wrong, therefore {m}.", "#{l}",
    "the picture shows {t} and not {u}, which everybody can see in the upper left corner: {l}",
    "First, {m} looks right. Answers: {l}", "'{l}'", "\"{l}\"", "{l}!", ": {l}", "Because {t}",
    "I choose {l}", "정답은 {l}", "{l}.{t}", "A{l}", "({low})", "Failed to obtain answer via API {l}",
    "Apple", "my choice is: {l}.", "so {l} it is now", "so {l} it is now then",
    "so {l} it is now then too", "Z {l} it is", "{l} Z it is now then too",
    "({m}) is tempting, but the answer is {l} they say", "answer is {l}, not ({m})",
    "({l})\nanswer is {m}", "({l}).\nanswer is {m}", "{l}: x {m}: y {l}: z end", "({l}) ({m}) ({l}) end",
    "{l} not but ({m})", "see {t}", "see {t} here", "we see {t} here", "we can see {t} here",
    "well, see {t} now", "({m}) no. the answer is {l} ok", "{l}) or {m}) so {l}) then",
    "{l} so {m} so {l} then", "Z {l} it is now then too: {t}",
)  # fmt: skip
"""Responses to a question with options: `l` and `m` two letters, `t` and `u` their texts."""


def lettered(draw: random.Random, options: dict[str, str], template: str = "") -> str:
    """A response to a question with options."""
    one, other = draw.choice(list(options)), draw.choice(list(options))
    return (template or draw.choice(LETTERED)).format(
        l=one, m=other, t=options[one], u=options[other], T=options[one].upper(), low=one.lower()
    )


def some_options(draw: random.Random, most: int = 4) -> dict[str, str]:
    return dict(zip("ABCDE", draw.sample(WORDS, draw.randint(2, most)), strict=False))


NUMBERS = (
    "3",
    "3.0",
    "0.5",
    "50%",
    "1,000",
    "1000",
    "-2",
    "1e3",
    ".5",
    "0",
    "12",
    "12.04",
    "2019",
    "nan",
    "3/4",
)
SHORT = (
    "yes", "No", "the cat", "A dog", "two", "ten.", "don't", "dont", "somebody'd", "isnt it", "t-shirt",
    "red, green", "red,green", "5,6", "U.S.A.", "4.5 m", "a b c", "New  York", "new york",
    "Dallas cowboys!", "1,000/2 km", "1,000-2,000", "it's", "none", "", "[1, 2]", "brown/white",
    "the quick brown fox", "the quick brown fax", "3 pm.",
)  # fmt: skip


def short(draw: random.Random) -> str:
    text = draw.choice((*NUMBERS, *SHORT))
    return draw.choice(("{}", "{}", "{}", " {} ", "{}.", "\t{}\n", "{} {}")).format(text, draw.choice(SHORT))


def near(draw: random.Random, references: list[str]) -> str:
    """Half of the time a reference, perhaps in other case or with a mark, else anything short."""
    if draw.random() < 0.5:
        return short(draw)
    one = draw.choice(references)
    return draw.choice(("{}", "{}", "{}.", " {}", "the {}", "{}!", "{}s")).format(
        draw.choice((one, one, one.upper(), one.title(), one.replace(",", ""), one.replace("1000", "1,000")))
    )


def references_of(draw: random.Random) -> list[str]:
    """One or several; a lone list is left out, for VLMEvalKit takes its entries as they are, numbers too."""
    texts = [one for one in (*NUMBERS, *SHORT) if one and not one.startswith("[")]
    if draw.random() < 0.1:
        return ["1000"] * draw.choice((1, 3, 10))
    if draw.random() < 0.4:
        return [draw.choice(texts)]
    pool = draw.sample(texts, 3)
    return [draw.choice(pool) for _ in range(draw.choice((2, 3, 10)))]


def case(rule: str, options: dict[str, str], answer: str, response: str, score: float) -> Row:
    return {"rule": rule, "options": options, "answer": answer, "response": response, "score": float(score)}
