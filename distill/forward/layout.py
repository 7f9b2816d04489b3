"""How questions about the same images and their responses lie in a row: as a tree.

In: rows of prompts and responses as token ids. Out: a packed batch: positions, visibility, predictions.
Not here: features, forwards (`distill/forward/tree.py`).

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

import numpy as np
import torch
from transformers import PreTrainedModel

from distill.forward.features import accepted, base_of, image_token
from distill.inputs.encoding import Prompt

ROOT, PADDING = -1, -2


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
        by_axes(at), tuple(rows), pad_id, tuple(next_g), tuple(positions_g),
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
    ids, mask = pad([prompt.ids for prompt in prompts], 0, left=False)
    found = base.get_rope_index(
        input_ids=ids,
        attention_mask=mask,
        mm_token_type_ids=(ids == image_token(model)).long(),
        **{k: v.cpu() for k, v in joined([accepted(base.get_rope_index, p) for p in prompts]).items()},
    )[0].numpy()
    positions = [found[:, i, : len(prompt.ids)] for i, prompt in enumerate(prompts)]
    return positions, [int(at.max()) + 1 for at in positions]


def joined(tensors: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The vision tensors of several prompts, one behind the other; a prompt without images has none."""
    names = {name: None for found in tensors for name in found}
    return {name: torch.cat([found[name] for found in tensors if name in found]) for name in names}


def pad(sequences: Sequence[Sequence[int]], pad_id: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (N, L) and their mask (N, L), 1 where a token is real."""
    width = max(map(len, sequences))
    ids, mask = np.full((len(sequences), width), pad_id), np.zeros((len(sequences), width), dtype=np.int64)
    for index, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[index, place], mask[index, place] = sequence, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


def by_axes(positions_anl: torch.Tensor) -> torch.Tensor:
    return positions_anl[0] if len(positions_anl) == 1 else positions_anl


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
