"""Prompts that are remembered are those that would be prepared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, ProcessorMixin

from distill.inputs.data import Sample
from distill.inputs.encoding import Encoder, Prompt
from distill.inputs.prompt_cache import CachedEncoder
from evals.tasks.images import ImageSource
from runtime.errors import InputError


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    """Two questions about each of three pictures."""
    found = []
    for i in range(3):
        Image.new("RGB", (64, 64), (80 * i, 10, 200)).save(tmp_path / f"{i}.png")
        for text in ("what color?", "is it blue?"):
            content = [{"type": "image"}, {"type": "text", "text": text}]
            images = (ImageSource(path=tmp_path / f"{i}.png"),)
            found.append(Sample(f"s:{len(found)}", ({"role": "user", "content": content},), images))
    return found


def same(first: Prompt, second: Prompt) -> bool:
    vision = first.vision.keys() == second.vision.keys()
    return (
        first == second
        and vision
        and all(torch.equal(first.vision[k], second.vision[k]) for k in first.vision)
    )


def test_the_same_prompts(processor: ProcessorMixin, samples: list[Sample]) -> None:
    plain, cached = Encoder(processor), CachedEncoder(processor)
    for _ in range(2):
        assert all(same(cached.encode(sample), plain.encode(sample)) for sample in samples)
    assert cached.prepared == len(samples)
    first, second = cached.encode(samples[0]), cached.encode(samples[1])
    assert all(first.vision[k] is second.vision[k] for k in first.vision), "one picture, one copy"


def test_memory_is_bounded(processor: ProcessorMixin, samples: list[Sample]) -> None:
    cached = CachedEncoder(processor)
    one = sum(t.numel() * t.element_size() for t in cached.encode(samples[0]).vision.values())
    for room in (one * 2, one // 2, 0):
        cached = CachedEncoder(processor)
        cached.memory_bytes = room
        for _ in range(2):
            for sample in samples:
                cached.encode(sample)
                assert cached._bytes <= max(room, one + 10_000)
        assert cached.prepared > len(samples), "what was dropped is prepared again"
        assert sum(users for _, users in cached._pictures.values()) == len(cached._kept)


def test_an_id_alone_is_not_enough(processor: ProcessorMixin, samples: list[Sample]) -> None:
    """Two data sets may give one id to different questions."""
    cached, plain = CachedEncoder(processor), Encoder(processor)
    cached.encode(samples[0])
    for other in (replace(samples[1], id=samples[0].id), replace(samples[2], id=samples[0].id)):
        assert same(cached.encode(other), plain.encode(other))


def test_a_sample_of_another_kind_is_not_remembered(processor: ProcessorMixin, samples: list[Sample]) -> None:
    class Open(Sample):
        def open_images(self) -> list[Image.Image]:
            return [Image.new("RGB", (64, 64), (len(seen), 0, 0))]

    seen: list[Prompt] = []
    cached = CachedEncoder(processor)
    for _ in range(2):
        seen.append(cached.encode(Open(**vars(samples[0]))))
    assert seen[0].key != seen[1].key


def test_errors_are_not_remembered(processor: ProcessorMixin, samples: list[Sample], tmp_path: Path) -> None:
    cached = CachedEncoder(processor)
    picture = samples[0].images[0].path
    assert picture is not None
    hidden = picture.rename(tmp_path / "away.png")
    with pytest.raises(InputError):
        cached.encode(samples[0])
    hidden.rename(picture)
    assert cached.encode(samples[0]).ids


def test_reading(tiny_checkpoint: Path, teacher: Path, processor: ProcessorMixin) -> None:
    """Checkpoints of one family read alike; another limit, template or processor is another reading."""
    one, two = CachedEncoder.load(str(tiny_checkpoint)), CachedEncoder.load(str(teacher))
    assert isinstance(one, CachedEncoder) and isinstance(two, CachedEncoder)
    assert one.reading == two.reading
    assert CachedEncoder(one.processor, max_pixels=100).reading != one.reading
    other = AutoProcessor.from_pretrained(tiny_checkpoint)
    other.chat_template = other.chat_template + " "
    assert CachedEncoder(other).reading != one.reading
