"""What prefix sharing saves: training and generation as a tree against one sequence per response.

    python benchmarks/sharing.py [--rows 16] [--rounds 12] [--threads 1]

Markdown and JSON on stdout, progress on stderr. The model is the demo's student with random weights on
pictures of easy-VQA; prompts and responses are random ids of fixed length, so every arm does exactly
the same work in every round. Arms are interleaved; a ratio compares two arms within one round.

Arms, training (forward and backward of the mean of -log p) and generation (7 tokens each):
    tree         one row per image: image, prompts and questions once, all responses as branches
    image once   one sequence per response; the image is encoded once and its features are shared
    naive        one sequence per response; each encodes its own image
    generate     transformers.generate(num_return_sequences=8), questions batched (sampling only)
Generation is timed twice: sampled as the pool is (top-k, top-p, repetition penalty), and greedy, which
leaves the model's share alone: choosing a token costs the same however its logits were computed.
Before anything is timed the arms must agree: gradient cosine, loss, greedy tokens.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor

from benchmarks.interleaved import Figure, measure, table
from distill import fresh
from distill.demo import demo_recipe
from distill.demo.vqa import VqaData
from distill.forward import tree
from distill.forward.features import Features, encode_images
from distill.forward.sampling import Sampling, sample
from distill.forward.tree import Group
from distill.inputs.encoding import Prompt
from evals import easy_vqa

BASE = "tree"
# Weights large enough that different prompts get different greedy responses.
RULES = [("*norm*", 1.0), ("*bias", 0.02), ("*embed*", 0.3), ("*", 0.25)]


@dataclass(frozen=True)
class Shape:
    """Images a batch, questions an image, responses a question, tokens of a prompt and of a response."""

    rows: int
    questions: int = 3
    responses: int = 8
    prompt: int = 32
    response: int = 7

    @property
    def sequences(self) -> int:
        return self.rows * self.questions * self.responses


class Work:
    """One batch of fixed shape, and every way to train on it or to answer it."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        self.shape = shape
        self.model, self.data = _student(seed)
        self.pad_id = self.data.tokenizer.pad_token_id
        draw = np.random.default_rng(seed)
        self.rows = [_row(self.data, shape, image, draw) for image in range(shape.rows)]
        self.flat = [
            (image, group.prompt, response)
            for image, row in enumerate(self.rows)
            for group in row
            for response in group.responses
        ]
        self.owner = [image for image, *_ in self.flat]

    # --- training: mean of -log p of every response token ---

    def train_tree(self) -> torch.Tensor:
        batch = tree.pack(self.model, self.rows, self.pad_id)
        return torch.nn.functional.nll_loss(tree.log_probs(self.model, batch), batch.target_t)

    def train_image_once(self) -> torch.Tensor:
        return self._separate(self._images().select(self.owner))

    def train_naive(self) -> torch.Tensor:
        return self._separate(self._images_apart())

    def _images(self) -> Features:
        return encode_images(self.model, [row[0].prompt for row in self.rows])

    def _images_apart(self) -> Features:
        return encode_images(self.model, [prompt for _, prompt, _ in self.flat])

    def _separate(self, features: Features) -> torch.Tensor:
        """Plain causal sequences; only the places that predict reach the head, as in the tree."""
        ids = torch.tensor([[*prompt.ids, *response[:-1]] for _, prompt, response in self.flat])
        target = torch.tensor([response for *_, response in self.flat])
        hidden = self.model.base_model(
            input_ids=ids, mm_encoder_outputs=features.outputs(), use_cache=False
        ).last_hidden_state[:, -self.shape.response :]
        logits = self.model.get_output_embeddings()(hidden).float().flatten(0, 1)
        return torch.nn.functional.nll_loss(logits.log_softmax(-1), target.flatten())

    # --- generation: 8 responses to every question ---

    def generate_tree(self, greedy: bool = False) -> list[list[int]]:
        return self._sample(self.rows, self._images(), self.shape.responses, greedy)

    def generate_image_once(self, greedy: bool = False) -> list[list[int]]:
        return self._sample(self._rows_apart(), self._images().select(self.owner), 1, greedy)

    def generate_naive(self, greedy: bool = False) -> list[list[int]]:
        return self._sample(self._rows_apart(), self._images_apart(), 1, greedy)

    def _rows_apart(self) -> list[list[Group]]:
        return [[Group(prompt)] for _, prompt, _ in self.flat]

    def _sample(self, rows: Any, features: Features, count: int, greedy: bool) -> list[list[int]]:
        """Nothing ends a response early."""
        settings = Sampling(max_new_tokens=self.shape.response, greedy=greedy)
        generator = torch.Generator().manual_seed(0)
        drawn = sample(self.model, rows, features, count, settings, generator, pad_id=self.pad_id, eos_ids=[])
        return [list(response.ids) for responses in drawn for response in responses]

    def generate_generate(self, greedy: bool = False) -> list[list[int]]:
        asked = [group.prompt for row in self.rows for group in row]
        prompts = torch.tensor([prompt.ids for prompt in asked])
        default = Sampling()
        drawing: dict[str, Any] = {
            "do_sample": True,
            "num_return_sequences": self.shape.responses,
            "top_k": default.top_k,
            "top_p": default.top_p,
            "repetition_penalty": default.repetition_penalty,
        }
        out = self.model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            pixel_values=torch.cat([prompt.vision["pixel_values"] for prompt in asked]),
            max_new_tokens=self.shape.response,
            eos_token_id=None,
            **({"do_sample": False} if greedy else drawing),
        )[:, self.shape.prompt :]
        return (out.repeat_interleave(self.shape.responses, 0) if greedy else out).tolist()


def _student(seed: int) -> tuple[Any, VqaData]:
    """The demo's student with its own tokenizer and processor, weights random."""
    demo = demo_recipe.read(demo_recipe.RECIPES / "demo.yaml")
    questions = easy_vqa.load("train")
    texts = [f"User:{q.question}\nAssistant: {q.answer}" for q in questions[:2000]]
    tokenizer = fresh.train_tokenizer(texts, demo.tokenizer.special, demo.tokenizer.vocab_size)
    config = demo.config(demo.students["student"].sizes)
    with tempfile.TemporaryDirectory() as name:
        out = fresh.write_checkpoint(
            Path(name), config, tokenizer, demo.processor, demo.chat_template, rules=RULES, seed=seed
        )
        model = AutoModelForImageTextToText.from_pretrained(out).eval()
        return model, VqaData(questions[:2000], AutoProcessor.from_pretrained(out))


def _row(data: VqaData, shape: Shape, image: int, draw: np.random.Generator) -> list[Group]:
    """Prompts of exactly `shape.prompt` ids: a real prompt's start up to its image, random ids, its end."""
    real = data.prompt("what color is the shape?")
    placeholder = data.tokenizer.convert_tokens_to_ids("<image>")
    start = len(real) - real[::-1].index(placeholder) + 1  # with the token after the image block
    end = real[-2:]
    ordinary = [i for i in range(len(data.tokenizer)) if i not in data.tokenizer.all_special_ids]

    def random(count: int) -> tuple[int, ...]:
        return tuple(draw.choice(ordinary, count).tolist())

    middle = shape.prompt - start - len(end)
    if middle < 1:
        raise SystemExit(f"a prompt of {shape.prompt} tokens is too short: {start + len(end) + 1} at least")
    vision = {"pixel_values": data.pixels([image])[:, None]}
    return [
        Group(
            Prompt((*real[:start], *random(middle), *end), vision, str(image)),
            tuple(random(shape.response) for _ in range(shape.responses)),
        )
        for _ in range(shape.questions)
    ]


# --- what is the same, and what it should cost -------------------------


def gradient(work: Work, loss: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    work.model.zero_grad()
    value = loss()
    value.backward()
    return value.item(), torch.cat([p.grad.flatten() for p in work.model.parameters() if p.grad is not None])


def agreement(work: Work, arms: Mapping[str, Callable[[], Any]], makers: Mapping[str, Any]) -> dict[str, Any]:
    """Gradient and loss of every training arm, greedy tokens of every generation arm, against the tree's."""
    base_loss, base = gradient(work, arms[BASE])
    found: dict[str, Any] = {"gradient_cosine": {}, "loss_difference": {}, "greedy_tokens_equal": {}}
    for name, arm in arms.items():
        loss, other = gradient(work, arm)
        cosine = torch.nn.functional.cosine_similarity(base.double(), other.double(), dim=0)
        found["gradient_cosine"][name] = cosine.item()
        found["loss_difference"][name] = abs(loss - base_loss)
    with torch.no_grad():
        expected = makers[BASE](greedy=True)
        found["distinct_greedy_responses"] = len({tuple(ids) for ids in expected})
        for name, maker in makers.items():
            same = [
                a == b
                for x, y in zip(expected, maker(greedy=True), strict=True)
                for a, b in zip(x, y, strict=True)
            ]
            found["greedy_tokens_equal"][name] = sum(same) / len(same)
    return found


def bounds(work: Work) -> dict[str, float]:
    """How many times fewer tokens a tree feeds than separate sequences: the most that sharing can save.

    `question` is (P + R) G / (P + R G) for one question by itself. `text` counts what is really fed, with
    the image shared by the questions and a response's last token not fed. `layers` weighs image patches
    with the vision layers and text tokens with the text layers: every sequence encodes its own image.
    """
    shape, config = work.shape, work.model.config
    p, r, g = shape.prompt, shape.response, shape.responses
    fed = int((tree.pack(work.model, work.rows, 0).question_bl != tree.PADDING).sum())
    apart = shape.sequences * (p + r - 1)
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    vision = patches * config.vision_config.num_hidden_layers
    text = config.text_config.num_hidden_layers
    return {
        "question": (p + r) * g / (p + r * g),
        "text": apart / fed,
        "layers": (apart * text + shape.sequences * vision) / (fed * text + shape.rows * vision),
    }


def markdown(result: Mapping[str, Any], tables: Mapping[str, Mapping[str, Figure]]) -> str:
    lines = []
    for kind, figures in tables.items():
        title = (
            f"**{kind.capitalize()}**, ms a batch (median); ratios as min / **median** / max of the rounds"
        )
        lines += [title, "", *table(figures), ""]
    bound, same = result["bounds"], result["agreement"]
    lines += [
        f"Bounds by tokens: {bound['question']:.2f} for one question, (P + R) G / (P + R G); "
        f"{bound['text']:.2f} with the image's prefix shared by its questions; "
        f"{bound['layers']:.2f} with an image encoded for every sequence (tokens x layers).",
        f"Same computation: lowest gradient cosine {min(same['gradient_cosine'].values()):.9f}, "
        f"largest difference of the losses {max(same['loss_difference'].values()):.1e}, "
        f"greedy tokens equal {min(same['greedy_tokens_equal'].values()):.1%} "
        f"({same['distinct_greedy_responses']} distinct responses).",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=16, help="images in a batch (the demo's step has 16)")
    parser.add_argument("--rounds", type=int, default=12, help="interleaved repeats of all arms")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    work = Work(Shape(options.rows))
    training = {
        "tree": work.train_tree, "image once": work.train_image_once, "naive": work.train_naive,
    }  # fmt: skip
    making = {
        "tree": work.generate_tree, "image once": work.generate_image_once,
        "naive": work.generate_naive, "generate": work.generate_generate,
    }  # fmt: skip
    same = agreement(work, training, making)
    if min(same["gradient_cosine"].values()) < 0.9999 or min(same["greedy_tokens_equal"].values()) < 0.99:
        raise SystemExit(f"the arms do not compute the same thing: {json.dumps(same)}")
    steps = {name: functools.partial(gradient, work, arm) for name, arm in training.items()}
    greedy = {name: functools.partial(arm, greedy=True) for name, arm in making.items() if name != "generate"}
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} at the start"
    tables = {"training": measure(steps, options.rounds, "training")}
    with torch.no_grad():
        tables["sampling"] = measure(making, options.rounds, "sampling")
        tables["greedy"] = measure(greedy, options.rounds, "greedy")
    result = {
        "shape": asdict(work.shape),
        "parameters": sum(p.numel() for p in work.model.parameters()),
        "threads": options.threads,
        "rounds": options.rounds,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": machine,
        "agreement": same,
        "bounds": bounds(work),
        **{kind: {name: asdict(f) for name, f in figures.items()} for kind, figures in tables.items()},
    }
    print(markdown(result, tables))
    print("\n```json\n" + json.dumps(result) + "\n```")


if __name__ == "__main__":
    main()
