"""Rules that turn a response into a score, and a score into the reward R_acc.

In: the response text, the reference answer, the options. Out: a score in [0, 1]; R_acc in {0, 1}.
Not here: models, sessions, judges. Standard library only, so that rewards and gates can import it.

Every rule gives 0 to an empty or repetitive response (METHOD 4), and raises ValueError on a reference that it
cannot use: that is a fault of the data, not a wrong answer. `vqa`, `anls` and `relaxed` compare the whole
response, as VLMEvalKit and lmms-eval do: the prompt has to ask for a short answer.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Sequence

from evals.answers import (
    LONGEST_BLOCK,
    NUMBER_WORDS,
    REPEATS,
    Quantity,
    alternatives,
    is_repetitive,
    is_worthless,
    last_word,
    option,
    option_of,
    quantities,
    quantity,
    words,
)

__all__ = [
    "LONGEST_BLOCK",
    "REPEATS",
    "RIGHT_FROM",
    "SCORERS",
    "accuracy_reward",
    "anls",
    "choice",
    "exact",
    "is_repetitive",
    "is_worthless",
    "last_word",
    "numeric",
    "relaxed",
    "score",
    "vote",
    "vqa",
    "words",
]

Reference = str | Sequence[str]


def exact(response: str, reference: Reference, choices: Sequence[str] = ()) -> int:
    """1 if the response's last word is the reference, else 0.

    Case, punctuation and whitespace do not count. A reference of several words must be the response's last
    words; one of several references is enough. Raises ValueError on a reference without a word.
    """
    wanted = [words(one) for one in alternatives(reference)]
    if not wanted or not all(wanted):
        raise ValueError(f"exact: the reference {reference!r} holds no word")
    if is_worthless(response):
        return 0
    found = words(response)
    return int(any(found[-len(one) :] == one for one in wanted))


def vqa(response: str, reference: Reference, choices: Sequence[str] = ()) -> float:
    """VQA accuracy (Antol et al. 2015): the mean over leave-one-out sets of human answers of
    min(1, matches / 3). With one answer: 1 if equal. Both sides are normalised as the official code does
    (punctuation, articles, number words, contractions)."""
    answers = [_vqa_normal(one) for one in _references("vqa", reference)]
    if is_worthless(response):
        return 0.0
    given = _vqa_normal(response)
    total, equal = len(answers), sum(one == given for one in answers)
    if total == 1:
        return float(equal)
    return (equal * min(1.0, (equal - 1) / 3) + (total - equal) * min(1.0, equal / 3)) / total


def anls(
    response: str, reference: Reference, choices: Sequence[str] = (), *, threshold: float = 0.5
) -> float:
    """Normalised Levenshtein similarity to the closest reference (Biten et al. 2019), 0 below `threshold`.

    Case and surplus whitespace do not count, also not in the length that the distance is divided by: there
    the harnesses count them, and a response padded with spaces would score near 1 with any text.
    """
    answers = [_collapsed(one) for one in _references("anls", reference)]
    if is_worthless(response):
        return 0.0
    given = _collapsed(response)
    best = max(_similarity(given, one) for one in answers)
    return best if best >= threshold else 0.0


def relaxed(
    response: str, reference: Reference, choices: Sequence[str] = (), *, tolerance: float = 0.05
) -> float:
    """ChartQA's relaxed accuracy (Masry et al. 2022): numbers within `tolerance` of the reference, text equal
    but for case. `12%` is 0.12; a reference of zero is compared as text, as in the harnesses."""
    answers = _references("relaxed", reference)
    if is_worthless(response):
        return 0.0
    given = response.strip()
    return float(any(relaxed_equal(given, one.strip(), tolerance) for one in answers))


def choice(response: str, reference: Reference, choices: Sequence[str] = ()) -> float:
    """1 if the response chooses the reference's option. The reference is a letter or an option's text; a
    response that does not choose clearly scores 0 (`evals.answers.option`)."""
    (one,) = alternatives(reference)[:1] or [""]
    wanted = option_of(one, choices)
    return 0.0 if is_worthless(response) else float(option(response, choices) == wanted)


def numeric(
    response: str, reference: Reference, choices: Sequence[str] = (), *, tolerance: float = 0.0
) -> float:
    """1 if the response's number is the reference's (as in MathVista): whole numbers exactly, decimals after
    rounding to the reference's places; a list `[2007, 2008]` entry by entry.

    Known units convert (`0.5 m` is `50 cm`), units of another kind are wrong, a missing one is any.
    `tolerance` is relative and added. Raises ValueError on a reference without a number.
    """
    wanted = quantities(reference if isinstance(reference, str) else next(iter(reference), ""))
    if not wanted:
        raise ValueError(f"numeric: the reference {reference!r} holds no number; use the scorer exact")
    if is_worthless(response):
        return 0.0
    if len(wanted) > 1:
        listed = re.findall(r"\[([^\[\]]*)\]", response)
        given = quantities(listed[-1] if listed else response)
        given = given if listed else given[-len(wanted) :]
    else:
        given = [one for one in (quantity(response),) if one is not None]
    pairs = list(zip(given, wanted, strict=False))
    return float(len(given) == len(wanted) and all(_same_number(*pair, tolerance) for pair in pairs))


Scorer = Callable[[str, Reference, Sequence[str]], float]

SCORERS: dict[str, Scorer] = {
    "exact": exact,
    "vqa": vqa,
    "anls": anls,
    "relaxed": relaxed,
    "choice": choice,
    "numeric": numeric,
}

RIGHT_FROM = {"exact": 1.0, "vqa": 0.5, "anls": 0.9, "relaxed": 1.0, "choice": 1.0, "numeric": 1.0}
"""R_acc is 1 from this score on: "the core point fully and correctly captured" (METHOD 4). Two of ten people
agreeing is right (0.6). ANLS forgives a typing error in a word, not a wrong digit in a year (0.75)."""


def score(name: str, response: str, reference: Reference, choices: Sequence[str] = ()) -> float:
    """Score in [0, 1] of a response by the rule `name`. Raises ValueError for an unknown rule."""
    if name not in SCORERS:
        near = difflib.get_close_matches(name, SCORERS, 1)
        raise ValueError(f"no scorer {name!r}; wanted {near[0] if near else ', '.join(SCORERS)}")
    return float(SCORERS[name](response, reference, choices))


def accuracy_reward(
    name: str,
    response: str,
    reference: Reference,
    choices: Sequence[str] = (),
    *,
    right_from: float | None = None,
    fractions: bool = False,
) -> float:
    """R_acc (METHOD 4): 1 from the score `right_from` on (None: RIGHT_FROM of the rule), else 0.

    `fractions` keeps the score itself; the paper's R_acc is in {0, 1}.
    """
    found = score(name, response, reference, choices)
    if fractions:
        return found
    return float(found >= (RIGHT_FROM[name] if right_from is None else right_from))


def vote(name: str, response: str, choices: Sequence[str] = ()) -> str:
    """The answer of a response in the form that equal answers share, for a majority (METHOD 4); "" is none.

    It can serve as reference to the rule `name`. An unknown name (a judge) compares whole responses by words.
    """
    if is_worthless(response):
        return ""
    if name == "exact":
        return last_word(response)
    if name == "choice":
        return option(response, choices) or ""
    if name == "numeric":
        found = quantity(response)
        return f"{found.value:.12g} {found.unit}".strip() if found else ""
    if name == "vqa":
        return _vqa_normal(response)
    return _collapsed(response) if name in ("anls", "relaxed") else " ".join(words(response))


def _references(rule: str, reference: Reference) -> list[str]:
    found = alternatives(reference)
    if not any(one.strip() for one in found):
        raise ValueError(f"{rule}: the reference {reference!r} is empty")
    return found


def _collapsed(text: str) -> str:
    return " ".join(text.lower().split())


def _similarity(first: str, second: str) -> float:
    """1 - Levenshtein distance / longer length, in [0, 1]; 0 where the lengths alone put it below 0.5."""
    longest = max(len(first), len(second))
    if abs(len(first) - len(second)) * 2 > longest:
        return 0.0
    return 1 - edit_distance(first, second) / longest


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance in characters."""
    previous = list(range(len(second) + 1))
    for i, char in enumerate(first, 1):
        row = [i]
        for j, other in enumerate(second, 1):
            row.append(min(previous[j] + 1, row[-1] + 1, previous[j - 1] + (char != other)))
        previous = row
    return previous[-1]


def relaxed_equal(given: str, wanted: str, tolerance: float = 0.05) -> bool:
    """Whether two texts are numbers within `tolerance` of the second, or equal but for case."""
    number, target = _share(given), _share(wanted)
    if number is None or not target:
        return given.lower() == wanted.lower()
    return abs(number - target) / abs(target) <= tolerance


def _share(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _same_number(given: Quantity, wanted: Quantity, tolerance: float) -> bool:
    value = given.in_unit_of(wanted)
    if value is None:
        return False
    if wanted.decimals:
        value = round(value, wanted.decimals)
    return math.isclose(value, wanted.value, rel_tol=max(1e-9, tolerance), abs_tol=1e-12)


# The official normalisation of VQA answers, as rules. A period goes unless a digit follows; other marks go
# where they touch a space or the text holds a number with commas, else they become a space.
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_VQA_NUMBERS = {"none": "0", **{word: str(value) for word, value in NUMBER_WORDS.items()}}
_ARTICLES = frozenset(("a", "an", "the"))
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd
somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't
we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've
you'll you're you've
"""
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, char in enumerate(word)
    if char == "'"
}
"""Each contraction with one apostrophe left out -> the contraction."""


def _vqa_normal(text: str) -> str:
    text = text.replace("\n", " ").replace("\t", " ").strip()
    glued = re.search(r"\d,\d", text) is not None
    plain = text
    for mark in _MARKS:
        touches = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if glued or touches else " ")
    plain = re.sub(r"\.(?!\d)", "", plain)
    kept = [_VQA_NUMBERS.get(word, word) for word in plain.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in kept if word not in _ARTICLES)
