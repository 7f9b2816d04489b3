"""Rules that turn a response into right or wrong.

In: the response text and the reference answer. Out: words, or 0/1.
Not here: models, sessions, judges. Standard library only, so that rewards and gates can import it.
"""

from __future__ import annotations

import unicodedata

REPEATS = 4
"""A block of words that occurs this often back to back makes a response repetitive."""
LONGEST_BLOCK = 8
"""Blocks of up to this many words are looked for."""


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
    """True when a block of 1 to LONGEST_BLOCK words occurs REPEATS times back to back."""
    found = words(text)
    return any(_most_repeats(found, block) >= REPEATS for block in range(1, LONGEST_BLOCK + 1))


def exact(response: str, reference: str) -> int:
    """1 if the response's last word is the reference, else 0.

    Case, punctuation and whitespace do not count. An empty or repetitive response scores 0.
    A reference of several words must be the response's last words. Raises ValueError on a reference
    without a word: that is a fault of the data, not a wrong answer.
    """
    wanted = words(reference)
    if not wanted:
        raise ValueError(f"exact: the reference {reference!r} holds no word")
    if is_repetitive(response):
        return 0
    return int(words(response)[-len(wanted) :] == wanted)


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
