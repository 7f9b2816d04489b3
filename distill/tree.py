"""Prefix sharing: one forward for all questions about an image and all responses to a question.

In: rows of prompts and responses as token ids. Out: a packed batch (tree attention), its log-probs,
and sampled responses from one shared prefill. Not here: losses, text, files.

A row is an image. Its tokens are laid out as a tree, depth first:

    shared prefix (image tokens)
    |-- question 0 -- response 0
    |              `- response 1
    `-- question 1 -- response 0

A token attends to its ancestors only, and its position id counts from the root, so every root-to-leaf
path is exactly the sequence that the model would see alone. A tree of P prefix tokens and G responses
of R tokens costs P + R x G tokens instead of (P + R) x G.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TopPLogitsWarper,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

ROOT, PADDING = -1, -2


@dataclass(frozen=True)
class Group:
    """One question about a row's image: its whole prompt and its distinct responses, as token ids."""

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn (METHOD 3; Sec. 4.1). `greedy` ignores the rest but the length."""

    max_new_tokens: int = 10
    temperature: float = 1.0
    top_p: float = 0.9
    top_k: int = 50
    repetition_penalty: float = 1.05
    greedy: bool = False


@dataclass(frozen=True)
class Tree:
    """A packed batch. B rows of L tokens; T predictions, ordered row, question, response, token."""

    ids_bl: torch.Tensor
    positions_bl: torch.Tensor
    question_bl: torch.Tensor  # question index in the row; ROOT for the shared prefix, PADDING for padding
    response_bl: torch.Tensor  # response index in the question; ROOT for prefix and question
    row_t: torch.Tensor  # which row predicts
    place_t: torch.Tensor  # at which token of the row
    target_t: torch.Tensor  # which id is to be predicted there
    response_t: torch.Tensor  # global response index, 0..responses-1
    group_r: torch.Tensor  # global question index of each response
    length_r: torch.Tensor  # tokens of each response

    @property
    def mask(self) -> torch.Tensor:
        """Additive attention mask (B, 1, L, L)."""
        return _mask(self.question_bl, self.response_bl, self.question_bl, self.response_bl, causal=True)


def pack(rows: Sequence[Sequence[Group]], pad_id: int) -> Tree:
    """Lay out rows of questions as trees. A question without responses gets no prediction."""
    laid = [_lay_out(row) for row in rows]
    length = max(len(ids) for ids, *_ in laid)
    fields = [np.full((len(rows), length), fill) for fill in (pad_id, 0, PADDING, PADDING)]
    for index, columns in enumerate(laid):
        for field, column in zip(fields, columns[:4], strict=True):
            field[index, : len(column)] = column
    columns_t: list[list[int]] = [[] for _ in range(6)]
    row_t, place_t, target_t, response_t, group_r, length_r = columns_t
    groups = 0
    for index, (row, columns) in enumerate(zip(rows, laid, strict=True)):
        starts = iter(columns[4])
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
    tensors = [torch.from_numpy(field) for field in fields]
    flat = [torch.tensor(x, dtype=torch.long) for x in columns_t]
    return Tree(*tensors, *flat)


def _lay_out(
    row: Sequence[Group],
) -> tuple[list[int], list[int], list[int], list[int], list[tuple[int, int]]]:
    """ids, positions, question and response index per token; (parent place, first place) per response."""
    shared = shared_prefix([group.prompt for group in row])
    ids = list(row[0].prompt[:shared])
    positions = list(range(shared))
    question, response = [ROOT] * shared, [ROOT] * shared
    starts = []
    for number, group in enumerate(row):
        tail = group.prompt[shared:]
        ids += tail
        positions += range(shared, len(group.prompt))
        question += [number] * len(tail)
        response += [ROOT] * len(tail)
        parent = len(ids) - 1
        for branch, tokens in enumerate(group.responses):
            starts.append((parent, len(ids)))
            ids += tokens[:-1]  # the last token is predicted and feeds nothing
            positions += range(len(group.prompt), len(group.prompt) + len(tokens) - 1)
            question += [number] * (len(tokens) - 1)
            response += [branch] * (len(tokens) - 1)
    return ids, positions, question, response, starts


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Length of the longest common prefix, at most one less than the shortest prompt."""
    limit = min(map(len, prompts)) - 1
    first = prompts[0]
    for place in range(limit):
        if any(prompt[place] != first[place] for prompt in prompts):
            return place
    return limit


def _mask(
    query_q: torch.Tensor, query_r: torch.Tensor, key_q: torch.Tensor, key_r: torch.Tensor, *, causal: bool
) -> torch.Tensor:
    """(B, 1, Q, K) additive mask: a query sees prefix, its own question and its own response."""
    same_question = query_q[:, :, None] == key_q[:, None, :]
    same_response = (key_r[:, None, :] == ROOT) | (query_r[:, :, None] == key_r[:, None, :])
    seen = (key_q[:, None, :] == ROOT) | (same_question & same_response)
    if causal:
        seen &= torch.ones(seen.shape[1:], dtype=torch.bool).tril()
    seen[:, :, 0] |= query_q == PADDING  # padding looks at the first token: no row of the softmax is empty
    return torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)[:, None]


def encode_images(model: PreTrainedModel, pixels: torch.Tensor) -> torch.Tensor:
    """Image features (B, tokens, hidden) of one image a row, pixels (B, 3, H, W)."""
    found = cast(Any, model).get_image_features(pixel_values=pixels[:, None], return_dict=True)
    return torch.stack(list(found.pooler_output))


def _hidden(model: PreTrainedModel, tree: Tree, features: torch.Tensor, **options: object) -> torch.Tensor:
    image = BaseModelOutputWithPooling(pooler_output=cast(torch.FloatTensor, list(features)))
    return cast(Any, model.base_model)(
        input_ids=tree.ids_bl,
        mm_encoder_outputs={"image": image},
        attention_mask=tree.mask,
        position_ids=tree.positions_bl,
        **options,
    ).last_hidden_state


def log_probs(model: PreTrainedModel, tree: Tree, features: torch.Tensor) -> torch.Tensor:
    """(T, vocabulary) fp32 log-probs at every predicting place. Only those reach the LM head."""
    hidden = _hidden(model, tree, features, use_cache=False)[tree.row_t, tree.place_t]
    return model.get_output_embeddings()(hidden).float().log_softmax(-1)


@dataclass(frozen=True)
class Sampled:
    """One drawn response: token ids (with the end token where it was generated) and raw T = 1 log-probs."""

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    rows: Sequence[Sequence[Group]],
    features: torch.Tensor,
    count: int,
    sampling: Sampling,
    generator: torch.Generator,
    *,
    pad_id: int,
    eos_id: int,
) -> list[list[Sampled]]:
    """Draw `count` responses to every question from one shared prefill, questions in row order.

    Every token is drawn from the processed distribution (repetition penalty, temperature, top-k,
    top-p, in the order of transformers' generate); its recorded log-prob is the raw one (METHOD 5: mu).
    The image placeholder is never drawn: a response that holds it could not be scored again.
    """
    tree = pack([[Group(group.prompt) for group in row] for row in rows], pad_id)
    cache = DynamicCache(config=model.config.get_text_config())
    hidden = _hidden(model, tree, features, past_key_values=cache, use_cache=True)
    most = max(map(len, rows))
    slots = [(index, number) for index, row in enumerate(rows) for number in range(len(row))]
    row_g, number_g = (torch.tensor(x) for x in zip(*slots, strict=True))
    last_g = torch.tensor(_last_places(rows))
    head = model.get_output_embeddings()
    question_bs = torch.full((len(rows), most), PADDING)
    question_bs[row_g, number_g] = number_g
    question_bs = question_bs.repeat_interleave(count, 1)
    branch_bs = torch.arange(count).repeat(most).expand(len(rows), -1)
    position_bs = torch.zeros((len(rows), most), dtype=torch.long)
    position_bs[row_g, number_g] = tree.positions_bl[row_g, last_g]
    position_bs = position_bs.repeat_interleave(count, 1)
    row_s, slot_s = _response_slots(row_g, number_g, count)
    logits_sv = head(hidden[row_g, last_g]).float().repeat_interleave(count, 0)

    draw = _Drawer(rows, count, sampling, generator, pad_id, eos_id, never=[model.config.image_token_id])
    key_q, key_r = tree.question_bl, tree.response_bl
    while not draw.step(logits_sv):
        position_bs = position_bs + 1
        key_q, key_r = torch.cat([key_q, question_bs], 1), torch.cat([key_r, branch_bs], 1)
        ids_bs = torch.full_like(question_bs, pad_id)
        ids_bs[row_s, slot_s] = draw.last_ids_s
        hidden = cast(Any, model.base_model)(
            input_ids=ids_bs,
            attention_mask=_mask(question_bs, branch_bs, key_q, key_r, causal=False),
            position_ids=position_bs,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits_sv = head(hidden[row_s, slot_s]).float()
    return draw.result(count)


def _last_places(rows: Sequence[Sequence[Group]]) -> list[int]:
    """Place of each question's last prompt token in its packed row."""
    places = []
    for row in rows:
        shared = end = shared_prefix([group.prompt for group in row])
        for group in row:
            end += len(group.prompt) - shared
            places.append(end - 1)
    return places


def _response_slots(
    row_g: torch.Tensor, number_g: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and slot of every response, ordered question by question."""
    slot = number_g[:, None] * count + torch.arange(count)
    return row_g.repeat_interleave(count), slot.flatten()


class _Drawer:
    """Draws a token for each of S responses at a time until all have ended."""

    def __init__(
        self,
        rows: Sequence[Sequence[Group]],
        count: int,
        sampling: Sampling,
        generator: torch.Generator,
        pad_id: int,
        eos_id: int,
        never: Sequence[int] = (),
    ) -> None:
        prompts = [group.prompt for row in rows for group in row for _ in range(count)]
        width = max(map(len, prompts))
        # filled with a token of the prompt's own: the repetition penalty then sees nothing else
        self.ids_sl = torch.tensor([[p[0]] * (width - len(p)) + list(p) for p in prompts])
        self.start = width
        self.log_probs: list[torch.Tensor] = []
        self.done_s = torch.zeros(len(prompts), dtype=torch.bool)
        self.sampling, self.generator, self.pad_id, self.eos_id = sampling, generator, pad_id, eos_id
        self.processors = LogitsProcessorList()
        if not sampling.greedy:
            if sampling.repetition_penalty != 1.0:
                self.processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
            if never:
                self.processors.append(SuppressTokensLogitsProcessor(list(never)))
        self.nucleus = LogitsProcessorList([TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else [])

    @property
    def last_ids_s(self) -> torch.Tensor:
        return self.ids_sl[:, -1]

    def candidates(self, logits_sv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Processed scores of the top-k tokens (S, k), and their ids. Sorting and drawing among k instead of
        the whole vocabulary gives the same distribution. It depends on each sequence's own ids only."""
        ids_sl = cast(torch.LongTensor, self.ids_sl)
        scores_sv = self.processors(ids_sl, cast(torch.FloatTensor, logits_sv / self.sampling.temperature))
        vocabulary = scores_sv.shape[-1]
        scores_sk, ids_sk = scores_sv.topk(min(self.sampling.top_k or vocabulary, vocabulary))
        return self.nucleus(ids_sl, cast(torch.FloatTensor, scores_sk)), ids_sk

    def step(self, logits_sv: torch.Tensor) -> bool:
        """Draw one token each; True when every response has ended or is at its longest."""
        if self.sampling.greedy:
            drawn_s = logits_sv.argmax(-1)
        else:
            scores_sk, ids_sk = self.candidates(logits_sv)
            place_s = torch.multinomial(scores_sk.softmax(-1), 1, generator=self.generator)
            drawn_s = ids_sk.gather(-1, place_s)[:, 0]
        raw_s = logits_sv.log_softmax(-1).gather(-1, drawn_s[:, None])[:, 0]
        drawn_s = drawn_s.masked_fill(self.done_s, self.pad_id)
        self.ids_sl = torch.cat([self.ids_sl, drawn_s[:, None]], 1)
        self.log_probs.append(raw_s)
        self.done_s = self.done_s | (drawn_s == self.eos_id)
        return bool(self.done_s.all()) or len(self.log_probs) == self.sampling.max_new_tokens

    def result(self, count: int) -> list[list[Sampled]]:
        new_sl = self.ids_sl[:, self.start :].tolist()
        raw_sl = torch.stack(self.log_probs, 1).tolist()
        drawn = []
        for ids, raw in zip(new_sl, raw_sl, strict=True):
            end = ids.index(self.eos_id) + 1 if self.eos_id in ids else len(ids)
            drawn.append(Sampled(tuple(ids[:end]), tuple(raw[:end])))
        return [drawn[i : i + count] for i in range(0, len(drawn), count)]
