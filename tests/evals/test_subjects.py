"""Checkpoints and bundles are told apart, hashed as the exporter hashes them, and named apart."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from evals.asking import subjects
from evals.torch_session import TorchSession
from export.checkpoint import load
from runtime.errors import BundleError, InputError
from runtime.session import Session


def test_a_bundle_knows_the_checkpoint_that_it_came_from(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    checkpoint, bundle = subjects.describe(tiny_checkpoint), subjects.describe(tiny_bundle)
    assert (checkpoint.is_bundle, checkpoint.format, checkpoint.precision) == (False, "safetensors", "fp32")
    assert (bundle.is_bundle, bundle.format, bundle.precision) == (True, "onnx", "fp32")
    assert bundle.source_sha256 == checkpoint.sha256 == load(tiny_checkpoint).sha256
    assert bundle.sha256 != checkpoint.sha256
    assert bundle.bytes == sum(file.stat().st_size for file in tiny_bundle.rglob("*") if file.is_file())


def test_opened_sessions_are_of_their_kind(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    with subjects.describe(tiny_checkpoint).open(threads=1) as session:
        assert isinstance(session, TorchSession)
    with subjects.describe(tiny_bundle).open(threads=1) as session:
        assert isinstance(session, Session)


def test_a_changed_weight_is_another_checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    assert subjects.checkpoint_sha256(copy) == subjects.checkpoint_sha256(tiny_checkpoint)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert subjects.checkpoint_sha256(copy) != subjects.checkpoint_sha256(tiny_checkpoint)


def test_one_name_twice_is_told_apart_and_one_directory_twice_refused(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for folder in ("a", "b"):
        shutil.copytree(tiny_checkpoint, tmp_path / folder / "student")
    found = subjects.describe_all([tmp_path / "a/student", tiny_checkpoint, tmp_path / "b/student"])
    assert [one.name for one in found] == ["a/student", tiny_checkpoint.name, "b/student"]
    with pytest.raises(InputError, match="is given twice"):
        subjects.describe_all([tmp_path / "a/student", tmp_path / "a/../a/student"])


def test_what_is_neither_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a bundle or a Hugging Face checkpoint"):
        subjects.describe(tmp_path / "nowhere")
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    (copy / "manifest.json").write_text("{}")
    with pytest.raises(BundleError):
        subjects.describe(copy)
