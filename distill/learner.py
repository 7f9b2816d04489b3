"""The student as one module whose forward is the whole loss of a micro-batch.

In: a student. Out: a module for `Accelerator.prepare`. Not here: the loop, what the micro-batches are
(`distill/steps.py`).
"""

from __future__ import annotations

from typing import cast

from transformers import PreTrainedModel

from distill.processes import Held, block_classes


class Learner(Held):
    """`learner(part)` is `part(student)`, a micro-batch's loss and figures. DDP and FSDP2 hook this forward,
    so a part may use any piece of the student: image encoder, decoder, the head's weight."""

    def __init__(self, student: PreTrainedModel) -> None:
        super().__init__(student)
        self._no_split_modules = block_classes(student)

    def tie_weights(self) -> None:
        """For Accelerate, after it has moved weights between devices."""
        cast(PreTrainedModel, self.model).tie_weights()
