"""Fewer visual tokens for the teacher, chosen by the student's attention (MaskedKD, arXiv 2302.10494).

In: the student's own forward, a packed batch, the teacher's image features. Out: the batch and the features
with the kept visual tokens only, each at its old position; FLOPs saved and what it costs in divergence.
Not here: packing (`distill/forward/tree.py`), the loss, when to use it.

MaskedKD drops patches before a vision transformer. A vision part with merged patches and windows needs its
whole grid, so here the teacher's vision part sees the whole image and its language model, where nearly all
of a large teacher's work is, sees the kept tokens. MaskedKD scores a patch by the attention of the class
token in the student's last layer; there is none here, so a visual token's score is the attention that the
text tokens behind the images (questions and responses) pay it in the student's last attention layer, a mean
over heads and text tokens. It is computed from that layer's queries and keys: no attention map is kept.

Needs tree sharing: a layer that mixes neighbours (a convolution, a recurrence) would mix others once tokens
are gone. Needs an attention implementation from transformers' registry (sdpa, flex_attention, flash): `eager`
is a function of each model's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distill.forward import tree
from distill.forward.features import Features, image_token
from distill.forward.tree import PADDING, Batch
from distill.losses.divergence import jsd_t
from distill.losses.lm_head import Head, row_blocks
from distill.losses.signal import LiveSignal
from runtime.errors import TrainingError


@dataclass
class Seen:
    """Queries (B, heads, L, d) and keys (B, kv heads, L, d) of the last attention layer that ran."""

    layer: int = -1
    query: torch.Tensor | None = None
    key: torch.Tensor | None = None
    scaling: float = 1.0


@contextlib.contextmanager
def watch(model: PreTrainedModel) -> Iterator[Seen]:
    """Remember queries and keys of the decoder's last attention layer while a forward runs in the block.

    The forward itself is untouched. Raises TrainingError for `eager` attention, which cannot be watched.
    """
    name = model.config.get_text_config()._attn_implementation
    if name not in ALL_ATTENTION_FUNCTIONS:
        raise TrainingError(
            f"visual tokens: attention {name!r} of the student cannot be watched; load it with "
            "attn_implementation='sdpa'"
        )
    own = {id(module) for module in cast(Any, model.base_model).get_decoder().modules()}
    plain, seen = ALL_ATTENTION_FUNCTIONS[name], Seen()

    def watching(module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        layer = getattr(module, "layer_idx", None)
        if id(module) in own and layer is not None and layer >= seen.layer:
            scaling = kwargs.get("scaling")
            seen.layer, seen.query, seen.key = layer, query.detach(), key.detach()
            seen.scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        return plain(module, query, key, *args, **kwargs)

    overridden = name in ALL_ATTENTION_FUNCTIONS._local_mapping
    ALL_ATTENTION_FUNCTIONS[name] = watching
    try:
        yield seen
    finally:
        if overridden:
            ALL_ATTENTION_FUNCTIONS[name] = plain
        else:
            del ALL_ATTENTION_FUNCTIONS[name]


@torch.no_grad()
def scores(seen: Seen, model: PreTrainedModel, batch: Batch) -> list[torch.Tensor]:
    """A row's entry: attention (visual tokens,) that the text behind the images pays each visual token.

    Means over heads and text tokens, at most 1 in sum. Empty for a row without images.
    """
    shapes = {(x.shape[0], x.shape[2]) for x in (seen.query, seen.key) if x is not None}
    if shapes != {tuple(batch.ids_bl.shape)}:
        raise TrainingError(
            "visual tokens: the student's attention over the whole tree was not seen; visual_drop needs "
            "sharing: tree"
        )
    visual_bl = batch.ids_bl == image_token(model)
    found = []
    for b, visual_l in enumerate(visual_bl):
        columns = visual_l.nonzero()[:, 0]
        if not len(columns):
            found.append(torch.zeros(0, device=columns.device))
            continue
        behind_l = (batch.question_bl[b] != PADDING) & ~visual_l
        behind_l[: int(columns[-1])] = False
        found.append(_paid(seen, batch, b, behind_l.nonzero()[:, 0], columns))
    return found


def _paid(seen: Seen, batch: Batch, b: int, text: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Mean attention of the `text` places of row b to the `columns`."""
    assert seen.query is not None and seen.key is not None
    key = seen.key[b].float()
    kv_heads, length = key.shape[0], key.shape[1]
    query = seen.query[b].float().unflatten(0, (kv_heads, -1))  # (kv heads, group, L, d)
    visible = tree.visible(
        batch.question_bl[b : b + 1], batch.response_bl[b : b + 1],
        batch.question_bl[b : b + 1], batch.response_bl[b : b + 1], causal=True,
    )[0]  # fmt: skip
    total = torch.zeros(len(columns), device=columns.device)
    for rows in row_blocks(len(text), kv_heads * query.shape[1] * length):
        places = text[rows]
        logits = torch.einsum("kgtd,kld->kgtl", query[:, :, places], key) * seen.scaling
        weights = logits.masked_fill(~visible[places], -math.inf).softmax(-1)
        total += weights[..., columns].mean((0, 1)).sum(0)
    return total / max(1, len(text))


def choose(scores_b: Sequence[torch.Tensor], keep: float) -> list[torch.Tensor]:
    """Which visual tokens of each row stay: the share `keep` with the highest scores, in their old order."""
    if not 0 < keep <= 1:
        raise TrainingError(f"signal.visual_keep {keep} must be above 0 and at most 1")
    return [row.topk(math.ceil(keep * len(row))).indices.sort().values for row in scores_b]


def drop(
    model: PreTrainedModel, batch: Batch, features: Features, kept: Sequence[torch.Tensor]
) -> tuple[Batch, Features]:
    """The teacher's batch and features with the kept visual tokens only; positions stay as they were.

    `kept` holds, a row, indices into its visual tokens. Raises TrainingError where the teacher sees another
    number of visual tokens than the student whose scores chose them.
    """
    visual_bl = batch.ids_bl == image_token(model)
    stays = []
    for b, (chosen, visual_l) in enumerate(zip(kept, visual_bl, strict=True)):
        columns = visual_l.nonzero()[:, 0]
        if len(features.tokens[b]) != len(columns) or (len(chosen) and int(chosen.max()) >= len(columns)):
            raise TrainingError(
                f"visual tokens: the teacher has {len(columns)} in row {b}, the student's choice goes to "
                f"{int(chosen.max()) if len(chosen) else 0}; both must cut an image into the same tokens"
            )
        stay_l = (batch.question_bl[b] != PADDING) & ~visual_l
        stay_l[columns[chosen.to(columns.device)]] = True
        stays.append(stay_l.nonzero()[:, 0])
    return _columns(batch, stays), Features(
        tuple(x[c.to(x.device)] for x, c in zip(features.tokens, kept, strict=True)),
        tuple(
            tuple(level[c.to(level.device)] for level in row)
            for row, c in zip(features.levels, kept, strict=True)
        ),
        features.stacked,
    )


def _columns(batch: Batch, stays: Sequence[torch.Tensor]) -> Batch:
    """The batch with some of each row's tokens, padded at the right again."""
    width = max(map(len, stays))
    device = batch.ids_bl.device
    source = torch.zeros((len(stays), width), dtype=torch.long, device=device)
    real = torch.zeros((len(stays), width), dtype=torch.bool, device=device)
    place = torch.zeros_like(batch.ids_bl)
    for b, stay in enumerate(stays):
        source[b, : len(stay)], real[b, : len(stay)] = stay, True
        place[b, stay] = torch.arange(len(stay), device=device)

    def taken(values: torch.Tensor, fill: int) -> torch.Tensor:
        return values.gather(-1, source.expand(*values.shape[:-1], -1)).masked_fill(~real, fill)

    return dataclasses.replace(
        batch,
        ids_bl=taken(batch.ids_bl, batch.pad_id),
        depth_bl=taken(batch.depth_bl, 0),
        question_bl=taken(batch.question_bl, PADDING),
        response_bl=taken(batch.response_bl, PADDING),
        positions=taken(batch.positions, 0),
        place_t=place[batch.row_t, batch.place_t],
    )


@dataclass(frozen=True)
class Cost:
    """What dropping saves and costs for one batch. FLOPs are the language model's, counted while it runs, the
    LM head not included; `divergence_nats` is the mean JSD between the teacher's answers with all of the
    visual tokens and with the kept ones."""

    visual_tokens: int
    kept_tokens: int
    flops: int
    kept_flops: int
    divergence_nats: float

    @property
    def saved(self) -> float:
        """Share of the FLOPs saved."""
        return 1 - self.kept_flops / self.flops


@torch.no_grad()
def cost(teacher: PreTrainedModel, batch: Batch, features: Features, kept: Sequence[torch.Tensor]) -> Cost:
    """Run the teacher with all and with the kept visual tokens, and compare."""
    from torch.utils.flop_counter import FlopCounterMode

    found: list[tuple[torch.Tensor, int]] = []
    for one, its_features in ((batch, features), drop(teacher, batch, features, kept)):
        with FlopCounterMode(display=False) as counter:
            hidden_th = tree.hidden_states(teacher, one, its_features, sharing=tree.TREE)
        found.append((hidden_th, counter.get_total_flops()))
    head, total = Head.of(teacher), 0.0
    whole, part = (LiveSignal(hidden_th, head) for hidden_th, _ in found)
    for rows in row_blocks(whole.tokens, whole.vocab):
        both = (signal.chunk(rows.start, rows.stop) for signal in (whole, part))
        total += jsd_t(*both).sum().item()
    return Cost(
        sum(map(len, features.tokens)), sum(map(len, kept)), found[0][1], found[1][1],
        total / max(1, whole.tokens),
    )  # fmt: skip
