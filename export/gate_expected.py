"""What the checkpoint answers to everything that the gate asks: arrays, so that its weights can be freed.

In: the checkpoint's reference session and the cases. Out: `Expected`. Not here: comparing (`gate.py`), which
conversation is held (`gate_turns.py`).

The checkpoint answers once for all precisions. A bundle is then judged without it: weights of the
checkpoint, of the float graphs and of a session side by side would be what an export needs most memory for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals.parity.parity import NEAR_TIE, ParityCase, Side, side
from evals.torch_session import TorchSession
from export import gate_turns
from runtime.prompt_spec import PromptSpec

GREEDY_TOKENS = 16
_ROWS = 8192


@dataclass(frozen=True)
class Greedy:
    """The checkpoint's own text for a case, and how far its two best logits were apart at each token."""

    ids: tuple[int, ...]
    margins: tuple[float, ...]

    def near_tie(self, place: int) -> bool:
        """Whether another order of summation could choose another token there."""
        return self.margins[place] < NEAR_TIE


@dataclass(frozen=True)
class Expected:
    """`sides` and `answers`: of each case. `later`: a conversation, unless the bundle takes none.

    `rows`: a hash of each row of the embedding, by id.
    """

    cases: tuple[ParityCase, ...]
    sides: tuple[Side, ...]
    answers: tuple[Greedy, ...]
    later: gate_turns.Later | None
    rows: tuple[bytes, ...]


def record(
    reference: TorchSession, cases: Sequence[ParityCase], prompt: PromptSpec, images: int, context: int
) -> Expected:
    """Ask the checkpoint everything. `images`, `context`: how many a bundle's conversation takes."""
    talk = gate_turns.choose(
        prompt, images, context, cases, lambda each: len(gate_turns.template_ids(reference, each)[-1])
    )
    return Expected(
        cases=tuple(cases),
        sides=tuple(side(reference, case) for case in cases),
        answers=tuple(_greedy(reference, case) for case in cases),
        later=None if talk is None else gate_turns.by_transformers(reference, talk),
        rows=_rows(reference.model.get_input_embeddings()),  # as a module: its rows may be scaled
    )


def _greedy(reference: TorchSession, case: ParityCase) -> Greedy:
    ids, margins = reference.greedy(case.image, case.question, GREEDY_TOKENS)
    return Greedy(tuple(ids), tuple(margins))


def row_marks(rows: NDArray[Any]) -> list[bytes]:
    """A hash of each row of (N, hidden); zeros of either sign are one number."""
    return [
        hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows + np.zeros((), rows.dtype)
    ]


def _rows(embed: Any) -> tuple[bytes, ...]:
    import torch

    found: list[bytes] = []
    for start in range(0, len(embed.weight), _ROWS):
        ids = torch.arange(start, min(start + _ROWS, len(embed.weight)))
        with torch.no_grad():
            found += row_marks(embed(ids).float().numpy())
    return tuple(found)
