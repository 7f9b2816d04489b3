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
from export.facts import prepare
from runtime.image import PreparedImage
from runtime.image_spec import Normalise
from runtime.session import Session, open_bundle
from tests.checkpoints import FAMILIES, VARIANTS, write_gemma3

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

MAKERS: dict[str, Callable[..., Path]] = {
    **FAMILIES,
    **VARIANTS,
    "gemma3": functools.partial(write_gemma3, side=128, tokens=256),  # what its processor writes
}
NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "lfm2_vl", "gemma3")
PICTURE = {"lfm2_vl": "<image>", "gemma3": "<start_of_image>"}
QUESTION = "what color is the shape?"
NEW_TOKENS = 12
SIZES = ((64, 64), (100, 60), (30, 90), (17, 9))
"""Width and height; none is cut into tiles, no side is half a token more than whole ones."""

SQUARE = (128, 128)
"""The size of gemma3's pictures."""


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
        facts = prepare(load(MAKERS[name](out / "tiny")), (), lambda _: None)

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
    for width, height in (*SIZES, SQUARE):
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
    """Up to NEW_TOKENS tokens without the one that ends the answer, and the logits of its first and last."""
    logits = session.prefill(ids, [session.encode_image(each) for each in prepared])
    tokens: list[int] = []
    seen: list[Any] = []
    while len(tokens) < NEW_TOKENS and not (seen and tokens[-1] in session.stop_ids):
        tokens.append(int(logits.argmax()))
        seen = [*seen[:1], logits]
        logits = session.decode(tokens[-1])
    return [token for token in tokens if token not in session.stop_ids], np.stack(seen)


def alone(pictures: Sequence[Path], name: str) -> list[list[Path]]:
    """No picture, and each by itself."""
    return [[], *([each] for each in (pictures if name == "gemma3" else pictures[: len(SIZES)]))]


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
    cases: list[dict[str, Any]] = []
    wanted = []
    with open_bundle(bundle) as session:
        groups = alone(pictures, name)
        # LFM2-VL's vision graph takes one picture; Gemma's takes all at once, which then share the scale of
        # rounded activations
        if name.startswith("qwen") or (name, precision) == ("gemma3", "fp32"):
            groups.append(pictures[:2])
        for group in groups:
            prepared = [session.prepare(str(each)) for each in group]
            ids = session.prompt_ids(QUESTION, prepared)
            tokens = [each.tokens for each in prepared]
            # pictures of one size: it counts those of one
            number = max(tokens, default=0) if name == "gemma3" else sum(tokens)
            case: dict[str, Any] = {"ids": ids.tolist(), "image_tokens": number}
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
    groups = alone(pictures, name)
    cases = [
        {"prompt": asked.format(made(name).mark * len(group)), "images": [str(each) for each in group]}
        for group in groups
    ]
    found, exact = ask_genai(bundle, cases, tmp_path), 0
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
            if np.abs(ours - theirs).max() < 1e-5 * float(np.abs(ours).max()):  # not resized
                exact += 1
                tokens, logits = greedy(session, ids, prepared)
                assert each["tokens"] == tokens
                np.testing.assert_allclose(each["logits"], logits, atol=1e-4 * float(np.abs(logits).max()))
    assert exact


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
