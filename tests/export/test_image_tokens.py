"""A ceiling on image tokens holds for every family, and its processor, so set, gives the same pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export import limits
from export.checkpoint import Checkpoint, load
from export.families import family_of
from runtime.errors import InputError
from runtime.image import prepare
from tests import checkpoints

MAKERS = {
    "smolvlm_tiles": checkpoints.VARIANTS["smolvlm_tiles"],
    **{name: checkpoints.FAMILIES[name] for name in ("qwen2_5_vl", "qwen3_vl", "internvl", "lfm2_vl")},
}
SIZES = [(300, 200), (333, 777), (64, 64)]
OWN = {"smolvlm_tiles": 17 * 16, "internvl": 5 * 4, "lfm2_vl": 5 * 16}


@pytest.fixture(params=MAKERS)
def named(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Checkpoint]:
    name = str(request.param)
    return name, load(MAKERS[name](tmp_path / name, layers=1))


def pixels(checkpoint: Checkpoint, picture: Image.Image) -> np.ndarray:
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "?"}]
    found: Any = checkpoint.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    return np.asarray(found["pixel_values"])


@pytest.mark.parametrize("most", [100, 40, 20, 10, 5])
def test_a_ceiling_holds_and_pixels_are_those_of_the_processor(
    named: tuple[str, Checkpoint], most: int
) -> None:
    name, checkpoint = named
    family = family_of(checkpoint)
    own = family.image(checkpoint)
    assert own.max_tokens == OWN.get(name, own.max_tokens)
    try:
        changed = limits.hold(checkpoint, family, most)
    except InputError as error:
        assert name == "smolvlm_tiles"
        assert most < 16
        assert "16 at least" in str(error)
        return
    image = limits.narrowed(family.image(checkpoint), most)
    assert image.max_tokens <= most
    if own.max_tokens <= most:
        assert (changed, image) == ({}, own)
    elif not changed:  # only pictures of an extreme aspect took more
        assert image == own.model_copy(
            update={"operations": image.operations, "max_tokens": image.max_tokens}
        )
        assert prepare(Image.new("RGB", (300, 200)), own).tokens <= most
    for width, height in SIZES:
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        picture = Image.fromarray(noise)
        prepared = prepare(picture, image)
        wanted = pixels(checkpoint, picture)
        got = np.concatenate([view.inputs["pixel_values"] for view in prepared.views])
        assert np.array_equal(got, wanted.reshape(got.shape))
        assert prepared.tokens <= most


def test_no_ceiling_changes_nothing(named: tuple[str, Checkpoint]) -> None:
    _, checkpoint = named
    family = family_of(checkpoint)
    own = family.image(checkpoint)
    assert limits.hold(checkpoint, family, None) == {}
    assert limits.narrowed(own, None) == own == family.image(checkpoint)
