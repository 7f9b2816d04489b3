"""Rules and targets of Core ML exports: what needs neither torch nor coremltools."""

from __future__ import annotations

from pathlib import Path

import pytest

from export import coreml_policy, targets
from export.coreml_policy import Rule, hazards, resolve, sized
from runtime.errors import InputError


@pytest.mark.parametrize("name", coreml_policy.NAMES)
def test_named_precisions_keep_what_must_stay(name: str) -> None:
    policy = resolve(name)
    assert policy.scheme("decoder", "gather:cos") == "keep", "rotary tables"
    assert policy.scheme("decoder", "conv:text_layers_0_conv_conv") == "keep"
    assert coreml_policy.bits(policy.scheme("vision_encoder", "linear:module_encoder_layers_0")) >= 8
    assert coreml_policy.bits(policy.scheme("embed_tokens", "gather:weight")) >= 8
    assert policy.compresses == (name not in ("fp16", "fp32"))


def test_named_precisions_of_the_decoder() -> None:
    label = "linear:text_layers_0_mlp_down_proj"
    found = {name: resolve(name).scheme("decoder", label) for name in ("fp16", "int8", "int4-b64", "pal6")}
    assert found == {"fp16": "keep", "int8": "int8", "int4-b64": "int4-block64", "pal6": "pal6-group16"}
    assert sized("int4-block64") == coreml_policy.Sized("int", 4, 64)
    assert sized("int8") is None


def test_default_precisions_have_no_known_hazard() -> None:
    weights = [
        ("decoder", "linear:head"), ("decoder", "gather:cos"), ("vision_encoder", "linear:module_fc"),
        ("embed_tokens", "gather:weight"),
    ]  # fmt: skip
    for name in ("fp32", "fp16", "int8", "int4", "int4-b64"):
        policy = resolve(name)
        assert hazards({weight: policy.scheme(*weight) for weight in weights}) == []


@pytest.mark.parametrize(
    ("weight", "scheme", "word"),
    [
        (("decoder", "linear:head"), "pal4-group16", "crashes of the Neural Engine"),
        (("decoder", "gather:cos"), "int8", "rotary tables"),
        (("vision_encoder", "linear:module_fc"), "int4-block32", "below 8 bits"),
    ],
)
def test_hazards_are_named(weight: tuple[str, str], scheme: coreml_policy.Scheme, word: str) -> None:
    (found,) = hazards({weight: scheme})
    assert word in found


def test_rules_of_a_file_come_first(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("base: int4\nrules: [{part: decoder, node: 'linear:head', scheme: int8}]")
    policy = resolve(str(path))
    assert policy.name == "mine" and policy.base == "float16"
    assert policy.rules[0] == Rule("decoder", "linear:head", "int8")
    assert policy.scheme("decoder", "linear:head") == "int8"
    assert policy.scheme("decoder", "linear:text_layers_0_mlp_up_proj") == "int4-block32"
    path.write_text("name: full\nbase: fp32\nrules: [{node: 'conv:*', scheme: int8}]")
    assert resolve(str(path)).base == "float32"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rules: [{scheme: int8, nodes: x}]", "did you mean node"),
        ("rules: [{scheme: int4-blok32}]", "did you mean int4-block32"),
        ("rules: [{scheme: int8-dynamic}]", "is not known"),
        ("rules: [{part: decodr, scheme: int8}]", "did you mean decoder"),
        ("rules: []", "neither base nor rules"),
        ("base: int5", "base: precision 'int5' is not known"),
        ("rules: [", "cannot be read as YAML"),
        ("- int8", "wanted a mapping"),
    ],
)
def test_faults_of_a_file_are_told(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        resolve(str(path))


def test_unknown_names_are_told() -> None:
    with pytest.raises(InputError, match=r"not known with --to coreml; did you mean int4\?"):
        resolve("int44")
    with pytest.raises(InputError, match="choose from fp32, fp16, int8"):
        resolve("q8_0")


def test_the_iphone_is_a_target_of_this_format() -> None:
    plan = targets.plan_for("iphone", to="coreml", max_context=512)
    assert plan.target == "iphone" and plan.static and plan.chunk == targets.COREML_CHUNK
    assert plan.max_context == 512
    assert targets.default_precision(plan, "coreml") == "fp16"
    free = targets.plan_for(None, to="coreml")
    assert free.target is None and free.max_context == targets.find("iphone").max_context
    assert targets.default_precision(free, "coreml") == "fp16"
    with pytest.raises(InputError, match="--flavour: is for --to onnx"):
        targets.plan_for(None, to="coreml", flavour="ort-fused")
    with pytest.raises(InputError, match="android: needs --to onnx; with --to coreml take iphone"):
        targets.plan_for("android", to="coreml")
