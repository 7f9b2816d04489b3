"""Models and batches of `benchmarks/distill.py`: random weights, random ids, one image a question.

In: a directory, a shape. Out: `student/`, `teacher/` (Hugging Face checkpoints), `batch.pt`.
The models are Qwen3-VL in small (deepstack, M-RoPE, tied head, grouped queries), so large that arithmetic
and not Python takes the time. They are wide and shallow, for what sharing saves depends on how much of a
token's arithmetic is attention: about a tenth here at 650 tokens of context, a twentieth in the 2B model.
The vision part costs a third of a text token per image token, in the 2B model about as much as one.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.against import common
from benchmarks.against.common import Asked, Shape
from distill import fresh
from tests.checkpoints import write_qwen3_vl

RULES = [("*norm*", 1.0), ("*bias", 0.02), ("*embed*", 0.07), ("*", 0.05)]
VISION = {"hidden_size": 192, "intermediate_size": 384, "depth": 3, "num_heads": 4}
PIXELS_A_PATCH = 3 * 2 * 8 * 8  # channels x temporal patch x 8 x 8


@dataclass(frozen=True)
class Sizes:
    hidden: int
    layers: int
    heads: int
    vocab: int = 4096


SIZES = {common.STUDENT: Sizes(640, 2, 10), common.TEACHER: Sizes(768, 3, 12)}
TINY = {common.STUDENT: Sizes(64, 2, 4, 352), common.TEACHER: Sizes(64, 3, 4, 352)}


def make_models(work: Path, sizes: dict[str, Sizes]) -> None:
    for seed, (name, size) in enumerate(sizes.items()):
        out = write_qwen3_vl(
            work / name, seed=seed, hidden=size.hidden, layers=size.layers, heads=size.heads, kv_heads=2
        )
        config = AutoConfig.from_pretrained(out)
        config.text_config.vocab_size = size.vocab
        config.text_config.intermediate_size = 3 * size.hidden
        config.text_config.max_position_embeddings = 4096
        for key, value in VISION.items():
            setattr(config.vision_config, key, value)
        config.vision_config.deepstack_visual_indexes = [0, 1]
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
        fresh.initialise(model, RULES, seed)
        model.tie_weights()
        model.save_pretrained(out)


def make_batch(work: Path, shape: Shape, seed: int = 0) -> list[Asked]:
    """Prompts of exactly `shape.prompt` ids: an image, then random ids."""
    config = AutoConfig.from_pretrained(work / common.STUDENT)
    side = round(shape.image**0.5)
    if side * side != shape.image:
        raise SystemExit(f"an image of {shape.image} tokens is no square")
    draw = np.random.default_rng(seed)
    never = {config.image_token_id, config.video_token_id, config.vision_start_token_id}
    never |= {config.vision_end_token_id, *range(8)}  # the tokenizer's special ids come first
    ordinary = [i for i in range(config.text_config.vocab_size) if i not in never]

    def some(count: int) -> tuple[int, ...]:
        return tuple(int(i) for i in draw.choice(ordinary, count))

    batch = []
    for _ in range(shape.questions):
        image = (config.vision_start_token_id, *[config.image_token_id] * shape.image)
        ids = (*some(4), *image, config.vision_end_token_id)
        grid = torch.tensor([[1, 2 * side, 2 * side]])
        pixels = torch.from_numpy(draw.standard_normal((4 * shape.image, PIXELS_A_PATCH), np.float32))
        distinct = [some(shape.response) for _ in range(shape.distinct)]
        responses = tuple(distinct[i % shape.distinct] for i in range(shape.responses))
        batch.append(Asked((*ids, *some(shape.prompt - len(ids))), pixels, grid, responses))
    common.write(work, batch)
    return batch


def bounds(work: Path, shape: Shape) -> dict[str, float]:
    """What sharing can save at most: how many times fewer tokens a tree feeds than separate sequences.

    `tokens`: text tokens alone, (P + R - 1) G / (P + D (R - 1)) with D distinct responses of G. `weights`:
    text tokens and image patches, each times the weights it passes in the student.
    """
    model = AutoModelForImageTextToText.from_pretrained(work / common.STUDENT)
    fed = shape.prompt + shape.distinct * (shape.response - 1)
    apart = (shape.prompt + shape.response - 1) * shape.responses
    text, vision = _weights(model)
    patches = 4 * shape.image
    return {
        "tokens": apart / fed,
        "weights": (apart * text + shape.responses * patches * vision) / (fed * text + patches * vision),
    }


def _weights(model: PreTrainedModel) -> tuple[int, int]:
    """Weights that a text token and an image patch pass (the head only sees responses: left out)."""
    base = model.base_model
    text = sum(p.numel() for p in base.get_decoder().layers.parameters())
    return text, sum(p.numel() for p in base.visual.parameters())
