"""LFM2-VL as published: settings of its files at toy size, and the model type that it had before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from export import export_checkpoint
from export.checkpoint import load
from export.families import family_of
from runtime.errors import CheckpointError
from tests.checkpoints import write_lfm2_vl

NORM = "model.multi_modal_projector.layer_norm"


@pytest.fixture(scope="module")
def stored_norm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A projector without its norm, whose weights are in the file all the same."""
    path = write_lfm2_vl(tmp_path_factory.mktemp("lfm2") / "tiny")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "projector_use_layernorm": False}))
    weights = load_file(path / "model.safetensors")
    width = len(weights[f"{NORM}.bias"])
    weights |= {f"{NORM}.weight": torch.full((width,), 3.0), f"{NORM}.bias": torch.ones(width)}
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_a_stored_norm_that_is_not_used_is_noted(stored_norm: Path) -> None:
    checkpoint = load(stored_norm)
    family_of(checkpoint)
    assert any(NORM in note and "left out" in note for note in checkpoint.notes)


def test_a_stored_norm_that_is_not_used_is_not_given_to_llama_cpp(stored_norm: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    out = export_checkpoint(stored_norm, tmp_path / "bundle", to="gguf", precision="f16")
    (mmproj,) = out.rglob("*mmproj*.gguf")
    names = {tensor.name for tensor in gguf.GGUFReader(mmproj).tensors}
    assert "mm.1.weight" in names and not {name for name in names if name.startswith("mm.input_norm")}


@pytest.mark.parametrize("to", ["onnx", "gguf"])
def test_the_older_model_type_is_refused_with_what_to_take(
    stored_norm: Path, tmp_path: Path, to: str
) -> None:
    if to == "gguf":
        pytest.importorskip("gguf")
    copy = tmp_path / "tiny"
    copy.mkdir()
    config: dict[str, Any] = json.loads((stored_norm / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "lfm2-vl"}))
    (copy / "model.safetensors").write_bytes((stored_norm / "model.safetensors").read_bytes())
    precision = "fp32" if to == "onnx" else "f16"
    with pytest.raises(CheckpointError, match=r"'lfm2-vl': .*present repository \(model_type lfm2_vl\)"):
        export_checkpoint(copy, tmp_path / "bundle", to=to, precision=precision)
