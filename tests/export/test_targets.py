"""Device classes as data, and what a user changes about them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from export import targets
from export.quantize_policy import resolve
from runtime.errors import InputError
from tests.cli import ROOT, call, refusal

ONNX = [target for target in targets.TARGETS if target.format == "onnx"]


def test_the_table_has_the_device_classes() -> None:
    names = [target.name for target in targets.TARGETS]
    assert names == ["iphone", "android", "jetson-orin", "raspberry-pi", "cpu", "browser"]


@pytest.mark.parametrize("target", targets.TARGETS, ids=lambda target: target.name)
def test_a_row_holds_together(target: targets.Target) -> None:
    assert set(target.bits) == {"vision_encoder", "embed_tokens", "decoder"}
    assert target.bits["vision_encoder"] >= targets.LEAST_VISION_BITS
    assert target.providers[-1] == targets.CPU and len(set(target.providers)) == len(target.providers)
    assert target.max_context >= target.max_image_tokens + target.chunk
    assert target.max_images >= 1 and target.device and target.shapes
    plan = targets.Plan(flavour=target.flavour)
    targets.check_precision(plan, target.precision)
    if target.flavour == "ort-fused":
        assert resolve(target.precision).name == target.precision


@pytest.mark.parametrize("target", ONNX, ids=lambda target: target.name)
def test_a_plan_is_the_row_with_changes_over_it(target: targets.Target) -> None:
    plan = targets.plan_for(target.name)
    assert (plan.target, plan.flavour, plan.providers) == (target.name, target.flavour, target.providers)
    assert (plan.max_context, plan.max_images) == (target.max_context, target.max_images)
    assert targets.default_precision(plan) == target.precision
    changed = targets.plan_for(target.name, max_context=300, max_image_tokens=64, max_images=1)
    assert (changed.max_context, changed.max_image_tokens, changed.max_images) == (300, 64, 1)
    assert changed.providers == target.providers and changed.split_images


def test_without_a_target_nothing_is_limited() -> None:
    plan = targets.plan_for(None)
    assert plan == targets.Plan() and plan.max_context is None and not plan.static
    assert targets.default_precision(plan) == "fp32"


@pytest.mark.parametrize(
    ("target", "flavour", "precision"),
    [
        ("cpu", "portable-static", "fp32"),
        ("android", "ort-fused", "int4"),
        ("jetson-orin", "ort-fused", "fp16"),
    ],
)
def test_the_other_flavour_of_a_target(target: str, flavour: str, precision: str) -> None:
    plan = targets.plan_for(target, flavour=flavour)
    assert targets.default_precision(plan) == precision
    targets.check_precision(plan, precision)


def test_a_target_of_another_format_says_what_to_use() -> None:
    with pytest.raises(InputError, match=r"iphone: needs --to coreml.*android.*CoreML provider"):
        targets.plan_for("iphone")


def test_unknown_names_get_the_nearest_one() -> None:
    with pytest.raises(InputError, match=r"'jetson' is not known; did you mean jetson-orin\?"):
        targets.plan_for("jetson")
    with pytest.raises(InputError, match="ort-fused, portable-static"):
        targets.plan_for("cpu", flavour="static")


@pytest.mark.parametrize(
    ("flavour", "precision"),
    [("portable-static", "int4"), ("portable-static", "int8"), ("ort-fused", "qdq-int8")],
)
def test_a_precision_of_the_other_flavour_is_refused(flavour: targets.Flavour, precision: str) -> None:
    with pytest.raises(InputError, match=f"--precision {precision}.*--flavour"):
        targets.check_precision(targets.Plan(flavour=flavour), precision)


def test_targets_load_nothing_heavy() -> None:
    code = "import sys, export.targets; assert not {'torch', 'onnx', 'onnx_ir', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- the command ------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "iphone"], "needs --to coreml"),
        (["--target", "toaster"], "'toaster' is not known"),
        (["--flavour", "fast"], "--flavour: got 'fast'"),
        (["--quant", "best"], "--quant: got best"),
        (["--quant", "auto", "--precision", "int8"], "leave --precision int8 out"),
        (["--target", "android", "--quant", "auto"], "--flavour ort-fused"),
        (["--target", "jetson-orin", "--precision", "int4"], "portable-static has fp32, fp16"),
        (["--to", "coreml", "--target", "android"], "android: needs --to onnx; with --to coreml take iphone"),
        (["--to", "coreml", "--flavour", "ort-fused"], "--flavour: is for --to onnx"),
        (["--to", "coreml", "--quant", "auto"], "--quant auto: is for --to onnx"),
    ],
)
def test_bad_exports_are_one_line(tmp_path: Path, arguments: list[str], words: str) -> None:
    assert words in refusal("export", tmp_path / "absent", "--out", tmp_path / "out", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_help_has_examples_of_targets() -> None:
    text = call("export", "--help").stdout
    assert "pocketvlm export student/ --target raspberry-pi" in text and "--max-image-tokens" in text
