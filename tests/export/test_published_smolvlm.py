"""What the published files of SmolVLM and Idefics3 say and our own tiny checkpoints do not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from distill.inputs.encoding import Encoder
from evals.torch_session import TorchSession
from export.checkpoint import load
from tests.checkpoints import VARIANTS

DIGITS = "first:\n\n1. 23\n  4"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As SmolVLM-256M, -500M and -Instruct: Idefics3's model type, GPT2Tokenizer, single digits."""
    path = VARIANTS["idefics3_tiles"](tmp_path_factory.mktemp("published") / "smolvlm")
    settings = path / "tokenizer_config.json"
    settings.write_text(
        json.dumps({**json.loads(settings.read_text()), "tokenizer_class": "GPT2Tokenizer"}), encoding="utf-8"
    )
    return path


def cuts(tokenizer: Tokenizer) -> list[str]:
    assert tokenizer.pre_tokenizer is not None
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(DIGITS)]


def test_digits_are_cut_as_tokenizer_json_says(published: Path) -> None:
    """transformers 5 gives a GPT2Tokenizer that class's own rule, so that the ids after blanks are others."""
    wanted = cuts(Tokenizer.from_file(str(published / "tokenizer.json")))
    assert "\u010a\u010a" in wanted  # both ends of a line before a digit are one piece
    checkpoint = load(published)
    assert type(checkpoint.tokenizer).__name__ == "GPT2Tokenizer"
    assert cuts(checkpoint.tokenizer.backend_tokenizer) == wanted
    assert [note for note in checkpoint.notes if "GPT2Tokenizer" in note and "pre_tokenizer" in note]
    with TorchSession(published) as session:
        assert cuts(session.tokenizer) == wanted
    assert cuts(Encoder.load(str(published)).tokenizer.backend_tokenizer) == wanted


def test_what_is_saved_again_cuts_so_too(published: Path, tmp_path: Path) -> None:
    load(published).processor.save_pretrained(tmp_path)
    wanted = cuts(Tokenizer.from_file(str(published / "tokenizer.json")))
    assert cuts(Tokenizer.from_file(str(tmp_path / "tokenizer.json"))) == wanted


def test_a_tokenizer_that_is_read_as_it_is_gives_no_note(tiny_checkpoint: Path) -> None:
    assert not load(tiny_checkpoint).notes


def test_no_tokenizer_json_leaves_the_class_its_rule(published: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(published, tmp_path / "copy")
    model = json.loads((copy / "tokenizer.json").read_text())["model"]
    (copy / "vocab.json").write_text(json.dumps(model["vocab"]))
    (copy / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    (copy / "tokenizer.json").unlink()
    assert type(Encoder.load(str(copy)).tokenizer).__name__ == "GPT2Tokenizer"
