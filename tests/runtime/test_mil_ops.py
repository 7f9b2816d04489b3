"""Every operation of the evaluator, against torch and against coremltools' own value inference."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import mil_ops
from runtime.mil_ops_math import erf
from tests.runtime.mil_cases import CASES

ROUNDS = 3
INFERRED_WRONG = {
    ("concat", 2): "coremltools 9 leaves out interleave",
    ("cumsum", 1): "coremltools 9 fails on exclusive",
    ("cumsum", 2): "coremltools 9 fails on exclusive",
    **{("scatter_along_axis", place): "coremltools 9 leaves out mode" for place in range(4)},
}
"""Cases in which value inference contradicts the operation's own description."""
PARAMETERS = [(name, place) for name, cases in CASES.items() for place in range(len(cases))]


def test_every_operation_has_a_case() -> None:
    assert set(CASES) == set(mil_ops.OPS)
    assert mil_ops.MOVES - {"read_state"} <= set(mil_ops.OPS)


@pytest.mark.parametrize(("name", "place"), PARAMETERS)
def test_it_gives_what_torch_gives(name: str, place: int) -> None:
    for seed in range(ROUNDS):
        arguments, wanted = CASES[name][place](generator(name, seed))
        found = mil_ops.OPS[name](**arguments)
        several = wanted if isinstance(wanted, tuple) else (wanted,)
        got = found if isinstance(found, tuple) else (found,)
        assert len(got) == len(several)
        for one, other in zip(got, several, strict=True):
            close(one, other.numpy())


@pytest.mark.parametrize(("name", "place"), PARAMETERS)
def test_it_gives_what_coremltools_infers(name: str, place: int) -> None:
    pytest.importorskip("coremltools")
    if (name, place) in INFERRED_WRONG:
        pytest.skip(INFERRED_WRONG[name, place])
    arguments, _ = CASES[name][place](generator(name, 0))
    inferred = infer(name, arguments)
    if any(each is None for each in inferred):
        pytest.skip("coremltools infers no value")
    found = mil_ops.OPS[name](**arguments)
    for one, other in zip(found if isinstance(found, tuple) else (found,), inferred, strict=True):
        close(one, np.asarray(other))


def infer(name: str, arguments: dict[str, Any]) -> list[Any]:
    """Values that coremltools works out while a program is built."""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb

    found: list[Any] = []

    @mb.program(input_specs=[mb.TensorSpec(shape=(1,))], opset_version=ct.target.iOS18)
    def program(unused: Any) -> Any:
        plain = {key: bool(each) if isinstance(each, np.bool_) else each for key, each in arguments.items()}
        result = getattr(mb, name)(**plain)
        results = result if isinstance(result, (tuple, list)) else [result]
        found.extend(each.val for each in results)
        return mb.identity(x=unused)

    return found


def generator(name: str, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def close(found: Any, wanted: np.ndarray[Any, Any]) -> None:
    """float32 sums in another order; whole numbers and truths exactly."""
    found = np.asarray(found)
    assert found.shape == wanted.shape
    assert found.dtype.kind == wanted.dtype.kind or {found.dtype.kind, wanted.dtype.kind} <= set("iu")
    if found.dtype.kind == "f":
        np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)
    else:
        np.testing.assert_array_equal(found, wanted)


@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=50))
def test_erf_is_the_error_function(values: list[float]) -> None:
    found = erf(np.array(values, np.float32))
    wanted = [math.erf(value) for value in np.array(values, np.float32).tolist()]
    np.testing.assert_allclose(found, wanted, rtol=6e-7, atol=1e-30)


def test_erf_of_more_than_a_block() -> None:
    values = np.linspace(-5, 5, 100_001, dtype=np.float32).reshape(1, -1)
    wanted = np.array([[math.erf(value) for value in values[0].tolist()]], np.float32)
    np.testing.assert_allclose(erf(values), wanted, rtol=6e-7)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("gelu", {"x": np.zeros(2, np.float32), "mode": "QUICK"}),
        ("pad", {"x": np.zeros((1, 2), np.float32), "pad": np.array([1, 1]), "mode": "wrap"}),
        ("conv", {"x": np.zeros((1, 1, 4)), "weight": np.zeros((1, 1, 2)), "pad_type": "full"}),
        ("max_pool", {"x": np.zeros((1, 1, 4)), "kernel_sizes": np.array([2]), "ceil_mode": True}),
        ("scatter", {"data": np.zeros(3), "indices": np.array([0]), "updates": np.ones(1), "mode": "xor"}),
        ("upsample_nearest_neighbor", {"x": np.zeros((1, 1, 2, 2)), "scale_factor_height": np.float32(1.5)}),
    ],
)
def test_a_mode_that_is_not_known_is_refused(name: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="know"):
        mil_ops.OPS[name](**arguments)


def test_a_slice_that_does_not_fit_is_refused_and_not_cut() -> None:
    arguments = {"begin": np.array([3]), "end": np.array([5])}
    with pytest.raises(ValueError, match="slice has the shape"):
        mil_ops.OPS["slice_update"](x=np.zeros(4), update=np.ones(2), **arguments)


@pytest.mark.parametrize("index", [-1, 3])
@pytest.mark.parametrize("name", ["gather", "gather_along_axis", "gather_nd"])
def test_an_index_outside_is_refused_though_numpy_would_take_it(name: str, index: int) -> None:
    places = np.array([[index]]) if name == "gather_nd" else np.array([index])
    with pytest.raises(IndexError, match=f"index {index} is outside of 0 to 2"):
        mil_ops.OPS[name](x=np.arange(3), indices=places)
