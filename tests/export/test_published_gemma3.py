"""Gemma 3 as published: nulls in its preprocessor, tokens for runs of blanks; and its relatives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from evals.torch_session import TorchSession
from export import export_checkpoint
from export.checkpoint import load
from export.families import family_of
from export.gate_cases import drawn
from runtime.errors import CheckpointError
from runtime.image import prepare
from tests import gguf_checkpoints
from tests.checkpoints import GEMMA3_TOKENS, write_gemma3

NULLS = dict.fromkeys((
    "do_convert_rgb", "do_pan_and_scan", "pan_and_scan_max_num_crops", "pan_and_scan_min_crop_size",
    "pan_and_scan_min_ratio_to_activate",
))  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_gemma3(tmp_path_factory.mktemp("gemma") / "tiny")
    content = json.loads((path / "processor_config.json").read_text())
    image = {**content.pop("image_processor"), **NULLS}
    (path / "preprocessor_config.json").write_text(json.dumps(image))
    (path / "processor_config.json").write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_nulls_in_the_preprocessor_are_what_the_processors_class_says(published: Path, mode: str) -> None:
    """A picture of any mode becomes RGB and is not cut, in transformers as in the bundle."""
    checkpoint = load(published)
    assert checkpoint.processor.image_processor.do_convert_rgb is None
    spec = family_of(checkpoint).image(checkpoint)
    picture = drawn(300, 100, seed=5).convert(mode)
    reference = TorchSession(published, model=checkpoint.model, processor=checkpoint.processor)
    assert len(spec.operations) == 5
    ours, theirs = prepare(picture, spec).pixels, reference.prepare(picture).pixels
    assert len(ours) == len(theirs) == 1
    assert np.array_equal(ours[0].ravel(), np.asarray(theirs[0]).ravel())


def test_the_settings_that_are_said_still_count(published: Path) -> None:
    checkpoint = load(published)
    checkpoint.processor.image_processor.do_convert_rgb = False
    with pytest.raises(CheckpointError, match="do_convert_rgb is False"):
        family_of(checkpoint)


def with_blanks(tokenizer: PreTrainedTokenizerFast, longest: int) -> PreTrainedTokenizerFast:
    """Runs of 2 to `longest` signs for a blank as Gemma has them: merged first, and added tokens that are not
    normalised."""
    content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    runs = ["\u2581" * count for count in range(2, longest + 1)]
    for run in runs:
        vocabulary.setdefault(run, len(vocabulary))
    cuts = [[run[:at], run[at:]] for run in runs for at in range(1, len(run))]
    content["model"]["merges"] = cuts + [each for each in content["model"]["merges"] if each not in cuts]
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
    content["added_tokens"] += [{"id": vocabulary[run], "content": run, **flags} for run in runs]
    standard = {role: GEMMA3_TOKENS[role] for role in ("pad_token", "bos_token", "eos_token")}
    extra = {role: text for role, text in GEMMA3_TOKENS.items() if role not in standard}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        unk_token="<unk>",
        extra_special_tokens=extra,
        clean_up_tokenization_spaces=False,
        **standard,
    )


def test_tokens_for_runs_of_blanks_pass_the_proof(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And the tokenizer's rule for two texts, which is Gemma's too, makes no line."""
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    tokenizer = with_blanks(gguf_checkpoints.gemma_tokenizer(), 5)
    bos = str(tokenizer.bos_token)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A",
        pair=f"{bos} $A {bos}:1 $B:1",
        special_tokens=[(bos, int(tokenizer.bos_token_id))],
    )
    monkeypatch.setattr(gguf_checkpoints, "gemma_tokenizer", lambda: tokenizer)
    path = gguf_checkpoints.write("gemma3", tmp_path / "tiny")
    assert len(tokenizer.encode("a   b", add_special_tokens=False)) <= 3
    out = export_checkpoint(path, tmp_path / "bundle", to="gguf", precision="f16")
    assert list(out.rglob("*.gguf"))
    assert not [record for record in caplog.records if record.name.startswith("gguf")]


@pytest.mark.parametrize("model_type", ["gemma3n", "paligemma", "gemma3_text"])
def test_relatives_are_refused_with_what_is_known(published: Path, tmp_path: Path, model_type: str) -> None:
    (tmp_path / "model.safetensors").write_bytes((published / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(CheckpointError, match=f"'{model_type}' has no exporter; known: gemma3, idefics3, "):
        export_checkpoint(tmp_path, tmp_path / "bundle")
