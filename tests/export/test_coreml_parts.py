"""Every family's parts as ML programs: converted, merged, read back and evaluated against torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("coremltools")

from export import coreml_convert, coreml_package, static
from export.checkpoint import Checkpoint, load
from export.coreml_convert import Function
from export.coreml_decoder import CoremlDecoder, state_shapes, traceable
from export.coreml_parts import ROLES, FromInputs, parts_of
from export.families import family_of, without_tiles
from export.static_decoder import StaticSizes
from runtime.bundle import digest
from runtime.errors import CheckpointError
from runtime.image import prepare
from runtime.image_spec import ImageSpec, PatchifyPadded
from runtime.mil import Program
from tests.checkpoints import FAMILIES, VARIANTS

SIZES = StaticSizes(context=64, chunk=8)
FAST = tuple(FAMILIES)
NAMES = [
    pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow])
    for name in (*FAMILIES, "internvl_qwen3", "qwen2_vl")
]


@pytest.fixture(scope="module", params=NAMES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(checkpoint, image section, programs by part) of one family, in float32."""
    name, root = request.param, tmp_path_factory.mktemp("parts")
    checkpoint = load((FAMILIES | VARIANTS)[name](root / "checkpoint", layers=1))
    if name == "lfm2_vl":
        without_tiles(checkpoint)
    image = static.fixed_views(family_of(checkpoint).image(checkpoint), 16)
    return checkpoint, image, converted(checkpoint, image, root)


def converted(checkpoint: Checkpoint, image: ImageSpec, root: Path) -> dict[str, Program]:
    parts = parts_of(checkpoint, family_of(checkpoint), image, SIZES)
    programs = {}
    for role in ROLES:
        sources = {}
        for name, function in parts.of(role).items():
            model = coreml_convert.convert(function, role, "float32")
            sources[name] = coreml_convert.save(model, root / f"{role}-{name}.mlpackage")
        package = coreml_convert.merge(sources, root / f"{role}.mlpackage")
        programs[role] = Program.open(package, rounded=False)
    return programs


def near(got: Any, wanted: Any) -> bool:
    return bool(np.abs(got - wanted).max() < 1e-4 * max(1.0, np.abs(wanted).max()))


def test_parts_compute_what_torch_does(made: Any) -> None:
    checkpoint, image, programs = made
    vision_is_equal(checkpoint, image, programs["vision_encoder"])
    embedding_is_equal(checkpoint, programs["embed_tokens"])
    decoder_is_equal(checkpoint, programs["decoder"])


def vision_is_equal(checkpoint: Checkpoint, image: ImageSpec, program: Program) -> None:
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 255, (70, 90, 3), dtype=np.uint8))
    view = prepare(picture, image).views[0]
    part = family_of(checkpoint).modules(checkpoint).vision
    given = [torch.from_numpy(np.ascontiguousarray(view.inputs[name])) for name in part.example]
    if isinstance(image.operations[-1], PatchifyPadded):
        given[0] = given[0][:, : int(np.prod(view.inputs["spatial_shapes"]))]
    with torch.no_grad():
        found = part.module(*given)
    wanted = found if isinstance(found, tuple) else (found,)
    got = program.run({"pixel_values": view.inputs["pixel_values"]})
    assert list(got) == list(part.outputs)
    assert got["image_features"].shape == (view.tokens, wanted[0].shape[-1])
    for name, tensor in zip(part.outputs, wanted, strict=True):
        assert near(got[name], tensor.numpy().reshape(got[name].shape)), name


def embedding_is_equal(checkpoint: Checkpoint, program: Program) -> None:
    table = checkpoint.model.get_input_embeddings()
    for function, count in (("prefill", SIZES.chunk), ("decode", 1)):
        ids = np.arange(count)[None] + 7
        with torch.no_grad():
            wanted = table(torch.from_numpy(ids)).numpy()
        got = program.run({"input_ids": ids.astype(np.int32)}, function=function)["inputs_embeds"]
        assert np.array_equal(got, wanted)


def decoder_is_equal(checkpoint: Checkpoint, program: Program) -> None:
    """Padded chunks, single tokens and a chunk again, over one state, against one pass over all of it."""
    family = family_of(checkpoint)
    shape, modules = family.decoder_shape(checkpoint), family.modules(checkpoint)
    count = 25
    embeds = torch.randn(1, count, shape.hidden, generator=torch.Generator().manual_seed(0)) * 0.3
    positions = torch.arange(count)[None]
    more: dict[str, Any] = {}
    if shape.position_rows > 1:
        positions = torch.cat([positions, positions // 2, positions % 7])
        more = {"position_ids": positions[:, None]}
    with torch.no_grad():
        hidden = modules.text(inputs_embeds=embeds, use_cache=False, **more).last_hidden_state
        wanted = modules.head(hidden)[0].numpy()
    state = program.new_state()
    runs = [(0, 8, "prefill"), (8, 13, "prefill"), *((n, n + 1, "decode") for n in range(13, 17))]
    for start, end, function in [*runs, (17, 25, "prefill")]:
        size = 1 if function == "decode" else SIZES.chunk
        room = (0, size - (end - start))
        inputs = {
            "inputs_embeds": np.pad(embeds[:, start:end].numpy(), [(0, 0), room, (0, 0)]),
            "position_ids": np.pad(positions[:, start:end].numpy(), [(0, 0), room]).astype(np.int32),
            "start": np.array([start], np.int32),
            "last": np.array([end - start - 1], np.int32),
        }
        if shape.deepstack_layers:
            inputs["deepstack_embeds"] = np.zeros((shape.deepstack_layers, 1, size, shape.hidden), np.float32)
        got = program.run(inputs, function=function, state=state)["logits"].reshape(-1)
        assert near(got, wanted[end - 1]), (start, end)


# --- what is stored ---------------------------------------------------


def test_functions_share_their_weights(made: Any) -> None:
    checkpoint, _, _ = made
    root = checkpoint.path.parent
    sizes = {
        path.stem: sum(file.stat().st_size for file in path.rglob("weight.bin"))
        for path in root.glob("decoder*.mlpackage")
    }
    alone = max(sizes["decoder-prefill"], sizes["decoder-decode"])
    assert sizes["decoder"] < 1.2 * alone
    functions = coreml_package.functions(root / "decoder.mlpackage")
    assert set(functions) == {"prefill", "decode"}
    shape = family_of(checkpoint).decoder_shape(checkpoint)
    found = {name: kind.shape for name, kind in coreml_package.states(functions["decode"]).items()}
    assert found == state_shapes(shape, SIZES.context)
    labels = [weight.label for weight in coreml_package.weights(functions["decode"])]
    assert {"linear:head", "gather:cos", "gather:sin"} <= set(labels)


def test_the_same_functions_make_the_same_bytes(made: Any, tmp_path: Path) -> None:
    root = made[0].path.parent
    sources = {name: root / f"decoder-{name}.mlpackage" for name in ("prefill", "decode")}
    again = coreml_convert.merge(sources, tmp_path / "decoder.mlpackage")
    assert digest(again) == digest(root / "decoder.mlpackage")
    assert b"conversion_date" not in (again / coreml_package.MODEL).read_bytes()


def test_transformers_is_as_it_was(made: Any) -> None:
    """Attention, norms and rotary angles are the model's own again."""
    checkpoint, _, _ = made
    modules = family_of(checkpoint).modules(checkpoint)
    for module in (*modules.text.modules(), *modules.vision.module.modules()):
        assert "forward" not in module.__dict__ and "static_weight" not in module._buffers
        config = getattr(module, "config", None)
        assert "pocketvlm" not in str(getattr(config, "_attn_implementation", ""))


# --- refusals ---------------------------------------------------------


class _Double(torch.nn.Module):
    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left + torch.linalg.inv(right)


def test_an_operation_without_a_counterpart_is_told() -> None:
    example = {"left": torch.eye(2), "right": torch.eye(2)}
    with pytest.raises(CheckpointError, match=r"somewhere: coremltools 9.*cannot convert it"):
        coreml_convert.convert(Function(_Double(), example, ["out"]), "somewhere")


def test_one_tensor_for_two_inputs_is_refused() -> None:
    same = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="one tensor stands for two inputs"):
        coreml_convert.convert(Function(_Double(), {"left": same, "right": same}, ["out"]), "x")


def test_a_trace_without_its_states_is_refused(tiny_checkpoint: Path) -> None:
    """Buffers become constants without a word when nobody declares them as states."""
    checkpoint = load(tiny_checkpoint)
    family = family_of(checkpoint)
    modules, shape = family.modules(checkpoint), family.decoder_shape(checkpoint)
    decoder = CoremlDecoder(modules.text, modules.head, shape, SIZES, 1).eval()

    def scope() -> Any:
        return traceable(decoder)

    function = Function(decoder, decoder.example(), ["logits"], {}, scope)
    with pytest.raises(CheckpointError, match="what is written differ in key_cache, value_cache"):
        coreml_convert.convert(function, "decoder")


def test_a_decoder_that_sees_both_ways_is_refused(tmp_path: Path) -> None:
    checkpoint = load(VARIANTS["gemma3"](tmp_path / "g", layers=1))
    image = family_of(checkpoint).image(checkpoint)
    with pytest.raises(CheckpointError, match="have no Core ML decoder here; use --to onnx"):
        parts_of(checkpoint, family_of(checkpoint), image, SIZES)


def test_only_what_depends_on_values_is_traced() -> None:
    """A size, and what is computed from it, are constants; the rest stays."""

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with FromInputs(x):
                ramp = torch.arange(x.shape[0], dtype=torch.float32).sqrt()
                return x * ramp + torch.ones(x.shape[0]).cumsum(0)

    traced = torch.jit.trace(Module(), (torch.zeros(3),), check_trace=False)
    kinds = {node.kind() for node in traced.graph.nodes()}
    assert not kinds & {"aten::arange", "aten::sqrt", "aten::cumsum", "aten::size"}
    assert torch.equal(traced(torch.ones(3)), torch.arange(3).sqrt() + torch.arange(1.0, 4.0))
