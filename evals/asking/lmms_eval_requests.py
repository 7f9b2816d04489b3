"""The requests of lmms-eval in this project's terms.

In: messages and generation arguments as the harness has them. Out: pictures, question, earlier turns;
`GenerationOptions`. Not here: the harness's classes (`asking/lmms_eval_model.py`), which need its package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runtime.errors import InputError
from runtime.generation import GenerationOptions

IGNORED = frozenset({"num_beams", "use_cache", "pad_token_id", "eos_token_id", "image_aspect_ratio", "seed"})
"""Arguments without a meaning here; another one is told."""
Tell = Callable[[str], None]
Earlier = tuple[list[Any], str, str]
"""Pictures, question and answer of an earlier turn."""


def generation_options(wanted: Mapping[str, Any], max_new_tokens: int, tell: Tell) -> GenerationOptions:
    """The generation arguments of a task, whose names are those of transformers' `generate`, with `until`."""
    given = {key: value for key, value in wanted.items() if value is not None}
    until = given.pop("until", ())
    sample = given.pop("do_sample", None)
    temperature = float(given.pop("temperature", 1.0 if sample else 0.0))
    found: dict[str, Any] = {
        "max_new_tokens": int(given.pop("max_new_tokens", max_new_tokens)),
        "temperature": 0.0 if sample is False else temperature,
        "stop": tuple(one for one in ([until] if isinstance(until, str) else until) if one),
    }
    for name in ("top_k", "top_p", "min_p", "repetition_penalty"):
        if name in given:
            found[name] = given.pop(name)
    if given.get("num_beams", 1) != 1:
        tell(f"num_beams {given['num_beams']}: answers are greedy or sampled, without beams")
    for name in sorted(set(given) - IGNORED):
        tell(f"generation argument {name!r} is not known and has no effect")
    return GenerationOptions(**found)


def turns(messages: Sequence[Mapping[str, Any]], tell: Tell) -> tuple[list[Any], str, list[Earlier]]:
    """The open question's pictures and text, and the turns before it.

    Raises InputError for what a bundle cannot be asked.
    """
    history: list[Earlier] = []
    asked: tuple[list[Any], str] | None = None
    for message in messages:
        seen, text = _content(message, tell)
        if message["role"] == "user" and asked is None:
            asked = (seen, text)
        elif message["role"] == "assistant" and asked is not None and not seen:
            history.append((*asked, text))
            asked = None
        else:
            raise InputError(
                f"messages: a {message['role']} turn cannot stand here; wanted user and assistant in turn, "
                "without a system's"
            )
    if asked is None:
        raise InputError("messages: end without a question")
    return (*asked, history)


def pictures_of(found: Any) -> list[Any]:
    """One picture, a list of them, lists of lists, or none."""
    if found is None:
        return []
    if not isinstance(found, (list, tuple)):
        return [found]
    return [picture for one in found for picture in pictures_of(one)]


def _content(message: Mapping[str, Any], tell: Tell) -> tuple[list[Any], str]:
    if isinstance(message["content"], str):
        return [], message["content"]
    seen: list[Any] = []
    texts: list[str] = []
    for part in message["content"]:
        if part["type"] == "text":
            texts.append(part["text"])
        elif part["type"] == "image":
            if texts:
                tell("a picture stands behind or inside a text; in a bundle's prompt pictures come first")
            seen.append(part["url"])
        else:
            raise InputError(f"messages: hold a {part['type']}; this bundle takes pictures and text")
    return seen, "".join(texts)
