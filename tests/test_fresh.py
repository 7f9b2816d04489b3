from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.checkpoints import write_smolvlm


def test_checkpoint_is_a_plain_hugging_face_directory(tiny_checkpoint: Path) -> None:
    """No code of ours: processor, chat template and generate() answer a question about an image."""
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    image = Image.new("RGB", (100, 40), "red")
    message = {
        "role": "user",
        "content": [{"type": "image", "image": image}, {"type": "text", "text": "color?"}],
    }
    inputs = processor.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 16
    new = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert len(new) > 0
    assert not (tiny_checkpoint / "pytorch_model.bin").exists()
    assert "auto_map" not in json.loads((tiny_checkpoint / "config.json").read_text())


def test_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second, other = (
        write_smolvlm(tmp_path / name, seed=seed) for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    weights = [(path / "model.safetensors").read_bytes() for path in (first, second, other)]
    assert weights[0] == weights[1] != weights[2]


def test_tokenizer_round_trips_any_text(tiny_checkpoint: Path) -> None:
    tokenizer = AutoProcessor.from_pretrained(tiny_checkpoint).tokenizer
    for text in ("what color is the circle?", " naïve 漢字 12 34\n\t", "", "🙂"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert torch.tensor(tokenizer("7").input_ids).numel() == 1
