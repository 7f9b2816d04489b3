"""A Core ML bundle through its gate; every kind of damage that the gate exists for; compressed weights."""

from __future__ import annotations

import dataclasses
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")

from export import coreml, coreml_audit, coreml_convert, coreml_gate, coreml_package
from export.checkpoint import load
from export.coreml import Work
from export.coreml_compress import choose, compress
from export.coreml_parts import ROLES, parts_of
from export.coreml_policy import Policy, Rule, resolve
from export.facts import prepare
from export.gate_cases import drawn
from export.static_decoder import StaticSizes
from export.targets import plan_for
from runtime import bundle, conformance
from runtime.coreml_session import CoremlBackend
from runtime.errors import CheckpointError, MissingExtra, ParityError, PocketError, StateError
from runtime.generation import GenerationOptions
from runtime.image import ImageFeatures
from runtime.manifest import Manifest
from runtime.mil_evaluate import Stored
from runtime.mil_weights import Store, WeightFiles
from runtime.session import open_bundle
from tests.checkpoints import FAMILIES, VARIANTS
from tests.cli import call

RECORD = struct.Struct("<IIQQ")  # of the weight file: marker, type, bytes, place of the data


@dataclass
class Made:
    """A float16 bundle that passed, and what made it."""

    work: Work
    path: Path

    @property
    def manifest(self) -> Manifest:
        return bundle.read(self.path)

    def check(self, path: Path) -> Any:
        return coreml_gate.check(self.work.facts, path, self.manifest, resolve("fp16"), None)


def prepared(checkpoint: Path, scratch: Path, **sizes: Any) -> Work:
    plan = dataclasses.replace(plan_for("iphone", to="coreml", **{"max_context": 256, **sizes}), chunk=8)
    facts = prepare(load(checkpoint), (), lambda _: None, plan=plan, trace=False)
    room = StaticSizes(facts.context, plan.chunk, plan.masked)
    return Work(facts, parts_of(facts.checkpoint, facts.family, facts.image, room), scratch)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Deepstack, three rows of positions, a picture of 16 tokens: two chunks and more."""
    root = tmp_path_factory.mktemp("coreml")
    checkpoint = FAMILIES["qwen3_vl"](root / "checkpoint", layers=1)
    work = prepared(checkpoint, root / "scratch", max_image_tokens=16)
    work.build(root / "bundle", resolve("fp16"), "tiny")
    return Made(work, root / "bundle")


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    """To be damaged."""
    return Path(shutil.copytree(made.path, tmp_path / "copy"))


# --- a sound bundle ---------------------------------------------------


def test_the_gate_measured_what_it_limits(made: Made) -> None:
    manifest = made.manifest
    figures, limits = manifest.parity.figures, manifest.parity.limits
    assert set(limits) == {"feature_rms_error", "logit_rms_error", "later_logit_rms_error"}
    assert all(figures[name] < limits[name] / 2 for name in limits)
    assert figures["pixels_equal"] == figures["ids_equal"] == 1.0 and figures["top1_agreement"] > 0.9
    assert "numerics only" in manifest.parity.reference


def test_the_manifest_says_what_is_in_the_packages(made: Made) -> None:
    manifest = made.manifest
    assert manifest.format == "coreml" and manifest.coreml is not None and manifest.target == "iphone"
    assert manifest.coreml.chunk == 8 and manifest.coreml.context == manifest.limits.context == 256
    assert [part.role for part in manifest.parts] == list(ROLES)
    decoder = {spec.name: spec for spec in manifest.part("decoder").inputs}
    assert decoder["inputs_embeds"].shape == (1, "tokens", 64)
    assert decoder["position_ids"].shape == (3, "tokens") and decoder["position_ids"].dtype == "int32"
    assert decoder["deepstack_embeds"].shape == (1, 1, "tokens", 64)
    assert [state.shape for state in manifest.state] == [(1, 2, 256, 16)] * 2
    assert {bits.scheme for part in manifest.parts for bits in part.bits} == {"fp16"}
    assert "coremltools" in manifest.tool_versions


def test_it_answers_and_conforms(made: Made) -> None:
    options = GenerationOptions(max_new_tokens=6)
    with open_bundle(made.path, threads=1) as session:
        assert conformance.check(session, made.path) == []
        case = made.work.facts.cases[0]
        got = session.ask(case.image, case.question, options).token_ids
        wanted = made.work.facts.reference.generate(case.image, case.question, 6)
        assert got == wanted


def test_it_passes_again_from_disk(made: Made, copy: Path) -> None:
    assert made.check(copy).figures == made.manifest.parity.figures


# --- damage: the session around the parts -----------------------------


def _turned(features: ImageFeatures) -> ImageFeatures:
    return ImageFeatures(features.tokens[::-1].copy(), features.grids, features.deepstack)


def _without_deepstack(features: ImageFeatures) -> ImageFeatures:
    assert features.deepstack is not None
    return ImageFeatures(features.tokens, features.grids, np.zeros_like(features.deepstack))


@pytest.mark.parametrize("change", [_turned, _without_deepstack])
def test_other_features_break_the_gate(
    made: Made, monkeypatch: pytest.MonkeyPatch, change: Callable[[ImageFeatures], ImageFeatures]
) -> None:
    encode = CoremlBackend.encode_view
    monkeypatch.setattr(CoremlBackend, "encode_view", lambda self, view: change(encode(self, view)))
    with pytest.raises(ParityError, match="gate: case"):
        made.check(made.path)


def test_later_positions_shifted_by_one_break_the_gate(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    extend = CoremlBackend.extend

    def shifted(self: CoremlBackend, ids: Any, positions: Any, images: Any) -> Any:
        moved = positions + (np.arange(positions.shape[1]) > positions.shape[1] // 2)
        return extend(self, ids, moved, images)

    monkeypatch.setattr(CoremlBackend, "extend", shifted)
    with pytest.raises(ParityError, match="logit_rms_error"):
        made.check(made.path)


@pytest.mark.parametrize("name", ["start", "last"])
def test_a_place_off_by_one_breaks_the_gate(made: Made, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The state one token further, or the logits of padding."""
    from runtime import coreml_session

    real = coreml_session._as

    def moved(wanted: Any, given: Any) -> Any:
        if name in given and len(given["position_ids"][0]) > 1:
            given = {**given, name: np.minimum(given[name] + 1, 7 if name == "last" else 240)}
        return real(wanted, given)

    monkeypatch.setattr(coreml_session, "_as", moved)
    with pytest.raises(ParityError, match="logit_rms_error"):
        made.check(made.path)


def test_a_state_that_is_not_cleared_breaks_no_gate(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands behind the tokens that were run is masked, so old keys and values do no harm."""
    from runtime.coreml_engine import Evaluated

    monkeypatch.setattr(Evaluated, "clear", lambda self: None)
    assert made.check(made.path).figures == made.manifest.parity.figures


# --- damage: files ----------------------------------------------------

WEIGHTS = (
    ("decoder", "linear:text_layers_0_self_attn_q_proj"),
    ("decoder", "linear:text_layers_0_mlp_down_proj"),
    ("decoder", "linear:head"),
    ("decoder", "gather:cos"),
    ("embed_tokens", "gather:weight"),
    ("vision_encoder", "linear:module_patch_embed"),
)


def damage(package: Path, label: str) -> None:
    """Put the rows of a weight into another order."""
    function = next(iter(coreml_package.functions(package).values()))
    found = {weight.label: weight for weight in coreml_package.weights(function)}
    assert label in found, sorted(found)
    weight = found[label]
    file = package / coreml_package.MODEL.parent / weight.values.file.removeprefix("@model_path/")
    data = bytearray(file.read_bytes())
    _, _, size, start = RECORD.unpack_from(data, weight.values.offset)
    rows = np.frombuffer(bytes(data[start : start + size]), np.uint8).reshape(weight.shape[0], -1)
    data[start : start + size] = rows[::-1].tobytes()
    file.write_bytes(data)


@pytest.mark.parametrize(("role", "label"), WEIGHTS)
def test_another_weight_breaks_the_gate(made: Made, copy: Path, role: str, label: str) -> None:
    damage(copy / made.manifest.part(role).path, label)
    with pytest.raises(ParityError, match="gate: "):
        made.check(copy)


def edit(package: Path, change: Callable[[Any], None]) -> None:
    """Change the steps of every function, as lists of protocol buffers."""
    spec = coreml_convert.tools().utils.load_spec(str(package / coreml_package.MODEL))
    for function in spec.mlProgram.functions.values():
        change(function.block_specializations[function.opset].operations)
    (package / coreml_package.MODEL).write_bytes(spec.SerializeToString())


def _forgets(steps: Any) -> None:
    """The last write of the values' state is gone."""
    writes = [n for n, step in enumerate(steps) if step.type == "write_state"]
    del steps[writes[-1]]


def _sees_less(steps: Any) -> None:
    """A token does not see itself."""
    (step,) = [step for step in steps if step.type == "less_equal"]
    step.type = "less"


def _turns_back(steps: Any) -> None:
    """The rotary embedding turns the other way."""
    tables = {step.attributes["name"].immediateValue.tensor.strings.values[0]: step for step in steps}
    cos, sin = (next(s for n, s in tables.items() if n.startswith(name)) for name in ("cos", "sin"))
    kept = cos.attributes["val"].blobFileValue.offset
    cos.attributes["val"].blobFileValue.offset = sin.attributes["val"].blobFileValue.offset
    sin.attributes["val"].blobFileValue.offset = kept


@pytest.mark.parametrize("change", [_forgets, _sees_less, _turns_back])
def test_another_program_breaks_the_gate(made: Made, copy: Path, change: Callable[[Any], None]) -> None:
    edit(copy / made.manifest.part("decoder").path, change)
    with pytest.raises(ParityError, match="gate: "):
        made.check(copy)


def test_a_cut_weight_file_is_told(made: Made, copy: Path) -> None:
    package = copy / made.manifest.part("decoder").path
    file = package / coreml_package.MODEL.parent / "weights" / "weight.bin"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(PocketError):
        made.check(copy)


# --- compression ------------------------------------------------------


@pytest.fixture(scope="module", params=["int8", pytest.param("int4", marks=pytest.mark.slow), "pal4"])
def small(request: pytest.FixtureRequest, made: Made) -> Iterator[tuple[Policy, Path, Any]]:
    """(policy, packages before the gate, what was written) of one precision."""
    policy = resolve(request.param)
    folder = made.path.parent / f"small-{policy.name}"
    yield policy, folder, [made.work._write(folder, role, policy) for role in ROLES]


def test_schemes_store_what_they_say(made: Made, small: tuple[Policy, Path, Any]) -> None:
    policy, folder, written = small
    stored = {each.part.role: {bits.scheme: bits.parameters for bits in each.part.bits} for each in written}
    wanted = {"int8": "int8", "int4": "int4", "pal4": "pal4"}[policy.name]
    assert stored["decoder"][wanted] > 20_000
    assert stored["embed_tokens"] == {"int8": made.manifest.part("embed_tokens").bits[0].parameters}
    assert set(stored["vision_encoder"]) == {"int8", "fp16"}
    labels = {
        weight.label: weight.scheme
        for function in coreml_package.functions(folder / "coreml" / "decoder.mlpackage").values()
        for weight in coreml_package.weights(function)
    }
    assert labels["gather:cos"] == labels["gather:sin"] == "fp16"
    sizes = [(folder / "coreml" / "decoder.mlpackage", made.path / "coreml" / "decoder.mlpackage")]
    for after, before in sizes:
        assert bundle.digest(after)[1] < bundle.digest(before)[1]


def test_rows_that_do_not_fit_are_told(small: tuple[Policy, Path, Any]) -> None:
    """311 tokens are no multiple of a group of 16 rows, so the head has 8 bits."""
    policy, _, written = small
    fallbacks = {each.node: each for each in written[-1].part.fallbacks}
    assert set(fallbacks) == ({"linear:head"} if policy.name == "pal4" else set())
    if fallbacks:
        assert (
            fallbacks["linear:head"].got == "int8"
            and "multiple of a group" in fallbacks["linear:head"].reason
        )


def test_the_audit_sees_rounding_and_nothing_else(made: Made, small: tuple[Policy, Path, Any]) -> None:
    policy, folder, _ = small
    least = {"int8": 1e-3, "int4": 0.03, "pal4": 0.03}[policy.name]
    for role in ROLES:
        packages = (made.path / "coreml" / f"{role}.mlpackage", folder / "coreml" / f"{role}.mlpackage")
        error = coreml_audit.same_but_rounded(*packages)
        scheme = policy.name if role == "decoder" else "int8"
        assert (least if role == "decoder" else 1e-3) < error < coreml_audit.WEIGHT_RMS[scheme]


@pytest.mark.parametrize(
    ("role", "label"),
    [
        ("decoder", "linear:text_layers_0_mlp_up_proj"),
        ("decoder", "gather:sin"),
        ("embed_tokens", "gather:weight"),
    ],
)
def test_the_audit_finds_another_weight(
    made: Made, small: tuple[Policy, Path, Any], tmp_path: Path, role: str, label: str
) -> None:
    _, folder, _ = small
    package = Path(shutil.copytree(folder / "coreml" / f"{role}.mlpackage", tmp_path / f"{role}.mlpackage"))
    damage(package, label)
    with pytest.raises(ParityError, match="off the checkpoint's"):
        coreml_audit.same_but_rounded(made.path / "coreml" / f"{role}.mlpackage", package)


@pytest.mark.parametrize("change", [_forgets, _sees_less])
def test_the_audit_finds_another_program(
    made: Made, small: tuple[Policy, Path, Any], tmp_path: Path, change: Callable[[Any], None]
) -> None:
    _, folder, _ = small
    package = Path(shutil.copytree(folder / "coreml" / "decoder.mlpackage", tmp_path / "d.mlpackage"))
    edit(package, change)
    with pytest.raises(ParityError, match=r"steps, \d+ before|stands for less_equal"):
        coreml_audit.same_but_rounded(made.path / "coreml" / "decoder.mlpackage", package)


def test_expanded_weights_are_what_coremltools_makes_of_them(small: tuple[Policy, Path, Any]) -> None:
    """Bit by bit, by its own decompression of the same file."""
    policy, folder, _ = small
    source = compress(
        folder.parent / "scratch" / "float16" / "decoder-decode.mlpackage",
        choose(folder.parent / "scratch" / "float16" / "decoder-decode.mlpackage", "decoder", policy),
        folder / "alone.mlpackage",
    )
    ct = coreml_convert.tools()
    with coreml_convert.quiet(), coreml_convert.unguarded():
        model = ct.optimize.coreml.decompress_weights(coreml_convert.opened(source))
        dense = coreml_convert.save(model, folder / "dense.mlpackage")
    packed, plain = (_constants(package) for package in (source, dense))
    names = [name for name, kind in packed.kinds.items() if kind.startswith("constexpr")]
    others = {_plain(name): name for name, kind in plain.kinds.items() if kind == "const"}
    assert len(names) >= 7
    for name in names:
        assert np.array_equal(packed.stored.packed(name), plain.stored.packed(others[_plain(name)])), name


@dataclass
class _Constants:
    """What a package with one function stores, by the name of the output."""

    stored: Stored
    kinds: dict[str, str]


def _constants(package: Path) -> _Constants:
    (function,) = coreml_package.functions(package).values()
    found = _Constants(Stored(WeightFiles(package / coreml_package.MODEL), Store(0)), {})
    for operation in function.operations:
        if operation.type.startswith("const"):
            found.stored.add(operation)
            found.kinds[operation.outputs[0][0]] = operation.type
    return found


def _plain(name: str) -> str:
    for ending in ("_quantized", "_palettized", "_decompressed", "_dequantized", "_depalettized"):
        name = name.removesuffix(ending)
    return name


def test_a_compressed_bundle_is_audited_not_limited(made: Made, tmp_path: Path) -> None:
    notes: list[str] = []
    work = Work(dataclasses.replace(made.work.facts, say=notes.append), made.work.parts, made.work.scratch)
    rules = (Rule("decoder", "linear:text_layers_0_mlp_*", "pal6-group16"), *resolve("int4").rules)
    work.build(tmp_path / "b", Policy("mine", rules), "tiny")
    manifest = bundle.read(tmp_path / "b")
    assert manifest.precision == "mine" and not manifest.parity.limits
    assert manifest.parity.figures["decoder_weight_rms_error"] > 0.01
    assert {bits.scheme for bits in manifest.part("decoder").bits} == {"fp16", "int4", "pal6"}
    assert any("crashes of the Neural Engine" in note for note in manifest.notes)
    assert any(note.startswith("note: decoder: palettes") for note in notes)
    assert "fp16: parity gate of what will be compressed" in notes
    notes.clear()
    work.build(tmp_path / "again", resolve("int8"), "tiny")
    assert not [note for note in notes if note.startswith("fp16")], "it passed once"


def test_what_coremltools_skips_is_an_error(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made.work.scratch / "float16" / "decoder-decode.mlpackage"
    choices = choose(source, "decoder", resolve("int8"))
    optimize = coreml_convert.tools().optimize.coreml
    monkeypatch.setattr(optimize, "linear_quantize_weights", lambda model, _: model)
    with pytest.raises(CheckpointError, match="stored as fp16, wanted int8"):
        compress(source, choices, tmp_path / "out.mlpackage")


def test_palettes_without_their_library_are_told(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made.work.scratch / "float16" / "decoder-decode.mlpackage"
    choices = choose(source, "decoder", resolve("pal6"))
    monkeypatch.setattr("export.coreml_compress.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="scikit-learn is not installed"):
        compress(source, choices, tmp_path / "out.mlpackage")


def test_a_disk_without_room_is_told(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.coreml._bytes", lambda *_: 1 << 60)
    with pytest.raises(StateError, match="the export needs about"):
        coreml.export_coreml(tiny_checkpoint, {"fp16": tmp_path / "b"}, names={"fp16": "b"})


# --- whole exports ----------------------------------------------------


@pytest.mark.slow
def test_a_failed_export_leaves_nothing(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(coreml_gate, "FP16_LIMITS", tuple(
        dataclasses.replace(limit, most=1e-9) for limit in coreml_gate.FP16_LIMITS
    ))  # fmt: skip
    with pytest.raises(ParityError, match="at most 1e-09 allowed"):
        coreml.export_coreml(tiny_checkpoint, {"fp16": tmp_path / "b"}, names={"fp16": "b"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path, tiny_checkpoint: Path) -> None:
    rules = tmp_path / "mine.yaml"
    rules.write_text("base: fp16\nrules: [{part: decoder, node: 'linear:head', scheme: int8}]")
    wanted = ["--to", "coreml", "--name", "tiny", "--quant", rules, "--out", tmp_path / "out"]
    done = call("export", tiny_checkpoint, *wanted)
    path = Path(done.stdout.strip())
    assert path == tmp_path / "out" / "tiny-coreml-mine"
    manifest = bundle.read(path)
    assert manifest.target is None and manifest.coreml is not None and manifest.coreml.chunk == 64
    assert {bits.scheme for bits in manifest.part("decoder").bits} == {"fp16", "int8"}
    picture = tmp_path / "picture.png"
    drawn(90, 70, seed=1).save(picture)
    assert call("run", path, "--image", picture, "what color?", "--max-new-tokens", "3").stdout
    call("doctor", path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("smolvlm_tiles", {"max_context": 512, "max_image_tokens": 64}),
        ("internvl", {"max_context": 512}),
        ("qwen2_5_vl", {"max_context": 512, "max_image_tokens": 16}),
        ("lfm2_vl", {"max_context": 512, "max_image_tokens": 16, "split_images": False}),
    ],
)
def test_other_families_pass(name: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = (FAMILIES | VARIANTS)[name](tmp_path / "c", layers=1)
    work = prepared(checkpoint, tmp_path / "scratch", **sizes)
    work.build(tmp_path / "b", resolve("fp16"), "b")
    manifest = bundle.read(tmp_path / "b")
    assert all(manifest.parity.figures[key] < most / 2 for key, most in manifest.parity.limits.items())
    if name == "smolvlm_tiles":
        _dropped_tile_breaks_the_gate(work, tmp_path / "b", manifest)


def _dropped_tile_breaks_the_gate(work: Work, path: Path, manifest: Manifest) -> None:
    encode, seen = CoremlBackend.encode_view, [0]

    def without_the_second(self: CoremlBackend, view: Any) -> ImageFeatures:
        seen[0] += 1
        features = encode(self, view)
        if seen[0] == 2:
            return ImageFeatures(np.zeros_like(features.tokens), features.grids, None)
        return features

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CoremlBackend, "encode_view", without_the_second)
        with pytest.raises(ParityError, match="gate: case"):
            coreml_gate.check(work.facts, path, manifest, resolve("fp16"), None)
