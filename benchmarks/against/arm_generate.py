"""Drawing the pool: our shared prefill against transformers' `generate`, interleaved in one process.

    python arm_generate.py WORK [--rounds N]

    ours         all questions together: prompt and image once, 8 responses as branches
    a question   generate(num_return_sequences=8), question by question
    batched      generate(num_return_sequences=8), all questions in one call
All draw tokens with top-k 50, top-p 0.9, repetition penalty 1.05; nothing ends a response early. Before
anything is timed, greedy tokens of all must agree.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers import AutoModelForImageTextToText

from benchmarks.against import common
from benchmarks.against.arm_ours import Encoded
from benchmarks.against.common import Asked
from benchmarks.interleaved import measure
from distill.forward import tree
from distill.forward.features import encode_images
from distill.forward.sampling import Sampling, sample

Drawn = list[list[int]]


class Work:
    """One batch of questions, and every way to answer it."""

    def __init__(self, work: Path) -> None:
        self.batch = common.read(work)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(work / common.TEACHER).eval()
        self.model.generation_config.eos_token_id = None
        self.never = [self.model.config.image_token_id, self.model.config.video_token_id]
        self.rows = [[tree.Group(prompt)] for prompt in Encoded(self.batch).prompts.values()]
        self.count = len(self.batch[0].responses)
        self.length = len(self.batch[0].responses[0])

    def ours(self, greedy: bool = False) -> Drawn:
        features = encode_images(self.model, [row[0].prompt for row in self.rows])
        drawn = sample(
            self.model,
            self.rows,
            features,
            self.count,
            Sampling(self.length, greedy=greedy),
            torch.Generator().manual_seed(0),
            pad_id=0,
            eos_ids=(),
        )
        return [list(response.ids) for responses in drawn for response in responses]

    def a_question(self, greedy: bool = False) -> Drawn:
        return [ids for asked in self.batch for ids in self._generate([asked], greedy)]

    def batched(self, greedy: bool = False) -> Drawn:
        return self._generate(self.batch, greedy)

    def _generate(self, batch: list[Asked], greedy: bool) -> Drawn:
        ids = torch.tensor([asked.ids for asked in batch])
        default = Sampling()
        drawing: dict[str, Any] = {
            "do_sample": True,
            "num_return_sequences": self.count,
            "top_k": default.top_k,
            "top_p": default.top_p,
            "repetition_penalty": default.repetition_penalty,
        }
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == self.model.config.image_token_id).long(),
            pixel_values=torch.cat([asked.pixel_values for asked in batch]),
            image_grid_thw=torch.cat([asked.image_grid_thw for asked in batch]),
            max_new_tokens=self.length,
            suppress_tokens=self.never,
            pad_token_id=0,
            **({"do_sample": False} if greedy else drawing),
        )[:, ids.shape[1] :]
        return (out.repeat_interleave(self.count, 0) if greedy else out).tolist()


def agreement(work: Work) -> float:
    """Share of greedy responses that equal ours, the least of all ways."""
    expected = work.ours(greedy=True)
    found = [work.a_question(greedy=True), work.batched(greedy=True)]
    return min(sum(a == b for a, b in zip(expected, other, strict=True)) / len(expected) for other in found)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work = Work(options.work)
    same = agreement(work)
    arms = {"ours": work.ours, "a question": work.a_question, "batched": work.batched}
    figures = measure(arms, options.rounds, "generation")
    found = {name: asdict(figure) for name, figure in figures.items()}
    print("RESULT " + json.dumps({"arm": "generate", "greedy_equal": same, "figures": found}), flush=True)


if __name__ == "__main__":
    main()
