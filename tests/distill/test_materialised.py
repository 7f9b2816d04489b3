"""A masked checkpoint on disk: loads elsewhere with the masked weights, and goes when its stage ends."""

from __future__ import annotations

import copy
import json
import shutil
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from distill.masks.masking import Masker
from distill.masks.materialised import RECORD, materialised
from runtime import files
from runtime.errors import StateError
from tests.distill.peak import Peak
from tests.distill.test_masking import experts

__all__ = ["experts"]


def load(path: Path) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(path)


def same(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("shard_bytes", [50_000, 1 << 30])
def test_loads_as_it_was(
    tiny_model: PreTrainedModel, processor: ProcessorMixin, tmp_path: Path, shard_bytes: int
) -> None:
    full = copy.deepcopy(tiny_model)
    masker = Masker(tiny_model, 0.4)
    masker.set(0.4)
    with materialised(masker, processor, tmp_path / "served", "tiny", shard_bytes=shard_bytes) as found:
        read = load(found.path)
        assert same(read, tiny_model) and not same(read, full)
        assert read.lm_head.weight is read.model.text_model.embed_tokens.weight, "still tied"
        record = files.read_json(found.path / RECORD)
        weights = sorted(path.name for path in found.path.glob("*.safetensors"))
        assert record["files"] == {name: files.sha256_file(found.path / name) for name in weights}
        assert (len(weights) == 1) is (shard_bytes == 1 << 30)
        assert record["ratio"] == found.ratio == 0.4 and record["sha256"] == found.sha256
        assert record["sparsity"] == masker.sparsity == found.sparsity
        again = AutoProcessor.from_pretrained(found.path)
        assert again.chat_template == processor.chat_template
        assert json.loads((found.path / "config.json").read_text())["dtype"] == "float32"
    assert list(tmp_path.iterdir()) == [], "deleted after its stage"
    masker.set(0)
    assert same(tiny_model, full)


def test_deleted_also_after_an_error(
    tiny_model: PreTrainedModel, processor: ProcessorMixin, tmp_path: Path
) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        materialised(Masker(tiny_model, 0.2), processor, tmp_path / "served", "tiny"),
    ):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_used_if_it_is_the_same(
    tiny_model: PreTrainedModel, processor: ProcessorMixin, tmp_path: Path
) -> None:
    left, served = tmp_path / "left", tmp_path / "served"
    masker = Masker(tiny_model, 0.4)
    masker.set(0.2)
    with materialised(masker, processor, served, "tiny") as found:
        shutil.copytree(found.path, left)

    def written_again(change: Any = None) -> bool:
        shutil.copytree(left, served)
        (served / "seen").touch()
        if change:
            change()
        with materialised(masker, processor, served, "tiny"):
            return not (served / "seen").exists()

    assert not written_again()
    assert written_again(lambda: cut(served)), "damaged"
    masker.set(0.3)
    assert written_again(), "another ratio"


def cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def test_stacked_experts_become_the_checkpoints_own_tensors(experts: Any, tmp_path: Path) -> None:
    """A server reads the original layout; read back, the stacks are the masked ones."""
    masker = Masker(experts, 0.3)
    masker.set(0.3)
    nothing: Any = SimpleNamespace(save_pretrained=lambda directory: None)
    with materialised(masker, nothing, tmp_path / "served", "moe", shard_bytes=4096) as found:
        assert same(load(found.path), experts)
        original = tmp_path / "original"
        experts.save_pretrained(original)
        index = json.loads((found.path / "model.safetensors.index.json").read_text())
        from safetensors import safe_open

        with safe_open(original / "model.safetensors", "pt") as stored:
            assert set(index["weight_map"]) == set(stored.keys()), "names as save_pretrained's"
    masker.set(0)


def test_a_disk_that_is_too_small(
    tiny_model: PreTrainedModel, processor: ProcessorMixin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masker = Masker(tiny_model, 0.2)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("distill.masks.materialised.save_file", full)
        with pytest.raises(StateError, match=r"served: cannot be written .*No space left.*make room"):
            materialised(masker, processor, tmp_path / "served", "tiny").__enter__()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**10))
    with pytest.raises(StateError, match=r"served: needs 0.0 GiB, 0.0 GiB are free"):
        materialised(masker, processor, tmp_path / "served", "tiny").__enter__()
    assert list(tmp_path.iterdir()) == [], "nothing half-written is left"


def test_writing_holds_no_copy_of_the_weights(tmp_path: Path) -> None:
    """About 200 MiB of weights in files of 8 MiB: what tensors and Python objects take at most, counted."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 64, "num_attention_heads": 4}
    model: Any = LlamaForCausalLM(LlamaConfig(num_hidden_layers=12, **sizes))
    weights = sum(p.nbytes for p in model.parameters())
    nothing: Any = SimpleNamespace(save_pretrained=lambda directory: None)
    masker = Masker(model, 0.1)
    masker.set(0.1)
    tracemalloc.start()
    try:
        with (
            Peak() as tensors,
            materialised(masker, nothing, tmp_path / "served", "llama", shard_bytes=8 << 20) as found,
        ):
            assert sum(path.stat().st_size for path in found.path.glob("*.safetensors")) > weights
        written = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert tensors.peak + written < 20 << 20 < weights / 8
