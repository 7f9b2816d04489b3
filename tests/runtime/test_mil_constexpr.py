"""Compressed weights: the formulas by hand, and what coremltools writes and decompresses itself."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from runtime import mil_ops_constexpr as made_dense
from runtime.mil import Program
from runtime.mil_program import parse
from tests.runtime import mil_writer as write

Array = NDArray[Any]
Blocks = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3)
"""(number of blocks, size of a block) of each axis"""


@given(blocks=Blocks, signed=st.booleans(), shifted=st.booleans(), seed=st.integers(0, 99))
def test_blocks_are_scaled_and_shifted(
    blocks: list[tuple[int, int]], signed: bool, shifted: bool, seed: int
) -> None:
    random = np.random.default_rng(seed)
    counts, sizes = [count for count, _ in blocks], [count * size for count, size in blocks]
    kind = np.int8 if signed else np.uint8
    data = random.integers(np.iinfo(kind).min, np.iinfo(kind).max + 1, sizes).astype(kind)
    scale = random.random(counts).astype(np.float16)
    offset = random.integers(0, 9, counts).astype(kind) if shifted else None
    found = made_dense.blockwise_shift_scale(data, scale, offset)
    assert found.dtype == np.float16
    for place in np.ndindex(*sizes):
        block = tuple(index // size for index, (_, size) in zip(place, blocks, strict=True))
        shift = 0 if offset is None else int(offset[block])
        assert found[place] == np.float16(float(scale[block]) * (int(data[place]) - shift))


@given(
    blocks=Blocks, bits=st.sampled_from([1, 2, 3, 4, 6, 8]), width=st.integers(1, 3), seed=st.integers(0, 99)
)
def test_tables_are_looked_up(blocks: list[tuple[int, int]], bits: int, width: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    counts, sizes = [count for count, _ in blocks], [count * size for count, size in blocks]
    indices = random.integers(0, 1 << bits, sizes).astype(np.uint8)
    lut = random.standard_normal([*counts, 1 << bits, width]).astype(np.float16)
    axis = int(random.integers(0, len(sizes)))
    found = made_dense.lut_to_dense(indices, lut, np.int32(axis) if width > 1 else None)
    for place in np.ndindex(*sizes):
        block = tuple(index // size for index, (_, size) in zip(place, blocks, strict=True))
        for part in range(width):
            spread = list(place)
            spread[axis] = place[axis] * width + part
            assert found[tuple(spread)] == lut[(*block, indices[place], part)]


def test_blocks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        made_dense.blockwise_shift_scale(np.zeros((3, 4), np.int8), np.ones((2, 1), np.float16))


def test_vectors_need_an_axis() -> None:
    with pytest.raises(ValueError, match="vector_axis"):
        made_dense.lut_to_dense(np.zeros((2, 2), np.uint8), np.zeros((1, 1, 2, 3)))


@given(bits=st.sampled_from([1, 2, 4, 6, 8]), seed=st.integers(0, 99))
def test_the_tables_of_ios_16_are_packed(bits: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    shape = random.integers(1, 6, 2)
    places = random.integers(0, 1 << bits, shape).astype(np.uint8)
    lut = random.standard_normal(1 << bits).astype(np.float16)
    data = np.frombuffer(write.packed(places, f"uint{bits}"), np.uint8)
    found = made_dense.lut_to_dense(data, lut, shape=shape.astype(np.uint32))
    np.testing.assert_array_equal(found, lut[places])


def test_the_masks_of_ios_16_are_packed() -> None:
    mask = np.random.default_rng(3).random((3, 7)) < 0.5
    values = np.arange(1, mask.sum() + 1, dtype=np.float16)
    packed = np.packbits(mask.reshape(-1), bitorder="little")
    found = made_dense.sparse_to_dense(values, packed, np.array([3, 7], np.uint32))
    np.testing.assert_array_equal(found[mask], values)
    assert not found[~mask].any()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("vector", [True, False])
def test_affine_weights(axis: int, vector: bool) -> None:
    random = np.random.default_rng(4)
    data = random.integers(0, 256, (3, 4)).astype(np.uint8)
    count = data.shape[axis]
    scale = random.random(count).astype(np.float32) if vector else np.float32(0.3)
    zero = random.integers(0, 256, count).astype(np.uint8) if vector else np.uint8(7)
    found = made_dense.affine_dequantize(data, np.asarray(zero), np.asarray(scale), np.int32(axis))
    wide = [-1, 1] if axis == 0 else [1, -1]
    shift, factor = (np.asarray(each).reshape(wide if vector else [1, 1]) for each in (zero, scale))
    np.testing.assert_allclose(found, (data.astype(np.float32) - shift) * factor, rtol=1e-6)


def test_sparse_weights_may_be_quantized_or_tables() -> None:
    mask = np.array([[1, 0, 1], [0, 1, 1]], np.uint8)
    values = np.array([3, 4, 5, 6], np.int8)
    scale = np.array([[0.5], [2]], np.float16)
    _, found = made_dense.sparse_blockwise_shift_scale(mask, values, scale)
    np.testing.assert_array_equal(found, [1.5, 2, 10, 12])
    lut = np.arange(8, dtype=np.float16).reshape(1, 1, 4, 2)
    wide, found = made_dense.lut_to_sparse(mask, np.array([0, 1, 2, 3], np.uint8), lut, np.int32(1))
    np.testing.assert_array_equal(wide, [[1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1]])
    np.testing.assert_array_equal(found, [0, 1, 2, 3, 4, 5, 6, 7])


def test_a_compressed_table_of_tokens_is_looked_up(tmp_path: Path) -> None:
    """constexpr -> gather: what is expanded stays float16, and an 8-bit table of scales feeds another."""
    random, weights = np.random.default_rng(5), write.Weights()
    data, scale = random.integers(-8, 8, (6, 8)).astype(np.int8), random.random((6, 2)).astype(np.float16)
    kind: write.Type = ("float16", (6, 8))
    steps = [
        write.operation(
            "constexpr_blockwise_shift_scale",
            {"data": weights.add(data, "int4"), "scale": weights.add(scale, "float16")},
            {"table": kind},
        ),
        write.number("axis", 0),
        write.operation(
            "gather", {"x": "table", "indices": "ids", "axis": "axis"}, {"y": ("float16", (3, 8))}
        ),
    ]
    body = write.function({"ids": ("int32", (3,))}, steps, ["y"])
    program = Program.open(write.package(tmp_path / "p.mlpackage", write.model({"main": body}), weights))
    found = program.run({"ids": np.array([5, 0, 2])})["y"]
    wanted = (data.astype(np.float32) * scale.repeat(4, axis=1)).astype(np.float16)
    np.testing.assert_array_equal(found, wanted[[5, 0, 2]].astype(np.float32))


# --- what coremltools makes -------------------------------------------


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A convolution and two linear layers as coremltools converts them, with the folder for variants."""
    ct = pytest.importorskip("coremltools")
    import torch

    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(4, 16, 3)
            self.first, self.second = torch.nn.Linear(64, 64), torch.nn.Linear(64, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = self.conv(x).flatten(2)[..., :64]
            return self.second(torch.nn.functional.gelu(self.first(found)))

    torch.manual_seed(0)
    traced = torch.jit.trace(Small().eval(), torch.zeros(1, 4, 10, 10), check_trace=False)
    model = ct.convert(
        traced,
        inputs=[ct.TensorType(name="x", shape=(1, 4, 10, 10), dtype=np.float16)],
        outputs=[ct.TensorType(name="y", dtype=np.float16)],
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )
    return model, tmp_path_factory.mktemp("compressed")


def compressed(model: Any, how: str) -> Any:
    import coremltools.optimize.coreml as cto

    if how == "sparse":
        return cto.prune_weights(model, _config(cto.OpMagnitudePrunerConfig(target_sparsity=0.5)))
    if how == "sparse-int8":
        sparse = compressed(model, "sparse")
        linear = cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8")
        return cto.linear_quantize_weights(sparse, _config(linear), joint_compression=True)
    if how.startswith("palette"):
        bits = int(how[len("palette")])
        table = cto.OpPalettizerConfig(
            mode="uniform", nbits=bits, granularity="per_grouped_channel", group_size=8, weight_threshold=64
        )
        found = cto.palettize_weights(model, _config(table))
        if not how.endswith("int8"):
            return found
        linear = cto.OpLinearQuantizerConfig(
            mode="linear_symmetric", dtype="int8", granularity="per_tensor", weight_threshold=64
        )
        return cto.linear_quantize_weights(found, _config(linear), joint_compression=True)
    mode, dtype, granularity = {
        "int8": ("linear_symmetric", "int8", "per_channel"),
        "uint8": ("linear", "uint8", "per_channel"),
        "int4": ("linear_symmetric", "int4", "per_block"),
        "uint4": ("linear", "uint4", "per_block"),
    }[how]
    linear = cto.OpLinearQuantizerConfig(
        mode=mode, dtype=dtype, granularity=granularity, block_size=32, weight_threshold=64
    )
    return cto.linear_quantize_weights(model, _config(linear))


def _config(operation: Any) -> Any:
    import coremltools.optimize.coreml as cto

    return cto.OptimizationConfig(global_config=operation)


@pytest.mark.parametrize(
    "how",
    ["int8", "uint8", "int4", "uint4", "palette4", "palette6", "palette4-int8", "sparse", "sparse-int8"],
)
def test_it_expands_as_coremltools_decompresses(plain: tuple[Any, Path], how: str) -> None:
    """The compressed package and coremltools' own decompression of it give the same, to the last bit."""
    import coremltools.optimize.coreml as cto

    model, folder = plain
    small = compressed(model, how)
    paths = [folder / f"{how}.mlpackage", folder / f"{how}-dense.mlpackage"]
    small.save(str(paths[0]))
    cto.decompress_weights(small).save(str(paths[1]))
    body = parse((paths[0] / "Data/com.apple.CoreML/model.mlmodel").read_bytes()).functions["main"]
    assert any(operation.type.startswith("constexpr_") for operation in body.operations)
    x = np.random.default_rng(6).standard_normal((1, 4, 10, 10)).astype(np.float16)
    found, wanted = (Program.open(path).run({"x": x})["y"] for path in paths)
    np.testing.assert_array_equal(found, wanted)
    assert math.isfinite(float(found.sum())) and found.any()
