"""What a response says: its words, its option letter, its number.

In: the response text (and the options of a multiple-choice question). Out: what was read, or None.
Not here: right or wrong (`evals/scorers.py`). Standard library only, so that rewards and gates can import it.
"""

from __future__ import annotations

import ast
import json
import re
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

REPEATS = 4
"""A block of words that occurs this often back to back makes a response repetitive."""
LONGEST_BLOCK = 8
"""Blocks of up to this many words, or letters inside a word, are looked for."""
LETTER_REPEATS = 10
"""A block of letters inside one word (`hahaha..`, text without spaces) has to occur this often."""

_LETTER_RUN = re.compile(rf"([^\W\d_]{{1,{LONGEST_BLOCK}}}?)\1{{{LETTER_REPEATS - 1}}}")


def words(text: str) -> list[str]:
    """Lower-case words of a text (NFKC, case-folded), split at whitespace, punctuation and symbols.

    Inside a word `-` and `'` stay (`t-shirt`), inside a number `.` and `,` stay (`3.5`), and a minus sign
    stays before a number. So `circle:yes` is two words and `"Yes!"` is `yes`.
    """
    folded = unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-").replace("\u2019", "'")
    return "".join(char if _in_word(folded, i) else " " for i, char in enumerate(folded)).split()


def last_word(text: str) -> str:
    """The answer of a response that may explain first: its last word, or "" when it has none."""
    found = words(text)
    return found[-1] if found else ""


def is_repetitive(text: str) -> bool:
    """True when a block of 1 to LONGEST_BLOCK words occurs REPEATS times back to back, or a block of as
    many letters LETTER_REPEATS times inside a word."""
    found = words(text)
    return any(_most_repeats(found, block) >= REPEATS for block in range(1, LONGEST_BLOCK + 1)) or any(
        len(word) >= LETTER_REPEATS and _LETTER_RUN.search(word) for word in found
    )


def is_worthless(text: str) -> bool:
    """Empty or repetitive: 0 under every rule and every judge (METHOD 4; Sec. 3.3)."""
    return not text.strip() or is_repetitive(text)


def _in_word(text: str, i: int) -> bool:
    if unicodedata.category(text[i])[0] not in "PSZC":  # letters, marks and numbers
        return True
    before, after = text[i - 1 : i], text[i + 1 : i + 2]
    if text[i] == "-" and after.isdigit() and not before.isalnum():
        return True
    if text[i] in "-'":
        return before.isalnum() and after.isalnum()
    return text[i] in ".," and before.isdigit() and after.isdigit()


def _most_repeats(found: list[str], block: int) -> int:
    """How often, at most, one block of `block` words occurs back to back."""
    longest = run = block
    for i in range(block, len(found)):
        run = run + 1 if found[i] == found[i - block] else block
        longest = max(longest, run)
    return longest // block


def alternatives(reference: str | Sequence[str]) -> list[str]:
    """The accepted answers of a question. A string that holds a list (JSON or Python, as VLMEvalKit's TSVs
    write ten human answers) is that list; its entries may be `{"answer": ...}` as in VQAv2's own files."""
    if not isinstance(reference, str):
        return list(reference)
    text = reference.strip()
    if text.startswith("[") and text.endswith("]"):
        for parse in (json.loads, ast.literal_eval):
            try:
                found = parse(text)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            return [str(one["answer"] if isinstance(one, dict) and "answer" in one else one) for one in found]
    return [reference]


# Multiple choice

_TOKEN = re.compile(r"""[^\s.()\[\],:;!*#{}"“”`<>/\\$?]+""")
_MARKED = re.compile(
    r"(?i:answer\s*(?:is|:)|boxed\{|<answer>)[\s*:(\[{\"'$\\]*(?:(?i:option|choice|text)\W{1,2})?([A-Z])(?![\w'’])"
)
_AFTER_A_LETTER = frozenset(("is", "are", "was", "because", "since", "as", "and", "or", "would"))
_NOT = frozenset(("not", "isn't", "no", "never", "neither"))
_LEADING = re.compile(r"[.):\]*]|\s*\n|\s+(?:is|because|since)\b")
_LAST = 4
"""A lone letter counts when it is among the last four words, as in VLMEvalKit's `can_infer`."""


def option(response: str, choices: Sequence[str] = ()) -> str | None:
    """The option letter that a response chooses, or None where it is not clear.

    First a letter: behind `answer is`, or the only letter named and among the last words or leading the
    response. Then an option's text: the response is one option, or names exactly one and is short. The
    article `A` and the pronoun `I` are no letters, and an option behind `not` is not chosen. Without
    `choices`, letters only.
    """
    response = unicodedata.normalize("NFKC", response)
    letters = string.ascii_uppercase[: len(choices) or None]
    marked = {
        found[1]
        for found in _MARKED.finditer(response)
        if found[1] in letters and not _is_article(response, found.start(1), choices)
    }
    if marked:
        return marked.pop() if len(marked) == 1 else None
    return _lone_letter(response, letters, choices) or _named_option(response, choices)


def option_of(reference: str, choices: Sequence[str] = ()) -> str:
    """The letter of a reference that is a letter (`B`, `(b)`) or an option's text; a letter comes first.

    Raises ValueError when it is neither, or the text of several options.
    """
    letters = string.ascii_uppercase[: len(choices) or None]
    bare = reference.strip(" ().:").upper()
    if len(bare) == 1 and bare in letters:
        return bare
    same = [letter for letter, choice in zip(letters, choices, strict=False) if _same(reference, choice)]
    if len(same) != 1:
        raise ValueError(f"the reference {reference!r} is no letter up to {letters[-1]} and no single option")
    return same[0]


def _is_article(text: str, place: int, choices: Sequence[str]) -> bool:
    """Whether the letter at `place` is the article A or the pronoun I: a lower-case word follows it, and not
    the letter's own option (`A cat` is a letter where A is the cat)."""
    rest = text[place + 1 :]
    following = re.match(r"\s+([a-z]+)", rest)
    if text[place] not in "AI" or following is None or following[1] in _AFTER_A_LETTER:
        return False
    number = string.ascii_uppercase.index(text[place])
    own = words(choices[number]) if number < len(choices) else []
    return not own or words(rest)[: len(own)] != own


def _lone_letter(response: str, letters: str, choices: Sequence[str]) -> str | None:
    tokens = list(_TOKEN.finditer(response))
    bare = [token[0].strip("'’‘") for token in tokens]
    if len(bare) == 1 and len(bare[0]) == 1 and bare[0].upper() in letters:
        return bare[0].upper()
    places = [
        i
        for i, (token, text) in enumerate(zip(tokens, bare, strict=True))
        if len(text) == 1 and text in letters and not _is_article(response, token.start(), choices)
    ]
    if len({bare[i] for i in places}) != 1 or any(i and bare[i - 1].lower() in _NOT for i in places):
        return None
    leads = places[0] == 0 and _LEADING.match(response[tokens[0].end() :]) is not None
    return bare[places[0]] if leads or places[-1] >= len(bare) - _LAST else None


def _named_option(response: str, choices: Sequence[str]) -> str | None:
    same = [i for i, choice in enumerate(choices) if _same(response, choice)]
    if len(same) == 1:
        return string.ascii_uppercase[same[0]]
    if same or len(response) > 2 * sum(map(len, choices)):
        return None
    found, named = words(response), []
    for i in sorted(range(len(choices)), key=lambda i: -len(words(choices[i]))):
        wanted = words(choices[i])
        for start in range(len(found) - len(wanted) + 1) if wanted else ():
            if found[start : start + len(wanted)] == wanted:
                if not _NOT & set(found[max(0, start - 2) : start]):
                    named.append(i)
                found[start : start + len(wanted)] = [""] * len(wanted)  # a shorter option is not in a longer
    return string.ascii_uppercase[named[0]] if len(set(named)) == 1 else None


def _same(first: str, second: str) -> bool:
    return words(first) == words(second) if words(second) else first.strip() == second.strip()


# Numbers

_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {word: value for value, word in enumerate(_COUNTED)}
_SCALES: tuple[tuple[str, dict[str, float]], ...] = (  # kind, unit: how many of the kind's first one
    ("length", {"m meter meters metre metres": 1, "mm": 1e-3, "cm centimeter centimeters": 1e-2}),
    ("length", {"km kilometer kilometers": 1e3, "inch inches": 0.0254, "ft foot feet": 0.3048}),
    ("length", {"mile miles": 1609.344}),
    ("mass", {"kg kilogram kilograms": 1, "g gram grams": 1e-3, "mg": 1e-6}),
    ("time", {"s sec second seconds": 1, "min minute minutes": 60, "h hr hour hours": 3600}),
    ("volume", {"l liter liters litre litres": 1, "ml": 1e-3}),
    ("speed", {"m/s": 1, "km/h": 1 / 3.6}),
    ("angle", {"° degree degrees deg circ": 1}),
    ("share", {"% percent": 1}),
    ("dollar", {"$ dollar dollars usd": 1, "cent cents ¢": 0.01}),
    ("euro", {"€ euro euros eur": 1}),
    ("pound", {"£ gbp": 1}),
)
UNITS = {
    alias: (kind, float(factor))
    for kind, units in _SCALES
    for aliases, factor in units.items()
    for alias in aliases.split()
}
_NUMBER = re.compile(
    r"(?P<money>[$€£]\s?)?(?<![\w.^/])(?P<digits>[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?P<point>\.\d+)?|(?P<bare>\.\d+))"
    r"(?:[eE][-+]?\d+(?!\w))?)(?:\s?/\s?(?P<below>\d+)(?![\w/]))?"
    r"(?:[\s^\\{]{0,2}(?P<unit>[°%¢€$£]|[^\W\d_]+(?:/[^\W\d_]+)?))?"
)
_ANSWER = re.compile(r"(?i:\b(?:answer|result)\b\s*(?:is|:|=)|boxed\{|<answer>)")


@dataclass(frozen=True)
class Quantity:
    """A number with its written decimals (None for a fraction) and its unit as written, or ""."""

    value: float
    decimals: int | None
    unit: str = ""

    def in_unit_of(self, other: Quantity) -> float | None:
        """The value in the other's unit. A missing or unknown unit is any unit; None for another kind."""
        own, wanted = UNITS.get(self.unit), UNITS.get(other.unit)
        if own is None or wanted is None:
            return self.value
        return self.value * own[1] / wanted[1] if own[0] == wanted[0] else None


def quantities(text: str) -> list[Quantity]:
    """Every number of a text in order: `1,000`, `-.5`, `2e3`, `3/4`, with the unit beside it. Digits inside a
    word (`A4`) or an exponent are none. Number words count where there is no digit."""
    text = text.replace("\u2212", "-").replace("\u2044", "/").replace("**", " ")
    found = [_quantity(match) for match in _NUMBER.finditer(text)]
    if found or any(char.isdigit() for char in text):
        return found
    return [Quantity(float(NUMBER_WORDS[word]), 0) for word in words(text) if word in NUMBER_WORDS]


def quantity(response: str) -> Quantity | None:
    """The number that a response answers: the first one behind its last `answer is` (behind the equals
    sign of that sentence, if it has one), else its last number. None without a number."""
    marks = list(_ANSWER.finditer(response))
    if marks:
        sentence = re.split(r"\n|\.\s", response[marks[-1].end() :], maxsplit=1)[0]
        behind = quantities(re.split(r"[=≈]", sentence)[-1]) or quantities(sentence)
        if behind:
            return behind[0]
    return next(reversed(quantities(response)), None)


def _quantity(match: re.Match[str]) -> Quantity:
    value = float(match["digits"].replace(",", ""))
    decimals: int | None = len(match["point"] or match["bare"] or ".") - 1
    if match["below"] and float(match["below"]):
        value, decimals = value / float(match["below"]), None
    elif "e" in match["digits"].lower():
        decimals = None
    unit = (match["money"] or match["unit"] or "").strip()
    return Quantity(value, decimals, unit if unit in UNITS else unit.lower())
