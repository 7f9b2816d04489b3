"""Chats as an OpenAI-compatible server wants them, and its answers as it gives them.

In: messages with images, what is asked. Out: JSON bodies; the parts of a chat completion.
Not here: connections, retries.

Servers differ in how they take what the OpenAI API has no field for (top-k, repetition penalty, token
ids). A *dialect* is one such way; the client finds out which one a server understands.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from runtime.errors import InputError

if TYPE_CHECKING:
    from evals.client import Ask


def data_url(image: Image.Image | Path | str) -> str:
    """A PNG data URL of an image's RGB pixels: what the server decodes is what we have."""
    if not isinstance(image, Image.Image):
        image = Image.open(image)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def for_server(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose `{"type": "image", "image": PIL image or path}` parts have become data URLs.

    Raises InputError for an image part without an image: a server would answer without having seen it.
    """
    return [
        {**message, "content": [_part(part) for part in message["content"]]}
        if isinstance(message["content"], (list, tuple))
        else dict(message)
        for message in messages
    ]


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part.get("type") != "image":
        return dict(part)
    image = part.get("image")
    if image is None:
        raise InputError(
            "a message has an image part without an image; wanted {'type': 'image', 'image': ...}: "
            "put the sample's images in with chats.with_images"
        )
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


def with_images(
    messages: Sequence[Mapping[str, Any]], images: Sequence[Image.Image | Path | str]
) -> list[dict[str, Any]]:
    """Put images into the `{"type": "image"}` parts in order. Raises InputError when their numbers differ."""
    left = iter(images)
    filled = [
        {**message, "content": list(_filled(message["content"], left))}
        if isinstance(message["content"], (list, tuple))
        else dict(message)
        for message in messages
    ]
    rest = len(list(left))
    if rest:
        raise InputError(
            f"a sample has {len(images)} images but places for {len(images) - rest}; "
            "wanted one image part a picture"
        )
    return filled


def _filled(content: Sequence[Mapping[str, Any]], images: Iterator[Any]) -> Iterator[dict[str, Any]]:
    for part in content:
        if part.get("type") == "image":
            image = next(images, None)
            if image is None:
                raise InputError("a sample has more image parts than images; wanted one image part a picture")
            yield {"type": "image", "image": image}
        else:
            yield dict(part)


@dataclass(frozen=True)
class Dialect:
    """A way to take options. `body` turns an `Ask` into fields of the request beside model and messages."""

    name: str
    body: Callable[[Ask], dict[str, Any]]


def _vllm(ask: Ask) -> dict[str, Any]:
    """vLLM and SGLang: everything is a field of the request; others ignore what they do not know."""
    body: dict[str, Any] = {"n": 1 if ask.greedy else ask.count, "max_tokens": ask.max_new_tokens}
    if ask.seed is not None:
        body["seed"] = ask.seed
    if ask.greedy:
        body.update(temperature=0.0, top_p=1.0, repetition_penalty=1.0)
    else:
        body.update(
            temperature=ask.temperature,
            top_p=ask.top_p,
            top_k=ask.top_k or -1,
            repetition_penalty=ask.repetition_penalty,
        )
    if ask.tokens:
        body.update(logprobs=True, return_token_ids=True, return_tokens_as_token_ids=True)
    return body


def _transformers(ask: Ask) -> dict[str, Any]:
    """`transformers serve`: a generation config as JSON; one answer a request, no ids, no log-probs."""
    config: dict[str, Any] = {"max_new_tokens": ask.max_new_tokens, "do_sample": not ask.greedy}
    if not ask.greedy:
        config.update(
            temperature=ask.temperature,
            top_p=ask.top_p,
            top_k=ask.top_k,
            repetition_penalty=ask.repetition_penalty,
        )
    body: dict[str, Any] = {"generation_config": json.dumps(config), "max_tokens": ask.max_new_tokens}
    if ask.seed is not None:
        body["seed"] = ask.seed
    return body


def _plain(ask: Ask) -> dict[str, Any]:
    """The OpenAI API alone: no top-k, no repetition penalty, no token ids."""
    body: dict[str, Any] = {
        "n": 1 if ask.greedy else ask.count,
        "max_completion_tokens": ask.max_new_tokens,
        "temperature": 0.0 if ask.greedy else ask.temperature,
        "top_p": 1.0 if ask.greedy else ask.top_p,
    }
    if ask.seed is not None:
        body["seed"] = ask.seed
    if ask.tokens:
        body["logprobs"] = True
    return body


DIALECTS = (Dialect("vllm", _vllm), Dialect("transformers", _transformers), Dialect("openai", _plain))
"""In the order in which they are tried: a server that refuses one is asked in the next."""


Parts = tuple[str, str, "tuple[int, ...] | None", "tuple[float, ...] | None"]


def choices(payload: Mapping[str, Any]) -> list[Parts]:
    """(text, finish reason, token ids, log-probs) of every choice of a chat completion.

    Raises ValueError for what is not a whole one.
    """
    found = payload.get("choices")
    if not isinstance(found, list) or not found:
        raise ValueError(f"no choices; keys are {', '.join(map(str, payload)) or 'none'}")
    parts = []
    for choice in found:
        message = choice.get("message") if isinstance(choice, dict) else None
        if not isinstance(message, dict):
            raise ValueError("a choice without a message")
        text = message.get("content")
        if text is None:
            text = ""
        if not isinstance(text, str):
            raise ValueError(f"a message whose content is a {type(text).__name__}")
        ids, log_probs = _tokens(choice)
        parts.append((text, str(choice.get("finish_reason") or "stop"), ids, log_probs))
    return parts


def _tokens(choice: Mapping[str, Any]) -> tuple[tuple[int, ...] | None, tuple[float, ...] | None]:
    """Token ids (`token_ids`, or inside the log-probs) and log-probs, each None where it is not given."""
    content = (choice.get("logprobs") or {}).get("content") or []
    ids = choice.get("token_ids")
    if ids is None and content:
        named = [_named_id(entry) for entry in content]
        ids = None if None in named else named
    log_probs = [entry.get("logprob") for entry in content]
    if ids is None or len(log_probs) != len(ids) or not all(isinstance(v, (int, float)) for v in log_probs):
        return (None if ids is None else tuple(map(int, ids))), None
    return tuple(map(int, ids)), tuple(float(value) for value in log_probs)


def _named_id(entry: Mapping[str, Any]) -> int | None:
    """The id in a log-prob entry: `id` (llama.cpp) or a token written `token_id:17` (vLLM)."""
    if isinstance(entry.get("id"), int):
        return int(entry["id"])
    token = str(entry.get("token", ""))
    return int(token[9:]) if token.startswith("token_id:") and token[9:].isdigit() else None
