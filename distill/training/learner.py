"""The student as one module whose forward is the whole loss of a micro-batch, and the models beside it.

In: a student, frozen teachers and a reference. Out: a module for `Accelerator.prepare`, hidden states and
distributions of rows. Not here: the loss (`training/parts.py`), which rows (`training/steps.py`), the loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from distill.forward import tree, visual_drop
from distill.forward.feature_store import FeatureStore
from distill.forward.features import Features, encode_images
from distill.inputs.encoding import Encoder
from distill.losses.objective import Objective
from distill.losses.signal import Head, LiveSignal, Signal
from distill.training.processes import Held, block_classes
from distill.training.student import adapters_off, plain, vision_parameters
from runtime.errors import InputError


class Learner(Held):
    """`learner(part)` is `part(student)`, a micro-batch's loss and figures. DDP and FSDP2 hook this forward,
    so a part may use any piece of the student: image encoder, decoder, the head's weight. With LoRA the
    part gets the base model, in which the adapters are.

    Under FSDP2 blocks of which nothing is trained and that lie outside the decoder (a frozen vision part)
    stay whole: processes may then encode different numbers of images.
    """

    def __init__(self, student: Any) -> None:
        super().__init__(student)
        plain_student = plain(student)
        held_back = {id(p) for p in vision_parameters(plain_student) if not p.requires_grad}
        self._no_split_modules = block_classes(plain_student, without=held_back)

    def forward(self, call: Any) -> Any:
        return call(plain(self.model))

    def tie_weights(self) -> None:
        """For Accelerate, after it has moved weights between devices."""
        cast(Any, self.model).tie_weights()


class FrozenModel:
    """A teacher or a reference model: its weights as `processes.hold` holds them, how it reads prompts.

    `encoder` None: it reads the student's prompts. `cache`: where its image features are kept; None where its
    vision part changes between phases (a mask that touches it). `weight` counts where several teach at once.
    """

    def __init__(
        self,
        held: Held,
        encoder: Encoder | None = None,
        *,
        sharing: str = tree.TREE,
        cache: FeatureStore | None = None,
        weight: float = 1.0,
    ) -> None:
        self.held, self.encoder, self.sharing, self.weight = held, encoder, sharing, weight
        self.cache = cache
        self._head: Head | None = None

    @property
    def model(self) -> PreTrainedModel:
        return cast(PreTrainedModel, self.held.model)

    @torch.no_grad()
    def signal(
        self, rows: Sequence[tree.Row], pad_id: int, kept: Sequence[torch.Tensor] | None = None
    ) -> LiveSignal:
        """Its distributions at every predicting place of the rows. Under FSDP2 all processes call alike.

        `kept`: a row's visual tokens that its language model gets to see (`distill/forward/visual_drop.py`).
        """

        def forward(model: Any) -> torch.Tensor:
            if self._head is None:
                self._head = Head.of(model)
            features = _features(model, rows, self.cache)
            batch = tree.pack(model, rows, pad_id)
            if kept is not None:
                batch, features = visual_drop.drop(model, batch, features, kept)
            return tree.hidden_states(model, batch, features, sharing=self.sharing)

        hidden_th = self.held(forward)
        assert self._head is not None
        return LiveSignal(hidden_th, self._head)


def _features(model: PreTrainedModel, rows: Sequence[tree.Row], cache: FeatureStore | None) -> Features:
    prompts = [row[0].prompt for row in rows]
    return encode_images(model, prompts) if cache is None else cache.features(model, prompts)


@dataclass
class Context:
    """What the micro-batches of a run share.

    `reference`: a frozen copy of the initial student; None with `lora` (adapters off) or where the objective
    needs none. `cache`: image features of a student whose vision part is frozen, None where it learns.
    `visual_keep`: the share of visual tokens that teachers get to see, chosen by the student's attention.
    """

    encoder: Encoder
    switches: Objective
    sharing: str = tree.TREE
    chunk_tokens: int = 1024
    reference: FrozenModel | None = None
    lora: bool = False
    cache: FeatureStore | None = None
    visual_keep: float = 1.0
    _heads: dict[int, Head] = field(default_factory=dict)

    def head(self, student: PreTrainedModel) -> Head:
        if id(student) not in self._heads:
            self._heads[id(student)] = Head.of(student)
        return self._heads[id(student)]

    def hidden(self, student: PreTrainedModel, rows: Sequence[tree.Row], batch: tree.Batch) -> torch.Tensor:
        """(T, hidden) of the student, with gradients."""
        return tree.hidden_states(student, batch, _features(student, rows, self.cache), sharing=self.sharing)

    @torch.no_grad()
    def reference_signal(
        self, student: PreTrainedModel, rows: Sequence[tree.Row], batch: tree.Batch
    ) -> Signal | None:
        """The initial student's distributions, where the loss needs them."""
        if not self.switches.needs_reference:
            return None
        if self.lora:
            with adapters_off(student):
                return LiveSignal(self.hidden(student, rows, batch), self.head(student))
        if self.reference is None:
            raise InputError("the objective has a KL to the initial student (kl_beta) and no reference model")
        return self.reference.signal(rows, self.encoder.pad_id)
