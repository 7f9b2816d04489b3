"""What a record of each data format says: messages, pictures, the label.

In: a source of the recipe. Out: `Sample`s by position. Not here: files
(`evals/tasks/readers.py`), hidden labels (`distill/inputs/data.py`).

    conversations   TRL / Hugging Face: `messages` (or `prompt` and `completion`), `images`, perhaps `answer`
    llava           `conversations` of human and gpt, `<image>` placeholders; every gpt turn is a question
    tsv             VLMEvalKit: index, image (base64) or image_path, question, answer, A.., hint
    easy-vqa, digits   tasks that ship with a package
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill.inputs.data import Records, Sample
from distill.recipe import Source
from evals.tasks.images import ImageSource, image_source, listed
from evals.tasks.readers import Store, Tsv, open_store
from runtime.errors import InputError

PLACEHOLDER = re.compile(r"\s*<image>\s*")
NUMBERED = re.compile(r"<image (\d+)>")
NUMBERED_PLACEHOLDER = re.compile(r"\s*<image \d+>\s*")
INDEX_UP_TO = 64
"""VLMEvalKit: an `image` this short is the index of the row that has the picture."""
LLAVA_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
Message = Mapping[str, Any]


def open_records(source: Source) -> Records:
    """The questions of a source. Raises InputError."""
    if source.format in BUILT_IN:
        return BuiltIn(BUILT_IN[source.format], source.split or "")
    path = Path(source.path or "")
    images = Path(source.images) if source.images else path if path.is_dir() else path.parent
    if not images.is_dir():
        raise InputError(f"{images}: data.images is no directory")
    store = open_store(path, source.split)
    return FORMATS[source.format](store, images)


# --- messages ---------------------------------------------------------


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _split_placeholders(text: str, pattern: re.Pattern[str] = PLACEHOLDER) -> list[dict[str, str]]:
    """Text cut at its `<image>` placeholders, white space around them dropped."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(pattern.split(text)):
        parts += [{"type": "image"}] if number else []
        parts += [_text(piece)] if piece else []
    return parts


def _with_images(messages: Sequence[Message], images: int) -> tuple[Message, ...]:
    """Messages whose parts name every picture: where none does, they stand before the first user's text.

    Raises InputError when parts and pictures differ in number.
    """
    named = sum(part["type"] == "image" for message in messages for part in message["content"])
    found = list(messages)
    if images and not named:
        first = next(i for i, message in enumerate(found) if message["role"] == "user")
        content = [{"type": "image"}] * images + list(found[first]["content"])
        found[first] = {**found[first], "content": content}
    elif named != images:
        raise InputError(f"the messages place {named} pictures, the record has {images}")
    return tuple(found)


class Conversations:
    """TRL's and Hugging Face's conversational format; a last assistant turn is the label."""

    def __init__(self, store: Store, images: Path) -> None:
        self._store, self._folder = store, images

    def __len__(self) -> int:
        return len(self._store)

    def sample(self, index: int) -> Sample:
        record = self._store[index]
        turns = self._turns(record)
        inline: list[Any] = []
        given = listed(record.get("images") or record.get("image"))
        marked = sum(str(turn["content"]).count("<image>") for turn in turns if _is_text(turn))
        messages = [self._message(turn, inline, split=marked == len(given) > 0) for turn in turns]
        answer = record.get("answer")
        if messages and messages[-1]["role"] == "assistant":
            last = messages.pop()
            answer = _joined(last) if answer is None else answer
        if not messages or messages[-1]["role"] != "user":
            raise InputError("wanted a user's turn last, or before the assistant's answer")
        pictures = [image_source(value, self._folder) for value in inline or given]
        return Sample(
            id=str(index),
            messages=_with_images(messages, len(pictures)),
            images=tuple(pictures),
            answer=_answer(answer),
            choices=tuple(map(str, record.get("choices") or ())),
            scorer=record.get("scorer") or ("choice" if record.get("choices") else "exact"),
        )

    @staticmethod
    def _turns(record: Mapping[str, Any]) -> list[Message]:
        found: list[Message] = []
        for key, role in (("messages", "user"), ("prompt", "user"), ("completion", "assistant")):
            value = record.get(key)
            if value is not None:
                found += [{"role": role, "content": value}] if isinstance(value, str) else value
        if not found:
            raise InputError(f"no messages; the keys are {', '.join(map(str, record))}")
        return found

    @staticmethod
    def _message(turn: Message, inline: list[Any], *, split: bool) -> Message:
        """One message in parts; pictures that stand in it are moved to `inline`."""
        if turn["role"] not in ("system", "user", "assistant"):
            raise InputError(f"a turn's role is {turn['role']!r}; wanted system, user or assistant")
        if _is_text(turn):
            text = turn["content"]
            return {"role": turn["role"], "content": _split_placeholders(text) if split else [_text(text)]}
        parts: list[dict[str, str]] = []
        for part in turn["content"]:
            if part["type"] == "text":
                parts.append(_text(part["text"]))
            elif part["type"] in ("image", "image_url"):
                value = next((part[k] for k in ("image", "image_url", "url", "path") if part.get(k)), None)
                inline += [] if value is None else [value]
                parts.append({"type": "image"})
            else:
                raise InputError(f"a part of type {part['type']!r}; wanted text or image")
        return {"role": turn["role"], "content": parts}


def _is_text(turn: Message) -> bool:
    return isinstance(turn["content"], str)


def _joined(message: Message) -> str:
    return "\n".join(part["text"] for part in message["content"] if part["type"] == "text")


def _answer(value: Any) -> str | None:
    """The label as text; several accepted answers stay a JSON list, which the scorers read."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else str(value)


class Llava:
    """LLaVA's format. Every gpt turn is a question of its own, asked after the turns before it."""

    def __init__(self, store: Store, images: Path) -> None:
        self._store, self._folder = store, images
        self._ends = np.cumsum([self._answers(record) for record in range(len(store))], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _answers(self, record: int) -> int:
        """How many questions a record holds; one for a faulty record, so that it is reported when read."""
        try:
            turns = self._store[record]["conversations"]
            return max(1, sum(LLAVA_ROLES[turn["from"]] == "assistant" for turn in turns))
        except (InputError, KeyError, TypeError):
            return 1

    def sample(self, index: int) -> Sample:
        place = int(np.searchsorted(self._ends, index, side="right"))
        number = index - (int(self._ends[place - 1]) if place else 0)
        record = self._store[place]
        pictures = [image_source(value, self._folder) for value in listed(record.get("image"))]
        turns: list[Message] = [
            {"role": LLAVA_ROLES[turn["from"]], "content": _split_placeholders(turn["value"])}
            for turn in record["conversations"]
        ]
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        if not answers or answers[number] == 0 or turns[answers[number] - 1]["role"] != "user":
            raise InputError("wanted a human's turn before every gpt turn")
        turns = list(_with_images(turns, len(pictures)))
        asked = tuple(turns[: answers[number]])
        used = sum(part["type"] == "image" for turn in asked for part in turn["content"])
        return Sample(
            id=str(index),
            messages=asked,
            images=tuple(pictures[:used]),
            answer=_joined(turns[answers[number]]),
        )


class VlmEval:
    """VLMEvalKit's TSV. Questions with options are asked as its multiple-choice prompt asks them."""

    def __init__(self, store: Store, images: Path) -> None:
        if not isinstance(store, Tsv):
            raise InputError(f"{store.path}: format tsv needs a .tsv file")
        has = set(store.columns)
        if "question" not in has or not has & {"image", "image_path"}:
            raise InputError(
                f"{store.path}: wanted the columns question and image or image_path, got {sorted(has)}"
            )
        self._store, self._folder = store, images

    def __len__(self) -> int:
        return len(self._store)

    def sample(self, index: int) -> Sample:
        row = self._store[index]
        choices = []
        for letter in string.ascii_uppercase:
            if not _given(row, letter):
                break
            choices.append(row[letter])
        pictures = tuple(image_source(value, self._folder) for value in self._images(row))
        text = _asked(row, choices)
        numbers = [int(number) - 1 for number in NUMBERED.findall(text)]  # MMMU: <image 1> inside the text
        if numbers and not 0 <= min(numbers) <= max(numbers) < len(pictures):
            raise InputError(f"the question names image {max(numbers) + 1}, the row has {len(pictures)}")
        content: list[dict[str, str]] = [{"type": "image"}] * len(pictures) + [_text(text)]
        if numbers:
            content = _split_placeholders(text, NUMBERED_PLACEHOLDER)
            pictures = tuple(pictures[number] for number in numbers)
        return Sample(
            id=str(index),
            messages=({"role": "user", "content": content},),
            images=pictures,
            answer=row["answer"] if _given(row, "answer") else None,
            scorer="choice" if choices else "exact",
            choices=tuple(choices),
        )

    def _images(self, row: Mapping[str, str]) -> list[Any]:
        if not _given(row, "image"):
            return _several(row["image_path"]) if _given(row, "image_path") else []
        value = row["image"]
        if len(value) <= INDEX_UP_TO:
            value = self._store[self._store.row_of(value)]["image"]
        return [{"base64": each} for each in _several(value)]


def _given(row: Mapping[str, str], key: str) -> bool:
    return row.get(key, "") not in ("", "nan", "NaN")


def _several(value: str) -> list[str]:
    """A field that may hold a list of strings."""
    if value.startswith("[") and value.endswith("]"):
        try:
            return list(map(str, ast.literal_eval(value)))
        except (ValueError, SyntaxError) as error:
            raise InputError("the image column begins like a list and is none") from error
    return [value]


def _asked(row: Mapping[str, str], choices: Sequence[str]) -> str:
    if not choices:
        return row["question"]
    lines = [f"Hint: {row['hint']}"] if _given(row, "hint") else []
    lines += [f"Question: {row['question']}", "Options:"]
    lines += [f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, choices, strict=False)]
    return "\n".join([*lines, "Please select the correct answer from the options above."])


class BuiltIn:
    """A task of `evals` with `load(split) -> questions`."""

    def __init__(self, module: str, split: str) -> None:
        try:
            self._questions = importlib.import_module(module).load(split)
        except OSError as error:
            raise InputError(f"{module}: has no split {split!r}; wanted train or test") from error

    def __len__(self) -> int:
        return len(self._questions)

    def sample(self, index: int) -> Sample:
        asked = self._questions[index]
        content = [{"type": "image"}, _text(asked.question)]
        return Sample(
            id=str(index),
            messages=({"role": "user", "content": content},),
            images=(ImageSource(path=asked.image_path),),
            answer=asked.answer,
        )


BUILT_IN = {"easy-vqa": "evals.easy_vqa", "digits": "evals.digits"}
FORMATS: dict[str, Callable[[Store, Path], Records]] = {
    "conversations": Conversations,
    "llava": Llava,
    "tsv": VlmEval,
}
