"""Prefix sharing: one forward for all questions about some images and all responses to a question.

In: rows of prompts and responses as token ids, image features. Out: a packed batch, and the hidden states
that predict its response tokens, in one of three ways that compute the same:

    tree    a row is laid out as a tree with a mask; P prompt and G x R response tokens cost P + G x R
    prefix  every prompt once, its cache expanded to its responses; for layers that carry a state along
    naive   one sequence a response: P x G + R x G

Not here: which way suits a model (`distill/sharing.py`), drawing (`distill/sampling.py`), LM head, losses.

A row's tokens, depth first:

    shared prefix (image tokens)
    |-- question 0 -- response 0
    |              `- response 1
    `-- question 1 -- response 0

A token attends to its ancestors only, and its position counts from the root (multi-dimensional positions
go on after the prompt's largest), so every root-to-leaf path is the sequence that the model would see alone.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch.nn.attention.flex_attention import create_block_mask
from transformers import DynamicCache, PreTrainedModel

from distill.encoding import Prompt
from distill.features import Features, accepted, base_of, encode_images, image_token, parameter_names
from runtime.errors import TrainingError

ROOT, PADDING = -1, -2
TREE, PREFIX, NAIVE = MODES = ("tree", "prefix", "naive")


@dataclass(frozen=True)
class Group:
    """One question: its prompt and its distinct responses, as token ids (each at least one token)."""

    prompt: Prompt
    responses: tuple[tuple[int, ...], ...] = ()


Row = Sequence[Group]
"""The groups of a row show the same images; their prompts agree up to the last image token (`row_key`)."""


def row_key(model: PreTrainedModel, prompt: Prompt) -> Hashable:
    """Prompts of equal key may share a row. Text alone: only equal prompts."""
    placeholder = image_token(model)
    if placeholder not in prompt.ids:
        return prompt.ids
    return prompt.key, prompt.ids[: len(prompt.ids) - prompt.ids[::-1].index(placeholder)]


@dataclass(frozen=True)
class Batch:
    """A packed batch on the model's device: B rows of at most L tokens, padded at the right; T predictions of
    R responses to `groups` questions, ordered row, question, response, token. A = 1 or 3 position axes."""

    ids_bl: torch.Tensor
    depth_bl: torch.Tensor  # tokens before this one on its own path
    question_bl: torch.Tensor  # question index in the row; ROOT for the shared prefix, PADDING for padding
    response_bl: torch.Tensor  # response index in the question; ROOT for prefix and question
    row_t: torch.Tensor  # which row predicts
    place_t: torch.Tensor  # at which token of the row
    target_t: torch.Tensor  # which id is to be predicted there
    response_t: torch.Tensor  # global response index, 0..R-1
    group_r: torch.Tensor  # global question index of each response
    length_r: torch.Tensor  # tokens of each response
    positions: torch.Tensor  # (B, L), or (A, B, L) for a model with multi-dimensional positions
    rows: tuple[Row, ...]
    pad_id: int
    next_g: tuple[int, ...]  # position of the first token after each question's prompt
    positions_g: tuple[np.ndarray, ...]  # (A, P) of each question's prompt

    @property
    def groups(self) -> int:
        return len(self.next_g)

    @property
    def visible(self) -> torch.Tensor:
        """(B, L, L) bool: a token sees itself and its ancestors."""
        return visible(self.question_bl, self.response_bl, self.question_bl, self.response_bl, causal=True)

    @property
    def flat(self) -> list[tuple[int, Group]]:
        """(row, group) of every question, in order."""
        return [(row, group) for row, groups in enumerate(self.rows) for group in groups]


# --- layout -----------------------------------------------------------


def pack(model: PreTrainedModel, rows: Sequence[Row], pad_id: int) -> Batch:
    """Lay out rows of questions as trees. A question without responses gets no prediction.

    Raises ValueError where the questions of a row cannot share their images.
    """
    flat = [group for row in rows for group in row]
    positions_g, next_g = _prompt_positions(model, [group.prompt for group in flat])
    placeholder, first = image_token(model), 0
    laid = []
    for row in rows:
        last = first + len(row)
        laid.append(_lay_out(row, positions_g[first:last], next_g[first:last], placeholder))
        first = last
    axes = positions_g[0].shape[0]
    width = max(len(row.ids) for row in laid)
    fills = (pad_id, 0, PADDING, PADDING)
    ids, depth, question, response = (np.full((len(rows), width), fill) for fill in fills)
    positions = np.zeros((axes, len(rows), width), dtype=np.int64)
    for b, row_ in enumerate(laid):
        size = len(row_.ids)
        ids[b, :size], depth[b, :size] = row_.ids, row_.depth
        question[b, :size], response[b, :size] = row_.question, row_.response
        positions[:, b, :size] = np.concatenate(row_.positions, 1)
    device = model.device
    ids_bl, depth_bl, question_bl, response_bl, at = (
        torch.from_numpy(x).to(device) for x in (ids, depth, question, response, positions)
    )
    row_t, place_t, target_t, response_t, group_r, length_r = (
        torch.tensor(x, dtype=torch.long, device=device) for x in _predictions(rows, laid)
    )
    return Batch(
        ids_bl, depth_bl, question_bl, response_bl, row_t, place_t, target_t, response_t, group_r, length_r,
        _by_axes(at), tuple(rows), pad_id, tuple(next_g), tuple(positions_g),
    )  # fmt: skip


@dataclass
class _Laid:
    """One row: token columns, position blocks (A, n), and (parent place, first place) of each response."""

    ids: list[int]
    depth: list[int]
    question: list[int]
    response: list[int]
    positions: list[np.ndarray]
    starts: list[tuple[int, int]]

    def add(self, ids: Sequence[int], depth: int, question: int, response: int, at: np.ndarray) -> None:
        self.ids += ids
        self.depth += range(depth, depth + len(ids))
        self.question += [question] * len(ids)
        self.response += [response] * len(ids)
        self.positions.append(at)


def _lay_out(row: Row, positions_g: Sequence[np.ndarray], next_g: Sequence[int], placeholder: int) -> _Laid:
    shared = shared_prefix([group.prompt.ids for group in row])
    laid = _Laid([], [], [], [], [], [])
    laid.add(row[0].prompt.ids[:shared], 0, ROOT, ROOT, positions_g[0][:, :shared])
    for number, group in enumerate(row):
        tail = group.prompt.ids[shared:]
        if len(row) > 1 and (placeholder in tail or group.prompt.key != row[0].prompt.key):
            raise ValueError(
                "questions of a row must show the same images, before anything that differs: use row_key"
            )
        laid.add(tail, shared, number, ROOT, positions_g[number][:, shared:])
        parent, axes = len(laid.ids) - 1, len(positions_g[number])
        for branch, tokens in enumerate(group.responses):
            fed = tokens[:-1]  # the last token is predicted and feeds nothing
            laid.starts.append((parent, len(laid.ids)))
            at = np.arange(next_g[number], next_g[number] + len(fed))
            laid.add(fed, len(group.prompt.ids), number, branch, np.broadcast_to(at, (axes, len(fed))))
    return laid


def _predictions(rows: Sequence[Row], laid: Sequence[_Laid]) -> tuple[list[int], ...]:
    """row_t, place_t, target_t, response_t, group_r, length_r."""
    row_t: list[int] = []
    place_t: list[int] = []
    target_t: list[int] = []
    response_t: list[int] = []
    group_r: list[int] = []
    length_r: list[int] = []
    groups = 0
    for index, (row, columns) in enumerate(zip(rows, laid, strict=True)):
        starts = iter(columns.starts)
        for group in row:
            for response in group.responses:
                parent, first = next(starts)
                place_t += [parent, *range(first, first + len(response) - 1)]
                row_t += [index] * len(response)
                target_t += response
                response_t += [len(group_r)] * len(response)
                group_r.append(groups)
                length_r.append(len(response))
            groups += 1
    return row_t, place_t, target_t, response_t, group_r, length_r


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix, at most one less than the shortest prompt."""
    limit = min(map(len, prompts)) - 1
    first = prompts[0]
    if all(prompt[:limit] == first[:limit] for prompt in prompts):
        return limit
    return next(i for i in range(limit) if any(prompt[i] != first[i] for prompt in prompts))


def _prompt_positions(
    model: PreTrainedModel, prompts: Sequence[Prompt]
) -> tuple[list[np.ndarray], list[int]]:
    """Positions (A, P) of every prompt, and where a response to it goes on.

    A model that places image tokens in several dimensions says so itself (`get_rope_index`).
    """
    base = base_of(model)
    if not hasattr(base, "get_rope_index"):
        return [np.arange(len(prompt.ids))[None] for prompt in prompts], [len(p.ids) for p in prompts]
    ids, mask = pad_left_or_right([prompt.ids for prompt in prompts], 0, left=False)
    found = base.get_rope_index(
        input_ids=ids,
        attention_mask=mask,
        mm_token_type_ids=(ids == image_token(model)).long(),
        **_joined([accepted(base.get_rope_index, prompt) for prompt in prompts]),
    )[0].numpy()
    positions = [found[:, i, : len(prompt.ids)] for i, prompt in enumerate(prompts)]
    return positions, [int(at.max()) + 1 for at in positions]


def _joined(tensors: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The vision tensors of several prompts, one behind the other; a prompt without images has none."""
    names = {name: None for found in tensors for name in found}
    return {name: torch.cat([found[name] for found in tensors if name in found]) for name in names}


def pad_left_or_right(
    sequences: Sequence[Sequence[int]], pad_id: int, *, left: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (N, L) and their mask (N, L), 1 where a token is real."""
    width = max(map(len, sequences))
    ids, mask = np.full((len(sequences), width), pad_id), np.zeros((len(sequences), width), dtype=np.int64)
    for index, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[index, place], mask[index, place] = sequence, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


# --- masks ------------------------------------------------------------


def visible(
    query_q: torch.Tensor, query_r: torch.Tensor, key_q: torch.Tensor, key_r: torch.Tensor, *, causal: bool
) -> torch.Tensor:
    """(B, Q, K) bool: a query sees prefix, its own question and its own response."""
    same_question = query_q[:, :, None] == key_q[:, None, :]
    same_response = (key_r[:, None, :] == ROOT) | (query_r[:, :, None] == key_r[:, None, :])
    seen = (key_q[:, None, :] == ROOT) | (same_question & same_response)
    if causal:
        seen &= torch.ones(seen.shape[1:], dtype=torch.bool, device=seen.device).tril()
    seen[:, :, 0] |= query_q == PADDING  # padding looks at the first token: no row of the softmax is empty
    return seen


def attention_mask(
    model: PreTrainedModel, seen: torch.Tensor, query_depth: torch.Tensor, key_depth: torch.Tensor
) -> torch.Tensor | dict[str, torch.Tensor | None]:
    """What a base model takes as `attention_mask` for (B, Q, K) visibility.

    One mask, or a dict by layer type where some layers see a window: there a token sees the last `window`
    tokens of its own path, itself included.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    types = set(getattr(config, "layer_types", None) or ())
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
    ids, mask = pad_left_or_right([flat[g][1].prompt.ids for g in groups], batch.pad_id, left=True)
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
        position_ids=_by_axes(torch.from_numpy(positions).to(device)),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1]
    return Prefilled(hidden, cache, mask)


def is_checkpointing(model: PreTrainedModel) -> bool:
    """Whether training recomputes activations layer by layer: layers then run without a cache."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _by_axes(positions_anl: torch.Tensor) -> torch.Tensor:
    return positions_anl[0] if len(positions_anl) == 1 else positions_anl


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
    ids, mask = pad_left_or_right([response[:-1] for response in responses], batch.pad_id, left=False)
    start_r = torch.tensor(batch.next_g, device=model.device)[batch.group_r]
    positions_rl = start_r[:, None] + torch.arange(ids.shape[1], device=model.device)
    later_rlh = base_of(model)(
        input_ids=ids.to(model.device),
        attention_mask=torch.cat([filled.mask_nl[owner_r], mask.to(model.device)], 1),
        position_ids=_by_axes(positions_rl.expand(len(batch.positions_g[0]), -1, -1)),
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
    ids, mask = pad_left_or_right([ids for *_, ids in whole], batch.pad_id, left=False)
    given = [accepted(base.forward, prompt) for _, prompt, _ in whole]
    inputs = _joined([{k: v for k, v in found.items() if not k.startswith("pixel")} for found in given])
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
