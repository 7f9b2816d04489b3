"""onnxruntime-genai itself on exported bundles: tokens as our session's, its processor's ids and pixels.

Skipped unless it is installed here, or `POCKETVLM_GENAI_PYTHON` names an interpreter that has it and numpy.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export import onnx
from export.checkpoint import load
from runtime.image import PreparedImage
from runtime.image_spec import Normalise
from runtime.session import Session, open_bundle
from tests.checkpoints import FAMILIES, VARIANTS

GIVEN = os.environ.get("POCKETVLM_GENAI_PYTHON")
PYTHON = GIVEN or sys.executable
PROBE = Path(__file__).with_name("genai_probe.py")
pytestmark = [
    pytest.mark.skipif(
        not GIVEN and importlib.util.find_spec("onnxruntime_genai") is None,
        reason="onnxruntime-genai is not installed and POCKETVLM_GENAI_PYTHON is not set",
    ),
    pytest.mark.slow,
]

NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "lfm2_vl")
PICTURE = {"lfm2_vl": "<image>"}
QUESTION = "what color is the shape?"
NEW_TOKENS = 12
SIZES = ((64, 64), (100, 60), (30, 90), (17, 9))
"""Width and height; none is cut into tiles, no side is half a token more than whole ones."""


@dataclass(frozen=True)
class Made:
    """Bundles of a checkpoint, by precision, and the text that stands for a picture."""

    bundle: Callable[[str], Path]
    mark: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    @functools.cache
    def get(name: str) -> Made:
        out = tmp_path_factory.mktemp(name)
        facts = onnx.prepare(load({**FAMILIES, **VARIANTS}[name](out / "tiny")), (), lambda _: None)

        @functools.cache
        def bundle(precision: str) -> Path:
            folder = out / precision
            folder.mkdir()
            onnx.build(facts, folder, precision, "tiny", out)
            return folder

        return Made(bundle, PICTURE.get(name, "<|vision_start|><|image_pad|><|vision_end|>"))

    return get


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    draw, out = np.random.default_rng(0), tmp_path_factory.mktemp("pictures")
    found = []
    for width, height in SIZES:
        noise = draw.integers(0, 256, (height // 10 + 2, width // 10 + 2, 3), dtype=np.uint8)
        found.append(out / f"{width}x{height}.png")
        Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(found[-1])
    return found


def ask_genai(bundle: Path, cases: Sequence[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    job = folder / "job.json"
    job.write_text(json.dumps([{"new_tokens": NEW_TOKENS, **case} for case in cases]))
    done = subprocess.run(
        [PYTHON, str(PROBE), str(bundle), str(job)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def greedy(session: Session, ids: Any, prepared: Sequence[PreparedImage]) -> tuple[list[int], Any]:
    """Up to NEW_TOKENS tokens without the one that ends the answer, and the logits of the first."""
    logits = first = session.prefill(ids, [session.encode_image(each) for each in prepared])
    tokens: list[int] = []
    while len(tokens) < NEW_TOKENS and int(logits.argmax()) not in session.stop_ids:
        tokens.append(int(logits.argmax()))
        logits = session.decode(tokens[-1])
    return tokens, first


def tensors_of(prepared: Sequence[PreparedImage], path: Path) -> str:
    """Our vision inputs of several pictures as its processors join them, in a file."""
    views = [view.inputs for each in prepared for view in each.views]
    names = (name for name in views[0] if name != "pixel_attention_mask")
    joined = {name: np.concatenate([view[name] for view in views]) for name in names}
    if "pixel_attention_mask" in views[0]:
        joined["pixel_attention_mask"] = views[0]["pixel_attention_mask"].astype(np.int64)
    np.savez(path, **joined)
    return str(path)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *((name, "fp32") for name in NAMES),
        *((name, "int4-b64") for name in NAMES[1:]),
        ("qwen2_5_vl", "fp16"),
        ("qwen3_vl", "int8"),
        ("qwen2_5_vl", "int4-kv8"),
    ],
)
def test_it_answers_as_our_session_does(
    made: Callable[[str], Made], pictures: list[Path], tmp_path: Path, name: str, precision: str
) -> None:
    """Our ids and vision inputs through its pipeline: positions, merging, states and the loop are its own."""
    bundle = made(name).bundle(precision)
    cases, wanted = [], []
    with open_bundle(bundle) as session:
        groups: list[list[Path]] = [[], *([each] for each in pictures)]
        if name != "lfm2_vl":  # whose vision graph takes one picture
            groups.append(pictures[:2])
        for group in groups:
            prepared = [session.prepare(str(each)) for each in group]
            ids = session.prompt_ids(QUESTION, prepared)
            case: dict[str, Any] = {"ids": ids.tolist(), "image_tokens": sum(x.tokens for x in prepared)}
            if group:
                case["tensors"] = tensors_of(prepared, tmp_path / f"{len(cases)}.npz")
            cases.append(case)
            wanted.append(greedy(session, ids, prepared))
    found = ask_genai(bundle, cases, tmp_path)
    assert [each["tokens"] for each in found] == [tokens for tokens, _ in wanted]
    for each, (_, logits) in zip(found, wanted, strict=True):
        np.testing.assert_allclose(each["logits"], logits, atol=1e-5 * float(np.abs(logits).max()))


@pytest.mark.parametrize("name", NAMES[1:])
def test_its_own_processor_makes_the_same_prompt_and_nearly_the_same_pixels(
    made: Callable[[str], Made], pictures: list[Path], tmp_path: Path, name: str
) -> None:
    """Text and picture files through its processor. Pillow's resize is up to two bytes from PyTorch's."""
    bundle = made(name).bundle("fp32")
    asked = "<|im_start|>user\n{}" + QUESTION + "<|im_end|>\n<|im_start|>assistant\n"
    groups: list[list[Path]] = [[], *([each] for each in pictures)]
    cases = [
        {"prompt": asked.format(made(name).mark * len(group)), "images": [str(each) for each in group]}
        for group in groups
    ]
    found = ask_genai(bundle, cases, tmp_path)
    with open_bundle(bundle) as session:
        operations = session.manifest.image.operations
        byte = 1 / min(min(each.divide) for each in operations if isinstance(each, Normalise))
        for each, group in zip(found, groups, strict=True):
            prepared = [session.prepare(str(path)) for path in group]
            ids = session.prompt_ids(QUESTION, prepared)
            assert each["ids"] == ids.tolist()
            if not group:
                assert each["tokens"] == greedy(session, ids, [])[0]
                continue
            with np.load(each["tensors"]) as arrays:
                theirs = arrays["pixel_values"]
            ours = prepared[0].views[0].inputs["pixel_values"][..., : theirs.shape[-2], :]
            assert np.abs(ours - theirs).max() <= 2.01 * byte
            if SIZES[pictures.index(group[0])] == (64, 64):  # not resized
                np.testing.assert_allclose(theirs, ours, atol=1e-6)
                tokens, logits = greedy(session, ids, prepared)
                assert each["tokens"] == tokens
                np.testing.assert_allclose(each["logits"], logits, atol=1e-4 * float(np.abs(logits).max()))


def test_several_pictures_are_refused_by_a_graph_of_one(
    made: Callable[[str], Made], pictures: list[Path], tmp_path: Path
) -> None:
    bundle = made("lfm2_vl").bundle("fp32")
    case = {"prompt": "<image><image>?", "images": [str(pictures[0])] * 2, "new_tokens": 1}
    job = tmp_path / "job.json"
    job.write_text(json.dumps([case]))
    done = subprocess.run([PYTHON, str(PROBE), str(bundle), str(job)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "Got: 2 Expected: 1" in done.stderr
