"""transformers.js loads the same bundles: an extra check that their layout is that of its ecosystem.

It is looked for in the node_modules directory of POCKETVLM_NODE_MODULES
(`npm install --ignore-scripts @huggingface/transformers`).
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export import export_checkpoint
from runtime.generation import GenerationOptions
from runtime.session import open_bundle
from tests.checkpoints import FAMILIES
from tests.export.browser_probe import NODE, PROGRAM, modules

MODULES = modules()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        NODE is None or MODULES is None or not (MODULES / "@huggingface" / "transformers").is_dir(),
        reason="no transformers.js in POCKETVLM_NODE_MODULES",
    ),
]
QUESTION = "what color is the shape?"
LOADS = ("smolvlm", "qwen2_5_vl")
"""Families whose bundles transformers.js 4.3 answers with, of a picture that needs no resizing."""


@pytest.mark.parametrize("family", LOADS)
def test_transformers_js_answers_as_the_python_session_does(tmp_path: Path, family: str) -> None:
    pytest.importorskip("onnxruntime")
    checkpoint = FAMILIES[family](tmp_path / "checkpoint")
    bundle = export_checkpoint(checkpoint, tmp_path / "bundle")
    picture = tmp_path / "picture.png"
    samples = np.random.default_rng(3).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(samples).save(picture)
    program = PROGRAM.with_name("transformers.mjs")
    command = [str(NODE), str(program), str(bundle), str(picture), QUESTION, "8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    with open_bundle(bundle, threads=1) as session:
        wanted = session.ask(picture, QUESTION, GenerationOptions(max_new_tokens=8))
        assert found["prompt"] == session.prompt_ids(QUESTION, [session.prepare(picture)]).tolist()
    assert found["ids"] == wanted.token_ids
