"""Prefix sharing: one forward for all questions about some images and all responses to a question.

In: a packed batch (`forward/layout.py`), image features. Out: the hidden states that predict its response
tokens, in one of three ways that compute the same:

    tree    a row is a tree with a mask; P prompt and G x R response tokens cost P + G x R
    prefix  every prompt once, its cache expanded to its responses; for layers that carry a state along
    naive   one sequence a response: (P + R) x G

Not here: which way suits a model (`forward/sharing.py`), drawing (`forward/sampling.py`), LM head, losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, PreTrainedModel

from distill.forward.features import Features, accepted, base_of, encode_images, image_token, parameter_names
from distill.forward.layout import (
    PADDING,
    ROOT,
    Batch,
    Group,
    Row,
    by_axes,
    joined,
    pack,
    pad,
    row_key,
    shared_prefix,
    visible,
)
from runtime.errors import TrainingError

__all__ = [
    "MODES", "NAIVE", "PADDING", "PREFIX", "ROOT", "TREE", "Batch", "Features", "Group", "Row",
    "attention_mask", "encode_images", "hidden_states", "is_checkpointing", "log_probs", "pack", "prefill",
    "row_key", "run_tree", "shared_prefix", "visible",
]  # fmt: skip

TREE, PREFIX, NAIVE = MODES = ("tree", "prefix", "naive")


# --- masks ------------------------------------------------------------


def attention_mask(
    model: PreTrainedModel, seen: torch.Tensor, query_depth: torch.Tensor, key_depth: torch.Tensor
) -> torch.Tensor | dict[str, torch.Tensor | None]:
    """What a base model takes as `attention_mask` for (B, Q, K) visibility.

    One mask, or a dict by layer type where some layers see a window: there a token sees the last `window`
    tokens of its own path, itself included. Raises NotImplementedError for layers that attend in chunks.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or ())
    if "chunked_attention" in types:
        raise NotImplementedError("some layers attend in chunks")
    full = _as_attention(config, seen, model.dtype)
    if window is None:
        return full
    near = query_depth[:, :, None] - key_depth[:, None, :] < window
    windowed = _as_attention(config, seen & near, model.dtype)
    if not types:
        return windowed
    return {kind: windowed if kind == "sliding_attention" else full for kind in types}


def _as_attention(config: Any, seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, 1, Q, K) in the form of the model's attention: a block mask for FlexAttention, which skips what no
    token of a block sees; boolean for SDPA, which keeps to the type of the queries; else added to scores."""
    if config._attn_implementation == "flex_attention":
        rows, queries, keys = seen.shape
        found = create_block_mask(lambda b, h, q, k: seen[b, q, k], rows, None, queries, keys, seen.device)
        return cast(torch.Tensor, found)
    if config._attn_implementation == "sdpa":
        return seen[:, None]
    zeros = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return zeros.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


# --- forward ----------------------------------------------------------


def hidden_states(
    model: PreTrainedModel, batch: Batch, features: Features | None = None, *, sharing: str = TREE
) -> torch.Tensor:
    """(T, hidden) at every predicting place, the final norm applied: what the LM head takes.

    `features` of the batch's rows; None encodes the images here, with gradients. Cached features (of a frozen
    vision part) save that.
    """
    if features is None:
        features = encode_images(model, [row[0].prompt for row in batch.rows])
    if not len(batch.target_t):
        return torch.empty((0, model.config.get_text_config().hidden_size), device=model.device)
    if sharing == TREE:
        return run_tree(model, batch, features, use_cache=False)[batch.row_t, batch.place_t]
    if sharing == PREFIX:
        return _prefix_states(model, batch, features)
    if sharing == NAIVE:
        return _naive_states(model, batch, features)
    raise ValueError(f"sharing: got {sharing!r}, wanted one of {', '.join(MODES)}")


def log_probs(
    model: PreTrainedModel, batch: Batch, features: Features | None = None, *, sharing: str = TREE
) -> torch.Tensor:
    """(T, vocabulary) fp32 log-probs at every predicting place. Not chunked: for small vocabularies."""
    hidden = hidden_states(model, batch, features, sharing=sharing)
    return model.get_output_embeddings()(hidden).float().log_softmax(-1)


def run_tree(model: PreTrainedModel, batch: Batch, features: Features, **options: object) -> torch.Tensor:
    """(B, L, hidden) of the whole tree."""
    return base_of(model)(
        input_ids=batch.ids_bl,
        mm_encoder_outputs=features.outputs(),
        attention_mask=attention_mask(model, batch.visible, batch.depth_bl, batch.depth_bl),
        position_ids=batch.positions,
        **options,
    ).last_hidden_state


@dataclass
class Prefilled:
    """Prompts that ran once: N of them, padded at the left."""

    hidden_nh: torch.Tensor  # at each prompt's last token
    cache: DynamicCache
    mask_nl: torch.Tensor


def prefill(model: PreTrainedModel, batch: Batch, features: Features, groups: Sequence[int]) -> Prefilled:
    """Run the prompts of `groups` (which may repeat) into a cache of the model's own kind."""
    flat, device = batch.flat, model.device
    ids, mask = pad([flat[g][1].prompt.ids for g in groups], batch.pad_id, left=True)
    axes, (count, width) = len(batch.positions_g[0]), ids.shape
    positions = np.zeros((axes, count, width), dtype=np.int64)
    for place, g in enumerate(groups):
        at = batch.positions_g[g]
        positions[:, place, width - at.shape[1] :] = at
    cache = DynamicCache(config=model.config)
    mask = mask.to(device)
    hidden = base_of(model)(
        input_ids=ids.to(device),
        mm_encoder_outputs=features.select([flat[g][0] for g in groups]).outputs(),
        attention_mask=mask,
        position_ids=by_axes(torch.from_numpy(positions).to(device)),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1]
    return Prefilled(hidden, cache, mask)


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Whether training recomputes activations layer by layer: layers then run without a cache."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _prefix_states(model: PreTrainedModel, batch: Batch, features: Features) -> torch.Tensor:
    """Every prompt once; its cache, through which gradients flow, expanded to its responses."""
    if is_checkpointing(model) and model.training:
        raise TrainingError(
            "sharing: gradient checkpointing drops the cache that prefix sharing needs; use naive or tree"
        )
    responses = [response for _, group in batch.flat for response in group.responses]
    asked = [g for g, (_, group) in enumerate(batch.flat) if group.responses]
    place = {g: n for n, g in enumerate(asked)}
    owner_r = torch.tensor([place[g] for g in batch.group_r.tolist()], device=model.device)
    filled = prefill(model, batch, features, asked)
    first_rh = filled.hidden_nh[owner_r]
    if max(map(len, responses)) == 1:
        return first_rh
    filled.cache.reorder_cache(cast(torch.LongTensor, owner_r))
    ids, mask = pad([response[:-1] for response in responses], batch.pad_id, left=False)
    start_r = torch.tensor(batch.next_g, device=model.device)[batch.group_r]
    positions_rl = start_r[:, None] + torch.arange(ids.shape[1], device=model.device)
    later_rlh = base_of(model)(
        input_ids=ids.to(model.device),
        attention_mask=torch.cat([filled.mask_nl[owner_r], mask.to(model.device)], 1),
        position_ids=by_axes(positions_rl.expand(len(batch.positions_g[0]), -1, -1)),
        past_key_values=filled.cache,
        use_cache=True,
    ).last_hidden_state
    return torch.cat([first_rh[:, None], later_rlh], 1)[batch.response_t, _token_in_response(batch)]


def _token_in_response(batch: Batch) -> torch.Tensor:
    """(T,) 0 for the first token of a response, 1 for the second, ..."""
    first_r = batch.length_r.cumsum(0) - batch.length_r
    return torch.arange(len(batch.target_t), device=first_r.device) - first_r[batch.response_t]


def _naive_states(model: PreTrainedModel, batch: Batch, features: Features) -> torch.Tensor:
    """One sequence a response, padded at the right; the model finds the positions itself."""
    base = base_of(model)
    whole = [(row, g.prompt, (*g.prompt.ids, *r[:-1])) for row, g in batch.flat for r in g.responses]
    ids, mask = pad([ids for *_, ids in whole], batch.pad_id, left=False)
    given = [accepted(base.forward, prompt) for _, prompt, _ in whole]
    inputs = joined([{k: v for k, v in found.items() if not k.startswith("pixel")} for found in given])
    if "mm_token_type_ids" in parameter_names(type(base).forward):
        inputs["mm_token_type_ids"] = (ids == image_token(model)).long()
    hidden = base(
        input_ids=ids.to(model.device),
        mm_encoder_outputs=features.select([row for row, *_ in whole]).outputs(),
        attention_mask=mask.to(model.device),
        use_cache=False,
        **{name: value.to(model.device) for name, value in inputs.items()},
    ).last_hidden_state
    start_r = torch.tensor([len(prompt.ids) - 1 for _, prompt, _ in whole], device=model.device)
    return hidden[batch.response_t, start_r[batch.response_t] + _token_in_response(batch)]
