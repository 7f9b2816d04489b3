"""From a directory to a bundle: what is refused, what is left behind, what the files say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import export
import runtime
from distill import fresh
from export import checkpoint, gate, onnx, storage, target
from export.checkpoint import Checkpoint, load, read_config
from export.families import FAMILIES, family_of
from runtime import bundle, conformance, files
from runtime.errors import CheckpointError, InputError, ParityError, PocketError, StateError
from runtime.manifest import Parity
from tests.checkpoints import RECIPE, smolvlm_config
from tests.export.conftest import Exported


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# --- a whole export ---------------------------------------------------


def test_a_bundle_answers_as_the_checkpoint(exported: Exported) -> None:
    picture = Image.effect_noise((70, 50), 90).convert("RGB")
    reference = exported.facts.reference
    with runtime.open_bundle(exported.bundles["fp32"], threads=1) as session:
        for question in ("what color is the shape?", "is there a red circle?"):
            options = runtime.GenerationOptions(max_new_tokens=20)
            got = session.ask(picture, question, options)
            assert got.token_ids == reference.generate(picture, question, 20)


@pytest.mark.parametrize("precision", export.PRECISIONS)
def test_bundles_conform_to_their_own_vectors(exported: Exported, precision: str) -> None:
    path = exported.bundles[precision]
    with runtime.open_bundle(path, threads=1) as session:
        assert conformance.check(session, path) == []


def test_layout_is_that_of_the_onnx_community(exported: Exported) -> None:
    path = exported.bundles["fp32"]
    for name in ("tokenizer.json", "config.json", "preprocessor_config.json", "generation_config.json"):
        assert (path / name).is_file()
    decoder = exported.manifest("fp32").part("decoder")
    names = [spec.name for spec in decoder.inputs]
    assert names[:4] == ["inputs_embeds", "attention_mask", "position_ids", "past_key_values.0.key"]
    assert [spec.name for spec in decoder.outputs][:2] == ["logits", "present.0.key"]


def test_rounded_bundles_are_smaller(exported: Exported) -> None:
    sizes = {p: sum(part.bytes for part in exported.manifest(p).parts) for p in export.PRECISIONS}
    assert sizes["int4"] < sizes["int8"] < 0.5 * sizes["fp32"]


def test_manifest_facts(exported: Exported, tiny_checkpoint: Path) -> None:
    manifest = exported.manifest("int8")
    assert manifest.source.sha256 == load(tiny_checkpoint).sha256
    assert manifest.limits.context == 256 and manifest.image.max_tokens == 16
    assert {"torch", "transformers", "onnxruntime"} <= set(manifest.tool_versions)
    assert len(manifest.state) == 4 and manifest.state[0].sequence_axis == 2
    assert set(manifest.parity.limits) <= set(manifest.parity.figures)


def test_export_checkpoint_replaces_only_its_own_bundles(
    exported: Exported, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundles" / "student"
    lines: list[str] = []
    sample = Image.new("RGB", (40, 90), "red")
    found = export.export_checkpoint(
        tiny_checkpoint, out, precision="int8", sample_images=[sample], progress=lines.append
    )
    assert found == out and bundle.read(out).name == "student"
    assert bundle.read(out).parity.cases == 8 and any("parity gate" in line for line in lines)
    hashes = [[part.sha256 for part in m.parts] for m in (bundle.read(out), exported.manifest("int8"))]
    assert hashes[0] == hashes[1]  # the same checkpoint gives the same bytes
    first = (out / bundle.MANIFEST_NAME).stat().st_ino
    with target.staging(out) as staged:  # a second export, its contents aside
        shutil.copytree(out, staged, dirs_exist_ok=True)
    assert (out / bundle.MANIFEST_NAME).stat().st_ino != first
    assert [path.name for path in out.parent.iterdir()] == ["student"] and not (out / ".lock").exists()


def test_a_foreign_directory_is_refused_before_any_work(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StateError, match="no bundle of ours"):
        export.export_checkpoint(tiny_checkpoint, tmp_path)
    with pytest.raises(StateError, match="is a file"):
        export.export_checkpoint(tiny_checkpoint, tmp_path / "notes.txt")
    with pytest.raises(StateError, match=r"notes\.txt: is a file"):
        export.export_checkpoint(tiny_checkpoint, tmp_path / "notes.txt" / "student")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_failing_gate_leaves_the_old_bundle(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "student"
    shutil.copytree(exported.bundles["fp32"], out)
    before = (out / bundle.MANIFEST_NAME).read_bytes()

    def fail(*_: object) -> None:
        raise ParityError("gate: features")

    monkeypatch.setattr(gate, "check_float", fail)
    with pytest.raises(ParityError, match="features"), target.staging(out) as staged:
        onnx.build(exported.facts, staged, "fp32", "student", tmp_path)
    assert (out / bundle.MANIFEST_NAME).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_the_checkpoints_weights_are_freed_before_a_bundle_is_judged(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the model nor the tracer nor the graphs hold them: an export's memory is bounded by that."""
    alive: list[weakref.ref[Any]] = []
    loaded: list[Checkpoint] = []
    seen: list[list[str]] = []
    judge = gate.check_float

    def load(path: Path) -> Checkpoint:
        loaded.append(checkpoint.load(path))
        alive.extend(weakref.ref(parameter) for parameter in loaded[0].model.parameters())
        return loaded[0]

    def look(*arguments: Any) -> Parity:
        seen.append([str(tuple(each.shape)) for one in alive if (each := one()) is not None])
        return judge(*arguments)

    monkeypatch.setattr(onnx, "load", load)
    monkeypatch.setattr(storage, "SMALL", 0)
    monkeypatch.setattr(gate, "check_float", look)
    export.export_checkpoint(tiny_checkpoint, tmp_path / "student", precision="int8")
    assert alive and seen == [[]]
    whole = checkpoint.load(tiny_checkpoint)
    assert loaded[0].parameters == whole.parameters  # a tied matrix once, although the ties are gone
    assert bundle.read(tmp_path / "student").source.parameters == whole.parameters


def test_what_a_killed_export_left_is_removed(tmp_path: Path) -> None:
    out = tmp_path / "student"
    code = (
        "import os, signal, sys; from pathlib import Path; from export import target\n"
        "with target.staging(Path(sys.argv[1])) as staged:\n"
        "    (staged / 'half.onnx').write_bytes(b'x'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(export.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=root, check=False)
    left = list(tmp_path.iterdir())
    assert len(left) == 1 and left[0].name.startswith(files.TEMP_PREFIX) and not out.exists()
    other = tmp_path / f"{files.TEMP_PREFIX}another-abc"
    other.mkdir()
    with target.staging(out) as staged:
        (staged / "whole").touch()
        assert not left[0].exists()
        with target.staging(out):  # a running export's directory is left alone
            assert staged.exists()
    assert other.exists() and (out / "whole").exists()


def test_importing_export_loads_no_torch() -> None:
    root = Path(export.__file__).parents[1]
    code = "import sys, export; assert not {'torch', 'transformers', 'onnx'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_unknown_format_and_precision_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"format 'tflite' .* onnx"):
        export.export_checkpoint(tiny_checkpoint, tmp_path / "a", to="tflite")
    with pytest.raises(InputError, match=r"precision 'int2' .* fp32, .*int8, .*int4"):
        export.export_all(tiny_checkpoint, tmp_path / "a", ["int8", "int2"])


def test_idefics3_is_cut_in_the_same_way(tmp_path: Path) -> None:
    """Its own processor and model classes, another filter and other mean and std."""
    recipe = yaml.safe_load(RECIPE.read_text())
    processor = {
        "processor_class": "Idefics3Processor",
        "image_seq_len": 16,
        "image_processor": {
            "image_processor_type": "Idefics3ImageProcessor",
            "do_image_splitting": False,
            "size": {"longest_edge": 128},
            "max_image_size": {"longest_edge": 64},
            "resample": 3,
        },
    }
    checkpoint = fresh.write_checkpoint(
        tmp_path / "idefics3",
        {**smolvlm_config(), "model_type": "idefics3"},
        fresh.train_tokenizer(["what color is it?"] * 4, recipe["tokenizer"]["special"], 300),
        processor,
        recipe["chat_template"],
        rules=[("*norm*", 1.0), ("*bias", 0.02), ("*embed*", 0.3), ("*", 0.25)],
    )
    out = export.export_checkpoint(checkpoint, tmp_path / "bundle")
    manifest = bundle.read(out)
    assert manifest.parity.figures["top1_agreement"] == 1.0
    assert manifest.prompt.refused_text == ("<image>",)
    assert {op.filter for op in manifest.image.operations if hasattr(op, "filter")} == {"bicubic"}


def test_a_sample_that_is_no_picture_gives_one_clear_line(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not an image"):
        export.export_checkpoint(tiny_checkpoint, tmp_path / "out", sample_images=[b"text"])


def test_a_checkpoint_without_a_stop_token_is_refused(copy: Path, tmp_path: Path) -> None:
    for name in ("generation_config.json", "config.json"):
        edit(
            copy / name,
            lambda c: (c.pop("eos_token_id", None), c.get("text_config", {}).pop("eos_token_id", None)),
        )
    with pytest.raises(CheckpointError, match="eos_token_id"):
        export.export_checkpoint(copy, tmp_path / "out")


def test_what_torch_cannot_trace_gives_one_clear_line(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export.families import smolvlm

    def branch(self: Any, pixel_values: Any) -> Any:
        return pixel_values if pixel_values.sum() > 0 else -pixel_values

    monkeypatch.setattr(smolvlm._Vision, "forward", branch)
    with pytest.raises(CheckpointError, match="cannot trace it") as caught:
        export.export_checkpoint(tiny_checkpoint, tmp_path / "out")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


# --- checkpoints that are refused -------------------------------------


def _remove_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def _only_pickle(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def _missing_shard(path: Path) -> None:
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def _truncated(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _remote_code(path: Path) -> None:
    edit(path / "config.json", lambda c: c.update(auto_map={"AutoModel": "evil.Model"}))


def _broken_json(path: Path) -> None:
    (path / "config.json").write_text("{")


def _no_model_type(path: Path) -> None:
    edit(path / "config.json", lambda c: c.pop("model_type"))


def _no_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()


def _wrong_width(path: Path) -> None:
    edit(path / "config.json", lambda c: c["text_config"].update(intermediate_size=64))


def _deeper(path: Path) -> None:
    edit(path / "config.json", lambda c: c["text_config"].update(num_hidden_layers=3))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_remove_weights, "no model.safetensors"),
        (_only_pickle, "pickle"),
        (_missing_shard, "1 of 2 weight shards missing .model-00002-of-00002"),
        (_truncated, "cannot load it"),
        (_remote_code, "auto_map"),
        (_broken_json, "cannot be read as JSON"),
        (_no_model_type, "no model_type"),
        (_no_tokenizer, "cannot load it"),
        (_wrong_width, "."),
        (_deeper, "weights missing"),
    ],
)
def test_a_damaged_checkpoint_gives_one_clear_line(
    copy: Path, damage: Callable[[Path], None], says: str
) -> None:
    damage(copy)
    with pytest.raises(CheckpointError, match=says) as caught:
        load(copy)
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)


def test_no_directory_gives_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_config(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"no config.json"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("processor_config.json", {"image_processor": {"do_resize": False}}, "do_resize is False"),
        ("processor_config.json", {"image_processor": {"resample": 0}}, "resample is 0"),
        ("processor_config.json", {"image_seq_len": 4}, "4 image tokens, the model makes 16"),
        (
            "processor_config.json",
            {"image_processor": {"max_image_size": {"longest_edge": 60}}},
            "max_image_size 60",
        ),
        (
            "config.json",
            {
                "text_config": {
                    "rope_parameters": {
                        "rope_type": "longrope",
                        "rope_theta": 1e4,
                        "short_factor": [1.0] * 8,
                        "long_factor": [2.0] * 8,
                    }
                }
            },
            "rope_type 'longrope'",
        ),
    ],
)
def test_settings_the_parts_cannot_reproduce_are_refused_by_name(
    copy: Path, file: str, change: dict[str, Any], says: str
) -> None:
    def merge(value: dict[str, Any], new: dict[str, Any] = change) -> None:
        for key, inner in new.items():
            if isinstance(inner, dict) and isinstance(value.get(key), dict):
                merge(value[key], inner)
            else:
                value[key] = inner

    edit(copy / file, merge)
    with pytest.raises(CheckpointError, match=says):
        family_of(load(copy))


def test_an_unknown_family_says_which_are_known_and_what_to_write(exported: Exported) -> None:
    checkpoint = exported.facts.checkpoint

    class Other:
        path, model_type = checkpoint.path, "fastvlm"

    with pytest.raises(CheckpointError, match=r"'fastvlm'.*idefics3.*smolvlm.*export/families/NAME\.py"):
        family_of(Other())  # type: ignore[arg-type]
    assert [family.model_types for family in FAMILIES]


# --- chat templates ---------------------------------------------------


def _shouting(template: str) -> str:
    return template.replace("{{ line['text'] }}", "{{ line['text'] | upper }}")


def _unasked(template: str) -> str:
    return template.replace("{{ line['text'] }}", "{{ line['text'] | trim('?') }}")


@pytest.mark.parametrize("change", [_shouting, _unasked])
def test_a_template_that_changes_the_question_fails_the_export(
    copy: Path, tmp_path: Path, change: Callable[[str], str]
) -> None:
    template = copy / "chat_template.jinja"
    template.write_text(change(template.read_text()))
    with pytest.raises(PocketError, match=r"template|prompt"):
        export.export_checkpoint(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()
