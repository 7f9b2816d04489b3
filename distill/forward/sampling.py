"""Drawing responses: one prefill of a prompt for all of its responses.

In: a model, rows of questions, features. Out: token ids with their raw log-probs.
Not here: layouts and forwards (`distill/forward/tree.py`), where responses are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TopPLogitsWarper,
)

from distill.forward import tree
from distill.forward.features import Features, base_of, image_token
from distill.forward.tree import NAIVE, PADDING, TREE, Batch, Group, Row


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
class Sampled:
    """One drawn response: token ids (with the end token where it was generated), raw T = 1 log-probs (nats),
    and whether an end token finished it."""

    ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    finished: bool


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    rows: Sequence[Row],
    features: Features,
    count: int,
    sampling: Sampling,
    generator: torch.Generator,
    *,
    pad_id: int,
    eos_ids: Sequence[int],
    sharing: str = TREE,
) -> list[list[Sampled]]:
    """Draw `count` responses to every question from one shared prefill, questions in row order.

    Every token is drawn from the processed distribution (repetition penalty, temperature, top-k, top-p, in
    the order of transformers' generate); its recorded log-prob is the raw one (METHOD 5: mu). Image
    placeholders are never drawn: a response that holds one could not be scored again. `sharing` as in
    `distill/forward/tree.py`.
    """
    asked = [[Group(group.prompt) for group in row] for row in rows]
    batch = tree.pack(model, asked, pad_id)
    prompts = [group.prompt.ids for _, group in batch.flat for _ in range(count)]
    drawer = Drawer(prompts, sampling, generator, pad_id, eos_ids, _placeholders(model), model.device)
    decoder: _Decoder
    if sharing == TREE:
        decoder = _TreeDecoder(model, batch, features, count)
    else:
        decoder = _CacheDecoder(model, batch, features, count, shared=sharing != NAIVE)
    head = model.get_output_embeddings()
    hidden_ah = decoder.first()
    while drawer.step(head(hidden_ah).float()):
        hidden_ah = decoder.next(drawer.alive_a, drawer.last_ids_a)
    return drawer.result(count)


def _placeholders(model: PreTrainedModel) -> list[int]:
    video = getattr(model.config, "video_token_id", None)
    return [image_token(model), *([video] if video is not None else [])]


class _Decoder(Protocol):
    """S responses, ordered question by question. `alive_a` names those that go on, in ascending order."""

    def first(self) -> torch.Tensor:
        """(S, hidden) after the prompts."""

    def next(self, alive_a: torch.Tensor, ids_a: torch.Tensor) -> torch.Tensor:
        """(A, hidden) after one more token of each response that is alive."""


@dataclass
class _Queries:
    """Where the living responses of a step sit: `row_a` of the cache, `slot_a` in the row; Q slots a row."""

    row_a: torch.Tensor
    slot_a: torch.Tensor
    question_bq: torch.Tensor
    branch_bq: torch.Tensor
    depth_bq: torch.Tensor  # at the first step; 0 for padding, at every step
    real_bq: torch.Tensor  # 1, 0 for padding
    position_bq: torch.Tensor
    seen_bqq: torch.Tensor  # of each other, in one step
    seen_bqk: torch.Tensor  # of all that is in the cache


class _TreeDecoder:
    """One row a sequence: at each step every living response of the row is a query with a mask of its own.
    Rows whose responses have all ended leave the cache when half of them have."""

    def __init__(self, model: PreTrainedModel, batch: Batch, features: Features, count: int) -> None:
        self.model, self.pad_id, self.device = model, batch.pad_id, model.device
        self.axes = len(batch.positions_g[0])
        self.cache = DynamicCache()  # plain layers: the mask holds any window
        hidden = tree.run_tree(model, batch, features, past_key_values=self.cache, use_cache=True)
        self.key_q, self.key_r, self.key_d = batch.question_bl, batch.response_bl, batch.depth_bl
        slots = [
            (row, number, len(group.prompt.ids), place, start)
            for (row, number, group, place), start in zip(_last_places(batch), batch.next_g, strict=True)
        ]
        table = torch.tensor(slots, device=self.device).repeat_interleave(count, 0)
        self.row_s, self.question_s, self.depth_s, place_s, self.position_s = table.unbind(1)
        self.branch_s = torch.arange(count, device=self.device).repeat(len(slots))
        self._first = hidden[self.row_s, place_s]
        self.step, self.kept_b = 0, torch.arange(len(batch.rows), device=self.device)
        self._queries: _Queries | None = None

    def first(self) -> torch.Tensor:
        return self._first

    def next(self, alive_a: torch.Tensor, ids_a: torch.Tensor) -> torch.Tensor:
        at = self._queries
        if at is None or len(at.row_a) != len(alive_a):
            at = self._queries = self._arrange(alive_a)
        ids_bq = torch.full_like(at.question_bq, self.pad_id).index_put((at.row_a, at.slot_a), ids_a)
        depth_bq, position_bq = at.depth_bq + self.step * at.real_bq, at.position_bq + self.step
        self.key_q = torch.cat([self.key_q, at.question_bq], 1)
        self.key_r = torch.cat([self.key_r, at.branch_bq], 1)
        self.key_d = torch.cat([self.key_d, depth_bq], 1)
        at.seen_bqk = torch.cat([at.seen_bqk, at.seen_bqq], 2)
        hidden = base_of(self.model)(
            input_ids=ids_bq,
            attention_mask=tree.attention_mask(self.model, at.seen_bqk, depth_bq, self.key_d),
            position_ids=position_bq if self.axes == 1 else position_bq.expand(self.axes, -1, -1),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        self.step += 1
        return hidden[at.row_a, at.slot_a]

    def _arrange(self, alive_a: torch.Tensor) -> _Queries:
        row_a = self._rows(alive_a)
        slot_a = torch.arange(len(row_a), device=self.device) - torch.searchsorted(row_a, row_a)
        shape = len(self.kept_b), int(slot_a.max()) + 1

        def spread(values_s: torch.Tensor, fill: int) -> torch.Tensor:
            empty = torch.full(shape, fill, device=self.device)
            return empty.index_put((row_a, slot_a), values_s[alive_a])

        question, branch = spread(self.question_s, PADDING), spread(self.branch_s, PADDING)
        among = tree.visible(question, branch, question, branch, causal=False)
        before = tree.visible(question, branch, self.key_q, self.key_r, causal=False)
        among[:, :, 0] &= question != PADDING  # padding looks at the first token of the cache instead
        depth, position = spread(self.depth_s, 0), spread(self.position_s, 0)
        real = (question != PADDING).long()
        return _Queries(row_a, slot_a, question, branch, depth, real, position, among, before)

    def _rows(self, alive_a: torch.Tensor) -> torch.Tensor:
        """The cache row of each living response, after ended rows have left."""
        row_a = self.row_s[alive_a]
        living = row_a.unique()
        if 2 * len(living) <= len(self.kept_b):
            index = torch.searchsorted(self.kept_b, living)
            self.cache.reorder_cache(cast(torch.LongTensor, index))
            self.key_q, self.key_r, self.key_d = self.key_q[index], self.key_r[index], self.key_d[index]
            self.kept_b = living
        return torch.searchsorted(self.kept_b, row_a)


def _last_places(batch: Batch) -> list[tuple[int, int, Group, int]]:
    """(row, question in the row, group, place of its last prompt token) of every question."""
    found = []
    for index, row in enumerate(batch.rows):
        shared = end = tree.shared_prefix([group.prompt.ids for group in row])
        for number, group in enumerate(row):
            end += len(group.prompt.ids) - shared
            found.append((index, number, group, end - 1))
    return found


class _CacheDecoder:
    """One sequence a response, in the model's own cache; with `shared` a prompt runs once, and its cache is
    expanded. Ended responses leave the cache when half of them have ended."""

    def __init__(
        self, model: PreTrainedModel, batch: Batch, features: Features, count: int, *, shared: bool
    ) -> None:
        self.model, self.pad_id, self.axes = model, batch.pad_id, len(batch.positions_g[0])
        owner_s = torch.arange(batch.groups, device=model.device).repeat_interleave(count)
        groups = range(batch.groups) if shared else owner_s.tolist()
        filled = tree.prefill(model, batch, features, groups)
        self.cache, self.mask_sl, self._first = filled.cache, filled.mask_nl, filled.hidden_nh
        if shared:
            self._first, self.mask_sl = self._first[owner_s], self.mask_sl[owner_s]
            self.cache.reorder_cache(cast(torch.LongTensor, owner_s))
        self.position_s = torch.tensor(batch.next_g, device=model.device)[owner_s]
        self.step, self.kept_s = 0, torch.arange(len(owner_s), device=model.device)

    def first(self) -> torch.Tensor:
        return self._first

    def next(self, alive_a: torch.Tensor, ids_a: torch.Tensor) -> torch.Tensor:
        if 2 * len(alive_a) <= len(self.kept_s):
            index = torch.searchsorted(self.kept_s, alive_a)
            self.cache.reorder_cache(cast(torch.LongTensor, index))
            self.mask_sl, self.kept_s = self.mask_sl[index], alive_a
        place_a = torch.searchsorted(self.kept_s, alive_a)
        ids_s = torch.full_like(self.kept_s, self.pad_id).index_put((place_a,), ids_a)
        position_sl = (self.position_s[self.kept_s] + self.step)[:, None]
        self.mask_sl = torch.cat([self.mask_sl, torch.ones_like(position_sl)], 1)
        hidden = base_of(self.model)(
            input_ids=ids_s[:, None],
            attention_mask=self.mask_sl,
            position_ids=position_sl if self.axes == 1 else position_sl.expand(self.axes, -1, -1),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        self.step += 1
        return hidden[place_a]


class Drawer:
    """Draws a token at a time for each of S responses until all have ended; `prompts` has S entries."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        generator: torch.Generator,
        pad_id: int,
        eos_ids: Sequence[int],
        never: Sequence[int] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        width = max(map(len, prompts))
        # filled with a token of the prompt's own: the repetition penalty then sees nothing else
        padded = [[p[0]] * (width - len(p)) + list(p) for p in prompts]
        self.ids_sl = torch.tensor(padded, device=device)
        self.start = width
        self.log_probs: list[torch.Tensor] = []
        self.alive_a = torch.arange(len(prompts), device=device)
        self.sampling, self.generator, self.pad_id = sampling, generator, pad_id
        self.eos = torch.tensor(list(eos_ids), dtype=torch.long, device=device)
        self.never = torch.tensor(list(never), dtype=torch.long, device=device)
        self.penalty = LogitsProcessorList()
        if sampling.repetition_penalty != 1.0 and not sampling.greedy:
            self.penalty.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        self.nucleus = LogitsProcessorList([TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else [])

    @property
    def last_ids_a(self) -> torch.Tensor:
        return self.ids_sl[self.alive_a, -1]

    def candidates(self, logits_av: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Processed scores of the top-k tokens (A, k), and their ids. Sorting and drawing among k instead of
        the whole vocabulary gives the same distribution. It depends on each sequence's own ids only."""
        ids_al = cast(torch.LongTensor, self.ids_sl[self.alive_a])
        scores_av = self.penalty(ids_al, cast(torch.FloatTensor, logits_av / self.sampling.temperature))
        scores_av = scores_av.index_fill(-1, self.never, -torch.inf)
        vocabulary = scores_av.shape[-1]
        scores_ak, ids_ak = scores_av.topk(min(self.sampling.top_k or vocabulary, vocabulary))
        return self.nucleus(ids_al, cast(torch.FloatTensor, scores_ak)), ids_ak

    def step(self, logits_av: torch.Tensor) -> bool:
        """Draw one token for each living response; False when all have ended or are at their longest."""
        if self.sampling.greedy:
            drawn_a = logits_av.index_fill(-1, self.never, -torch.inf).argmax(-1)
        else:
            scores_ak, ids_ak = self.candidates(logits_av)
            chance_ak = scores_ak.softmax(-1).to(self.generator.device)
            place_a = torch.multinomial(chance_ak, 1, generator=self.generator).to(ids_ak.device)
            drawn_a = ids_ak.gather(-1, place_a)[:, 0]
        raw_a = logits_av.log_softmax(-1).gather(-1, drawn_a[:, None])[:, 0]
        going = ~torch.isin(drawn_a, self.eos)
        ids_s, raw_s = drawn_a, raw_a
        if len(self.alive_a) < len(self.ids_sl):
            ids_s = torch.full_like(self.ids_sl[:, 0], self.pad_id).index_put((self.alive_a,), drawn_a)
            raw_s = raw_a.new_zeros(len(ids_s)).index_put((self.alive_a,), raw_a)
        self.ids_sl = torch.cat([self.ids_sl, ids_s[:, None]], 1)
        self.log_probs.append(raw_s)
        if not bool(going.all()):
            self.alive_a = self.alive_a[going]
        return len(self.alive_a) > 0 and len(self.log_probs) < self.sampling.max_new_tokens

    def result(self, count: int) -> list[list[Sampled]]:
        new_sl = self.ids_sl[:, self.start :]
        ended_sl = torch.isin(new_sl, self.eos).tolist()
        raw_sl = torch.stack(self.log_probs, 1).tolist()
        drawn = []
        for ids, ended, raw in zip(new_sl.tolist(), ended_sl, raw_sl, strict=True):
            length = ended.index(True) + 1 if True in ended else len(ids)
            drawn.append(Sampled(tuple(ids[:length]), tuple(raw[:length]), True in ended))
        return [drawn[i : i + count] for i in range(0, len(drawn), count)]
