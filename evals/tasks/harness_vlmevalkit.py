"""VLMEvalKit's rules, so that a score here is the score there.

In: a response, the row of the TSV. Out: what the rule reads, and a score in [0, 1].
Not here: prompts (`prompts.py`), circular groups (a unit is as right as its worst question), judges.

Written from the behaviour of VLMEvalKit (Apache-2.0) without a judge model (`exact_matching`), its quirks
included, and compared with it on fixtures (docs/tasks.md). Where our own rules (`evals/scorers.py`) differ,
ours are stricter on empty and repetitive responses and read more phrasings.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence

from evals import scorers

LETTERS = string.ascii_uppercase
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_FAILED = "Failed to obtain answer via API"
_SAID = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")
_BLANKED = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LAST_WORDS = 5


def option(response: str, options: Mapping[str, str]) -> str | None:
    """The letter that a response chooses, `Z` for a refusal, None where the harness would ask its judge.

    A letter that is the only one among the words and one of the last five; else one behind `answer is`; else
    the one option whose text the response contains, unless it is twice as long as all options together.
    """
    return _option_letter(response, options) or _option_text(response, options)


def _option_letter(response: str, options: Mapping[str, str]) -> str | None:
    if _FAILED in response:
        return None
    if any(refusal in response for refusal in _REFUSALS):
        return "Z"
    found = response.translate(_BLANKED).split()
    named = [letter for letter in options if letter in found]
    if len(named) == 1 and found.index(named[0]) > len(found) - _LAST_WORDS:
        return named[0]
    if not named and "Z" in found:
        return "Z"
    said = _SAID.search(response)
    return said[1].upper() if said and said[1].upper() in options else None


def _option_text(response: str, options: Mapping[str, str]) -> str | None:
    lower = response.lower()
    if len(lower) > 2 * sum(len(text) for text in options.values()):
        return None
    inside = [letter for letter, text in options.items() if text.lower() in lower]
    return inside[0] if len(inside) == 1 else None


def relaxed(response: str, references: Sequence[str]) -> float:
    """ChartQA: the best reference by relaxed accuracy; the reference is not stripped, the response is."""
    given = response.strip()
    return float(any(scorers.relaxed_equal(given, one) for one in references))


def accuracy(response: str, references: Sequence[str]) -> float:
    """OCRVQA, GQA: equal to a reference but for case and surrounding blanks."""
    given = response.strip().lower()
    return float(any(given == one.strip().lower() for one in references))


def anls(response: str, references: Sequence[str]) -> float:
    """DocVQA, InfoVQA: 1 - edit distance / longest length, 0 below 0.5. Blanks collapse for the distance and
    count for the length, as the harness has it."""
    best = max(1 - _distance(one, response) for one in references)
    return best if best >= 0.5 else 0.0


def _distance(reference: str, response: str) -> float:
    longest = max(len(reference.upper()), len(response.upper()))
    if not longest:
        return 0.0
    return scorers.edit_distance(_collapsed(reference), _collapsed(response)) / longest


def _collapsed(text: str) -> str:
    return " ".join(text.strip().lower().split())


def vqa_score(response: str, references: Sequence[str]) -> float:
    """TextVQA: the mean over leave-one-out sets of human answers of min(1, matches / 3). One answer alone
    leaves an empty set, hence 0."""
    wanted, given = [vqa_normal(one) for one in references], vqa_normal(response)
    equal = [one == given for one in wanted]
    total = sum(equal)
    return sum(min(1.0, (total - one) / 3) for one in equal) / len(equal)


def vqa_match(response: str, references: Sequence[str]) -> float:
    """Other questions: the share of references that equal the response after normalising both."""
    given = vqa_normal(response)
    return sum(vqa_normal(one) == given for one in references) / len(references)


_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip


_PERIODS_REMOVED = 32  # both harnesses pass re.UNICODE (32) where the count of replacements belongs


def vqa_normal(text: str, period: str = r"(?<!\d)\.(?!\d)", thousands: str = r"\d,\d") -> str:
    """An answer as the harness compares it: marks, articles, number words, contractions.

    `period`: which periods go; `thousands`: where it is found, every mark goes without leaving a space.
    """
    plain = text = text.replace("\n", " ").replace("\t", " ").strip()
    glued = re.search(thousands, text) is not None
    for mark in _MARKS:
        touches = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if glued or touches else " ")
    plain = re.sub(period, "", plain, count=_PERIODS_REMOVED)
    kept = [_NUMBERS.get(word, word) for word in plain.lower().split()]
    return " ".join(_contraction(word) for word in kept if word not in ("a", "an", "the"))


def _contraction(word: str) -> str:
    """With its apostrophe. Both harnesses have `somebody'd` the wrong way round."""
    swapped = {"somebody'd": "somebodyd", "somebodyd": "somebodyd"}
    return swapped.get(word) or scorers.CONTRACTIONS.get(word, word)


def mathvista(response: str, row: Mapping[str, str], options: Mapping[str, str]) -> tuple[str | None, bool]:
    """MathVista without the judge that extracts an answer first: (what was read, whether it is right).

    Whole numbers and decimals must be the response itself. Questions of type text or list are never right
    there: the harness compares their answer with the text `None`.
    """
    if row.get("question_type") == "multi_choice":
        found = option(response, options)
        return found, found == row.get("answer_option")
    kinds: dict[str, Callable[[str], float]] = {"integer": int, "float": float}
    kind = kinds.get(row.get("answer_type", ""))
    if kind is None:
        return None, False
    try:
        return response.strip(), kind(response) == kind(row["answer"])
    except ValueError:
        return None, False
