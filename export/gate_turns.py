"""A conversation that goes on from its cache must give what a fresh pass over all of it gives.

In: a session over the parts just written, and a reference. Out: logits of both, after each question and after
tokens forced behind the last. Not here: what difference is allowed (`gate_limits.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals.parity.parity import ParityCase
from evals.torch_session import TorchSession, quiet_transformers
from export import prompts, proof
from export.prompts import Message
from runtime.answer import Turn
from runtime.errors import ParityError
from runtime.image import ImageInput
from runtime.prompt_spec import PromptSpec
from runtime.session import Session

Floats = NDArray[np.float32]
FORCED_STEPS = 3


@dataclass(frozen=True)
class Conversation:
    """Questions with their pictures; each but the last has an answer. `forced` ids follow the last."""

    questions: tuple[str, ...]
    pictures: tuple[tuple[ImageInput, ...], ...]
    answers: tuple[str, ...]
    forced: tuple[int, ...]

    def messages(self, reference: TorchSession) -> list[Message]:
        """As the chat template takes them, pictures as the reference's processor does."""
        found = []
        for n, question in enumerate(self.questions):
            images = tuple(reference.prepare(image).source for image in self.pictures[n])
            found.append(Message(question, images))
            found += [Message(self.answers[n], answer=True)] if n < len(self.answers) else []
        return found


@dataclass(frozen=True)
class Later:
    """A conversation as the checkpoint has it: ids after each question, logits (turns + forced, vocab)."""

    talk: Conversation
    prompts: tuple[tuple[int, ...], ...]
    logits: Floats


def choose(
    prompt: PromptSpec,
    images: int,
    context: int,
    cases: Sequence[ParityCase],
    length: Callable[[Conversation], int],
) -> Conversation | None:
    """Three turns, the last with another picture if the bundle takes one; None if the context ends before.

    `length`: tokens up to the last question's answer.
    """
    shown = [tuple(case.images) for case in cases if len(case.images) == 1]
    if prompt.later is None or not shown:
        return None
    another = shown[2 % len(shown)] if prompt.later.user is not None and images > 1 else ()
    forced = cases[0].forced[:FORCED_STEPS]
    for shape in ((shown[1 % len(shown)], (), another), (shown[-1], ())):
        found = Conversation(proof.QUESTIONS[: len(shape)], shape, proof.ANSWERS[: len(shape) - 1], forced)
        if length(found) + len(forced) <= context:
            return found
    return None


def _prompts(session: Session, conversation: Conversation) -> list[tuple[NDArray[np.int64], tuple[Any, ...]]]:
    """After each question: ids of all of it, and its pictures so far."""
    found: list[tuple[NDArray[np.int64], tuple[Any, ...]]] = []
    history: list[Turn] = []
    for n, question in enumerate(conversation.questions):
        prepared = tuple(session.prepare(image) for image in conversation.pictures[n])
        ids = session.prompt_ids(question, prepared, history)
        before = found[-1][1] if found else ()
        found.append((ids, (*before, *prepared)))
        if n < len(conversation.answers):
            history.append(Turn(question, conversation.answers[n], prepared))
    return found


def going_on(session: Session, conversation: Conversation) -> Floats:
    """Logits (turns + forced, vocab) of a session that keeps its cache from turn to turn.

    Raises ParityError when it does not keep it.
    """
    steps = _prompts(session, conversation)
    rows = []
    for n, (ids, prepared) in enumerate(steps):
        features = [session.encode_image(each) for each in prepared]
        rows.append(session.prefill(ids, features, reuse=n > 0))
        if n + 1 < len(steps):
            following = steps[n + 1][0]
            if following[: len(ids)].tolist() != ids.tolist():
                raise ParityError("gate: a later turn's prompt does not begin with the turns before it")
            for token in following[len(ids) : len(ids) + len(_answer(session, conversation.answers[n]))]:
                session.decode(int(token))
            session.decode(conversation.forced[0])  # a generated id that the next prompt does not have
    rows += [session.decode(token) for token in conversation.forced]
    return np.stack(rows)


def _answer(session: Session, text: str) -> list[int]:
    later = session.manifest.prompt.later
    assert later is not None
    return list(session.tokenizer.encode(later.answer_before + text, add_special_tokens=False).ids)


def afresh(session: Session, conversation: Conversation) -> Floats:
    """The same logits, every prompt in a sequence of its own."""
    rows = []
    for ids, prepared in _prompts(session, conversation):
        rows.append(session.prefill(ids, [session.encode_image(each) for each in prepared]))
    rows += [session.decode(token) for token in conversation.forced]
    return np.stack(rows)


def check_ids(session: Session, later: Later) -> None:
    """Raises ParityError when the ids of the session's prompts are not the chat template's."""
    found = [ids.tolist() for ids, _ in _prompts(session, later.talk)]
    if found != [list(ids) for ids in later.prompts]:
        raise ParityError("gate: the ids of a conversation are not the chat template's; wrong later segments")


def template_ids(reference: TorchSession, conversation: Conversation) -> list[list[int]]:
    """Ids of the whole conversation after each question, by the chat template."""
    return [_template(reference, conversation, n)["input_ids"][0].tolist() for n in _turns(conversation)]


def by_transformers(reference: TorchSession, conversation: Conversation) -> Later:
    """The same logits from one pass of the checkpoint's own model over the whole conversation."""
    import torch

    ids = template_ids(reference, conversation)
    found = _template(reference, conversation, _turns(conversation)[-1])
    forced = torch.tensor([list(conversation.forced)])
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if name in found:
            more = forced if name == "input_ids" else torch.full_like(forced, int(name == "attention_mask"))
            found[name] = torch.cat([found[name], more.to(found[name].dtype)], dim=1)
    for module in reference.model.modules():
        if hasattr(module, "rope_deltas"):  # of another prompt
            module.rope_deltas = None
    total = len(ids[-1])
    places = [len(each) - 1 for each in ids] + list(range(total, total + len(conversation.forced)))
    with torch.no_grad():
        out = reference.model(**found, use_cache=False, logits_to_keep=torch.tensor(places))
    return Later(conversation, tuple(map(tuple, ids)), out.logits[0].float().numpy())


def _turns(conversation: Conversation) -> range:
    return range(len(conversation.questions))


def _template(reference: TorchSession, conversation: Conversation, last: int) -> dict[str, Any]:
    """What the checkpoint's processor makes of the conversation up to question `last`."""
    messages = prompts.conversation(conversation.messages(reference)[: 2 * last + 1])
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    with quiet_transformers():
        return dict(reference.processor.apply_chat_template(messages, **options))
