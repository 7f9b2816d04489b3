"""Prompts that were prepared once are not prepared again: an `Encoder` that remembers.

In: samples. Out: the prompts that `Encoder.encode` gives for them, within a bound of memory.
Not here: how a prompt is made (`distill/inputs/encoding.py`).
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch

from distill.inputs.data import Sample
from distill.inputs.encoding import Encoder, Prompt

MEMORY_MIB = 256
TOKEN_BYTES = 32
"""What an id takes in a tuple, roughly."""


class CachedEncoder(Encoder):
    """Keeps the prompts used last, `memory_mib` of them. A sample is known by its id, its text and its
    images: by their bytes, or by paths of files that stay what they are while a run lasts. Prompts of equal
    images share the processor's tensors, so several questions about one image take little more than one.
    """

    def __init__(self, *args: Any, memory_mib: int = MEMORY_MIB, **options: Any) -> None:
        super().__init__(*args, **options)
        self.memory_bytes, self.prepared = memory_mib << 20, 0
        self._kept: OrderedDict[Hashable, Prompt] = OrderedDict()
        self._pictures: dict[
            str, tuple[Prompt, int]
        ] = {}  # images' hash -> a prompt with them, how many have
        self._bytes = 0
        self._lock = threading.Lock()  # the next step's prompts are prepared in a thread

    def encode(self, sample: Sample) -> Prompt:
        if type(sample) is not Sample:  # its images may be other ones than `images` says
            return super().encode(sample)
        key = (sample.id, sample.images, json.dumps(sample.messages))
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        prompt = super().encode(sample)
        with self._lock:
            self.prepared += 1
            return self._keep(key, prompt)

    def _keep(self, key: Hashable, prompt: Prompt) -> Prompt:
        known, users = self._pictures.get(prompt.key, (prompt, 0))
        if users and not _equal(known, prompt):
            return prompt  # a processor that looks at the text, too: its tensors are this prompt's own
        shared = Prompt(prompt.ids, known.vision, prompt.key)
        self._kept[key] = shared
        self._pictures[prompt.key] = (known, users + 1)
        self._bytes += TOKEN_BYTES * len(prompt.ids) + (0 if users else _size(prompt))
        while self._bytes > self.memory_bytes and len(self._kept) > 1:
            self._drop(self._kept.popitem(last=False)[1])
        return shared

    def _drop(self, prompt: Prompt) -> None:
        known, users = self._pictures.pop(prompt.key)
        if users > 1:
            self._pictures[prompt.key] = (known, users - 1)
        self._bytes -= TOKEN_BYTES * len(prompt.ids) + (0 if users > 1 else _size(prompt))

    @property
    def reading(self) -> str:
        """What two encoders have in common that prepare every sample alike."""
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        facts = {
            "processor": self.processor.to_dict(),
            "template": [self.processor.chat_template, tokenizer.chat_template],
            "vocabulary": backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items()),
            "ids": [self.pad_id, *self.eos_ids],
            "limits": [self.max_prompt_tokens, self.max_pixels],
        }
        return json.dumps(facts, sort_keys=True, default=str)


def _equal(first: Prompt, second: Prompt) -> bool:
    return first.vision.keys() == second.vision.keys() and all(
        torch.equal(tensor, second.vision[name]) for name, tensor in first.vision.items()
    )


def _size(prompt: Prompt) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in prompt.vision.values())
