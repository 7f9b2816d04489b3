"""What an export takes in, and what it says when it cannot go on: dtypes, shards, families, disks."""

from __future__ import annotations

import errno
import json
import resource
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import export
from export import onnx, space, storage
from export.checkpoint import load
from export.families import without_tiles
from export.quantize_policy import resolve
from runtime.errors import CheckpointError, StateError
from tests.checkpoints import FAMILIES
from tests.export.conftest import Exported


def saved_as(source: Path, out: Path, dtype: torch.dtype, shard: str) -> Path:
    """The same checkpoint with its weights in another type and in shards."""
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
    model.save_pretrained(out, max_shard_size=shard)
    AutoProcessor.from_pretrained(source).save_pretrained(out)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_and_shards_load_to_the_same_float32(
    tiny_checkpoint: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    path = saved_as(tiny_checkpoint, tmp_path / "copy", dtype, "100KB")
    assert len(list(path.glob("model-*.safetensors"))) > 2
    found, wanted = load(path), load(tiny_checkpoint)
    assert {parameter.dtype for parameter in found.model.parameters()} == {torch.float32}
    for (name, got), (_, original) in zip(
        found.model.named_parameters(), wanted.model.named_parameters(), strict=True
    ):
        assert torch.equal(got, original.to(dtype).float()), name


def test_a_sharded_bfloat16_checkpoint_is_exported(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The gate holds the parts against the weights as they are in the files."""
    path = saved_as(tiny_checkpoint, tmp_path / "copy", torch.bfloat16, "100KB")
    assert export.export_checkpoint(path, tmp_path / "out").is_dir()


def test_an_unknown_family_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "fastvlm"}))
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(
        CheckpointError, match=r"'fastvlm' has no exporter; known: .*internvl.*docs/export\.md"
    ):
        export.export_checkpoint(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_family_without_tiles_has_none_to_leave_out(tmp_path: Path) -> None:
    checkpoint = load(FAMILIES["qwen3_vl"](tmp_path / "tiny"))
    with pytest.raises(CheckpointError, match="qwen3_vl cuts no picture into tiles"):
        without_tiles(checkpoint)


# --- disks ------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_too_little_space_is_told_before_the_work(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100, 80, 20 * 2**20))
    with pytest.raises(StateError, match=r"needs about \d+ MiB, 20 MiB are free; free some space"):
        export.export_checkpoint(
            tiny_checkpoint, tmp_path / "new" / "out", precision=precision, progress=lines.append
        )
    assert lines == ["reading the checkpoint"] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4", "int4-prefill8"])
def test_the_estimate_is_no_smaller_than_the_bundle_but_of_its_size(
    exported: Exported, tmp_path: Path, precision: str
) -> None:
    """Without the constant for what is no weight; the tiny graphs themselves take a few tens of KiB."""
    (scratch := tmp_path / "scratch").mkdir()
    facts = onnx.on_disk(exported.facts, scratch)
    found = onnx.write_bundles(facts, {precision: tmp_path / "out"}, {precision: "tiny"}, scratch)
    size = sum(file.stat().st_size for file in found[0].rglob("*.onnx*"))
    estimate = space.bytes_of(resolve(precision), space.stored_parameters(exported.facts.checkpoint))
    assert size < estimate < 2.2 * size + space._OTHERS


def test_a_disk_that_fills_up_leaves_no_half_bundle(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = storage.save
    written: list[Path] = []

    def full(model: Any, path: Path, **options: Any) -> Any:
        if len(written) == 2:
            path.write_bytes(b"half of a graph")
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        return save(model, path, **options)

    monkeypatch.setattr(storage, "save", full)
    with pytest.raises(StateError, match=r"decoder.*the disk is full \(No space left on device\)") as caught:
        onnx.write_bundles(exported.facts, {"fp32": tmp_path / "out"}, {"fp32": "tiny"}, tmp_path)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


@pytest.fixture
def small_files() -> Iterator[None]:
    """The kernel refuses files of more than 200 KB, as it would on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_the_kernel_refuses_leaves_no_half_bundle(
    exported: Exported, tmp_path: Path, small_files: None
) -> None:
    with pytest.raises(StateError, match="the disk is full"):
        onnx.write_bundles(exported.facts, {"fp32": tmp_path / "out"}, {"fp32": "tiny"}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_errors_of_the_system_are_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), space.told(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")
