"""The flavour portable-static: graphs of fixed shapes and standard operators, through the same gate."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from PIL import Image
from transformers import AttentionInterface

import export
import runtime
from evals.torch_session import TorchSession
from export import audit, limits, static, static_bundle, static_decoder, static_files, static_qdq, targets
from export.checkpoint import load
from export.decoder import IR_VERSION, OPSET
from export.facts import Facts
from export.facts import prepare as prepare_export
from export.families import family_of
from export.passes import add_initializer, constant
from runtime import bundle, conformance, image_limits
from runtime.errors import CheckpointError, InputError, ParityError
from runtime.image import prepare
from runtime.image_spec import ResizeExact, SmartResize
from runtime.manifest import Manifest
from tests.checkpoints import FAMILIES
from tests.cli import call

CHUNK, CONTEXT = 16, 200
PLAN = targets.Plan(flavour="portable-static", chunk=CHUNK, max_context=CONTEXT)
PRECISIONS = targets.STATIC_PRECISIONS
PICTURE = Image.effect_noise((70, 50), 90).convert("RGB")
QUESTION = "what color is the shape?"


@dataclass(frozen=True)
class Static:
    facts: Facts
    bundles: dict[str, Path]

    def manifest(self, precision: str) -> Manifest:
        return bundle.read(self.bundles[precision])

    def models(self, precision: str) -> dict[str, ir.Model]:
        path = self.bundles[precision]
        return {part.role: ir.load(path / part.path) for part in self.manifest(precision).parts}


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Static:
    out = tmp_path_factory.mktemp("static")
    facts = prepare_export(load(tiny_checkpoint), (), lambda _: None, plan=PLAN)
    bundles = {}
    for precision in PRECISIONS:
        bundles[precision] = out / precision
        bundles[precision].mkdir()
        static_bundle.build(facts, bundles[precision], precision, precision, out)
    return Static(facts, bundles)


# --- graphs -----------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_operator_is_standard_and_every_shape_a_number(exported: Static, precision: str) -> None:
    for role, model in exported.models(precision).items():
        assert {node.domain for node in model.graph} == {""}, role
        assert set(model.opset_imports) == {""} and model.ir_version <= IR_VERSION
        opset = static_qdq.OPSET_16_BIT if precision == "qdq-a16w8" else OPSET
        assert model.opset_imports[""] <= opset
        values = [*model.graph.inputs, *model.graph.outputs]
        if not precision.startswith("qdq"):
            values += [out for node in model.graph for out in node.outputs]
        for value in values:
            assert value.shape is not None and all(isinstance(size, int) for size in value.shape), value
        assert {node.op_type for node in model.graph} <= {
            schema.name for schema in onnx.defs.get_all_schemas()
        }


def test_no_graph_writes_the_cache(exported: Static) -> None:
    """Outputs are the new entries; nothing scatters into the buffers or copies them."""
    models = exported.models("fp32")
    for role, length in (("decoder_prefill", CHUNK), ("decoder", 1)):
        model = models[role]
        used = {node.op_type for node in model.graph}
        assert not used & {"ScatterND", "ScatterElements", "Where", "Expand", "Tile"}
        for value in model.graph.outputs[1:]:
            axis = 3 if str(value.name).endswith("key") else 2
            assert list(value.shape)[axis] == length  # type: ignore[arg-type]
        for value in model.graph.inputs:
            if str(value.name).startswith("past_key_values"):
                assert [node.op_type for node, _ in value.uses()] == ["MatMul"]


@pytest.mark.parametrize("precision", PRECISIONS)
def external(model: ir.Model) -> dict[str, ir.ExternalTensor]:
    """Tensors of a graph that lie in the data files."""
    found = {str(v.name): v.const_value for v in model.graph.initializers.values()}
    return {name: tensor for name, tensor in found.items() if isinstance(tensor, ir.ExternalTensor)}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_stored_once(exported: Static, precision: str) -> None:
    """Prefill and decode point at the same bytes; no tensor lies in the files twice."""
    models = exported.models(precision)
    places: dict[bytes, set[tuple[str, int | None]]] = {}
    for model in models.values():
        for tensor in external(model).values():
            places.setdefault(tensor.tobytes(), set()).add((str(tensor.location), tensor.offset))
        inside = [v.const_value for v in model.graph.initializers.values()]
        assert all(isinstance(t, ir.ExternalTensor) or t.nbytes <= 1024 for t in inside if t is not None)
    assert places and all(len(found) == 1 for found in places.values())
    prefill, token = external(models["decoder_prefill"]), external(models["decoder"])
    weights = [name for name in prefill if "proj.weight" in name]
    assert len(weights) == 14 and all(token[name].offset == prefill[name].offset for name in weights)
    files = (exported.bundles[precision] / "onnx").glob("*.onnx_data*")
    assert sum(file.stat().st_size for file in files) <= sum(len(data) + 4096 for data in places)


def test_the_manifest_says_what_a_reader_needs(exported: Static) -> None:
    manifest = exported.manifest("fp32")
    assert manifest.flavour == "portable-static" and manifest.limits.context == CONTEXT
    assert manifest.static is not None and manifest.static.chunk == CHUNK
    assert "cache.static@1" in manifest.requires
    assert [part.role for part in manifest.parts] == list(static.ROLES)
    assert {state.sequence_axis for state in manifest.state if state.input.endswith("key")} == {3}
    names = [spec.name for spec in manifest.part("decoder_prefill").inputs]
    assert {"inputs_embeds", "position_ids", "past_mask", "logits_index"} <= set(names)
    assert "logits_index" not in [spec.name for spec in manifest.part("decoder").inputs]
    paths = [file.path for file in manifest.files()]
    assert len(paths) == len(set(paths))  # the shared file is hashed once


def test_a_manifest_without_its_prefill_part_is_refused(exported: Static) -> None:
    raw = json.loads((exported.bundles["fp32"] / "manifest.json").read_text())
    raw["parts"] = [part for part in raw["parts"] if part["role"] != "decoder_prefill"]
    with pytest.raises(ValueError, match="decoder_prefill"):
        Manifest.model_validate(raw)
    raw = json.loads((exported.bundles["fp32"] / "manifest.json").read_text())
    raw["flavour"] = "ort-fused"
    with pytest.raises(ValueError, match="do not go together"):
        Manifest.model_validate(raw)


# --- through the session ----------------------------------------------


def test_answers_are_the_checkpoints(exported: Static) -> None:
    reference = exported.facts.reference
    with runtime.open_bundle(exported.bundles["fp32"], threads=1) as session:
        options = runtime.GenerationOptions(max_new_tokens=20)
        got = session.ask(PICTURE, QUESTION, options).token_ids
    assert got == reference.generate(PICTURE, QUESTION, 20)


@pytest.mark.parametrize("length", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_chunks_and_steps_equal_the_checkpoint_at_any_length(exported: Static, length: int) -> None:
    """Teacher-forced: a prompt of this length, then four steps, against one pass of the checkpoint."""
    vocab = exported.facts.checkpoint.model.config.text_config.vocab_size
    token = exported.facts.checkpoint.model.config.image_token_id
    ids = np.random.default_rng(length).integers(0, vocab, length + 4)
    ids[ids == token] = 0
    with torch.no_grad():
        wanted = exported.facts.checkpoint.model(input_ids=torch.tensor(ids[None])).logits[0].numpy()
    with runtime.open_bundle(exported.bundles["fp32"], threads=1) as session:
        got = [session.prefill(ids[:length]), *(session.decode(int(i)) for i in ids[length:])]
    error = np.abs(np.stack(got) - wanted[length - 1 :]).max() / np.abs(wanted).max()
    assert error < 1e-5  # order of summation


def test_what_an_earlier_sequence_left_in_the_buffers_does_not_matter(exported: Static) -> None:
    ids = np.arange(5, 40)
    with runtime.open_bundle(exported.bundles["fp32"], threads=1) as session:
        fresh = session.prefill(ids)
        for step in range(60):
            session.decode(step + 40)
        assert np.array_equal(session.prefill(ids), fresh)


def test_the_whole_context_can_be_used_and_no_more(exported: Static) -> None:
    ids = np.arange(CONTEXT - 3) % 90 + 5
    more = [7, 8, 9]
    with torch.no_grad():
        both = torch.tensor([[*ids.tolist(), *more]])
        wanted = exported.facts.checkpoint.model(input_ids=both).logits[0, -1].numpy()
    with runtime.open_bundle(exported.bundles["fp32"], threads=1) as session:
        session.prefill(ids)
        for token in more:
            logits = session.decode(token)
        assert np.abs(logits - wanted).max() / np.abs(wanted).max() < 1e-5
        with pytest.raises(InputError, match=f"needs {CONTEXT + 1} tokens, {CONTEXT} are available"):
            session.decode(1)
        with pytest.raises(InputError, match=f"{CONTEXT + 1} tokens"):
            session.prefill(np.arange(CONTEXT + 1) % 90 + 5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bundles_conform_to_their_own_vectors(exported: Static, precision: str) -> None:
    path = exported.bundles[precision]
    with runtime.open_bundle(path, threads=1) as session:
        assert conformance.check(session, path) == []


# --- norms in float16 -------------------------------------------------


@pytest.mark.parametrize("size", [1e-4, 1.0, 3e4])
def test_norms_do_not_overflow_float16(exported: Static, size: float) -> None:
    """The plain formula squares 3e4 to infinity; this one is right over the whole range of float16."""
    norm = exported.facts.checkpoint.model.model.text_model.norm
    norm.register_buffer("static_weight", norm.weight.detach(), persistent=False)
    try:
        hidden = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0)).clamp(-1.5, 1.5) * size
        wanted = norm(hidden)
        assert torch.allclose(static_decoder._rms_norm(norm, hidden), wanted, rtol=1e-5, atol=1e-7)
        norm.static_weight = norm.static_weight.half()
        halves = static_decoder._rms_norm(norm, hidden.half()).float()
    finally:
        norm._buffers.pop("static_weight")
    assert torch.isfinite(halves).all()
    assert (halves - wanted).abs().max() < 5e-3 * wanted.abs().max() + 1e-3  # steps of float16


def test_tracing_leaves_transformers_as_it_was(exported: Static) -> None:
    text = exported.facts.checkpoint.model.model.text_model
    assert static_decoder._KEY not in AttentionInterface()
    assert text.config._attn_implementation != static_decoder._KEY
    for module in text.modules():
        assert "forward" not in module.__dict__ and "static_weight" not in dict(module.named_buffers())


# --- static rounding --------------------------------------------------


def _pairs(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "QuantizeLinear"]


def test_tensorrt_gets_symmetric_eight_bits(exported: Static) -> None:
    for role, model in exported.models("qdq-int8").items():
        if role == "embed_tokens":
            continue
        assert _pairs(model)
        for node in model.graph:
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                continue
            zero, stored = constant(node.inputs[2]), constant(node.inputs[0])
            assert zero is not None and zero.dtype == np.int8 and not zero.any()
            if stored is not None:  # a weight: one scale per output channel
                scale = constant(node.inputs[1])
                axis = node.attributes["axis"].as_int()
                assert scale is not None and scale.shape == (stored.shape[axis],)
        weighted = [n for n in model.graph if n.op_type == "MatMul" and n.inputs[1].producer() is not None]
        rounded = [n for n in weighted if n.inputs[1].producer().op_type == "DequantizeLinear"]
        assert rounded and all(n.inputs[0].producer().op_type == "DequantizeLinear" for n in rounded)


def test_qnn_gets_sixteen_bit_activations_around_every_operator(exported: Static) -> None:
    for role, model in exported.models("qdq-a16w8").items():
        if role == "embed_tokens":
            continue
        zeros = [constant(node.inputs[2]) for node in _pairs(model)]
        assert zeros and all(zero is not None and zero.dtype == np.uint16 for zero in zeros)
        around = {"QuantizeLinear", "DequantizeLinear", "Cast"}
        for node in model.graph:
            if node.op_type in around or node.outputs[0].dtype != ir.DataType.FLOAT:
                continue
            users = [user.op_type for user, _ in node.outputs[0].uses()]
            assert users == ["QuantizeLinear"], node


@pytest.mark.parametrize("precision", ["qdq-int8", "qdq-a16w8"])
def test_rounded_bundles_are_held_to_their_recipe(exported: Static, precision: str) -> None:
    parity, recipe = exported.manifest(precision).parity, static_qdq.RECIPES[precision]
    assert parity.limits["twin_logit_rms_error"] == recipe.most_error and recipe.reason
    assert 0 < parity.figures["twin_logit_rms_error"] <= recipe.most_error
    for role in static.ROLES:
        assert 0 < parity.figures[f"{role}_weight_error_steps"] <= 0.5 + 1e-3
    for part in exported.manifest(precision).parts:
        assert min(entry.bits for entry in part.bits) == 8


def test_a_rounded_bundle_is_smaller(exported: Static) -> None:
    sizes = {
        p: sum({f.path: f.bytes for part in exported.manifest(p).parts for f in part.data}.values())
        for p in PRECISIONS
    }
    assert sizes["qdq-int8"] < 0.4 * sizes["fp32"] and sizes["fp16"] < 0.6 * sizes["fp32"]


def _float_and_rounded(exported: Static, precision: str) -> tuple[ir.Model, ir.Model]:
    graphs = exported.facts.graphs
    masked = static_qdq.RECIPES[precision].masked
    if masked is not None:
        graphs = static.remasked(graphs, masked)
    rounded = ir.external_data.load_to_model(exported.models(precision)["decoder"])
    return graphs["decoder"], rounded


@pytest.mark.parametrize("precision", ["qdq-int8", "qdq-a16w8"])
def test_the_audit_sees_a_weight_two_steps_off(exported: Static, precision: str) -> None:
    original, rounded = _float_and_rounded(exported, precision)
    assert audit.same_but_rounded(original, static_qdq.float_twin(rounded), "decoder") <= 0.5 + 1e-3
    value = next(
        v for v in rounded.graph.initializers.values()
        if (a := constant(v)) is not None and a.ndim == 2 and a.dtype in (np.int8, np.uint8)
    )  # fmt: skip
    array = np.array(constant(value))
    step = 2 if array[0, 0] < 100 else -2
    array[0, 0] = int(array[0, 0]) + step
    value.const_value = ir.tensor(array, name=value.name)
    with pytest.raises(ParityError, match="grid steps"):
        audit.same_but_rounded(original, static_qdq.float_twin(rounded), "decoder")


@pytest.mark.parametrize("precision", ["qdq-int8", "qdq-a16w8"])
def test_the_audit_sees_a_pair_of_two_scales(exported: Static, precision: str) -> None:
    _, rounded = _float_and_rounded(exported, precision)
    node = next(n for n in rounded.graph if n.op_type == "DequantizeLinear" and constant(n.inputs[0]) is None)
    other = static_qdq.add_initializer(rounded.graph, "other", np.float32(7.0) * np.ones((), np.float32))
    node.replace_input_with(1, other)
    with pytest.raises(ParityError, match="other scale"):
        static_qdq.float_twin(rounded)


def test_masks_of_any_family_are_held_by_few_bits() -> None:
    """The lowest float32 in a mask of windows; a table that has such a value among others is no mask."""
    lowest = np.finfo(np.float32).min
    for values, is_mask in (
        ([0, lowest], True),
        ([0, -np.inf], True),
        ([0, 1, -1e4], False),
        ([0, -1], False),
    ):
        assert static._is_mask(np.array(values, np.float32)) == is_mask
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 20}, name="g")
    node = ir.node("Add", [x, static_qdq.add_initializer(graph, "mask", np.array([0, lowest], np.float32))])
    graph.append(node)
    graph.outputs.append(node.outputs[0])
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "y", ir.DataType.FLOAT, x.shape
    found = static.remasked({"vision_encoder": ir.Model(graph, ir_version=10)}, -100.0)["vision_encoder"]
    assert constant(found.graph.initializers["mask"]).tolist() == [0.0, -100.0]  # type: ignore[union-attr]


def test_calibration_needs_something_to_see(exported: Static) -> None:
    with pytest.raises(InputError, match="nothing was fed"):
        static_qdq.quantize(exported.facts.graphs["decoder"], "decoder", static_qdq.RECIPES["qdq-int8"], [])


# --- files ------------------------------------------------------------


def test_data_files_begin_anew_when_one_is_full(exported: Static, tmp_path: Path) -> None:
    graphs = exported.facts.graphs
    names = {static_bundle.FILES[role]: graphs[role] for role in ("decoder_prefill", "decoder")}
    files = static_files.save_sharing(names, tmp_path / "w.onnx_data", limit_bytes=100_000)
    assert [file.name for file in files[:2]] == ["w.onnx_data", "w.onnx_data_1"]
    assert all(file.stat().st_size <= 100_000 for file in files)
    for name, model in names.items():
        session = onnxruntime.InferenceSession(str(tmp_path / name), providers=["CPUExecutionProvider"])
        assert [x.name for x in session.get_inputs()] == [x.name for x in model.graph.inputs]
        assert set(static_files.used_files(ir.load(tmp_path / name))) <= {file.name for file in files}
        assert not static_files.used_files(model)  # the model itself is as it was


# --- ceilings and other families --------------------------------------


def test_a_context_without_room_for_a_picture_is_refused(exported: Static) -> None:
    facts = exported.facts
    with pytest.raises(InputError, match="max_context: 40 tokens hold no picture of 16 and 64"):
        limits.context(facts.checkpoint, facts.family, facts.image, 40)
    assert limits.context(facts.checkpoint, facts.family, facts.image, 9999) == 256


def test_a_picture_that_cannot_be_made_smaller_is_refused(exported: Static) -> None:
    with pytest.raises(InputError, match="16"):
        limits.hold(exported.facts.checkpoint, exported.facts.family, 4)


def test_pictures_of_any_size_get_one_square(tmp_path: Path) -> None:
    checkpoint = load(FAMILIES["qwen3_vl"](tmp_path / "tiny"))
    family = family_of(checkpoint)
    spec = family.image(checkpoint)
    assert any(isinstance(op, SmartResize) for op in spec.operations)
    fixed = static.fixed_views(spec, 20)
    exact = next(op for op in fixed.operations if isinstance(op, ResizeExact))
    assert exact.height == exact.width == 4 * 16 and fixed.max_tokens == 16
    views = [prepare(Image.new("RGB", size), fixed).views for size in ((40, 30), (30, 400), (64, 64))]
    assert {view.grid for each in views for view in each} == {(4, 4)}
    with pytest.raises(InputError, match="max_image_tokens: got 1"):
        static.fixed_views(spec, 1)
    large = spec.operations[-3].model_copy(update={"max_pixels": 5000 * spec.operations[-3].factor ** 2})
    published = image_limits.bounded((*spec.operations[:-3], large, *spec.operations[-2:]), spec.tokens)
    with pytest.raises(
        InputError, match=r"largest, 5000 tokens; give --max-image-tokens \(1024, say\) or --target"
    ):
        static.fixed_views(published)
    assert static.fixed_views(published, 1024).max_tokens == 1024
    changed = limits.hold(checkpoint, family, 20)
    assert changed and limits.narrowed(family.image(checkpoint), 20).max_tokens <= 20
    assert image_limits.limit(spec, 20).max_tokens <= 20
    session = limits.presized(fixed)(checkpoint.path, model=checkpoint.model, processor=checkpoint.processor)
    assert isinstance(session, TorchSession) and session.prepare(Image.new("RGB", (30, 400))).tokens == 16


def test_layers_without_a_static_form_are_named(tmp_path: Path) -> None:
    checkpoint = load(FAMILIES["lfm2_vl"](tmp_path / "tiny"))
    family = family_of(checkpoint)
    with pytest.raises((CheckpointError, InputError), match="--no-split"):
        static.fixed_views(family.image(checkpoint))
    sizes = static_decoder.StaticSizes(128, 16)
    with pytest.raises(CheckpointError, match="conv"):
        static.trace_all(checkpoint, family, family.image(checkpoint), sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("precision", ["fp32", "qdq-int8"])
def test_other_families_pass_the_gate(name: str, precision: str, tmp_path: Path) -> None:
    checkpoint = FAMILIES[name](tmp_path / "tiny")
    plan = targets.Plan(flavour="portable-static", chunk=CHUNK, max_context=300, max_image_tokens=32)
    out = {precision: tmp_path / precision}
    found = static_bundle.export_static(checkpoint, out, names={precision: name}, plan=plan)
    manifest = bundle.read(found[0])
    assert manifest.parity.figures["ids_equal"] == 1 and manifest.image.max_tokens <= 32
    if precision == "fp32":
        assert manifest.parity.figures["top1_agreement"] == 1.0


# --- the command ------------------------------------------------------


@pytest.mark.slow
def test_the_command_writes_a_targets_bundle(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = ("--target", "jetson-orin", "--max-context", "160", "--images", "1", "--json")
    done = call("export", tiny_checkpoint, "--out", tmp_path, *options)
    found = json.loads(done.stdout)
    path = Path(found["bundles"][0])
    assert path == tmp_path / f"{tiny_checkpoint.name}-onnx-jetson-orin-fp16"
    manifest, facts, row = bundle.read(path), found["facts"][0], targets.find("jetson-orin")
    assert (manifest.target, manifest.providers) == (row.name, row.providers)
    assert (manifest.limits.context, manifest.limits.images) == (160, 1)
    for part in manifest.parts:
        role = part.role.replace("decoder_prefill", "decoder")
        assert min(entry.bits for entry in part.bits) == row.bits[role]
    assert facts["cache_bytes_per_1000_tokens"] == sum(state.bytes(1000) for state in manifest.state)
    assert facts["bytes"] == sum(file.bytes for file in {f.path: f for f in manifest.files()}.values())


def test_the_phone_target_takes_a_conversation(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Its ranges are calibrated on later turns too: cut off there, they failed the gate at full context."""
    plan = targets.plan_for("android")
    out = export.export_checkpoint(tiny_checkpoint, tmp_path / "phone", precision="qdq-a16w8", plan=plan)
    figures = bundle.read(out).parity.figures
    assert figures["twin_later_logit_rms_error"] < 0.1


def test_ranges_are_calibrated_on_the_users_questions_too(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    record = static_qdq.record

    def look(session: Any, cases: Any, talk: Any) -> Any:
        shown.extend(case.question for case in cases)
        return record(session, cases, talk)

    monkeypatch.setattr(static_qdq, "record", look)
    out = export.export_checkpoint(
        tiny_checkpoint,
        tmp_path / "own",
        precision="qdq-int8",
        plan=PLAN,
        examples=[(PICTURE, "is it mine?")],
    )
    assert "is it mine?" in shown and len(shown) == 8
    assert bundle.read(out).precision == "qdq-int8"


@pytest.mark.parametrize(("wrong", "passes"), [(0, True), (3, False)])
def test_a_bias_of_millions_of_steps_is_held_as_far_as_float32_goes(wrong: int, passes: bool) -> None:
    step = np.float32(1e-7)
    bias = np.random.default_rng(0).uniform(0.5, 1, 64).astype(np.float32)
    levels = np.rint(bias.astype(np.float64) / float(step)).astype(np.int32) + wrong
    models = []
    for rounded in (False, True):
        x = ir.Value(name="x", shape=ir.Shape([1, 64]), type=ir.TensorType(ir.DataType.FLOAT))
        graph = ir.Graph([x], [], nodes=[], opset_imports={"": OPSET}, name="g")
        term = add_initializer(graph, "bias", levels if rounded else bias)
        if rounded:
            scale = add_initializer(graph, "scale", np.array(step))
            graph.append(ir.node("DequantizeLinear", [term, scale], name="dequantized"))
            term = graph[-1].outputs[0]
            term.name = "bias_float"
        graph.append(ir.node("Add", [x, term], name="add"))
        out = graph[-1].outputs[0]
        out.name, out.type, out.shape = "y", ir.TensorType(ir.DataType.FLOAT), x.shape
        graph.outputs.append(out)
        models.append(ir.Model(graph, ir_version=IR_VERSION))
    twin = static_qdq.float_twin(models[1])
    if passes:
        audit.same_but_rounded(models[0], twin, "part")
        return
    with pytest.raises(ParityError, match="grid steps from the float32 weight"):
        audit.same_but_rounded(models[0], twin, "part")
