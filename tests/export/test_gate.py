"""The gate itself is tested by mutation: every damage here must fail it, and the undamaged parts must not."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from evals.parity.parity import compare
from export import gate
from export.facts import expected_of
from export.passes import add_initializer, constant
from runtime.errors import ParityError, PocketError
from runtime.image import ImageFeatures
from runtime.manifest import Manifest
from runtime.prompt_spec import Ids
from runtime.session import Session
from tests.export.conftest import Exported

PRECISIONS = ("fp32", "int8", "int4")


def judge(exported: Exported, precision: str, directory: Path, manifest: Manifest) -> object:
    facts = exported.facts
    if precision == "fp32":
        return gate.check_float(facts.checkpoint, directory, manifest, expected_of(facts))
    return gate.check_quantized(
        facts.checkpoint, facts.graphs, directory, manifest, expected_of(facts), exported.scratch
    )


# --- mutations of a written part --------------------------------------


def _through(model: ir.Model, value: ir.Value, op_type: str, other: ir.Value, **attributes: int) -> None:
    """Put `op_type(value, other)` between `value` and its users."""
    users = list(value.uses())
    node = ir.node(op_type, [value, other], attributes=attributes or None, name=f"mutant_{op_type}")
    after = node.outputs[0]
    after.dtype, after.shape = value.dtype, value.shape
    if value.is_graph_output():
        name = value.name
        value.name = f"{name}_before"
        model.graph.outputs[list(model.graph.outputs).index(value)] = after
        after.name = name
    for user, index in users:
        user.replace_input_with(index, after)
    place = value.producer()
    if place is None:
        model.graph.insert_before(next(iter(model.graph)), node)
    else:
        model.graph.insert_after(place, node)


def _store(value: ir.Value, array: np.ndarray) -> None:
    value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)


def permuted_features(model: ir.Model) -> None:
    order = add_initializer(model.graph, "order", np.random.default_rng(0).permutation(16).astype(np.int64))
    _through(model, model.graph.outputs[0], "Gather", order, axis=1)


def zeroed_features(model: ir.Model) -> None:
    _through(model, model.graph.outputs[0], "Mul", add_initializer(model.graph, "zero", np.float32([0])))


def shifted_patch_positions(model: ir.Model) -> None:
    tables = [v for v in model.graph.initializers.values() if (a := constant(v)) is not None and a.ndim == 3]
    assert len(tables) == 1
    array = constant(tables[0])
    assert array is not None and array.shape[1] == 64
    _store(tables[0], np.roll(array, 1, axis=1))


def swapped_cache(model: ir.Model) -> None:
    node = next(n for n in model.graph if n.op_type == "GroupQueryAttention")
    key, value = node.inputs[3], node.inputs[4]
    node.replace_input_with(3, value)
    node.replace_input_with(4, key)


def swapped_key_value_weights(model: ir.Model) -> None:
    """Columns of the packed projection: 64 of the query, then 32 of the key and 32 of the value."""
    for name, value in model.graph.initializers.items():
        array = constant(value)
        if "layers.0.self_attn.qkv_proj" in name and array is not None and 128 in array.shape:
            axis = array.shape.index(128)
            order = np.r_[0:64, 96:128, 64:96]
            _store(value, np.take(array, order, axis=axis))


def positions_shifted_by_one(model: ir.Model) -> None:
    """From position 12 on: a shift of all positions alike is no error, RoPE sees only distances."""
    value = next(v for v in model.graph.inputs if v.name == "position_ids")
    users = list(value.uses())
    limit = add_initializer(model.graph, "limit", np.array(11, np.int64))
    later = ir.node("Greater", [value, limit], name="mutant_later")
    step = ir.node("Cast", [later.outputs[0]], attributes={"to": ir.DataType.INT64}, name="mutant_step")
    total = ir.node("Add", [value, step.outputs[0]], name="mutant_total")
    for node, kind in ((later, ir.DataType.BOOL), (step, ir.DataType.INT64), (total, ir.DataType.INT64)):
        node.outputs[0].dtype = kind
    for user, index in users:
        user.replace_input_with(index, total.outputs[0])
    model.graph.insert_before(next(iter(model.graph)), [later, step, total])


def scrambled_embedding_rows(model: ir.Model) -> None:
    """The two last rows, which no case uses."""
    table = max(model.graph.initializers.values(), key=lambda v: constant(v).size)  # type: ignore[union-attr]
    array = constant(table)
    assert array is not None
    order = np.arange(len(array))
    order[[-1, -2]] = order[[-2, -1]]
    _store(table, array[order])


def dropped_residual(model: ir.Model) -> None:
    """The second skip-norm adds the branch to itself."""
    node = [n for n in model.graph if n.op_type == "SkipSimplifiedLayerNormalization"][1]
    node.replace_input_with(0, node.inputs[1])


MUTATIONS: tuple[tuple[str, Callable[[ir.Model], None]], ...] = (
    ("vision_encoder", permuted_features),
    ("vision_encoder", zeroed_features),
    ("vision_encoder", shifted_patch_positions),
    ("embed_tokens", scrambled_embedding_rows),
    ("decoder", swapped_cache),
    ("decoder", swapped_key_value_weights),
    ("decoder", positions_shifted_by_one),
    ("decoder", dropped_residual),
)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("role", "mutate"), MUTATIONS, ids=[m.__name__ for _, m in MUTATIONS])
def test_a_damaged_part_fails_the_gate(
    exported: Exported, tmp_path: Path, precision: str, role: str, mutate: Callable[[ir.Model], None]
) -> None:
    directory = tmp_path / "bundle"
    shutil.copytree(exported.bundles[precision], directory)
    manifest = exported.manifest(precision)
    path = directory / manifest.part(role).path
    model = ir.load(path)
    before = ir.to_proto(model).SerializeToString()
    mutate(model)
    ir.save(model, path)
    assert path.read_bytes() != before
    with pytest.raises(ParityError):
        judge(exported, precision, directory, manifest)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_written_parts_pass_the_gate(exported: Exported, precision: str) -> None:
    judge(exported, precision, exported.bundles[precision], exported.manifest(precision))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_missing_part_fails_the_gate(exported: Exported, tmp_path: Path, precision: str) -> None:
    directory = tmp_path / "bundle"
    shutil.copytree(exported.bundles[precision], directory)
    manifest = exported.manifest(precision)
    (directory / manifest.part("vision_encoder").path).unlink()
    with pytest.raises(PocketError, match="vision_encoder"):
        judge(exported, precision, directory, manifest)


# --- mutations of what the manifest says ------------------------------


def _without_rotation(manifest: Manifest) -> Manifest:
    image = manifest.image
    left = tuple(op for op in image.operations if op.op != "exif_rotate@1")
    return manifest.model_copy(update={"image": image.model_copy(update={"operations": left})})


def _other_filter(manifest: Manifest) -> Manifest:
    image = manifest.image
    changed = tuple(
        op.model_copy(update={"filter": "bilinear"}) if hasattr(op, "filter") else op
        for op in image.operations
    )
    return manifest.model_copy(update={"image": image.model_copy(update={"operations": changed})})


def _one_prompt_id_less(manifest: Manifest) -> Manifest:
    prompt = manifest.prompt
    first = prompt.user[0]
    assert isinstance(first, Ids)
    user = (Ids(ids=first.ids[:-1]), *prompt.user[1:])
    return manifest.model_copy(update={"prompt": prompt.model_copy(update={"user": user})})


@pytest.mark.parametrize("change", [_without_rotation, _other_filter, _one_prompt_id_less])
def test_a_wrong_manifest_fails_the_gate(exported: Exported, change: Callable[[Manifest], Manifest]) -> None:
    manifest = change(exported.manifest("fp32"))
    with pytest.raises(ParityError, match=r"pixels|prompt"):
        judge(exported, "fp32", exported.bundles["fp32"], manifest)


# --- rounding alone ---------------------------------------------------


class _Permuted:
    """A session whose features reach the decoder in another order."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __getattr__(self, name: str) -> object:
        return getattr(self._session, name)

    def encode_image(self, prepared: object) -> ImageFeatures:
        found = self._session.encode_image(prepared)  # type: ignore[arg-type]
        return dataclasses.replace(found, tokens=found.tokens[::-1].copy())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_features_in_another_order_break_the_limits_of_every_precision(
    exported: Exported, precision: str
) -> None:
    """Also where structure and weights are right: the measured limits alone must see it."""
    limits: Sequence[gate.Limit] = gate.FP32_LIMITS if precision == "fp32" else gate.ROUNDED_LIMITS
    bundle = exported.bundles[precision]
    with Session.from_manifest(bundle, exported.manifest(precision), threads=1) as session:
        result = compare(session, _Permuted(session), exported.facts.cases)  # type: ignore[arg-type]
    assert any(result.figures()[limit.figure] > limit.most for limit in limits)


def test_limits_carry_their_reasons() -> None:
    for limit in (*gate.FP32_LIMITS, *gate.ROUNDED_LIMITS):
        assert limit.reason and limit.most > 0


def test_float_bundle_is_within_the_order_of_summation(exported: Exported) -> None:
    parity = exported.manifest("fp32").parity
    assert parity.figures["logit_rel_diff"] < 1e-4 and parity.figures["feature_max_diff"] < 1e-4
    assert parity.figures["top1_agreement"] == 1.0 and parity.figures["pixel_max_diff"] == 0.0


def test_cases_cover_the_preprocessing(exported: Exported) -> None:
    names = {case.name for case in exported.facts.cases}
    pictures = {"large", "tall", "rotated-file", "alpha-file", "alpha"}
    assert names == {*pictures, "two-pictures", "no-picture"}
    assert all(len(case.forced) == gate.FORCED_STEPS for case in exported.facts.cases)
    assert all(dataclasses.is_dataclass(case) for case in exported.facts.cases)
