"""Checkpoints as people have them: settings and files that differ from what the makers of tests write."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

gguf = pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")

import torch  # noqa: E402
from tokenizers import AddedToken, Tokenizer  # noqa: E402
from transformers import AutoConfig, AutoModelForImageTextToText  # noqa: E402

from distill.fresh import initialise  # noqa: E402
from evals.torch_session import TorchSession  # noqa: E402
from export.families import gguf_rope  # noqa: E402
from export.families.gguf import _positions  # noqa: E402
from export.gguf import export_gguf, plan_files  # noqa: E402
from export.gguf_vocabulary import _REGEXES  # noqa: E402
from runtime import bundle  # noqa: E402
from runtime.errors import BundleError, CheckpointError, ParityError  # noqa: E402
from runtime.generation import GenerationOptions  # noqa: E402
from runtime.gguf_library import FIDELITY, TextModel  # noqa: E402
from runtime.session import open_bundle  # noqa: E402
from tests import gguf_checkpoints  # noqa: E402
from tests.checkpoints import RULES  # noqa: E402

Settings = dict[str, Any]
NAMES = ("smolvlm", "qwen2_5_vl", "qwen3_vl", "internvl", "lfm2_vl", "gemma3")
TOKENS = 8
NEAR = {"qwen2_5_vl": 5e-3, "qwen3_vl": 5e-3, "gemma3": 1e-3}
"""Largest rms of logits where llama.cpp computes otherwise (docs/gguf.md); else 1e-5."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("variants")
    return {name: gguf_checkpoints.write(name, root / name) for name in NAMES}


def copied(checkpoint: Path, out: Path, change: Callable[[Settings], Any] | None = None) -> Path:
    """A copy, with another configuration."""
    copy = Path(shutil.copytree(checkpoint, out / "changed"))
    if change:
        gguf_checkpoints.edit(copy, change)
    return copy


def redrawn(checkpoint: Path, out: Path, change: Callable[[Settings], Any]) -> Path:
    """A copy with another configuration and weights that fit it."""
    copy = copied(checkpoint, out, change)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(copy))
    initialise(model, RULES, 0)
    model.save_pretrained(copy)
    return copy


def edit(path: Path, change: Callable[[Settings], Any]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def reweigh(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the weights in place."""
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def exported(checkpoint: Path, out: Path, name: str = "") -> Path:
    """A float32 bundle whose figures are near, and whose answer is the checkpoint's."""
    export_gguf(checkpoint, {"f32": out / "bundle"}, names={"f32": "m"})
    figures = bundle.read(out / "bundle").parity.figures
    assert figures["text_logit_rms_error"] < NEAR.get(name, 1e-5)
    assert figures["feature_rms_error"] < 2e-3
    noise = np.random.default_rng(0).integers(0, 255, (72, 96, 3), dtype=np.uint8)
    image, question = Image.fromarray(noise), "what color?"
    reference = TorchSession(checkpoint)
    wanted = reference.generate([image], question, TOKENS)
    reference.close()
    with open_bundle(out / "bundle", threads=1) as session:
        answer = session.ask(image, question, GenerationOptions(max_new_tokens=TOKENS))
    assert list(answer.token_ids) == wanted
    return out / "bundle"


def text_file(directory: Path) -> Any:
    return gguf.GGUFReader(directory / bundle.read(directory).part("text_model").path)


# --- rotary scaling ---------------------------------------------------

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SHORT = {"original_max_position_embeddings": 64}


def rotary(kind: str, **more: Any) -> Callable[[Settings], None]:
    def change(config: Settings) -> None:
        text = config["text_config"]
        found = text.get("rope_parameters") or {"rope_theta": 1e4}
        text["rope_parameters"] = {**found, "rope_type": kind, **more}

    return change


@pytest.mark.parametrize(
    ("name", "kind", "more"),
    [
        ("smolvlm", "linear", {"factor": 4.0}),
        ("smolvlm", "llama3", {**LLAMA3, **SHORT}),
        ("smolvlm", "yarn", {"factor": 4.0, "attention_factor": 1.7, **SHORT}),
        ("internvl", "dynamic", {"factor": 2.0}),
        ("internvl", "yarn", {"factor": 4.0, "mscale": 1.3, "mscale_all_dim": 0.4, **SHORT}),
        ("qwen2_5_vl", "yarn", {"factor": 4.0, **SHORT}),
        ("lfm2_vl", "linear", {"factor": 4.0}),
    ],
)
def test_scaling_gives_the_checkpoints_answer(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, kind: str, more: Settings
) -> None:
    exported(redrawn(checkpoints[name], tmp_path, rotary(kind, **more)), tmp_path, name)


def test_scaling_that_is_left_out_breaks_the_gate(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the texts of the gate would be too short to show it."""
    copy = redrawn(checkpoints["smolvlm"], tmp_path, rotary("llama3", **LLAMA3, **SHORT))
    monkeypatch.setattr(gguf_rope, "divisors", lambda *_: None)
    with pytest.raises(ParityError, match="gate: logit_rms_error"):
        export_gguf(copy, {"f32": tmp_path / "b"}, names={"f32": "b"})


@pytest.mark.parametrize("kind", ["llama3", "yarn"])
def test_frequencies_are_transformers(kind: str) -> None:
    """The numbers themselves, at the size of a published model."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    more = {**LLAMA3, "original_max_position_embeddings": 8192, "rope_theta": 5e5, "rope_type": kind}
    config = LlamaConfig(head_dim=64, max_position_embeddings=131072, rope_parameters=more)
    wanted, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    text = config.to_dict()
    if kind == "llama3":
        plain = 5e5 ** -(torch.arange(0, 64, 2).double() / 64)
        found = gguf_rope.divisors(text, 64)
        assert found is not None and max(found) == 8.0 and min(found) == 1.0
        torch.testing.assert_close(plain / torch.tensor(found), wanted.double(), rtol=1e-5, atol=0)
    else:
        assert gguf_rope._scale(gguf_rope.parameters(text), 8.0) == pytest.approx(scale)
        assert gguf_rope._stretch(gguf_rope.parameters(text), text) == (8.0, 8192)


# --- weights ----------------------------------------------------------


def test_a_head_trained_apart_from_a_tied_embedding_is_used(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """As peft's modules_to_save leaves it; transformers uses what is stored, whatever config.json says."""
    copy = copied(checkpoints["smolvlm"], tmp_path)
    assert json.loads((copy / "config.json").read_text())["tie_word_embeddings"]
    name = "model.text_model.embed_tokens.weight"
    reweigh(copy, lambda w: w.update({"lm_head.weight": w[name].roll(1, 0) * 1.5}))
    tensors = {tensor.name for tensor in text_file(exported(copy, tmp_path)).tensors}
    assert {"token_embd.weight", "output.weight"} <= tensors


@pytest.mark.parametrize("keep", [True, False])
def test_a_head_that_repeats_or_replaces_the_embedding(
    checkpoints: dict[str, Path], tmp_path: Path, keep: bool
) -> None:
    copy = copied(checkpoints["smolvlm"], tmp_path)
    name = "model.text_model.embed_tokens.weight"
    reweigh(copy, lambda w: w.update({"lm_head.weight": (w[name] if keep else w.pop(name)).clone()}))
    tensors = {tensor.name for tensor in text_file(exported(copy, tmp_path)).tensors}
    assert "token_embd.weight" in tensors and "output.weight" not in tensors


def test_rows_that_only_fill_the_table_are_not_asked_for(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """A vocabulary padded with zeros: without an epsilon, as llama.cpp has it here, such a row is NaN."""
    copy = copied(checkpoints["qwen2_5_vl"], tmp_path)
    model: Any = AutoModelForImageTextToText.from_pretrained(copy)
    model.resize_token_embeddings(1024, mean_resizing=False)
    size = Tokenizer.from_file(str(copy / "tokenizer.json")).get_vocab_size()
    with torch.no_grad():
        model.get_input_embeddings().weight[size:] = 0
        model.get_output_embeddings().weight[size:] = 0
    model.save_pretrained(copy)
    tokens = text_file(exported(copy, tmp_path, "qwen2_5_vl")).fields["tokenizer.ggml.tokens"]
    assert len(tokens.data) == 1024


def test_buffers_of_older_versions_are_left_out(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    copy = copied(checkpoints["smolvlm"], tmp_path)
    frequencies = {"model.text_model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(8)}
    ids = {"model.vision_model.embeddings.position_ids": torch.arange(64)[None]}
    reweigh(copy, lambda w: w.update(frequencies | ids))
    files, plain = plan_files(copy), plan_files(checkpoints["smolvlm"])
    assert [len(plan.pieces) for plan in (files.text, files.vision)] == [
        len(plan.pieces) for plan in (plain.text, plain.vision)
    ]


def test_weights_under_a_wrapper_are_told_by_what_wrapped_them(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    copy = copied(checkpoints["smolvlm"], tmp_path)

    def wrapped(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            weights[f"module.{name}"] = weights.pop(name)

    reweigh(copy, wrapped)
    with pytest.raises(CheckpointError, match=r"names in the files have 'module\.' in them"):
        export_gguf(copy, {"f32": tmp_path / "b"}, names={"f32": "b"})


def test_an_adapter_among_the_weights_is_told(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    copy = copied(checkpoints["smolvlm"], tmp_path)
    name = "model.text_model.layers.0.self_attn.q_proj.lora_A.default.weight"
    reweigh(copy, lambda weights: weights.update({name: torch.rand(4, 64)}))
    with pytest.raises(CheckpointError, match="weights of an adapter beside the model's"):
        export_gguf(copy, {"f32": tmp_path / "b"}, names={"f32": "b"})


# --- pictures ---------------------------------------------------------


def test_settings_that_the_file_leaves_out_are_transformers(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    copy = copied(checkpoints["internvl"], tmp_path)

    def sparse(content: Settings) -> None:
        for name in ("image_mean", "image_std", "rescale_factor"):
            content["image_processor"].pop(name, None)

    edit(copy / "processor_config.json", sparse)
    assert len(plan_files(copy).source.preprocessor["image_mean"]) == 3
    exported(copy, tmp_path)


def test_another_rescale_factor_goes_into_mean_and_deviation(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """llama.cpp divides by 255."""
    copy = copied(checkpoints["qwen3_vl"], tmp_path)
    edit(copy / "processor_config.json", lambda c: c["image_processor"].update(rescale_factor=1 / 127.5))
    exported(copy, tmp_path, "qwen3_vl")


@pytest.mark.parametrize("side", [32, 128])
def test_pictures_of_another_size_than_the_encoder_was_trained_with(
    checkpoints: dict[str, Path], tmp_path: Path, side: int
) -> None:
    copy = copied(checkpoints["smolvlm"], tmp_path)

    def size(content: Settings) -> None:
        content["image_seq_len"] = (side // 8 // 2) ** 2
        content["image_processor"].update(size={"longest_edge": side}, max_image_size={"longest_edge": side})

    edit(copy / "processor_config.json", size)
    exported(copy, tmp_path)


def test_positions_are_plain_where_each_patch_has_its_own() -> None:
    assert _positions(32, 32) is None
    assert _positions(2, 4).tolist() == [0, 2, 8, 10]


@pytest.mark.parametrize("full", [[], [0, 1, 2]])
def test_windows_in_all_layers_or_none(checkpoints: dict[str, Path], tmp_path: Path, full: list[int]) -> None:
    def change(config: Settings) -> None:
        config["vision_config"].update(depth=3, fullatt_block_indexes=full)

    exported(redrawn(checkpoints["qwen2_5_vl"], tmp_path, change), tmp_path, "qwen2_5_vl")


def test_a_norm_after_the_vision_encoder(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    change: Callable[[Settings], Any] = lambda config: config["vision_config"].update(use_mean_pooling=False)  # noqa: E731
    exported(redrawn(checkpoints["internvl"], tmp_path, change), tmp_path)


# --- tokens -----------------------------------------------------------


def test_llama_cpp_stops_where_the_checkpoint_does(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """One token known by its text, two that only generation_config.json knows."""
    copy = copied(checkpoints["qwen3_vl"], tmp_path)
    ends = [2, 0, 7, 9]
    edit(copy / "generation_config.json", lambda content: content.update(eos_token_id=ends))
    out = exported(copy, tmp_path, "qwen3_vl")
    fields = text_file(out).fields
    assert [fields[f"tokenizer.ggml.{role}_token_id"].contents() for role in ("eos", "eot", "eom")] == [
        2,
        7,
        9,
    ]
    assert bundle.read(out).tokenizer.stop_ids == tuple(ends)
    path = out / bundle.read(out).part("text_model").path
    text = TextModel(path, context=64, threads=1, settings=FIDELITY, spin=False)
    try:
        found = [end for end in range(text.tokens) if text._lib.llama_vocab_is_eog(text.vocabulary, end)]
    finally:
        text.close()
    assert found == sorted(ends)


def test_the_template_is_the_processors(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """Not the one in tokenizer_config.json, which a training may have left as it was."""
    copy = copied(checkpoints["smolvlm"], tmp_path)
    edit(copy / "tokenizer_config.json", lambda content: content.update(chat_template="another"))
    wanted = (copy / "chat_template.jinja").read_text()
    found = text_file(exported(copy, tmp_path)).fields["tokenizer.chat_template"].contents()
    assert found == wanted


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_rules_of_added_tokens_that_llama_cpp_lacks_are_told(
    checkpoints: dict[str, Path], tmp_path: Path, flag: str
) -> None:
    """A session gives ids and needs none of them."""
    copy = copied(checkpoints["gemma3"], tmp_path)
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    text = max((each for each in tokenizer.get_vocab() if each.isascii() and each.isalpha()), key=len)
    tokenizer.add_tokens([AddedToken(text, normalized=False, **{flag: True})])
    tokenizer.save(str(copy / "tokenizer.json"))
    out = exported(copy, tmp_path, "gemma3")
    assert f"read {text!r} without its {flag}" in (out / "Modelfile").read_text()


QWEN_SPLIT = next(pattern for pattern, name in _REGEXES.items() if name == "qwen2")


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl"])
def test_a_tokenizer_as_qwen_publishes_it(checkpoints: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Characters are composed first (NFC), which llama.cpp does not do; the gate has such texts."""
    copy = copied(checkpoints[name], tmp_path)
    split = {"type": "Split", "pattern": {"Regex": QWEN_SPLIT}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}

    def published(content: Settings) -> None:
        content["normalizer"] = {"type": "NFC"}
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
        content["post_processor"] = level

    edit(copy / "tokenizer.json", published)
    out = exported(copy, tmp_path, name)
    assert text_file(out).fields["tokenizer.ggml.pre"].contents() == "qwen2"
    assert "do not compose characters" in (out / "Modelfile").read_text()


def test_another_normalizer_is_refused_by_name(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    copy = copied(checkpoints["smolvlm"], tmp_path)
    edit(copy / "tokenizer.json", lambda content: content.update(normalizer={"type": "Lowercase"}))
    with pytest.raises(CheckpointError, match=r'normalizer \{"type": "Lowercase"\} has no counterpart'):
        export_gguf(copy, {"f32": tmp_path / "b"}, names={"f32": "b"})


def test_files_without_a_fast_tokenizer_are_told(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    copy = copied(checkpoints["smolvlm"], tmp_path)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json; write it by AutoTokenizer"):
        plan_files(copy)


# --- refused by name --------------------------------------------------

TEXT, VISION = "text_config", "vision_config"


@pytest.mark.parametrize(
    ("name", "section", "change", "message"),
    [
        ("smolvlm", TEXT, {"hidden_act": "gelu"}, "text_config.hidden_act is 'gelu'"),
        ("smolvlm", VISION, {"hidden_act": "relu"}, "vision_config.hidden_act is 'relu'"),
        ("smolvlm", "", {"scale_factor": 1}, "scale_factor 1: llama.cpp knows 2 or more"),
        ("lfm2_vl", "", {"downsample_factor": 1}, "downsample_factor 1: llama.cpp knows 2 or more"),
        ("lfm2_vl", "", {"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu'"),
        ("lfm2_vl", TEXT, {"head_dim": 32}, r"head_dim 32\), hidden_size is 64"),
        ("internvl", TEXT, {"head_dim": 32}, r"head_dim 32\), hidden_size is 64"),
        ("internvl", "", {"vision_feature_layer": -2}, "vision_feature_layer is -2"),
        ("internvl", "", {"vision_feature_select_strategy": "full"}, "select_strategy is 'full'"),
        ("internvl", VISION, {"norm_type": "rms_norm"}, "norm_type is 'rms_norm'"),
        ("internvl", VISION, {"use_absolute_position_embeddings": False}, "position_embeddings is False"),
        ("qwen2_5_vl", TEXT, {"rms_norm_eps": 1e-3}, "rms_norm_eps is 0.001; llama.cpp takes 0"),
        ("qwen2_5_vl", VISION, {"hidden_act": "gelu"}, "vision_config.hidden_act is 'gelu'"),
        ("qwen2_5_vl", VISION, {"depth": 5, "fullatt_block_indexes": [1]}, "evenly spaced"),
        ("qwen3_vl", VISION, {"num_position_embeddings": 50}, "num_position_embeddings 50"),
        ("qwen3_vl", VISION, {"spatial_merge_size": 1}, "spatial_merge_size 1: llama.cpp knows 2 alone"),
        ("qwen3_vl", VISION, {"temporal_patch_size": 1}, "temporal_patch_size 1: llama.cpp knows 2 alone"),
    ],
)
def test_what_llama_cpp_does_otherwise_is_refused_by_name(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, section: str, change: Settings, message: str
) -> None:
    def changed(config: Settings) -> None:
        (config[section] if section else config).update(change)

    with pytest.raises(CheckpointError, match=message):
        plan_files(copied(checkpoints[name], tmp_path, changed))


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("llama3", {**LLAMA3, **SHORT}, "rope_type 'llama3'; llama.cpp's qwen2 does not know it"),
        ("yarn", {"factor": 4.0, "beta_fast": 16, **SHORT}, "yarn with beta_fast 16; llama.cpp knows 32"),
        (
            "longrope",
            {"factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, **SHORT},
            "rope_type 'longrope' has no GGUF export here",
        ),
    ],
)
def test_scaling_that_llama_cpp_lacks_is_refused(
    checkpoints: dict[str, Path], tmp_path: Path, kind: str, more: Settings, message: str
) -> None:
    copy = copied(checkpoints["internvl"], tmp_path, rotary(kind, **more))
    with pytest.raises(CheckpointError, match=message):
        plan_files(copy)


def test_a_bias_that_an_architecture_lacks_is_refused_by_name(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    change: Callable[[Settings], Any] = lambda config: config[TEXT].update(attention_bias=True)  # noqa: E731
    with pytest.raises(CheckpointError, match=r"o_proj\.bias: llama\.cpp's qwen3vl has no bias there"):
        plan_files(redrawn(checkpoints["qwen3_vl"], tmp_path, change))


@pytest.mark.parametrize(
    ("section", "setting", "value", "message"),
    [
        (TEXT, "conv_bias", True, r"cannot open it \(wrong number of tensors; expected \d+, got \d+\)"),
        ("", "projector_bias", False, r"beside the text model \(unable to find tensor mm\.1\.bias\)"),
    ],
)
def test_llama_cpps_own_reason_is_told(
    checkpoints: dict[str, Path], tmp_path: Path, section: str, setting: str, value: bool, message: str
) -> None:
    def change(config: Settings) -> None:
        (config[section] if section else config)[setting] = value

    copy = redrawn(checkpoints["lfm2_vl"], tmp_path, change)
    with pytest.raises(BundleError, match=message):
        export_gguf(copy, {"f32": tmp_path / "b"}, names={"f32": "b"})
    assert not (tmp_path / "b").exists()
