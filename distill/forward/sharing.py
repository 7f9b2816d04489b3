"""Which way of prefix sharing suits a model: found by probing, never by its name.

In: a model, an encoder, one row of questions. Out: `tree`, `prefix` or `naive`, and the reason in words.
Not here: the three ways themselves (`distill/forward/tree.py`).

A tree needs layers that mix tokens by attention alone: a convolution or recurrence runs along the row and
carries one branch into the next. A prefix cache needs a cache through which gradients flow, which gradient
checkpointing takes away. Naive is one sequence a response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from distill.forward import tree
from distill.forward.features import accepted, base_of, encode_images, image_token, parameter_names
from distill.forward.tree import MODES, NAIVE, PREFIX, TREE, Group, Row
from distill.inputs.encoding import Encoder, Prompt
from runtime.errors import CheckpointError

FP32_TOLERANCE = 1e-3
"""Largest relative difference that counts as rounding in float32; a leak between branches is above 0.1."""
HALF_TOLERANCE = 3e-2
"""The same in 16-bit floats, where a mode may also differ as much as twice the naive batch does."""
HINTS = {
    tree.TREE: " (a layer carries one branch into the next)",
    PREFIX: " (the cache does not carry all of the prompt)",
    tree.NAIVE: "",
}
MOST_GRADIENTS = 2**24
"""Gradients are compared on the smallest trainable tensors, norms first, up to so many values in total:
they hang in every layer, so whatever leaks in forward or backward reaches some of them."""


ATTENTION_COST = 2.0
"""What an operation of masked attention costs against one of a matrix product: kernels with a mask of their
own reach about half the rate."""
PREFIX_COST = 1.25
"""A prefix cache runs the decoder's layers twice and copies the prompt's keys and values to every response:
what it saves must be worth that."""


@dataclass(frozen=True)
class Shape:
    """A typical question: tokens of its prompt, how many distinct responses, tokens of each."""

    prompt: float
    responses: float
    length: float


def by_cost(model: PreTrainedModel, shape: Shape) -> tuple[str, ...]:
    """The three ways, the cheapest first, by the decoder's operations for a question of this shape.

    A tree of L tokens runs them once and attends over L x L places, most of them masked; a prefix cache
    attends over what is seen; naive repeats the prompt. So long responses are cheaper from a prefix cache.
    """
    config = model.config.get_text_config()
    decoder: Any = cast(Any, model.base_model).get_decoder()
    table: Any = model.get_input_embeddings()
    weights = sum(p.numel() for p in decoder.parameters()) - table.weight.numel()
    heads = config.num_attention_heads
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    layers = config.num_hidden_layers

    def operations(tokens: float, pairs: float) -> float:
        return 2 * weights * tokens + ATTENTION_COST * 4 * width * layers * pairs

    p, r = shape.prompt, shape.length
    fed = shape.responses * r
    cost = {
        TREE: operations(p + fed, (p + fed) ** 2),
        PREFIX: PREFIX_COST * operations(p + fed, p**2 + fed * (p + r)),
        NAIVE: shape.responses * operations(p + r, (p + r) ** 2),
    }
    return tuple(sorted(MODES, key=lambda mode: cost[mode]))


@dataclass(frozen=True)
class _Found:
    hidden_th: torch.Tensor
    gradients: tuple[torch.Tensor | None, ...]


def choose(
    model: PreTrainedModel,
    encoder: Encoder,
    row: Row,
    *,
    gradients: bool = True,
    shape: Shape | None = None,
) -> tuple[str, str]:
    """(mode, reason): the first of tree, prefix, naive that computes what the model alone computes; in the
    order of their cost where the `shape` of the questions is known.

    Compares hidden states, and gradients of trainable parameters where `gradients`, of one question with
    made-up responses (two questions on the image of `row`, batched with a shorter row) against the model
    called on each sequence by itself. Raises CheckpointError where even naive sequences differ.
    """
    rows = _probe(encoder, image_token(model), row[0].prompt)
    parameters = _some_parameters(model) if gradients else []
    training = model.training
    model.eval()  # dropout would hide what is compared
    try:
        modes = MODES if shape is None else by_cost(model, shape)
        return _first_equal(model, tree.pack(model, rows, encoder.pad_id), parameters, gradients, modes)
    finally:
        model.train(training)


def _first_equal(
    model: PreTrainedModel,
    batch: tree.Batch,
    parameters: Sequence[torch.Tensor],
    gradients: bool,
    modes: Sequence[str] = MODES,
) -> tuple[str, str]:
    expected = _measure(_alone(model, batch, grad=bool(parameters)), parameters)
    tolerance = FP32_TOLERANCE
    if model.dtype != torch.float32:
        naive = _measure(_shared(model, batch, tree.NAIVE, grad=bool(parameters)), parameters)
        tolerance = max(HALF_TOLERANCE, 2 * max(_differences(naive, expected).values()))
    reasons = []
    for mode in modes:
        if mode == PREFIX and gradients and tree.is_checkpointing(model):
            reasons.append("prefix: gradient checkpointing drops the cache")
            continue
        try:
            found = _measure(_shared(model, batch, mode, grad=bool(parameters)), parameters)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
            reasons.append(
                f"{mode}: the model refuses ({str(error).splitlines()[0] or type(error).__name__})"
            )
            continue
        apart = _differences(found, expected)
        worst = max(apart, key=lambda name: apart[name])
        if apart[worst] <= tolerance:
            reasons.append(
                f"{mode}: {' and '.join(apart)} equal separate sequences within {apart[worst]:.1g}"
            )
            return mode, "; ".join(reasons)
        reasons.append(
            f"{mode}: {worst} differ from separate sequences by {apart[worst]:.2g} of their size{HINTS[mode]}"
        )
    raise CheckpointError(
        f"{model.config.name_or_path}: no batched forward equals the model alone ({'; '.join(reasons)}); "
        "this architecture needs inputs that a token id and an image do not give"
    )


def _probe(encoder: Encoder, placeholder: int, prompt: Prompt) -> list[list[Group]]:
    """Two questions with two responses each in a row, and a shorter row with one."""
    special = {*encoder.tokenizer.all_special_ids, *encoder.eos_ids, encoder.pad_id, placeholder}
    ordinary = [i for i in range(len(encoder.tokenizer)) if i not in special]
    a, b, c, d, e, f = (ordinary[len(ordinary) * i // 6] for i in range(6))
    longer = Prompt((*prompt.ids[:-1], d, e, f), prompt.vision, prompt.key)
    return [
        [Group(prompt, ((a, b, c, d), (e, f))), Group(longer, ((b, a), (c, d, e)))],
        [Group(prompt, ((f, d, b),))],
    ]


def _some_parameters(model: PreTrainedModel) -> list[torch.Tensor]:
    trainable = sorted((p for p in model.parameters() if p.requires_grad), key=torch.Tensor.numel)
    chosen: list[torch.Tensor] = []
    total = 0
    for parameter in trainable:
        total += parameter.numel()
        if chosen and total > MOST_GRADIENTS:
            break
        chosen.append(parameter)
    return chosen


def _shared(model: PreTrainedModel, batch: tree.Batch, mode: str, *, grad: bool) -> torch.Tensor:
    with torch.set_grad_enabled(grad):
        features = encode_images(model, [batch.rows[0][0].prompt]).select([0] * len(batch.rows))
        return tree.hidden_states(model, batch, features, sharing=mode)


def _alone(model: PreTrainedModel, batch: tree.Batch, *, grad: bool) -> torch.Tensor:
    """(T, hidden): the model on each whole sequence as its processor would hand it over."""
    base = base_of(model)
    found = []
    with torch.set_grad_enabled(grad):
        for _, group in batch.flat:
            inputs = {k: v.to(model.device) for k, v in accepted(base.forward, group.prompt).items()}
            for response in group.responses:
                ids = torch.tensor([[*group.prompt.ids, *response[:-1]]], device=model.device)
                if "mm_token_type_ids" in parameter_names(type(base).forward):
                    inputs["mm_token_type_ids"] = (ids == image_token(model)).long()
                hidden = base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **inputs)
                found.append(hidden.last_hidden_state[0, len(group.prompt.ids) - 1 :])
    return torch.cat(found)


def _measure(hidden_th: torch.Tensor, parameters: Sequence[torch.Tensor]) -> _Found:
    """Hidden states, and gradients of their product with fixed random numbers."""
    hidden_th = hidden_th.float()
    if not parameters:
        return _Found(hidden_th, ())
    weight_th = torch.randn(hidden_th.shape, generator=torch.Generator().manual_seed(0)).to(hidden_th.device)
    found = torch.autograd.grad((hidden_th * weight_th).mean(), list(parameters), allow_unused=True)
    return _Found(hidden_th.detach(), found)


def _differences(found: _Found, expected: _Found) -> dict[str, float]:
    """Size of the difference against the size of what is expected."""
    apart = {"hidden states": _apart([found.hidden_th], [expected.hidden_th])}
    if expected.gradients:
        apart["gradients"] = _apart(found.gradients, expected.gradients)
    return apart


def _apart(found: Sequence[torch.Tensor | None], expected: Sequence[torch.Tensor | None]) -> float:
    difference = size = 0.0
    for one, other in zip(found, expected, strict=True):
        if one is None and other is None:
            continue
        given = torch.zeros_like(cast(torch.Tensor, other)) if one is None else one
        wanted = torch.zeros_like(given) if other is None else other
        difference += float((given.double() - wanted.double()).square().sum())
        size += float(wanted.double().square().sum())
    return (difference / max(size, 1e-30)) ** 0.5
