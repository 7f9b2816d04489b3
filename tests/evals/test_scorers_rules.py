"""The rules beside `exact`, on values worked out by hand from the published formulas."""

from __future__ import annotations

import json
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals import answers, scorers
from evals.scorers import SCORERS, accuracy_reward, anls, choice, numeric, relaxed, score, vote, vqa

ANIMALS = ("cat", "dog", "light blue", "blue")
REFERENCE = {
    "exact": "red",
    "vqa": "red",
    "anls": "red",
    "relaxed": "5",
    "choice": "B",
    "numeric": "5",
}
"""A reference that each rule accepts."""


def ten(**counts: int) -> list[str]:
    """Ten human answers, as counts of words."""
    found = [word for word, count in counts.items() for _ in range(count)]
    assert len(found) == 10
    return found


@pytest.mark.parametrize(
    ("response", "counts", "wanted"),
    [
        ("red", {"red": 10}, 1.0),
        ("red", {"red": 4, "blue": 6}, 1.0),
        ("red", {"red": 3, "blue": 7}, (3 * 2 / 3 + 7 * 1) / 10),
        ("red", {"red": 2, "blue": 8}, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("red", {"red": 1, "blue": 9}, (1 * 0 + 9 * 1 / 3) / 10),
        ("green", {"red": 1, "blue": 9}, 0.0),
    ],
)
def test_vqa_leaves_one_answer_out(response: str, counts: dict[str, int], wanted: float) -> None:
    assert vqa(response, ten(**counts)) == pytest.approx(wanted)
    assert vqa(response, json.dumps(ten(**counts))) == pytest.approx(wanted)
    assert vqa(response, str(ten(**counts))) == pytest.approx(wanted)
    assert vqa(response, json.dumps([{"answer": a} for a in ten(**counts)])) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("response", "reference"),
    [
        ("The  Cat!", "cat"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("1,000", "1000"),
        ("42.", "42"),
        ("black/white", "black white"),
        ("black / white", "black  white"),
        ("t-shirt", "t shirt"),
        ("an\napple", "apple"),
    ],
)
def test_vqa_normalises_both_sides(response: str, reference: str) -> None:
    assert vqa(response, reference) == vqa(reference, response) == 1


@pytest.mark.parametrize(("response", "reference"), [("3.5", "35"), ("cat", "cats"), ("1.000", "1000")])
def test_vqa_keeps_what_matters(response: str, reference: str) -> None:
    assert vqa(response, reference) == 0


@pytest.mark.parametrize(
    ("response", "reference", "wanted"),
    [
        ("Hello  World", "hello world", 1.0),
        ("helo", "hello", 0.8),  # one deletion of five
        ("2011", "2019", 0.75),
        ("abcd", "abxy", 0.5),  # at the threshold it still counts
        ("abc", "axy", 0.0),  # a third is below
        ("hello world again", "hello", 0.0),
        ("blue", '["red", "bleu"]', 0.5),  # two substitutions of four, the better of two
    ],
)
def test_anls(response: str, reference: str, wanted: float) -> None:
    assert anls(response, reference) == pytest.approx(wanted)


def test_padding_with_spaces_earns_nothing() -> None:
    """The harnesses divide by the raw length: any four letters and 1,000 spaces would score 0.996."""
    assert anls("wxyz" + " " * 1000, "abcd") == 0
    assert anls("abcd" + " " * 1000, "abcd") == 1


@given(st.text("ab c", max_size=8), st.text("ab c", max_size=8))
def test_the_distance_is_levenshteins(first: str, second: str) -> None:
    def distance(a: str, b: str) -> int:  # the definition
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

    a, b = (" ".join(text[:6].split()) for text in (first, second))
    if a and b and not answers.is_worthless(a):
        wanted = 1 - distance(a, b) / max(len(a), len(b))
        assert anls(a, b) == pytest.approx(wanted if wanted >= 0.5 else 0)


@pytest.mark.parametrize(
    ("response", "reference", "right"),
    [
        ("105", "100", 1),
        ("105.1", "100", 0),
        ("95", "100", 1),
        ("-95", "-100", 1),
        ("94.9", "100", 0),
        ("5%", "0.05", 1),
        ("5%", "5", 0),
        ("Yes", "yes", 1),
        ("yes it is", "yes", 0),
        ("0", "0", 1),
        ("0.0", "0", 0),  # a reference of zero is compared as text
        (" 104 ", "100", 1),
        ("1,000", "1000", 0),  # a number with a comma is text to the harnesses
        ("nan", "5", 0),
        ("104", "['10', '100']", 1),
    ],
)
def test_relaxed(response: str, reference: str, right: int) -> None:
    assert relaxed(response, reference) == right


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("b.", "B"),
        ("Ｂ", "B"),
        ("B. dog", "B"),
        ("The answer is **B**.", "B"),
        ("Answer: (C) light blue", "C"),
        ("<answer>B</answer>", "B"),
        (r"$\boxed{\text{B}}$", "B"),
        ("Between A and C, the answer is C", "C"),
        ("B. Because the animal barks and has a tail that wags", "B"),
        ("A dog", "B"),  # an article
        ("A cat", "A"),
        ("I think it is B", "B"),
        ("It is light blue.", "C"),
        ("blue", "D"),
        ("A is the right answer", "A"),
        ("A cat or B dog", None),
        ("A or B", None),
        ("cat dog", None),
        ("concatenate", None),  # no word is an option
        ("The answer is not B", None),
        ("it is not a dog", None),
        ("The answer is A. No wait, the answer is B.", None),
        ("B and so on and on we go until the end", None),
        ("none of them", None),
        ("E", None),
        ("Z", None),
        ("There was one of the animals. " * 3 + "a dog", None),  # names one, but long
    ],
)
def test_which_option_is_chosen(response: str, letter: str | None) -> None:
    assert answers.option(response, ANIMALS) == letter
    if letter is not None:
        assert choice(response, letter, ANIMALS) == 1
        assert choice(response, ANIMALS["ABCD".index(letter)], ANIMALS) == 1
    assert choice(response, "AB"[letter == "A"], ANIMALS) == (letter == "AB"[letter == "A"])


def test_numbers_as_options() -> None:
    assert choice("10", "B", ("1", "10", "100")) == 1
    assert choice("It is 10", "B", ("1", "10", "100")) == 1
    assert choice("1", "10", ("1", "10", "100")) == 0


def test_letters_without_options() -> None:
    assert choice("The answer is (D)", "D") == 1
    assert choice("I see a dog", "D") == 0
    with pytest.raises(ValueError, match="no letter"):
        choice("dog", "dog")
    with pytest.raises(ValueError, match="no single option"):
        choice("E", "E", ANIMALS)


@pytest.mark.parametrize(
    ("response", "reference", "right"),
    [
        ("14", "14", 1),
        ("The number missing is 14.", "14", 1),
        ("14.0", "14", 1),
        ("14.2", "14", 0),
        ("1.449", "1.45", 1),  # rounds to the reference's two places
        ("1.46", "1.45", 0),
        ("Luca needs $1.45 to buy both.", "1.45", 1),
        ("5 + 3 = 8", "8", 1),
        ("The answer is 5 out of 12.", "5", 1),
        ("The answer is 5 + 3 = 8.", "8", 1),
        (r"so \boxed{42}, not 41", "42", 1),
        ("x = 42 cm^2", "42", 1),
        ("1,000", "1000", 1),
        ("−5", "-5", 1),
        ("5", "-5", 0),
        ("3/4", "0.75", 1),
        ("2e3", "2000", 1),
        ("three apples", "3", 1),
        ("A4", "4", 0),
        ("from 5-6", "6", 1),
        ("50 cm", "0.5 m", 1),
        ("0.5 m", "50 cm", 1),
        ("50 kg", "50 cm", 0),
        ("50", "50 cm", 1),
        ("50 apples", "50 cm", 1),
        ("50 percent", "50%", 1),
        ("90 degrees", "90°", 1),
        ("between 2007 and 2008", "[2007, 2008]", 1),
        ("[2007, 2008], as in 1999", "[2007, 2008]", 1),
        ("2008 and 2007", "[2007, 2008]", 0),
        ("2008", "[2007, 2008]", 0),
        ("no idea", "5", 0),
    ],
)
def test_numeric(response: str, reference: str, right: int) -> None:
    assert numeric(response, reference) == right


def test_a_tolerance_is_relative_and_added() -> None:
    assert numeric("104", "100") == 0
    assert numeric("104", "100", tolerance=0.05) == 1
    assert numeric("106", "100", tolerance=0.05) == 0


def test_the_registry_is_whole() -> None:
    assert set(SCORERS) == set(REFERENCE) == set(scorers.RIGHT_FROM)
    with pytest.raises(ValueError, match="wanted relaxed"):
        score("relax", "a", "b")


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize(
    "response", ["", "  \n", "{} {} {} {}", "so the value is the value is the value is the value is {}"]
)
def test_empty_and_repetitive_responses_score_zero(name: str, response: str) -> None:
    reference = REFERENCE[name]
    assert score(name, response.replace("{}", reference), reference, ANIMALS) == 0
    assert vote(name, response.replace("{}", reference), ANIMALS) == ""


@pytest.mark.parametrize("name", SCORERS)
@given(response=st.text(string.printable, max_size=40))
def test_every_score_is_in_the_unit_range(name: str, response: str) -> None:
    assert 0 <= score(name, response, REFERENCE[name], ANIMALS) <= 1


@pytest.mark.parametrize("name", SCORERS)
def test_the_reference_itself_is_right(name: str) -> None:
    assert score(name, REFERENCE[name], REFERENCE[name], ANIMALS) == 1


@pytest.mark.parametrize("name", SCORERS)
def test_a_vote_is_a_reference_that_its_response_meets(name: str) -> None:
    response = "the answer is 5" if name == "numeric" else "The answer is B"
    assert (
        score(
            name,
            vote(name, response, ANIMALS) if name in ("exact", "choice", "numeric") else response,
            vote(name, response, ANIMALS),
            ANIMALS,
        )
        == 1
    )


@pytest.mark.parametrize("text", ["hahahahahahahahahaha", "是的" * 10, "aaaaaaaaaa"])
def test_letters_that_repeat_inside_a_word(text: str) -> None:
    assert answers.is_repetitive(f"well, {text}!")
    assert not answers.is_repetitive(text[: len(text) // 2])


def test_digits_may_repeat() -> None:
    assert not answers.is_repetitive("1000000000000 and 0.333333333333")


def test_fractions_become_a_reward_of_zero_or_one() -> None:
    two, one = json.dumps(ten(red=2, blue=8)), json.dumps(ten(red=1, blue=9))
    assert (accuracy_reward("vqa", "red", two), accuracy_reward("vqa", "red", one)) == (1, 0)
    assert accuracy_reward("vqa", "red", one, right_from=0.3) == 1
    assert accuracy_reward("vqa", "red", one, fractions=True) == pytest.approx(0.3)
    assert accuracy_reward("anls", "2011", "2019") == 0  # a wrong year is wrong
    assert accuracy_reward("anls", "universty", "university") == 1


def test_a_list_is_read_as_alternatives_only_where_it_is_one() -> None:
    assert answers.alternatives("['red', 'blue']") == ["red", "blue"]
    assert answers.alternatives("[red]") == ["[red]"]
    assert answers.alternatives("red") == ["red"]
    assert scorers.exact("it is blue", "['red', 'light blue']") == 0
    assert scorers.exact("it is light blue", "['red', 'light blue']") == 1


@pytest.mark.parametrize("name", ["vqa", "anls", "relaxed"])
def test_an_empty_reference_is_a_fault_of_the_data(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: the reference ' ' is empty"):
        score(name, "red", " ")


def test_a_reference_without_a_number_is_a_fault_of_the_data() -> None:
    with pytest.raises(ValueError, match="holds no number"):
        numeric("5", "several")
