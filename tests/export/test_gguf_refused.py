"""Checkpoints that a GGUF export refuses, in a line that says what and where; nothing is left behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

from export.gguf import export_gguf, plan_files
from export.gguf_kinds import Request, TensorRule
from export.gguf_write import write as write_file
from runtime.errors import CheckpointError, InputError
from tests import gguf_checkpoints
from tests.cli import refusal


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("refused")
    return {name: gguf_checkpoints.write(name, root / name) for name in ("smolvlm", "internvl")}


def copied(checkpoint: Path, out: Path, name: str) -> Path:
    """To be damaged."""
    return Path(shutil.copytree(checkpoint, out / name))


def rewrite(checkpoint: Path, keep: str = "", drop: str = "\0") -> None:
    """Leave out the weights whose names hold `drop`."""
    path = checkpoint / "model.safetensors"
    kept = {name: each for name, each in load_file(path).items() if keep in name and drop not in name}
    save_file(kept, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (float("nan"), "f32", "up_proj.weight: holds a number that is none"),
        (float("inf"), "q8_0", "up_proj.weight: holds a number that is none"),
        (1e6, "f16", r"holds 1e\+06, more than float16 can; choose bf16"),
    ],
)
def test_numbers_that_a_type_does_not_have(
    checkpoints: dict[str, Path], tmp_path: Path, value: float, kind: str, message: str
) -> None:
    copy = copied(checkpoints["smolvlm"], tmp_path, "odd")
    weights = load_file(copy / "model.safetensors")
    weights["model.text_model.layers.0.mlp.up_proj.weight"][3, 2] = value
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    files = plan_files(copy)
    with pytest.raises(CheckpointError, match=message):
        write_file(files.text, files.source, tmp_path / "text.gguf", kind)


def test_a_family_that_is_none(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    copy = copied(checkpoints["smolvlm"], tmp_path, "odd")
    gguf_checkpoints.edit(copy, lambda config: config.update(model_type="fastvlm"))
    with pytest.raises(CheckpointError, match="odd: model_type 'fastvlm' has no GGUF export; known: "):
        plan_files(copy)


def test_a_damaged_configuration(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    copy = copied(checkpoints["smolvlm"], tmp_path, "cut")
    (copy / "processor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"processor_config\.json: cannot be read as JSON"):
        plan_files(copy)
    gguf_checkpoints.edit(copy, lambda config: config["text_config"].update(num_attention_heads="four"))
    with pytest.raises(CheckpointError, match=r"cut: transformers cannot read config\.json"):
        plan_files(copy)


@pytest.mark.parametrize(
    ("name", "drop", "message"),
    [
        ("internvl", "vision_tower", "weights missing"),
        ("internvl", "layers.0.mlp.up_proj.weight", "1 weights missing"),
        ("smolvlm", "connector", "1 weights missing"),
    ],
)
def test_missing_weights_leave_no_bundle(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, drop: str, message: str
) -> None:
    copy = copied(checkpoints[name], tmp_path, "part")
    rewrite(copy, drop=drop)
    with pytest.raises(CheckpointError, match=message):
        export_gguf(copy, {"f32": tmp_path / "b"}, names={"f32": "b"})
    assert not (tmp_path / "b").exists()


def test_a_checkpoint_without_a_vision_model_gives_no_empty_mmproj(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    copy = copied(checkpoints["internvl"], tmp_path, "text")
    rewrite(copy, keep="language_model")
    with pytest.raises(CheckpointError, match="text: no vision tensors under a known name"):
        plan_files(copy)


def test_rules_are_checked_before_the_work(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    lines: list[str] = []
    for rule, message in ((("blk.9.*", "q8_0"), "matches no tensor"), (("blk.0.*", "q9"), "'q9' is not")):
        with pytest.raises(InputError, match=message):
            export_gguf(
                checkpoints["smolvlm"], {"q4_0": tmp_path / "b"}, names={"q4_0": "b"},
                request=Request(rules=(TensorRule(*rule),)), progress=lines.append,
            )  # fmt: skip
    assert set(lines) == {"reading the checkpoint"} and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--to", "gguf", "--quant", "q4_km"), "did you mean q4_k_m"),
        (("--to", "gguf", "--quant", ","), "no precision given; choose from f32, f16, bf16, q8_0"),
        (("--to", "gguf", "--quant", "auto"), "is for --to onnx"),
        (("--to", "gguf", "--quant", "q8_0", "--imatrix"), "weighs nothing in q8_0"),
        (("--to", "gguf", "--quant", "q4_0", "--rules", "none.yaml"), "none.yaml: cannot be read"),
        (("--precision", "int8", "--imatrix"), "--imatrix: is for --to gguf, not onnx"),
        (("--precision", "int8", "--rules", "none.yaml"), "--rules: is for --to gguf, not onnx"),
    ],
)
def test_options_that_do_not_fit(
    checkpoints: dict[str, Path], tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    assert message in refusal("export", checkpoints["smolvlm"], "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()
