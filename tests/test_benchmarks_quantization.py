"""The quantization benchmark goes its whole way, and goes on where it stopped."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from benchmarks import quantization
from distill.demo.demo_recipe import LabelTraining

pytest.importorskip("easy_vqa")

SMALL = dataclasses.replace(
    quantization.QUICK, train=LabelTraining(steps=4, images=4, questions=2, lr=3e-3), questions=8
)


@pytest.mark.slow
def test_from_nothing_to_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = quantization.run(tmp_path, ["int4-b64-gptq-kv8"], SMALL)
    rows = {row["precision"]: row for row in found["rows"]}
    assert list(rows) == ["fp32", "int4-b64-gptq-kv8"]
    assert rows["fp32"]["kl_mean_nats"] == 0.0 and rows["fp32"]["top1"] == 1.0
    small, plain = rows["int4-b64-gptq-kv8"], rows["fp32"]
    assert small["cache_bytes"] * 4 == plain["cache_bytes"]
    assert small["bytes"]["decoder"] < 0.3 * plain["bytes"]["decoder"]
    assert small["kl_mean_nats"] > 0 and small["comparison"]["n"] == 8
    table = quantization.table(found["rows"])
    assert len(table) == 4 and "int4-b64-gptq-kv8" in table[-1]

    def never(*_: object, **__: object) -> None:
        raise AssertionError("done already")

    monkeypatch.setattr(quantization.onnx, "export_onnx", never)
    monkeypatch.setattr(quantization, "evaluate", never)
    monkeypatch.setattr(quantization.demo, "new_model", never)
    assert quantization.run(tmp_path, ["int4-b64-gptq-kv8"], SMALL) == found


@pytest.mark.slow
def test_gguf_with_and_without_an_importance_matrix(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("llama_cpp")
    asked = ["gguf-q8_0", "gguf-q4_0", "gguf-q4_0-imatrix", "gguf-q4_0-imatrix-text"]
    found = quantization.run(tmp_path, asked, SMALL)
    rows = {row["precision"]: row for row in found["rows"]}
    assert list(rows) == ["fp32", *asked]
    assert rows["gguf-q8_0"]["kl_mean_nats"] < rows["gguf-q4_0"]["kl_mean_nats"]
    fours = [rows[name] for name in asked[1:]]
    assert len({row["bytes"]["text_model"] for row in fours}) == 1
    assert len({row["kl_mean_nats"] for row in fours}) == 3, "three ways to round"
