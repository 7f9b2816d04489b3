"""Answers from a given list: how likely is each, token by token.

In: the choices and a session that can go on and back. Out: their token ids, the logarithm of each one's
probability. Not here: pictures and prompts (`runtime/session.py`).

The score of a choice is exact: the logarithm of the product of its tokens' probabilities and that of an end
after them, over the whole vocabulary. Choices with a common beginning share its steps: they form a tree of
token ids, each inner place of which is one step of the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from runtime.errors import InputError
from runtime.generation import check_finite
from runtime.prompt import encode
from runtime.prompt_spec import PromptSpec

Logits = NDArray[np.float32]


class Walker(Protocol):
    """A sequence that can take a token more and go back to an earlier length."""

    def decode(self, token_id: int) -> Logits: ...

    def fork(self) -> int: ...

    def go_back(self, length: int) -> None: ...


@dataclass
class Node:
    """A place in the tree: which tokens may follow, and the choice that may end here."""

    following: dict[int, Node] = field(default_factory=dict)
    ends: int | None = None


def tree(choices: Sequence[Sequence[int]], names: Sequence[str]) -> Node:
    """The tree of token ids. Raises InputError when two choices are the same ids, or one is none."""
    root = Node()
    for index, ids in enumerate(choices):
        node = root
        for token in ids:
            node = node.following.setdefault(token, Node())
        if node is root:
            raise InputError(f"choices: {names[index]!r} is empty; give texts")
        if node.ends is not None:
            raise InputError(f"choices: {names[index]!r} and {names[node.ends]!r} are the same answer")
        node.ends = index
    return root


def spellings(spec: PromptSpec, tokenizer: Tokenizer, names: Sequence[str]) -> list[list[list[int]]]:
    """Ids of all choices behind the opening of an answer, in one or two spellings.

    As the template writes an answer, if that is known; else bare and behind a blank, and the model decides
    (`likelier`). Raises InputError for no choice and for an empty one.
    """
    if not names:
        raise InputError("choices: got none; give one or more")
    if odd := [name for name in names if not isinstance(name, str)]:
        raise InputError(f"choices: got {odd[0]!r}, expected texts")
    if empty := [name for name in names if not name.strip()]:
        raise InputError(f"choices: {empty[0]!r} is empty; give texts")
    leads = [spec.later.answer_before] if spec.later else ["", " "]
    return [[spelled(tokenizer, spec.assistant, lead + name) for name in names] for lead in leads]


def spelled(tokenizer: Tokenizer, opening: Sequence[int], text: str) -> list[int]:
    """Ids of `text` behind the ids of an answer's opening, as if both had been tokenised as one string.

    Where the text would change the opening's own ids, which are fixed, it is tokenised alone.
    """
    before = tokenizer.decode(list(opening), skip_special_tokens=False)
    whole = encode(tokenizer, before + text)
    if whole[: len(opening)] == list(opening):
        return whole[len(opening) :]
    return encode(tokenizer, text)


def likelier(spellings: Sequence[Sequence[Sequence[int]]], logits: Logits) -> int:
    """The spelling (a list of ids for each choice) whose first tokens have more probability together."""
    masses = [
        np.logaddexp.reduce([logits[token] for token in {ids[0] for ids in choices if ids}], initial=-np.inf)
        for choices in spellings
    ]
    return int(np.argmax(masses))


def score(
    walker: Walker,
    root: Node,
    number: int,
    logits: Logits,
    stop_ids: Sequence[int],
    cancelled: Callable[[], bool],
) -> tuple[float, ...] | None:
    """Natural logarithms of the choices' probabilities; `logits` (vocab,) are those after the prompt.

    None when it was cancelled. The walker is left at one of the choices.
    """
    found = [float("-inf")] * number

    def visit(node: Node, logits: Logits, so_far: float) -> bool:
        logs = log_softmax(logits)
        if node.ends is not None:
            found[node.ends] = so_far + float(np.logaddexp.reduce(logs[list(stop_ids)]))
        last = len(node.following) - 1
        length = walker.fork() if last > 0 else 0
        for index, (token, child) in enumerate(node.following.items()):
            if cancelled():
                return False
            if index:
                walker.go_back(length)
            if not visit(child, walker.decode(token), so_far + float(logs[token])):
                return False
        return True

    return tuple(found) if visit(root, logits, 0.0) else None


def draw(log_probabilities: Sequence[float], temperature: float, seed: int) -> int:
    """The likeliest choice, the first of equal ones; above temperature 0 one in proportion to p^(1 / T)."""
    values = np.asarray(log_probabilities, dtype=np.float64)
    if temperature == 0.0:
        return int(np.argmax(values))
    weights = np.exp((values - values.max()) / temperature)
    return int(np.random.default_rng(seed).choice(len(values), p=weights / weights.sum()))


def log_softmax(logits: Logits) -> NDArray[np.float64]:
    """Natural logarithms of probabilities (vocab,). InputError where the largest logit is no number."""
    check_finite(logits.max())
    shifted = logits.astype(np.float64) - float(logits.max())
    return shifted - np.log(np.exp(shifted).sum())
