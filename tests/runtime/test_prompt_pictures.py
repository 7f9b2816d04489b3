"""Ids of one and two pictures of any size are those of the processors' chat templates, tiles included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoProcessor

from runtime import image, prompt
from runtime.errors import BundleError
from runtime.image import PreparedImage, View
from runtime.image_spec import ImageSpec, TokenGrid
from runtime.prompt_spec import Ids, ImageSlot, ImageTokens, PromptSpec, QuestionSlot, TiledTokens
from tests import checkpoints
from tests.runtime.processors import spec_of

SIZES = [(64, 64), (300, 200), (120, 777), (1000, 90), (130, 128)]
QUESTION = "what color is the shape?"
TOKENS = TokenGrid(patch=8, merge=2)  # of every tiny checkpoint


@dataclass(frozen=True)
class Layout:
    """How a family writes a picture and a turn, as text."""

    picture: tuple[str, str, str]  # before, token, after
    user: str
    end: str
    assistant: str
    between: str = ""
    question: str = ""  # what stands right before it
    tile: str = ""
    row_end: str = ""
    whole: str = ""
    system: str = ""


FAKE = "<fake_token_around_image>"
ROLES: dict[str, Any] = {
    "user": "<|im_start|>user\n", "end": "<|im_end|>\n", "assistant": "<|im_start|>assistant\n"
}  # fmt: skip
SPLIT = Layout(
    (FAKE + "<global-img>", "<image>", FAKE),
    system="<|im_start|>",
    user="User:",
    end="<end_of_utterance>\n",
    assistant="Assistant:",
    tile=FAKE + "<row_{row}_col_{column}>",
    row_end="\n",
    whole="\n\n" + FAKE + "<global-img>",
)
VISION = Layout(("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"), **ROLES)
LAYOUTS: dict[str, tuple[Callable[..., Path], Layout]] = {
    "smolvlm_tiles": (checkpoints.VARIANTS["smolvlm_tiles"], SPLIT),
    "idefics3_tiles": (checkpoints.VARIANTS["idefics3_tiles"], SPLIT),
    "qwen2_5_vl": (checkpoints.write_qwen2_5_vl, VISION),
    "qwen3_vl": (checkpoints.write_qwen3_vl, VISION),
    "internvl": (
        checkpoints.write_internvl,
        Layout(("<img>", "<IMG_CONTEXT>", "</img>"), between="\n", question="\n", **ROLES),
    ),
    "lfm2_vl": (
        checkpoints.write_lfm2_vl,
        Layout(
            ("<|image_start|>", "<image>", "<|image_end|>"),
            tile="<|img_row_{row}_col_{column}|>",
            whole="<|img_thumbnail|>",
            **ROLES,
        ),
    ),
}


@dataclass(frozen=True)
class Opened:
    processor: Any
    tokenizer: Tokenizer
    image: ImageSpec
    prompt: PromptSpec


@pytest.fixture(scope="module", params=LAYOUTS)
def opened(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    write, layout = LAYOUTS[request.param]
    path = write(tmp_path_factory.mktemp("pictures") / request.param, layers=1)
    processor = AutoProcessor.from_pretrained(path)
    tokenizer = prompt.load_tokenizer(path / "tokenizer.json")
    return Opened(
        processor, tokenizer, spec_of(processor.image_processor, TOKENS), prompt_of(layout, tokenizer)
    )


def prompt_of(layout: Layout, tokenizer: Tokenizer) -> PromptSpec:
    """The layout's text in token ids."""

    def ids(text: str) -> tuple[int, ...]:
        return tuple(prompt.encode(tokenizer, text))

    before, token, after = layout.picture
    tiled = None
    if layout.tile:
        names = [[layout.tile.format(row=r, column=c) for c in range(1, 5)] for r in range(1, 5)]
        tiled = TiledTokens(
            before=ids(before) if not layout.row_end else (),
            cells=tuple(tuple(map(ids, row)) for row in names),
            row_end=ids(layout.row_end),
            whole=ids(layout.whole),
            after=ids(after),
        )
    return PromptSpec(
        image=ImageTokens(before=ids(before), token=ids(token)[0], after=ids(after), tiled=tiled),
        system=ids(layout.system),
        user=(
            Ids(ids=ids(layout.user)),
            ImageSlot(between=ids(layout.between)),
            QuestionSlot(before=layout.question),
            Ids(ids=ids(layout.end)),
        ),
        assistant=ids(layout.assistant),
    )


def template_ids(processor: Any, pictures: list[Image.Image]) -> list[int]:
    content: list[dict[str, Any]] = [{"type": "image", "image": each} for each in pictures]
    turn = [{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}]
    found = processor.apply_chat_template(turn, tokenize=True, add_generation_prompt=True, return_dict=True)
    return [int(token) for token in found["input_ids"][0]]


def assert_as_template(opened: Opened, sizes: list[tuple[int, int]]) -> list[PreparedImage]:
    pictures = [Image.new("RGB", size, "gray") for size in sizes]
    prepared = [image.prepare(each, opened.image) for each in pictures]
    got = prompt.render(opened.prompt, opened.tokenizer, QUESTION, prepared)
    assert got.tolist() == template_ids(opened.processor, pictures)
    return prepared


@pytest.mark.parametrize("size", SIZES)
def test_one_picture(opened: Opened, size: tuple[int, int]) -> None:
    assert_as_template(opened, [size])


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 0), (2, 3), (1, 1)])
def test_two_pictures(opened: Opened, first: int, second: int) -> None:
    assert_as_template(opened, [SIZES[first], SIZES[second]])


def test_the_sizes_make_whole_pictures_and_tiles(opened: Opened) -> None:
    """Else the tests above would prove less than they say."""
    grids = {image.prepare(Image.new("RGB", size), opened.image).tiles for size in SIZES}
    if opened.image.max_views > 1:
        assert len(grids - {(0, 0)}) > 1
    else:
        assert grids == {(0, 0)}


def test_more_tiles_than_the_prompt_knows_are_a_fault_of_the_bundle() -> None:
    tiled = TiledTokens(before=(), cells=(((1,), (2,)),), after=())
    spec = ImageTokens(before=(), token=9, after=(), tiled=tiled)
    view = View({"pixel_values": np.zeros(1)}, (1, 2))
    assert prompt.picture_ids(spec, PreparedImage((view,) * 2, (1, 2))) == [1, 9, 9, 2, 9, 9]
    with pytest.raises(BundleError, match="no ids for 2 x 1 tiles"):
        prompt.picture_ids(spec, PreparedImage((view,) * 2, (2, 1)))
