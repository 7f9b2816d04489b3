"""What a record of a benchmark's file says: pictures, question, options, the accepted answers.

In: records by position (`readers.py`). Out: `Question`s. Not here: which rules apply (`catalogue.py`), what a
training record says (`distill/inputs/formats.py`).

    vlmevalkit   VLMEvalKit's TSV: index, image (base64, a list, or another row's index) or image_path,
                 question, answer, A.., hint, category, split
    documents    lmms-eval's data sets as JSON lines, JSON or Parquet: question, image(s), options, answer(s)
"""

from __future__ import annotations

import ast
import functools
import re
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evals.answers import alternatives
from evals.tasks import prompts
from evals.tasks.images import image_source
from evals.tasks.question import Picture, Question, picture_sha256
from evals.tasks.readers import Store, Tsv
from runtime.errors import InputError

LETTERS = string.ascii_uppercase
INDEX_UP_TO = 64
"""An `image` this short is the index of the row that has the picture."""
CIRCLE = 1_000_000
"""Rows whose indices differ by multiples of this are one question with its options in another order."""
_ABSENT = frozenset(
    (
        "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>",
        "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
    )
)  # fmt: skip
"""What pandas reads as no value. VLMEvalKit reads its TSVs so, and an option `None` is no option there."""
_IDS = ("id", "index", "question_id", "questionId", "pid", "idx", "doc_id")
_ANSWERS = ("answers", "answer", "target", "label")
_CATEGORIES = ("l2_category", "category", "sub_task", "subject", "type", "task")


# --- VLMEvalKit -------------------------------------------------------


def vlmevalkit(
    store: Store,
    folder: Path,
    kind: str,
    prompt: str,
    *,
    circular: bool,
    split: str | None = None,
    limit: int | None = None,
) -> list[Question]:
    """The rows that have a picture. Raises InputError naming file and row."""
    if not isinstance(store, Tsv):
        raise InputError(f"{store.path}: wanted a .tsv file")
    has = set(store.columns)
    if not {"index", "question"} <= has or not has & {"image", "image_path"}:
        raise InputError(
            f"{store.path}: wanted the columns index, question, answer and image or image_path, "
            f"got {', '.join(store.columns)}"
        )
    found: list[Question] = []
    for number in range(len(store)):
        try:
            row = {key: value for key, value in store[number].items() if value not in _ABSENT}
            if (split is None or row.get("split") == split) and ("image" in row or "image" not in has):
                found.append(_tsv_question(store, folder, number, row, kind, prompt, circular))
        except InputError as error:
            raise InputError(f"{store.path}, row {number + 1}: {error}") from error
        if limit is not None and len(found) == limit:
            break
    return found


def _tsv_question(
    store: Tsv, folder: Path, number: int, row: dict[str, str], kind: str, prompt: str, circular: bool
) -> Question:
    answer = row.get("answer")
    if answer is None:
        raise InputError("has no answer; a test split without labels can be submitted, not scored here")
    index, pictures = row.get("index", str(number)), tuple(_tsv_pictures(store, folder, number, row))
    letters = "".join(letter for letter in LETTERS if letter in row)
    choices = [row[letter] for letter in letters]
    if "choices" in row:  # MathVista
        choices, letters = listed(row["choices"]), LETTERS
    asked = prompts.Asked(row.get("question", ""), choices, row.get("hint", ""), row, letters)
    references: tuple[str, ...] = tuple(alternatives(answer))
    if kind == "MMMU":
        letters = letters or LETTERS
        choices, references = _mmmu(choices, answer)
    elif choices and kind != "MathVista":
        references = (answer,)
    return Question(
        id=index,
        unit=_unit(index, row) if circular else index,
        group=picture_sha256(pictures[0])[:16] if pictures else index,
        question=asked.question,
        prompt=prompts.PROMPTS[prompt](asked),
        images=pictures,
        references=references,
        options=tuple(choices),
        letters=letters,
        category=row.get("category", ""),
        row={key: value for key, value in row.items() if key != "image"},
    )


def _mmmu(choices: list[str], answer: str) -> tuple[list[str], tuple[str, ...]]:
    """As VLMEvalKit: an open question counts as the choice between its answer and `Other Answers`."""
    wanted = answer if answer in LETTERS and len(answer) == 1 else "A"
    return choices or [answer, "Other Answers"], (wanted,)


def _unit(index: str, row: Mapping[str, str]) -> str:
    if "g_index" in row:
        return row["g_index"]
    try:
        return str(int(float(index)) % CIRCLE)
    except ValueError as error:
        raise InputError(f"index {index!r}: circular evaluation needs whole numbers") from error


def _tsv_pictures(store: Tsv, folder: Path, number: int, row: Mapping[str, str]) -> Iterator[Picture]:
    if "image" not in row:
        yield from (_path(one, folder) for one in _several(row.get("image_path", "")))
        return
    source = number if len(row["image"]) > INDEX_UP_TO else store.row_of(row["image"])
    value = row["image"] if source == number else store[source]["image"]
    for place, _ in enumerate(_several(value)):
        yield functools.partial(_tsv_bytes, store, source, place)


def _tsv_bytes(store: Tsv, row: int, place: int) -> bytes:
    """The picture's file. Raises InputError."""
    return image_source({"base64": _several(store[row]["image"])[place]}, store.path.parent).bytes()


def _several(value: str) -> list[str]:
    """A field that may hold a list of strings."""
    if value.startswith("[") and value.endswith("]"):
        try:
            return list(map(str, ast.literal_eval(value)))
        except (ValueError, SyntaxError) as error:
            raise InputError("the image column begins like a list and is none") from error
    return [value] if value else []


def _path(value: str, folder: Path) -> Path:
    found = image_source(value, folder).path
    if found is None:
        raise InputError(f"image_path {value[:40]!r}: wanted a path")
    return found


# --- lmms-eval --------------------------------------------------------


def documents(
    store: Store,
    folder: Path,
    kind: str,
    prompt: str,
    *,
    circular: bool,
    split: str | None = None,
    limit: int | None = None,
) -> list[Question]:
    """All documents (of the split that was opened). Raises InputError naming file and record."""
    found: list[Question] = []
    for number in range(len(store) if limit is None else min(limit, len(store))):
        try:
            found.append(_document(store, folder, number, kind, prompt, circular))
        except InputError as error:
            raise InputError(f"{store.path}, record {number + 1}: {error}") from error
    return found


def _document(store: Store, folder: Path, number: int, kind: str, prompt: str, circular: bool) -> Question:
    record = store[number]
    text = next((record[key] for key in ("question", "query", "prompt") if record.get(key)), None)
    if text is None:
        raise InputError(f"no question; the keys are {', '.join(map(str, record))}")
    choices = options(record)
    asked = prompts.Asked(str(text), choices, _text(record.get("hint")), record)
    index = next((str(record[key]) for key in _IDS if record.get(key) is not None), str(number))
    pictures = tuple(_pictures(store, folder, number, record))
    return Question(
        id=index,
        unit=_unit(index, {}) if circular else index,
        group=picture_sha256(pictures[0])[:16] if pictures else index,
        question=str(text),
        prompt=prompts.PROMPTS[prompt](asked),
        images=pictures,
        references=tuple(_references(record, choices, kind)),
        options=tuple(choices),
        category=_category(record, index, kind),
        row={key: value for key, value in record.items() if isinstance(value, (str, int, float, list))},
    )


def _category(record: Mapping[str, Any], index: str, kind: str) -> str:
    """What the document says, or for MMMU what its id does: `validation_Art_Theory_3`."""
    said = next((str(record[key]) for key in _CATEGORIES if record.get(key)), "")
    subject = re.fullmatch(r"[^_]+_(.+)_\d+", index) if kind == "mmmu" else None
    return said or (subject[1] if subject else "")


def options(record: Mapping[str, Any]) -> list[str]:
    """A document's options: `options` or `choices` (a list, perhaps as text), `choice_a`.., or `A`.."""
    for key in ("options", "choices"):
        if record.get(key):
            return [_text(one) for one in listed(record[key])]
    for keys in ([f"choice_{letter.lower()}" for letter in LETTERS], list(LETTERS)):
        found = [record[key] for key in keys if _text(record.get(key))]
        if found:
            return [str(one) for one in found]
    return []


def listed(value: Any) -> list[str]:
    """Options or answers of a document: a list, a string that holds one, one value, or none."""
    if isinstance(value, (list, tuple)):
        return [
            str(one["answer"]) if isinstance(one, dict) and "answer" in one else str(one) for one in value
        ]
    return [] if value is None else alternatives(str(value))


def _text(value: Any) -> str:
    """A field as text; what stands for no value is none."""
    return "" if value is None or value != value or str(value) == "nan" else str(value)


def _references(record: Mapping[str, Any], choices: list[str], kind: str) -> list[str]:
    value = next((record[key] for key in _ANSWERS if record.get(key) not in (None, [], "")), None)
    if value is None:
        raise InputError("no answer; a test split without labels can be submitted, not scored here")
    if kind in ("ai2d", "options") and choices and str(value).isdigit():
        if int(value) >= len(choices):
            raise InputError(f"answer {value}: there are {len(choices)} options, counted from 0")
        return [LETTERS[int(value)]]
    return listed(value)


def _pictures(store: Store, folder: Path, number: int, record: Mapping[str, Any]) -> Iterator[Picture]:
    for key in ("image", "images", "decoded_image", *(f"image_{place}" for place in range(1, 8))):
        value = record.get(key)
        if value is None or (key == "image" and record.get("decoded_image") is not None):
            continue
        several = isinstance(value, (list, tuple))
        for place, one in enumerate(value if several else [value]):
            found = image_source(one, folder)
            if found.path is not None:
                yield found.path
            else:
                yield functools.partial(_document_bytes, store, number, key, place if several else None)


def _document_bytes(store: Store, number: int, key: str, place: int | None) -> bytes:
    value = store[number][key]
    return image_source(value if place is None else value[place], store.path.parent).bytes()
