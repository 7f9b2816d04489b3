"""lmms-eval's rules, so that a score here is the score there.

In: a response, the options or the fields of the document. Out: what the rule reads, and a score in [0, 1].
Not here: prompts (`prompts.py`), how scores are averaged (`evals/asking/eval_summary.py`), judges.

Written from the behaviour of lmms-eval (MIT and Apache-2.0) where no judge model is asked, its quirks
included, and compared with it on fixtures (docs/tasks.md). Where the harness draws an option at random
because none was chosen, nothing is read and the score is 0.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Sequence

from evals import scorers
from evals.tasks import harness_vlmevalkit

LETTERS = string.ascii_uppercase
_ENDS = ",.!?;:'"
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _stripped(text: str, marks: str) -> str:
    """Without each mark at its ends, one mark after the other as listed."""
    for mark in marks:
        text = text.strip(mark)
    return text


# --- options ----------------------------------------------------------

_PHRASES = (
    "the answer is", "answer is", "the correct answer is", "correct answer is", "the best answer is",
    "best answer is", "the correct option is", "correct option is", "the best option is", "best option is",
    "the choice is", "choice is", "the correct choice is", "correct choice is", "i choose", "i select",
    "i pick", "my answer is", "my choice is",
    "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは",
)  # fmt: skip
_SHAPES = ((6, "({})"), (5, "{}."), (4, "{}:"), (3, "{})"), (2, "{} "))
"""How a letter may be written, with its rank; the last place of the best rank wins."""


def option(response: str, letters: str = "ABCD") -> str:
    """The letter that a response chooses, "" for none: MMStar, RealWorldQA, and our own tasks with options.

    A letter that begins the response comes first, then one that ends it, one behind `answer is`, `(A)`,
    `A.`, `A:`, `A)`, `A `; of one kind the last. Without any, the last letter anywhere.
    """
    if not response.strip():
        return ""
    text = f" {_stripped(response.strip(), _ENDS + chr(34))} "
    found = list(_candidates(text, letters))
    if not found:
        found = [(0, text.rfind(letter), letter) for letter in letters if letter in text]
    best = max(found, key=lambda one: one[:2], default=None)
    return best[2] if best else ""


def _candidates(text: str, letters: str) -> Iterator[tuple[int, int, str]]:
    """(rank, place, letter) of every way in which a letter is named."""
    for rank, shape in _SHAPES:
        for letter in letters:
            place = text.rfind(shape.format(letter))
            if place >= 0:
                yield rank, place, letter
    lower = text.lower()
    for phrase in _PHRASES:
        start = lower.find(phrase)
        for letter in letters if start >= 0 else "":
            place = text.find(letter, start + len(phrase))
            if place >= 0:
                yield 7, place, letter
    core = text.strip()
    for letter in letters:
        if core.startswith(letter) and not core[1:2].isalpha():
            yield 10, 0, letter
        if core.endswith(letter) and not core[-2:-1].isalpha():
            yield 9, len(text) - 1, letter


def mmmu_option(response: str, options: Mapping[str, str]) -> str | None:
    """MMMU: `(A)`, else `A `, else `A.`, else, in more than five words, an option's text; of several the last
    one. None where the harness draws one at random."""
    text = f" {_stripped(response, _ENDS)} "
    for shape, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in options if shape.format(letter) in text]
        if found:
            return _last(found, [text.rfind(place.format(letter)) for letter in found])
    if len(text.split()) <= 5:
        return None
    lower = text.lower()
    found = [letter for letter, option in options.items() if option.lower() in lower]
    return _last(found, [lower.rfind(options[letter].lower()) for letter in found]) if found else None


def _last(letters: Sequence[str], places: Sequence[int]) -> str:
    """The first of those with the greatest place."""
    return letters[places.index(max(places))]


def ai2d(response: str, answer: str) -> tuple[str, bool]:
    """AI2D: a capital letter with a period at the start, else the whole response, against the letter; case
    and punctuation do not count."""
    match = re.match(r"\s*([A-Z])\.", response)
    read = match[1] if match else response.strip()
    return read, _bare(read) == _bare(answer)


def exact_match(response: str, answer: str) -> bool:
    """The generic `exact_match` with ignore_case and ignore_punctuation."""
    return _bare(response) == _bare(answer)


def _bare(text: str) -> str:
    return text.lower().translate(_NO_PUNCTUATION)


def seedbench(response: str, answer: str) -> tuple[str, bool]:
    """SEED-Bench: the first character of the response."""
    read = response.strip()[:1]
    return read, read.lower().strip() == answer.lower().strip()


def blink(response: str, answer: str, letters: str) -> tuple[str, bool]:
    """BLINK: a first line that is a letter, the last `answer is (B)`, the last `(B)`, a letter at the start
    (also of a word). Only the question's own letters count, in either case."""
    text = response.strip()
    own = re.escape(letters)
    first = text.split("\n", 1)[0].strip()
    alone = re.match(rf"^\(?([{own}])\)?[\.\s:,)]*$", first, re.IGNORECASE) if len(first) <= 4 else None
    said = re.findall(rf"answers?(?:\s+is)?\s*[:\-]?\s*\(?([{own}])\)?(?![A-Za-z])", text, re.IGNORECASE)
    bracketed = re.findall(rf"\(([{own}])\)", text)
    leading = re.match(rf"[\(\s]*([{own}])", text, re.IGNORECASE)
    read = alone[1] if alone else (said or bracketed or [leading[1] if leading else ""])[-1]
    return read.upper(), read.upper() == answer.strip("()")


def realworldqa(response: str, answer: str) -> tuple[str, bool]:
    """RealWorldQA: options by `option`, anything else as text, but for case and a final period."""
    wanted = answer.strip()
    if wanted.upper() in ("A", "B", "C", "D"):
        read = option(response)
        return read, read == wanted.upper()
    read = response.lower().strip().rstrip(".")
    return read, read == wanted.lower()


_SIMPLE_SHAPES = (
    ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."),
    (":", ""), (":", ","), (":", "."), (":", ")"), (":", ")."),
)  # fmt: skip
"""What may stand before and behind a letter in MMBench's own rule, first match first."""


def mmbench(response: str, options: Mapping[str, str]) -> str:
    """MMBench, static: a letter that stands alone or with marks around, else the one option whose text the
    response contains, else `option`. "" for none."""
    found = _mmbench_letter(response) or _mmbench_text(response, options)
    return found or option(response, "".join(sorted(options)))


def _mmbench_letter(response: str) -> str | None:
    words, letters = response.split(), "ABCDE"
    named = [letter for letter in letters if letter in words]
    if len(named) == 1 and not ("A" in words and len(words) > 3):
        return named[0]
    for before, behind in _SIMPLE_SHAPES:
        if sum(before + letter + behind in words for letter in "ABCDE") == 1:
            return next(letter for letter in letters if before + letter + behind in words)
    return None


def _mmbench_text(response: str, options: Mapping[str, str]) -> str | None:
    inside = [letter for letter, text in options.items() if text.lower() in response.lower()]
    return inside[0] if len(inside) == 1 else None


# --- open answers -----------------------------------------------------


def chartqa(response: str, answer: str) -> bool:
    """ChartQA: relaxed accuracy, nothing is stripped."""
    return scorers.relaxed_equal(response, answer)


def anls(response: str, references: Sequence[str]) -> float:
    """DocVQA, InfoVQA: as VLMEvalKit's."""
    return harness_vlmevalkit.anls(response, references)


def vqa(response: str, references: Sequence[str], *, tokenized: bool) -> float:
    """VQAv2, and TextVQA with `tokenized`: mean over leave-one-out sets of min(1, matches / 3)."""
    wanted = [_vqa_normal(one, tokenized) for one in references]
    given = _vqa_normal(response, tokenized)
    total = sum(one == given for one in wanted)
    return sum(min(1.0, (total - (one == given)) / 3) for one in wanted) / len(wanted)


def _vqa_normal(text: str, tokenized: bool) -> str:
    if tokenized:
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return harness_vlmevalkit.vqa_normal(text, r"\.(?!\d)", r"\d,+\d")


# MMMU's open questions

_KEYS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS_IN = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)


def mmmu_open(response: str, references: Sequence[str]) -> tuple[str, bool]:
    """MMMU's open questions as lmms-eval scores them: (what was read, whether it is right).

    The harness keeps one of the parsed values (which one depends on its hash seed), writes it as text and
    looks for the reference in its characters. Here every parsed value may hold it.
    """
    parsed = mmmu_parsed(response)
    wanted = [normal for one in references for normal in _mmmu_normal(one)]
    right = any(
        (isinstance(one, str) and isinstance(normal, str) and normal in one) or one == normal
        for one in parsed
        for normal in wanted
    )
    return "; ".join(map(str, parsed)), right


def mmmu_parsed(response: str) -> list[str | float]:
    """The strings and numbers that an open response may mean, in the order found."""
    keys = list(_key_phrases(response))
    found = [
        *keys,
        *(number for key in keys for pattern in _NUMBERS_IN for number in re.findall(pattern, key)),
    ]
    return list(dict.fromkeys(normal for one in found for normal in _mmmu_normal(one)))


def _key_phrases(response: str) -> Iterator[str]:
    text = response.strip().strip(".").lower()
    parts = re.split(r"\.\s(?=[A-Z])|\n", text)
    found = []
    for place, part in enumerate(parts):
        keys = (*_KEYS, "=") if place == len(parts) - 1 else _KEYS
        shortest = ""
        for tail in (part.split(key)[-1].strip() for key in keys if key in part):
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in (":", ",", ".", "!", "?", ";", "'"):
            found.append(shortest)
    return iter(found or [text])


def _mmmu_normal(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lower = text.lower()
    return [f" {lower}", f"{lower} "] if len(lower) == 1 else [lower]


# --- MathVista --------------------------------------------------------


def mathvista(response: str, row: Mapping[str, object], options: Sequence[str]) -> tuple[str | None, bool]:
    """MathVista with the response itself where the harness asks a model to extract the answer.

    Options: the letter in brackets or alone, else the option with the smallest edit distance. Numbers: cut
    or rounded to the wanted precision, and compared as text.
    """
    text, answer = response.strip(), row.get("answer")
    read: str | None
    if row.get("question_type") == "multi_choice":
        read = _mathvista_option(text, options)
    elif row.get("answer_type") == "integer":
        read = _number(text, 0)
    elif row.get("answer_type") == "float":
        read = _number(text, int(float(str(row.get("precision") or 0))))
    else:
        read = text
    return read, answer is not None and str(read).strip() == str(answer).strip()


def _mathvista_option(text: str, options: Sequence[str]) -> str:
    if text in options:
        return text
    bracketed = re.findall(r"\(([a-zA-Z])\)", text)
    letter = bracketed[0].upper() if bracketed else text
    if len(letter) == 1 and letter in LETTERS[: len(options)]:
        return options[LETTERS.index(letter)]
    distances = [scorers.edit_distance(letter, option) for option in options]
    return options[distances.index(min(distances))]


def _number(text: str, precision: int) -> str | None:
    try:
        return str(round(float(text), precision)) if precision else str(int(float(text)))
    except (ValueError, OverflowError):
        return None
