"""Processors as checkpoints of older transformers have them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from distill.inputs.encoding import Encoder
from runtime.errors import CheckpointError
from tests.distill.learning import sample


def test_a_template_in_the_tokenizers_settings(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """As older transformers wrote it; without any it is one line, before the first sample."""
    wanted = Encoder.load(str(tiny_checkpoint)).encode(sample(0)).ids
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match=r"copy: no chat template .* copy that of the model"):
        Encoder.load(str(copy))
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    assert Encoder.load(str(copy)).encode(sample(0)).ids == wanted
