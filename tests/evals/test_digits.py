"""The digits task: answers are true and hard to guess, splits share no handwriting, files are whole."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import signal
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evals import digits, scorers
from runtime.errors import InputError, MissingExtra

SMALL = "validation"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def read(split: str, picture: int) -> list[int | None]:
    classes = digits.glyphs()[1]
    return [int(classes[g]) if g >= 0 else None for g in digits.scenes(split)[picture]]


def answer(question: str, places: list[int | None]) -> str:
    """The answer by another way than the module's: from the question's words."""
    at = dict(zip(digits.PLACES, places, strict=True))
    filled = [digit for digit in places if digit is not None]
    if match := re.fullmatch(r"what is the sum of the (top|bottom|left|right) (row|column)\?", question):
        return str(sum(digit or 0 for place, digit in at.items() if match[1] in place.split()))
    if match := re.fullmatch(r"is the (\w+ \w+) larger than the (\w+ \w+)\?", question):
        return "yes" if (at[match[1]] or 0) > (at[match[2]] or 0) else "no"
    if match := re.fullmatch(r"is the (\w+ \w+) odd or even\?", question):
        return ("even", "odd")[(at[match[1]] or 0) % 2]
    if match := re.fullmatch(r"where is the (\d)\?", question):
        [place] = [place for place, digit in at.items() if digit == int(match[1])]
        return place
    if question == "how many places are empty?":
        return str(places.count(None))
    match = re.fullmatch(r"how many digits are (even|odd|above|below) ?(\d)?\?", question)
    assert match, question
    number = int(match[2] or 0)
    holds = {"even": lambda d: d % 2 == 0, "odd": lambda d: d % 2, "above": lambda d: d > number,
             "below": lambda d: d < number}[match[1]]  # fmt: skip
    return str(sum(1 for digit in filled if holds(digit)))


@pytest.mark.parametrize("split", digits.SPLITS)
def test_every_answer_is_true_and_every_explanation_ends_with_it(split: str) -> None:
    explained = digits.explained(split)
    asked = digits._asked(split)
    assert len(asked) == len(explained) == len(digits.KINDS) * digits.SPLITS[split][1]
    for number, (question, said, response) in enumerate(asked):
        assert answer(question, read(split, number // len(digits.KINDS))) == said, question
        assert explained[number] == response
        assert scorers.exact(response, said) == 1, response


def test_an_explanation_names_what_is_read() -> None:
    for number, (question, _, response) in enumerate(digits._asked(SMALL)):
        places = read(SMALL, number // len(digits.KINDS))
        text = "".join("x" if digit is None else str(digit) for digit in places)
        if question.startswith("how many digits"):
            assert response.startswith(f"{text},")
        if match := re.fullmatch(r"where is the (\d)\?", question):
            assert response.startswith(text[: text.index(match[1]) + 1] + ":")


def test_splits_share_no_handwriting() -> None:
    members = {split: set(digits.members(split).tolist()) for split in digits.SPLITS}
    assert sum(len(own) for own in members.values()) == len(set().union(*members.values())) == 1797
    for split, own in members.items():
        assert {glyph for scene in digits.scenes(split) for glyph in scene if glyph >= 0} <= own


def test_who_knows_only_the_question_guesses_badly() -> None:
    """The best constant answer to every wording, learned on train, on test: by kind and in all."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for question, said, _ in digits._asked("train"):
        seen[question][said] += 1
    kinds = list(digits.KINDS)
    right: Counter[str] = Counter()
    asked = digits._asked("test")
    for number, (question, said, _) in enumerate(asked):
        right[kinds[number % len(kinds)]] += seen[question].most_common(1)[0][0] == said
    share = {kind: right[kind] / (len(asked) / len(kinds)) for kind in kinds}
    assert share["sum"] < 0.15 and share["where"] < 0.33 and share["count"] < 0.45
    assert share["compare"] < 0.55 and share["parity"] < 0.57
    assert sum(right.values()) / len(asked) < 0.38


def test_this_version_is_these_pictures_and_questions() -> None:
    """A change must raise VERSION, and this hash with it: pictures are kept under the version."""
    digest = hashlib.sha256()
    for split in digits.SPLITS:
        digest.update(repr(digits._asked(split)[:500]).encode())
        for index in (0, 7, 123):
            digest.update(digits.picture(split, index).tobytes())
    assert (digits.VERSION, digest.hexdigest()[:16]) == (1, "ea830a25558326dd")


def test_pictures_are_drawn_once(cache: Path) -> None:
    asked = digits.load(SMALL, cache=cache)
    assert [q.id for q in asked] == list(range(5 * 300)) and asked[7].image_id == 1
    path = asked[5].image_path
    found = Image.open(path)
    assert found.size == (64, 64)
    assert np.array_equal(np.asarray(found), digits.picture(SMALL, 1))
    before = path.stat().st_mtime_ns
    assert digits.load(SMALL, cache=cache)[5].image_path.stat().st_mtime_ns == before


def test_a_digit_fills_its_place_and_an_empty_one_is_paper() -> None:
    for index in range(20):
        grey = digits.picture(SMALL, index).astype(int)
        for place, digit in enumerate(read(SMALL, index)):
            row, column = divmod(place, 2)
            cell = grey[32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
            assert (cell.min() < 160) == (digit is not None)


def _load(cache: str) -> int:
    return len(digits.load(SMALL, cache=Path(cache)))


def test_processes_draw_side_by_side_and_one_is_killed(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    doomed = context.Process(target=_load, args=(str(tmp_path),))
    doomed.start()
    split = tmp_path / f"digits-{digits.VERSION}"
    for _ in range(2000):
        if list(split.glob(".tmp-*/*.png")):
            break
        time.sleep(0.01)
    assert doomed.pid is not None
    os.kill(doomed.pid, signal.SIGKILL)
    doomed.join()
    assert list(split.glob(".tmp-*")) and not (split / SMALL).exists()
    with context.Pool(3) as pool:
        assert pool.map(_load, [str(tmp_path)] * 3) == [1500] * 3
    assert not list(split.glob(".tmp-*"))
    assert len(list((split / SMALL).glob("*.png"))) == 300


def test_where_pictures_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("POCKETVLM_CACHE", raising=False)
    assert digits.cache_directory() == tmp_path / "pocketvlm"
    monkeypatch.setenv("POCKETVLM_CACHE", str(tmp_path / "own"))
    assert digits.cache_directory() == tmp_path / "own"


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="unknown split 'tset'; wanted one of pretrain, train"):
        digits.load("tset")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    digits.glyphs.cache_clear()
    with pytest.raises(MissingExtra, match="scikit-learn"):
        digits.glyphs()
