from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals.scorers import LONGEST_BLOCK, REPEATS, exact, is_repetitive, last_word, words

WORD = st.text(string.ascii_lowercase, min_size=1, max_size=8)
NOISE = st.text(" \t\n.,;:!?\"'()[]*", max_size=5)


@pytest.mark.parametrize(
    ("response", "reference", "right"),
    [
        ("yes", "yes", 1),
        ("  YES.\n", "yes", 1),
        ("red circle: no", "no", 1),
        ("red circle:no", "no", 1),
        ("There is a red circle, so the answer is **Red**!", "red", 1),
        ("no, it is yes", "yes", 1),
        ("yes it is", "yes", 0),
        ("yesno", "no", 0),
        ("", "no", 0),
        (" ... ", "no", 0),
        ("no no no no", "no", 0),
        ("red red red: red", "red", 0),
        ("red circle red circle red circle red circle", "circle", 0),
        ("the answer is light blue", "light blue", 1),
        ("blue", "light blue", 0),
        ("t-shirt", "shirt", 0),
        ("it is 3.5", "3.5", 1),
        ("it is 3.5", "5", 0),
        ("it is −5.", "-5", 1),
        ("it is -5", "5", 0),
        ("1,000", "1,000", 1),
        ("Ｒｅｄ", "red", 1),
        ("STRASSE", "straße", 1),
        ("<red>", "red", 1),
    ],
)
def test_examples(response: str, reference: str, right: int) -> None:
    assert exact(response, reference) == right


def test_a_reference_without_a_word_is_a_fault_of_the_data() -> None:
    with pytest.raises(ValueError, match="holds no word"):
        exact("yes", " .")


@given(WORD, NOISE, NOISE)
def test_case_and_surroundings_do_not_count(word: str, before: str, after: str) -> None:
    assert exact(before + " " + word.upper() + " " + after, word) == 1


@given(st.lists(WORD, max_size=6, unique=True), WORD, WORD)
def test_only_the_last_word_counts(explanation: list[str], answer: str, reference: str) -> None:
    assert exact(f"{' '.join(explanation)}: {answer}", reference) == int(answer == reference)


@given(st.lists(WORD, min_size=1, max_size=LONGEST_BLOCK), st.integers(REPEATS, 9), WORD)
def test_a_repeated_block_scores_zero_wherever_it_is(block: list[str], times: int, last: str) -> None:
    response = " ".join(block * times)
    assert is_repetitive(response)
    assert exact(f"{response} {last}", last) == 0


@given(st.lists(WORD, unique=True, max_size=30))
def test_distinct_words_are_not_repetitive(found: list[str]) -> None:
    assert not is_repetitive(" ".join(found))


@given(st.text(max_size=60))
def test_any_text_has_words_or_none(text: str) -> None:
    found = words(text)
    assert last_word(text) == (found[-1] if found else "")
    assert all(word and not any(char.isspace() for char in word) for word in found)
    assert words(" ".join(found)) == found
