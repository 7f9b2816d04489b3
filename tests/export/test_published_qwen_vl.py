"""What the published files of Qwen-VL say and our own tiny checkpoints do not: pictures of 16,384 tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from export.checkpoint import load
from export.facts import prepare
from export.families import family_of
from export.limits import LEAST_TOKENS, most_pictures
from export.targets import TARGETS, Target, plan_for
from runtime.image_limits import limit
from tests.checkpoints import FAMILIES

TOKENS = 16_384
STATIC = [each for each in TARGETS if each.flavour == "portable-static"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-VL whose pictures may be as large, in tokens, and whose context as long as the published."""
    path = FAMILIES["qwen3_vl"](tmp_path_factory.mktemp("published") / "qwen3-vl")
    for name, change in (
        ("config.json", lambda found: found["text_config"].update(max_position_embeddings=262_144)),
        (
            "processor_config.json",
            lambda found: found["image_processor"]["size"].update(longest_edge=TOKENS * 256),
        ),
    ):
        found = json.loads((path / name).read_text())
        change(found)
        (path / name).write_text(json.dumps(found))
    return path


@pytest.mark.parametrize("target", STATIC, ids=lambda target: str(target.name))
def test_pictures_of_a_fixed_size_leave_room_for_questions(target: Target, published: Path) -> None:
    """1,024 of 2,048 tokens, 2,048 of 4,096: two such pictures and no question is no conversation."""
    checkpoint = load(published)
    whole = family_of(checkpoint).image(checkpoint)
    assert whole.max_tokens == TOKENS
    image = limit(whole, target.max_image_tokens)
    count = most_pictures(image, target.max_context, fixed=True)
    assert count == 1
    assert count * (image.max_tokens + LEAST_TOKENS) <= target.max_context
    # of moving sizes most are smaller, and two of the largest are refused when they are asked
    assert most_pictures(image, target.max_context, fixed=False) == 2


def test_fewer_pictures_than_the_target_has_are_noted(published: Path) -> None:
    facts = prepare(load(published), (), print, plan=plan_for("android"), trace=False, expect=False)
    assert facts.images == 1
    (note,) = (each for each in facts.notes if "pictures in a conversation" in each)
    assert "at most 1 of 2" in note and "--max-image-tokens" in note
