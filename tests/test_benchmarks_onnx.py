"""The benchmark of ONNX bundles: its models, its own arms, and how its tables compare."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

driver = importlib.import_module("benchmarks.onnx")
AGAINST = Path(driver.__file__).parent / "against"


@pytest.fixture(scope="module")
def models() -> Any:
    sys.path.append(str(AGAINST))  # the arms run as scripts, beside their helper
    try:
        return importlib.import_module("benchmarks.against.onnx_models")
    finally:
        sys.path.remove(str(AGAINST))


def test_the_full_shape_is_that_of_smolvlm_256m(models: Any) -> None:
    shape = models.FULL
    assert shape.image_tokens == 64
    layer = shape.text_hidden * (2 * shape.text_hidden + 2 * 64 * shape.kv_heads + 3 * shape.intermediate)
    assert 134e6 < shape.text_layers * layer + shape.vocab * shape.text_hidden < 135e6


def test_every_token_of_the_tokenizer_is_text(models: Any) -> None:
    made = models.tokenizer(2048)
    assert len(made) == 2048
    assert all(made.decode([i]).isalpha() for i in range(len(made) - 1000, len(made)))
    assert made.decode(made("what word is it?").input_ids) == "what word is it?"


@pytest.mark.slow
def test_our_arms_run_on_the_tiny_shape(tmp_path: Path) -> None:
    """As `--quick --no-peers` does, one bundle only."""
    bench = driver.Bench(tmp_path, quick=True, peers=False)
    bench._models("checkpoint", "--tiny")
    bench._models("int4-b64-prefill8", "--bundle", "int4-b64-prefill8")
    model = ("--model", "int4-b64-prefill8")
    decode = bench.run(driver.Arm("ours", "ours", model), 1, "--past", 8, "--steps", 3)
    assert len(decode["ms"]) == 3 and decode["kv_bytes_a_token"] == 2 * 2 * 2 * 16 * 4  # float32
    ttft = bench.run(driver.Arm("ours", "ours", ("--what", "ttft", *model)), 1, "--repeats", 1)
    assert ttft["prompt_tokens"] == 16 + 64 and ttft["image_tokens"] == 16 and ttft["text"]
    assert bench.run(driver.Arm("bandwidth", "bandwidth", ("--mib", 8)), 1)["gb_s"] > 0


def test_without_peers_only_our_arms_run(tmp_path: Path) -> None:
    alone = driver.Bench(tmp_path, quick=True, peers=False).arms(driver.DECODE)
    assert {arm.name for arm in alone} == {"ours", "ours-float-kv"}


def test_tables_compare_within_a_round() -> None:
    def run(ms: float, **more: Any) -> dict[str, Any]:
        return {"ms": [ms], **more}

    sizes = {"decoder_bytes": 60e6, "kv_bytes_a_token": 0.0}
    rounds = [{"ours": run(8.0, **sizes), "genai": run(ms)} for ms in (10.0, 10.0, 10.0)]
    entry = {"threads": 1, "past": 1100, "rounds": rounds, "bandwidth_gb_s": [15.0]}
    lines = driver.decode_table([entry])
    assert lines[2] == "| 1 | 1,100 | ours | 8.00 | 1.00 (1.00 to 1.00) | 50% | 15.0 |"
    assert lines[3] == "| 1 | 1,100 | genai | 10.00 | 1.25 (1.25 to 1.25) |  | 15.0 |"
    export = driver.export_table([run(90e3, peak_mib=2800.0, fp32_mib=1000.0, bundle_bytes=2e8)])
    assert export[2] == "| 90 / 90 / 90 | 2,800 | 1,000 | 2.80 | 200 |"


def test_an_arm_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"onnx_ours.py .* failed:"):
        driver.Bench(tmp_path, quick=True, peers=False).run(driver.Arm("x", "ours", ("--model", "none")), 1)


@pytest.mark.slow
@pytest.mark.skipif(not driver.PEER.exists(), reason="needs the peers' environment")
def test_all_arms_run_and_get_the_same_prompt(tmp_path: Path) -> None:
    bench = driver.Bench(tmp_path, quick=True, peers=True)
    bench.make(("decode", "ttft"))
    result, _ = driver.measure(bench, ("decode", "ttft"), 1, [1])
    assert set(result["decode"][0]["rounds"][0]) == {arm.name for arm in driver.DECODE}
    texts = {name: run["text"] for name, run in result["ttft"][0]["rounds"][0].items()}
    assert texts["mtmd-f16"] and texts["ours-fp32"].startswith(texts["mtmd-f16"][:1])
    json.dumps(result)
