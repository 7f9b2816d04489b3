"""Checkpoint directories as trainings leave them: other names, adapters, templates, settings, damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AddedToken, AutoConfig, AutoModelForImageTextToText, AutoProcessor

import export
from distill import fresh
from evals.torch_session import TorchSession
from export import prompts
from export.checkpoint import load, read_config
from export.facts import prepare
from export.families import family_of
from export.gate_cases import drawn
from export.targets import plan_for
from runtime.errors import CheckpointError
from runtime.generation import GenerationOptions
from runtime.session import open_bundle
from tests.checkpoints import FAMILIES, RULES, VARIANTS

QUERY = "model.text_model.layers.0.self_attn.q_proj"
QUESTION = "what color is the shape?"


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


def rewrite(copy: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the weights of the one file, in place or by returning others."""
    tensors = load_file(copy / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file(
        {name: each.clone() for name, each in tensors.items()}, copy / "model.safetensors", {"format": "pt"}
    )


def named(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": each for name, each in tensors.items()}


# --- weights ----------------------------------------------------------


def test_an_adapter_that_was_not_merged_is_refused(copy: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{QUERY}.lora_A.default.weight"] = torch.randn(4, 64)
        tensors[f"{QUERY}.lora_B.default.weight"] = torch.randn(64, 4)

    rewrite(copy, add)
    with pytest.raises(CheckpointError, match=r"2 weights of an adapter.*lora_A.*merge it first"):
        load(copy)


def test_a_bias_that_the_configuration_denies_is_refused(copy: Path) -> None:
    rewrite(copy, lambda tensors: tensors.update({f"{QUERY}.bias": torch.ones(64)}))
    with pytest.raises(CheckpointError, match=rf"{QUERY}\.bias is in the files.*correct config\.json"):
        load(copy)


def test_buffers_that_older_versions_stored_do_not_matter(copy: Path) -> None:
    stored = {
        "model.vision_model.embeddings.patch_embedding.position_ids": torch.arange(64)[None],
        "model.text_model.layers.0.self_attn.q_proj.inv_freq": torch.ones(8),
    }
    rewrite(copy, lambda tensors: tensors.update(stored))
    assert load(copy).notes == ()


def test_weights_of_no_layer_are_left_out_and_noted(copy: Path) -> None:
    rewrite(copy, lambda tensors: tensors.update({"reward_head.weight": torch.ones(1, 64)}))
    facts = prepare(load(copy), (), lambda _: None, trace=False, expect=False)
    assert any(
        "1 weights in the files have no place" in note and "reward_head" in note for note in facts.notes
    )


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_names_with_a_wrapper_are_told(copy: Path, prefix: str) -> None:
    rewrite(copy, lambda tensors: named(tensors, prefix))
    with pytest.raises(CheckpointError, match=rf"weights missing.*names in the files have '{prefix}'"):
        load(copy)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["self_attn.v_proj", "embed_tokens", "patch_embedding"])
def test_a_weight_that_is_no_number_is_named(copy: Path, name: str, number: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        next(each for key, each in tensors.items() if name in key).view(-1)[-1] = number

    rewrite(copy, spoil)
    with pytest.raises(CheckpointError, match=rf"{name}\S* has 1 of \d+ numbers that are NaN or infinite"):
        load(copy)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "internvl", "gemma3"])
def test_both_layouts_of_names_load_to_the_same(tmp_path: Path, family: str) -> None:
    """transformers saves these under their old names; trainings that save a state dict write the new ones."""
    path = {**FAMILIES, **VARIANTS}[family](tmp_path / "tiny")
    wanted = load(path).model.state_dict()
    assert not {"model.language_model.norm.weight"} & set(load_file(path / "model.safetensors"))
    own = {name: each for name, each in wanted.items() if name != "lm_head.weight" or family == "qwen2_5_vl"}
    save_file(
        {name: each.clone() for name, each in own.items()}, path / "model.safetensors", {"format": "pt"}
    )
    found = load(path).model.state_dict()
    assert all(torch.equal(found[name], each) for name, each in wanted.items())


def flattened(config: dict[str, Any]) -> None:
    """The configuration of Qwen2-VL and Qwen2.5-VL as published: the text model's settings at the top."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    for name in ("model_type", "layer_types", "dtype", "architectures", "transformers_version"):
        text.pop(name, None)
    old = {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope"}, "torch_dtype": "bfloat16"}
    old["rope_scaling"]["mrope_section"] = rope["mrope_section"]
    unused = {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 1}
    config.update({**text, **old, **unused, "transformers_version": "4.41.2"})


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_a_flat_configuration_is_the_same_model(tmp_path: Path, family: str) -> None:
    path = {**FAMILIES, **VARIANTS}[family](tmp_path / "tiny")
    with TorchSession(path) as session:
        wanted = session.generate(drawn(64, 48, 1), QUESTION, 6)
    shape = family_of(load(path)).decoder_shape(load(path))
    edit(path / "config.json", flattened)
    checkpoint = load(path)
    assert family_of(checkpoint).decoder_shape(checkpoint) == shape
    with TorchSession(path, model=checkpoint.model, processor=checkpoint.processor) as session:
        assert session.generate(drawn(64, 48, 1), QUESTION, 6) == wanted


# --- directories ------------------------------------------------------


def test_an_adapter_directory_says_what_to_merge(copy: Path) -> None:
    (copy / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base"}))
    with pytest.raises(CheckpointError, match=r"on top of it; if it is merged already, move"):
        read_config(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors; it is an adapter of some/base; merge"):
        read_config(copy)
    (copy / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json; it is an adapter of some/base; merge"):
        read_config(copy)


def test_a_directory_of_checkpoints_says_which_is_the_last(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for step in ("500", "1500", "best"):
        shutil.copytree(tiny_checkpoint, tmp_path / f"checkpoint-{step}")
    with pytest.raises(
        CheckpointError, match=r"no config\.json; it has 2 checkpoints .*checkpoint-1500 is the last"
    ):
        read_config(tmp_path)


def test_a_trainers_files_beside_the_model_do_not_matter(copy: Path) -> None:
    torch.save({}, copy / "optimizer.pt")
    torch.save({}, copy / "training_args.bin")
    shutil.copytree(copy, copy / "checkpoint-500")
    assert load(copy).notes == ()


def test_no_tokenizer_is_told(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"it has no tokenizer\.json; copy that of the model"):
        load(copy)


def test_two_models_in_a_directory_are_refused(copy: Path) -> None:
    names = dict.fromkeys(load_file(copy / "model.safetensors"), "model-00001-of-00001.safetensors")
    shutil.copyfile(copy / "model.safetensors", copy / "model-00001-of-00001.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    with pytest.raises(CheckpointError, match=r"are two models, and transformers takes the first"):
        read_config(copy)
    (copy / "model.safetensors").unlink()
    assert load(copy).parameters


def test_quantized_checkpoints_are_refused(copy: Path) -> None:
    edit(
        copy / "config.json", lambda found: found.update(quantization_config={"quant_method": "bitsandbytes"})
    )
    with pytest.raises(CheckpointError, match=r"config\.json: weights quantized by bitsandbytes"):
        read_config(copy)


@pytest.mark.parametrize(
    ("kind", "name"), [(torch.int8, "I8"), (torch.uint8, "U8"), (torch.float8_e4m3fn, "F8_E4M3")]
)
def test_weights_without_their_scales_are_refused(copy: Path, kind: torch.dtype, name: str) -> None:
    """transformers would take the bare numbers."""
    rewrite(copy, lambda tensors: tensors.update({f"{QUERY}.weight": tensors[f"{QUERY}.weight"].to(kind)}))
    with pytest.raises(CheckpointError, match=rf"{QUERY}\.weight is stored as {name}, which is quantized"):
        load(copy)


def test_mixed_types_load_to_float32(copy: Path) -> None:
    def mix(tensors: dict[str, torch.Tensor]) -> None:
        for name, each in tensors.items():
            kind = torch.float64 if "norm" in name else torch.float16 if "mlp" in name else torch.bfloat16
            tensors[name] = each.to(kind)

    rewrite(copy, mix)
    wanted, found = load_file(copy / "model.safetensors"), load(copy).model.state_dict()
    assert all(found[name].dtype == torch.float32 for name in wanted)
    assert all(torch.equal(found[name], each.float()) for name, each in wanted.items())


def test_a_file_that_is_passed_over_is_noted(copy: Path) -> None:
    assert load(copy).notes == ()
    template = (copy / "chat_template.jinja").read_text()
    edit(copy / "tokenizer_config.json", lambda found: found.update(chat_template=f"{template}\n"))
    settings = json.loads((copy / "processor_config.json").read_text())["image_processor"]
    (copy / "preprocessor_config.json").write_text(json.dumps(settings))
    assert load(copy).notes == ()  # the same twice
    edit(copy / "tokenizer_config.json", lambda found: found.update(chat_template=f"Short!{template}"))
    edit(copy / "preprocessor_config.json", lambda found: found.update(image_mean=[0.1, 0.1, 0.1]))
    checkpoint = load(copy)
    assert checkpoint.processor.chat_template == template
    assert checkpoint.notes == (
        "tokenizer_config.json has another chat template than the one taken",
        "processor_config.json is taken, preprocessor_config.json has other image_mean",
    )


# --- chat templates ---------------------------------------------------


@pytest.mark.parametrize("named_ones", [False, True])
def test_a_template_in_the_tokenizers_configuration_is_taken(copy: Path, named_ones: bool) -> None:
    """Where versions 4.43 and later wrote it for text models."""
    text = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").unlink()
    value = (
        [{"name": "default", "template": text}, {"name": "tool_use", "template": "x"}] if named_ones else text
    )
    edit(copy / "tokenizer_config.json", lambda found: found.update(chat_template=value))
    assert load(copy).processor.chat_template == text
    with TorchSession(copy) as session:  # evaluations open the checkpoint themselves
        assert len(session.prompt_ids(QUESTION, [session.prepare(drawn(40, 30, 1))])) > 16


def test_no_template_is_told(copy: Path) -> None:
    (copy / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match=r"no chat template in chat_template\.jinja"):
        load(copy)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('no pictures') }}", r"cannot be rendered: no pictures"),
        ("{% if %}", r"cannot be rendered: Expected an expression"),
        (
            "{% for m in messages %}{{ 'U: ' + m['content'] }}{% endfor %}",
            r"cannot be rendered: can only concat",
        ),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", r"it is one for text alone"),
    ],
)
def test_a_template_for_other_messages_is_told(copy: Path, template: str, told: str) -> None:
    (copy / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match=told):
        prepare(load(copy), (), lambda _: None, trace=False, expect=False)


@pytest.mark.parametrize(("line", "noted"), [("", 0), ("Today: {{ strftime_now('%d %b %Y') }}. ", 1)])
def test_a_day_in_the_template_is_noted(copy: Path, line: str, noted: int) -> None:
    path = copy / "chat_template.jinja"
    unused = "{%- if false -%}{{ strftime_now('%Y') }}{%- endif -%}"
    path.write_text(unused + line + path.read_text())
    found = prompts.day_note(load(copy))
    assert len(found) == noted and all("strftime_now" in note for note in found)


# --- generation_config.json -------------------------------------------


def ask_for(copy: Path, **settings: Any) -> None:
    edit(copy / "generation_config.json", lambda found: found.update(settings))


def test_a_checkpoint_with_penalties_is_exported_and_noted(copy: Path, tmp_path: Path) -> None:
    """As published Qwen2.5 models have them: the gate compares what the logits say."""
    ask_for(copy, do_sample=True, temperature=0.7, repetition_penalty=1.5)
    bundle = export.export_checkpoint(copy, tmp_path / "out")
    with TorchSession(copy) as reference, open_bundle(bundle, threads=1) as session:
        wanted = reference.generate(drawn(64, 48, 1), QUESTION, 8)
        answer = session.ask(drawn(64, 48, 1), QUESTION, GenerationOptions(max_new_tokens=8))
        assert reference.model.generation_config.repetition_penalty == 1.5  # as it was
    assert answer.token_ids == wanted
    (note,) = [note for note in session.manifest.notes if "generation_config" in note]
    assert "repetition_penalty 1.5" in note and "temperature 0.7" in note


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 2}, {"min_new_tokens": 4}, {"suppress_tokens": [1, 2]}, {"stop_strings": ["a"]}],
)
def test_settings_that_choose_tokens_are_noted_and_not_followed(copy: Path, settings: dict[str, Any]) -> None:
    with TorchSession(copy) as session:
        wanted = session.generate(drawn(64, 48, 1), QUESTION, 6)
    ask_for(copy, **settings)
    checkpoint = load(copy)
    facts = prepare(checkpoint, (), lambda _: None, trace=False, expect=False)
    assert sum(next(iter(settings)) in note for note in facts.notes) == 1
    assert facts.reference.generate(drawn(64, 48, 1), QUESTION, 6) == wanted


def test_settings_without_effect_are_not_noted(copy: Path) -> None:
    ask_for(copy, temperature=0.3, top_k=5, max_length=20, use_cache=False, repetition_penalty=1.0)
    facts = prepare(load(copy), (), lambda _: None, trace=False, expect=False)
    assert not any("generation_config" in note for note in facts.notes)


def test_a_broken_generation_config_is_told(copy: Path) -> None:
    """transformers would go on without it, and without its stop tokens."""
    (copy / "generation_config.json").write_text("{broken")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: cannot be read as JSON"):
        load(copy)


def test_a_model_that_transformers_cannot_run_is_told(tmp_path: Path) -> None:
    path = FAMILIES["internvl"](tmp_path / "tiny")
    edit(path / "config.json", lambda found: found.update(vision_feature_select_strategy="full"))
    with pytest.raises(CheckpointError, match=r"transformers cannot answer with it: .*correct its config"):
        prepare(load(path), (), lambda _: None, trace=False, expect=False)


# --- settings ---------------------------------------------------------


def taken(path: Path) -> None:
    """Everything before the trace."""
    prepare(load(path), (), lambda _: None, trace=False, expect=False)


@pytest.mark.parametrize(("length", "works"), [(1024, True), (10, False)])
def test_truncation_of_the_training_in_the_tokenizers_file(copy: Path, length: int, works: bool) -> None:
    """transformers cuts a prompt by it, and with it the picture; a bundle's reader turns it off."""
    cut = {"direction": "Right", "max_length": length, "strategy": "LongestFirst", "stride": 0}
    edit(copy / "tokenizer.json", lambda found: found.update(truncation=cut))
    if works:
        taken(copy)
    else:
        with pytest.raises(CheckpointError, match=r"transformers cannot answer with it: .*truncation"):
            taken(copy)


def test_tokens_without_an_embedding_are_refused(copy: Path) -> None:
    """A question with one of them would end in the runtime's own error."""
    processor = AutoProcessor.from_pretrained(copy)
    rows = len(processor.tokenizer)
    processor.tokenizer.add_tokens(["<box>", "</box>"])
    processor.save_pretrained(copy)
    with pytest.raises(
        CheckpointError, match=rf"2 tokens beyond the {rows} embeddings \(first: '<box>', id {rows}"
    ):
        taken(copy)


def test_added_tokens_and_a_padded_table_are_exported(copy: Path, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(copy)
    processor.tokenizer.add_tokens([AddedToken("<box>", lstrip=True), AddedToken(" red ", normalized=True)])
    processor.save_pretrained(copy)
    model = AutoModelForImageTextToText.from_pretrained(copy, dtype=torch.float32)
    model.resize_token_embeddings(len(processor.tokenizer), pad_to_multiple_of=64)
    model.save_pretrained(copy)
    bundle, picture = export.export_checkpoint(copy, tmp_path / "out"), drawn(64, 48, 1)
    with TorchSession(copy) as reference, open_bundle(bundle, threads=1) as session:
        for question in ("where  <box> is red ?", "<box>", " red  red <box>"):
            wanted, found = (
                each.prompt_ids(question, [each.prepare(picture)]).tolist() for each in (reference, session)
            )
            assert found == wanted and processor.tokenizer.convert_tokens_to_ids("<box>") in found


@pytest.mark.parametrize("family", ["smolvlm", "qwen3_vl"])
def test_a_window_that_only_the_cache_would_have_is_refused(tmp_path: Path, family: str) -> None:
    path = FAMILIES[family](tmp_path / "tiny")
    edit(path / "config.json", lambda found: found["text_config"].update(sliding_window=16))
    with pytest.raises(
        CheckpointError, match=r"text_config\.sliding_window is 16.*take it out of config\.json"
    ):
        taken(path)


def test_photos_that_the_context_cannot_hold_are_told(tmp_path: Path) -> None:
    path = VARIANTS["qwen2_vl"](tmp_path / "tiny")
    limits = {"shortest_edge": 1024, "longest_edge": 12845056}
    edit(path / "processor_config.json", lambda found: found["image_processor"].update(size=limits))
    with pytest.raises(
        CheckpointError, match=r"takes 3072 tokens, the context is 2048; give --max-image-tokens 1024"
    ):
        taken(path)


def test_another_kind_of_size_is_refused(copy: Path) -> None:
    size = {"height": 64, "width": 64}
    edit(copy / "processor_config.json", lambda found: found["image_processor"].update(size=size))
    with pytest.raises(CheckpointError, match=r"image_processor\.size is .*wanted a longest_edge"):
        taken(copy)


def test_pixels_beyond_the_last_patch_are_left_out(copy: Path, tmp_path: Path) -> None:
    """SmolVLM's largest has pictures of 384 pixels and patches of 14; here 64 and 7, and heads of 72."""
    config = json.loads((copy / "config.json").read_text())
    config["scale_factor"] = 3
    config["vision_config"].update(patch_size=7, hidden_size=72, num_attention_heads=1)
    own = config.pop("model_type")
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(own, **config))
    fresh.initialise(model, RULES, 0)
    model.generation_config.eos_token_id = config["text_config"]["eos_token_id"]
    model.save_pretrained(copy)
    edit(copy / "processor_config.json", lambda found: found.update(image_seq_len=9))
    bundle = open_bundle(export.export_checkpoint(copy, tmp_path / "out"), threads=1)
    with bundle as session:
        assert session.prepare(drawn(200, 150, 1)).views[0].grid == (3, 3)


# --- shapes -----------------------------------------------------------

THETA = {"rope_theta": 1e4}
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.3},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    **{name: {"rope_parameters": {"rope_type": name, **THETA, **more}} for name, more in ROPES.items()},
    "one-kv-head": {"num_key_value_heads": 1},
    "as-many-kv-heads": {"num_key_value_heads": 4},
    "wide-heads": {"head_dim": 32},
    "nine-heads": {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 16},
    "biases": {"attention_bias": True, "mlp_bias": True, "intermediate_size": 100},
    "one-layer": {"num_hidden_layers": 1},
}


@pytest.mark.slow
@pytest.mark.parametrize("flavour", ["ort-fused", "portable-static"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_text_models_pass_the_gate(copy: Path, tmp_path: Path, shape: str, flavour: str) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["text_config"].update(SHAPES[shape])
    own = config.pop("model_type")
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(own, **config))
    fresh.initialise(model, RULES, 0)
    model.generation_config.eos_token_id = config["text_config"]["eos_token_id"]
    model.save_pretrained(copy)
    precisions = ("fp32", "int4") if flavour == "ort-fused" else ("fp32",)
    plan = plan_for(None, to="onnx", flavour=flavour)
    found = export.export_all(copy, tmp_path / "out", precisions, plan=plan)
    assert len(found) == len(precisions)
