"""Gemma 3: a picture's tokens see each other, windows by layer, one graph whose weights are there once."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from PIL import Image

from export import audit, bidirectional, gate, onnx
from export.checkpoint import load
from export.draft import draft_manifest
from export.facts import expected_of, prepare
from export.families.gemma3 import GEMMA3
from export.passes import constant
from runtime.errors import CheckpointError, InputError, ParityError
from runtime.generation import GenerationOptions
from runtime.manifest import ImageAttention
from runtime.session import open_bundle
from tests.checkpoints import write_gemma3
from tests.export.conftest import Exported


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    out = tmp_path_factory.mktemp("gemma3")
    facts = prepare(load(write_gemma3(out / "tiny")), (), lambda _: None)
    bundles = {}
    for precision in ("fp32", "int8", "int4"):
        bundles[precision] = out / precision
        bundles[precision].mkdir()
        onnx.build(facts, bundles[precision], precision, f"tiny-{precision}", out)
    return Exported(facts, bundles, out)


class Steps:
    """Runs a decoder graph on embeddings (1, S, hidden) and token types (1, S), piece by piece."""

    def __init__(self, model: ir.Model, capacity: int = 0) -> None:
        data = ir.to_proto(model).SerializeToString()
        self.session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        self.length, self.capacity = 0, capacity
        self.state = {
            value.name: np.full((1, 2, capacity, 16), 9.0, np.float32)  # what is not filled must not be seen
            for value in self.session.get_inputs()
            if value.name.startswith("past")
        }

    def __call__(self, embeds: np.ndarray, types: np.ndarray) -> np.ndarray:
        """Logits (1, S, vocab)."""
        count = embeds.shape[1]
        self.length += count
        feeds = {
            "inputs_embeds": embeds.astype(np.float32),
            "attention_mask": np.ones((1, self.length), np.int64),
            "position_ids": np.arange(self.length - count, self.length, dtype=np.int64)[None],
            "token_type_ids": types.astype(np.int64),
            "num_logits_to_keep": np.array(0, np.int64),
        }
        if not self.capacity:
            logits, *present = self.session.run(None, {**feeds, **self.state})
            self.state = dict(zip(self.state, present, strict=True))
            return logits
        binding = self.session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        binding.bind_output("logits")
        for name, array in self.state.items():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()


def checkpoint_logits(exported: Exported, embeds: np.ndarray, types: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        out = exported.facts.checkpoint.model(
            inputs_embeds=torch.from_numpy(embeds),
            token_type_ids=torch.from_numpy(types),
            attention_mask=torch.ones(types.shape, dtype=torch.long),
        )
    return out.logits.numpy()


def sequence(seed: int, *runs: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (1, S, 64) and types (1, S): text and picture in turn, of these lengths."""
    types = np.concatenate([np.full(length, index % 2) for index, length in enumerate(runs)])[None]
    embeds = np.random.default_rng(seed).standard_normal((*types.shape, 64)).astype(np.float32)
    return embeds, types


def close(got: np.ndarray, wanted: np.ndarray) -> bool:
    return bool(np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max())


# --- bundles ----------------------------------------------------------


def test_every_precision_passes_its_gate(gemma3: Exported) -> None:
    for precision in ("fp32", "int8", "int4"):
        figures = gemma3.manifest(precision).parity.figures
        assert figures["pixel_max_diff"] == 0 and figures["ids_equal"] == 1
    assert gemma3.manifest("fp32").parity.figures["logit_rel_diff"] < 1e-5
    bits = {part.role: min(entry.bits for entry in part.bits) for part in gemma3.manifest("int4").parts}
    assert bits == {"vision_encoder": 8, "embed_tokens": 8, "decoder": 4}


def test_the_manifest_says_what_a_token_sees(gemma3: Exported) -> None:
    manifest = gemma3.manifest("fp32")
    assert isinstance(manifest.attention, ImageAttention)
    assert manifest.attention.windows == (12, None, 12, None)
    assert manifest.attention.input in [spec.name for spec in manifest.part("decoder").inputs]
    assert "attention.image_bidirectional@1" in manifest.requires
    assert all(state.rewindable and state.in_place for state in manifest.state)


def test_weights_are_stored_once_and_packed(gemma3: Exported) -> None:
    model = gemma3.facts.graphs["decoder"]
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("If") == 4 + 1 and "GroupQueryAttention" not in kinds and "Transpose" not in kinds
    assert kinds.count("MatMul") == 4 * 4 + 1
    arrays = [constant(value) for value in model.graph.initializers.values()]
    large = [array.tobytes() for array in arrays if array is not None and array.size > 256]
    assert len(large) == len(set(large)) == 4 * 4 + 1


def test_chat_over_one_cache_equals_the_whole_conversation(gemma3: Exported) -> None:
    """Two pictures in two turns: the second prefill has a past and image tokens."""
    (_, first), (_, second) = gate.pictures()[:2]
    reference = gemma3.facts.reference
    with (
        open_bundle(gemma3.bundles["fp32"], threads=1) as session,
        open_bundle(gemma3.bundles["fp32"], threads=1) as fresh,
    ):
        chat = session.chat(first)
        chat.ask("what color is it?", GenerationOptions(max_new_tokens=5))
        chat.show(second)
        history = list(chat.turns)
        prepared = session.prepare(second)
        ids = session.prompt_ids("and this?", [prepared], history=history)
        features = [session.encode_image(each) for each in (session.prepare(first), prepared)]
        alone = fresh.prefill(ids, features)
        assert close(session.prefill(ids, features, reuse=True), alone)
        types = (ids == session.manifest.merge.token).astype(np.int64)[None]
        table = gemma3.facts.checkpoint.model.get_input_embeddings()
        with torch.no_grad():
            embeds = table(torch.from_numpy(ids)[None]).numpy()
        embeds[types == 1] = np.concatenate(
            [reference.encode_image(reference.prepare(each)).tokens for each in (first, second)]
        )
        assert close(alone, checkpoint_logits(gemma3, embeds, types)[0, -1])


def test_batches_of_unequal_rows(gemma3: Exported) -> None:
    pictures = [image for _, image in gate.pictures()[:2]]
    questions = ["what color?", "is there a red circle in the image? yes or no?"]
    options = GenerationOptions(max_new_tokens=4)
    with open_bundle(gemma3.bundles["fp32"], threads=1) as session:
        together = session.ask_batch(list(zip(pictures, questions, strict=True)), options)
        alone = [session.ask(image, text, options) for image, text in zip(pictures, questions, strict=True)]
    assert [each.token_ids for each in together] == [each.token_ids for each in alone]


# --- attention --------------------------------------------------------


@pytest.mark.parametrize("capacity", [0, 64])
@pytest.mark.parametrize("runs", [(3, 16, 5), (0, 16, 1, 16, 9), (30,), (2, 20), (14, 4, 14)])
def test_prefill_in_one_piece(gemma3: Exported, runs: tuple[int, ...], capacity: int) -> None:
    """Pictures longer than the window, at the start and at the end; states handed on and in place."""
    embeds, types = sequence(0, *runs)
    got = Steps(gemma3.facts.graphs["decoder"], capacity)(embeds, types)
    assert close(got, checkpoint_logits(gemma3, embeds, types))


@pytest.mark.parametrize("capacity", [0, 64])
def test_text_token_by_token_and_a_picture_after_a_past(gemma3: Exported, capacity: int) -> None:
    embeds, types = sequence(1, 5, 16, 6, 16, 4)
    steps = Steps(gemma3.facts.graphs["decoder"], capacity)
    cuts = [0, 22, 23, 24, 25, 45, 46, 47]  # each picture within one piece
    pieces = [steps(embeds[:, a:b], types[:, a:b]) for a, b in itertools.pairwise(cuts)]
    assert close(np.concatenate(pieces, axis=1), checkpoint_logits(gemma3, embeds, types))


def test_image_tokens_do_see_each_other(gemma3: Exported) -> None:
    """The first of them hears from the last; the same tokens as text do not."""
    embeds, types = sequence(2, 3, 16, 2)
    other = embeds.copy()
    other[0, 18] += 1.0
    decoder = gemma3.facts.graphs["decoder"]
    heard = [Steps(decoder)(each, types)[0, 3] for each in (embeds, other)]
    deaf = [Steps(decoder)(each, 0 * types)[0, 3] for each in (embeds, other)]
    assert np.abs(heard[0] - heard[1]).max() > 1e-3 and np.array_equal(deaf[0], deaf[1])


# --- damage -----------------------------------------------------------


def damaged(exported: Exported, damage: str) -> ir.Model:
    model = ir.from_proto(ir.to_proto(exported.facts.graphs["decoder"]))
    branches = [node for node in model.graph if node.op_type == "If"]
    if damage == "causal":  # pictures take the branch of text
        graph = model.graph
        never = ir.Value(name="never", const_value=ir.tensor(np.array(False)))
        graph.register_initializer(never)
        for node in branches:
            node.replace_input_with(0, never)
        return model
    inner = [
        node
        for branch in branches
        for attribute in branch.attributes.values()
        for node in attribute.as_graph()
    ]
    causal = [node for node in inner if node.op_type == "GroupQueryAttention"]
    if damage == "window":  # of the causal branch
        for node in causal:
            node.attributes.pop("local_window_size", None)
    else:  # one less in the masks of pictures
        less = ir.Value(name="eleven", const_value=ir.tensor(np.array(11, np.int64)))
        model.graph.register_initializer(less)
        cut = next(
            node
            for node in inner
            if node.op_type == "Sub" and (array := constant(node.inputs[1])) is not None and array == 12
        )
        cut.replace_input_with(1, less)
    return model


@pytest.mark.parametrize("damage", ["causal", "window", "mask"])
def test_the_gate_and_the_audit_see_wrong_attention(gemma3: Exported, tmp_path: Path, damage: str) -> None:
    facts = gemma3.facts
    model = damaged(gemma3, damage)
    onnx.write_files(facts, tmp_path, {**facts.graphs, "decoder": model})
    draft = draft_manifest(facts, tmp_path, "fp32", "damaged")
    with pytest.raises(ParityError, match="logit_rel_diff"):
        gate.check_float(facts.checkpoint, tmp_path, draft, expected_of(facts))
    with pytest.raises(ParityError, match="decoder"):
        audit.same_but_rounded(facts.graphs["decoder"], audit.float_twin(model), "decoder")


def test_the_checkpoint_is_left_as_it_was(gemma3: Exported) -> None:
    """Norms get another weight and layers get hooks for the trace only."""
    model = gemma3.facts.checkpoint.model
    again = load(gemma3.facts.checkpoint.path).model
    for (name, left), (_, right) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(left, right), name
    assert not any(layer._forward_pre_hooks for layer in model.model.language_model.layers)
    broken = bidirectional.one_centred(model)
    with pytest.raises(RuntimeError), broken:
        raise RuntimeError
    assert torch.equal(model.model.language_model.norm.weight, again.model.language_model.norm.weight)


# --- refusals ---------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "setting", "value", "message"),
    [
        ("image", "do_pan_and_scan", True, "do_pan_and_scan is True"),
        ("image", "size", {"height": 32, "width": 64}, "pictures of 32 x 64"),
        ("image", "do_convert_rgb", False, "do_convert_rgb is False"),
        ("text", "final_logit_softcapping", 30.0, "final_logit_softcapping is 30.0"),
        ("text", "use_bidirectional_attention", True, "use_bidirectional_attention is True"),
        ("text", "layer_types", ["chunked_attention"] * 4, "chunked_attention"),
        ("config", "mm_tokens_per_image", 9, "9 tokens"),
        ("config", "image_token_index", 100_000, "image_token_index 100000"),
        ("processor", "image_seq_length", 4, "the model makes 16"),
    ],
)
def test_unfit_settings_are_refused_by_name(
    gemma3: Exported, where: str, setting: str, value: object, message: str
) -> None:
    checkpoint = load(gemma3.facts.checkpoint.path)
    target = {
        "image": checkpoint.processor.image_processor,
        "processor": checkpoint.processor,
        "text": checkpoint.config.text_config,
        "config": checkpoint.config,
    }[where]
    setattr(target, setting, value)
    with pytest.raises(CheckpointError, match=message):
        GEMMA3.check(checkpoint)


def test_a_question_may_not_hold_a_picture_token(gemma3: Exported) -> None:
    with open_bundle(gemma3.bundles["fp32"], threads=1) as session:
        with pytest.raises(InputError, match="start_of_image"):
            session.prompt_ids("<start_of_image>", [])
        prepared = session.prepare(Image.new("RGB", (200, 30)))
        assert prepared.tokens == 16 and len(prepared.views) == 1
