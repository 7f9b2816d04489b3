"""What a model is asked: the wording that each harness gives a question of each kind.

In: a question's text, options and fields. Out: the prompt. Not here: reading files, chat templates.
The wordings are those of VLMEvalKit's and lmms-eval's tasks, because a score depends on them; pictures go
before the text, also where VLMEvalKit puts them between (`<image 1>` of MMMU stays in the text).
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LETTERS = string.ascii_uppercase
DIRECTLY = "Answer with the option's letter from the given choices directly."
PHRASE = "Answer the question using a single word or phrase."


@dataclass(frozen=True)
class Asked:
    """A question before its wording. `hint` may be empty; `row` has the data's other fields."""

    question: str
    options: Sequence[str] = ()
    hint: str = ""
    row: Mapping[str, Any] | None = None
    letters: str = LETTERS

    @property
    def lettered(self) -> str:
        """`A. first` and so on, a line each."""
        return "\n".join(
            f"{letter}. {text}" for letter, text in zip(self.letters, self.options, strict=False)
        )

    def field(self, name: str) -> Any:
        return (self.row or {}).get(name)


def raw(asked: Asked) -> str:
    return asked.question


def options_below(asked: Asked) -> str:
    """Our own: the options, if any, and to answer with a letter."""
    return f"{asked.question}\n{asked.lettered}\n{DIRECTLY}" if asked.options else asked.question


def vlmevalkit_mcq(asked: Asked) -> str:
    hint = f"Hint: {asked.hint}\n" if asked.hint else ""
    text = f"{hint}Question: {asked.question}\n"
    if not asked.options:
        return text
    return f"{text}Options:\n{asked.lettered}\nPlease select the correct answer from the options above. \n"


def vlmevalkit_vqa(asked: Asked) -> str:
    return f"{asked.question}\n{PHRASE}"


def lmms_ai2d(asked: Asked) -> str:
    return f"{asked.question}\n{asked.lettered}\n{DIRECTLY}"


def lmms_phrase(asked: Asked) -> str:
    """DocVQA, VQAv2, and the like."""
    return f"{asked.question}\n{PHRASE}"


def lmms_textvqa(asked: Asked) -> str:
    return f"{asked.question.capitalize()}\n{PHRASE}"


def lmms_chartqa(asked: Asked) -> str:
    return f"{asked.question}\nAnswer the question with a single word."


def lmms_mmbench(asked: Asked) -> str:
    hint = f"{asked.hint} " if asked.hint else ""
    return f"{hint}{asked.question} There are several options:\n{asked.lettered}\n\n{DIRECTLY}"


def lmms_mmmu(asked: Asked) -> str:
    if asked.options:
        return f"{asked.question}\n{asked.lettered}\n\n{DIRECTLY}"
    return f"{asked.question}\n\n{PHRASE}"


def lmms_mmstar(asked: Asked) -> str:
    """The options stand in the question."""
    text = asked.question.strip().replace(" Please answer yes or no.", "")
    return f"{text}\n{DIRECTLY.rstrip('.')}"


def lmms_seedbench(asked: Asked) -> str:
    return f"{asked.question}\n{asked.lettered}\n{DIRECTLY}"


def lmms_realworldqa(asked: Asked) -> str:
    """The options and what to answer stand in the question."""
    return asked.question.strip()


def lmms_blink(asked: Asked) -> str:
    """The document has a prompt of its own, options included."""
    letters = ", ".join(LETTERS[: len(asked.options)])
    own = asked.field("prompt") or asked.question
    return (
        f"Note: You only need to respond with {letters} without providing any additional information.\n{own}"
    )


def lmms_mathvista(asked: Asked) -> str:
    """The harness's `format-prompt`, which asks for the bare answer, as scoring without a judge needs it."""
    unit, precision = asked.field("unit"), asked.field("precision")
    text = asked.question.lstrip() + (f" (Unit: {unit})" if unit else "")
    text += f"\n{asked.lettered}" if asked.options else ""
    if asked.field("question_type") == "multi_choice":
        return f"{text}\n{DIRECTLY}"
    kind = asked.field("answer_type")
    if kind == "float":
        places = {1: "one decimal place", 2: "two decimal places"}.get(int(precision or 0))
        form = f"single floating-point number with {places}" if places else "single floating-point number"
    else:
        form = {"integer": "single integer number", "list": "Python list"}.get(str(kind), "")
    return f"{text}\nAnswer the question using a {form}." if form else text


PROMPTS: dict[str, Callable[[Asked], str]] = {
    "raw": raw,
    "options": options_below,
    "vlmevalkit.mcq": vlmevalkit_mcq,
    "vlmevalkit.vqa": vlmevalkit_vqa,
    "lmms.ai2d": lmms_ai2d,
    "lmms.phrase": lmms_phrase,
    "lmms.textvqa": lmms_textvqa,
    "lmms.chartqa": lmms_chartqa,
    "lmms.mmbench": lmms_mmbench,
    "lmms.mmmu": lmms_mmmu,
    "lmms.mmstar": lmms_mmstar,
    "lmms.seedbench": lmms_seedbench,
    "lmms.realworldqa": lmms_realworldqa,
    "lmms.blink": lmms_blink,
    "lmms.mathvista": lmms_mathvista,
}
"""Wordings by the name that `Task.prompt` and eval.json carry."""
