"""Are these the weights? Fixed questions about fixed images, asked of a server and of the checkpoint.

In: a client; the checkpoint as a model of this process, or a record of an earlier probe. Out: a proof, or
a ServerError. Not here: starting a server.

The server answers greedily. Where it gives token ids and log-probs, the checkpoint scores the same
tokens, and the two must agree to rounding. Where it gives text only, the checkpoint's own greedy text must
be the same, or, because rounding may tip a tie, every token of the server's must be (nearly) its best one.
That tells models apart that answer differently; two masks whose greedy answers agree need log-probs.
Two of the questions differ in the image only: a server that does not see images fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from evals.client import Ask, Choice, Client, ServerError
from runtime import files

NEW_TOKENS = 16
TOLERANCE_NATS = 0.1
"""Mean over tokens of what two implementations of one checkpoint may differ by. 16-bit kernels stay below
0.05; another checkpoint of a family is usually off by more than 0.5."""


@dataclass(frozen=True)
class Proof:
    """How the served weights were proved. `gap_nats` is the mean difference that was found.

    `by`: `log-probs`, `greedy text`, `record` (an earlier answer of the same server), or `first record`
    (nothing to compare with yet).
    """

    model: str
    by: str
    gap_nats: float
    answers: tuple[Choice, ...]


def questions(*, images: bool = True) -> list[list[dict[str, Any]]]:
    """Three chats; the first two ask the same about different images. Without `images`, of text alone."""
    if not images:
        asked = ("Name three colors.", "What is a corner?", "Count from one to five.")
        return [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in asked]
    about = ((0, "Describe this picture."), (1, "Describe this picture."), (2, "What is in the corner?"))
    return [
        [{"role": "user", "content": [{"type": "image", "image": image(i)}, {"type": "text", "text": text}]}]
        for i, text in about
    ]


def image(number: int, side: int = 224) -> Image.Image:
    """A picture that is the same everywhere: coloured waves and a square, different for every number."""
    y, x = np.mgrid[0:side, 0:side]
    waves = [(x * (3 + number) + y * (5 - number)) // 2, x * y // (40 + 25 * number), (x + 2 * number * y)]
    pixels = np.stack([np.mod(wave, 256) for wave in waves], -1).astype(np.uint8)
    corner = side // 3
    pixels[:corner, :corner] = [(200, 30, 30), (30, 60, 210), (40, 170, 60)][number % 3]
    return Image.fromarray(pixels)


def prove(
    client: Client,
    model: PreTrainedModel | None = None,
    processor: ProcessorMixin | None = None,
    *,
    record: Path | None = None,
    checkpoint: str = "",
    images: bool = True,
    tolerance_nats: float = TOLERANCE_NATS,
) -> Proof:
    """Compare the server's answers with `model`'s, or without one with the file `record`.

    `images=False` for a server that reads text alone, such as a judge.

    `record` is written at the first probe and compared with at the next ones, so a server that is started
    again in the middle of a stage must still be the same. Raises ServerError naming what differs.
    """
    chats = questions(images=images)
    ask = Ask(max_new_tokens=NEW_TOKENS, greedy=True, tokens=True)
    answers = [choices[0] for choices in _in_order(client, [(chat, ask) for chat in chats])]
    if images:
        _check_sees_images(client, answers)
    name = checkpoint or client.model
    if model is not None and processor is not None:
        training = model.training
        model.eval()
        compared = [_against(model, processor, *pair) for pair in zip(chats, answers, strict=True)]
        model.train(training)
        worst, by = max(gap for gap, _ in compared), compared[0][1]
        wanted = "the checkpoint in this process"
    elif record is not None and record.exists():
        worst, by = _against_record(answers, _read_record(record)), "record"
        wanted = str(record)
    else:
        worst, by, wanted = 0.0, "first record", ""
    if worst > tolerance_nats:
        raise ServerError(
            f"{client.base_url}: the served weights are not those of {name}: its answers to fixed questions "
            f"differ from {wanted} by {worst:.3f} nats a token (compared by {by}), wanted at most "
            f"{tolerance_nats:g}. Look at the command that starts the server, and at its log for the "
            "weights that it loaded"
        )
    proof = Proof(client.model, by, worst, tuple(answers))
    if record is not None and not record.exists():
        files.write_json(record, [asdict(choice) for choice in answers])
    return proof


def _in_order(client: Client, requests: Sequence[tuple[Any, Ask]]) -> list[list[Choice]]:
    found = dict(client.stream(requests))
    return [found[place] for place in range(len(found))]


def _check_sees_images(client: Client, answers: Sequence[Choice]) -> None:
    """With log-probs, the same question about two images must not give the same numbers."""
    first, second = answers[0], answers[1]
    if first.log_probs and first.token_ids == second.token_ids and first.log_probs == second.log_probs:
        raise ServerError(
            f"{client.base_url}: the server gives the same log-probs to one question about two different "
            "images: it does not see them. Look at its chat template and at its limit of images a prompt"
        )


def _against(
    model: PreTrainedModel, processor: ProcessorMixin, chat: list[dict[str, Any]], answer: Choice
) -> tuple[float, str]:
    """(mean nats by which server and checkpoint differ, compared by what) for one answer."""
    tokenizer = cast(Any, processor).tokenizer
    if answer.token_ids is None and _greedy(model, processor, chat) == answer.text:
        return 0.0, "greedy text"
    ids = answer.token_ids
    if ids is None:
        ids = tuple(tokenizer(answer.text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    ids = ids[: scorable(processor, ids)]
    vocabulary = model.get_output_embeddings().weight.shape[0]
    if not ids or max(ids) >= vocabulary:
        return float("inf"), "token ids"
    log_prob_t, gap_t = score(model, processor, chat, ids)
    if answer.log_probs:
        told_t = torch.tensor(answer.log_probs[: len(ids)])
        return float((log_prob_t - told_t).abs().mean()), "log-probs"
    return float(gap_t.mean()), "greedy text"


def scorable(processor: ProcessorMixin, ids: Sequence[int]) -> int:
    """How many leading tokens can be scored: all before the first placeholder of an image or a video."""
    named = (getattr(processor, f"{kind}_token_id", None) for kind in ("image", "video"))
    placeholders = {token for token in named if token is not None}
    return next((place for place, token in enumerate(ids) if token in placeholders), len(ids))


@torch.no_grad()
def score(
    model: PreTrainedModel, processor: ProcessorMixin, chat: list[dict[str, Any]], ids: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-prob, distance of that from the best token's) of each of T given tokens, each (T,), fp32 nats."""
    inputs = _inputs(model, processor, chat)
    length = inputs["input_ids"].shape[1]
    tail = torch.tensor([list(ids)], device=inputs["input_ids"].device)
    for key, value in inputs.items():
        if value.shape == (1, length):  # a value a token: ids, mask, or the kind of a token (0: text)
            rest = tail if key == "input_ids" else torch.full_like(tail, int(key == "attention_mask"))
            inputs[key] = torch.cat([value, rest.to(value.dtype)], 1)
    logits_tv = cast(Any, model)(**inputs, use_cache=False).logits[0, length - 1 : -1].float()
    log_probs_tv = logits_tv.log_softmax(-1)
    log_prob_t = log_probs_tv.gather(-1, tail[0, :, None])[:, 0]
    return log_prob_t.cpu(), (log_probs_tv.amax(-1) - log_prob_t).cpu()


@torch.no_grad()
def _greedy(model: PreTrainedModel, processor: ProcessorMixin, chat: list[dict[str, Any]]) -> str:
    inputs = _inputs(model, processor, chat)
    drawn = cast(Any, model).generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1, repetition_penalty=1.0
    )
    new = drawn[0, inputs["input_ids"].shape[1] :]
    return str(cast(Any, processor).tokenizer.decode(new, skip_special_tokens=True))


def _inputs(
    model: PreTrainedModel, processor: ProcessorMixin, chat: list[dict[str, Any]]
) -> dict[str, torch.Tensor]:
    encoded: Any = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    inputs = {key: value.to(model.device) for key, value in encoded.items()}
    return {
        key: value.to(model.dtype) if value.is_floating_point() else value for key, value in inputs.items()
    }


def _read_record(path: Path) -> list[Choice]:
    def whole(value: Any) -> Any:
        return None if value is None else tuple(value)

    return [
        Choice(c["text"], c["finish"], whole(c["token_ids"]), whole(c["log_probs"]))
        for c in files.read_json(path)
    ]


def _against_record(answers: Sequence[Choice], recorded: Sequence[Choice]) -> float:
    """Mean difference of the log-probs in nats, the largest of all answers; infinite where answers part.

    Tokens are compared as far as they are the same; an answer whose first token differs is another model's.
    Without log-probs most of the texts must be the same: rounding may tip one.
    """
    pairs = list(zip(answers, recorded, strict=True))
    if not all(choice.log_probs and choice.token_ids for pair in pairs for choice in pair):
        return 0.0 if 2 * sum(now.text == then.text for now, then in pairs) > len(pairs) else float("inf")
    return max(_gap(now, then) for now, then in pairs)


def _gap(now: Choice, then: Choice) -> float:
    gaps = []
    here = zip(now.token_ids or (), now.log_probs or (), strict=True)
    there = zip(then.token_ids or (), then.log_probs or (), strict=True)
    for (token, log_prob), (before, log_prob_before) in zip(here, there, strict=False):
        if token != before:
            break
        gaps.append(abs(log_prob - log_prob_before))
    return float(np.mean(gaps)) if gaps else float("inf")
