"""One or more cases of every operation that the evaluator knows: its arguments, and what torch makes of them.

`CASES[name]` is a list of `(arguments, torch result)` makers over a seeded generator; arguments are called as
in an ML program and may be given to coremltools' builder as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

Array = NDArray[Any]
Case = Callable[[np.random.Generator], tuple[dict[str, Any], Any]]
T = torch.from_numpy


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def positive(rng: np.random.Generator, *shape: int) -> Array:
    return (rng.random(shape) + 0.1).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int32)


def i32(value: int) -> Any:
    return np.int32(value)


def f32(value: float) -> Any:
    return np.float32(value)


def sizes(rng: np.random.Generator, rank: int, most: int = 5) -> tuple[int, ...]:
    return tuple(int(size) for size in rng.integers(1, most + 1, rank))


def unary(function: Callable[[torch.Tensor], torch.Tensor], make: Any = normal, **more: Any) -> Case:
    def case(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
        x = make(rng, *sizes(rng, int(rng.integers(1, 5))))
        return {"x": x, **more}, function(T(x))

    return case


def binary(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], make: Any = normal) -> Case:
    """Two arrays that broadcast: one of them lacks an axis or has one of size 1."""

    def case(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
        shape = sizes(rng, 3)
        x, y = make(rng, *shape), make(rng, *(1 if rng.random() < 0.3 else size for size in shape[1:]))
        return {"x": x, "y": y}, function(T(x), T(y))

    return case


def small(rng: np.random.Generator, *shape: int) -> Array:
    """Whole numbers as floats, so that comparisons are true as well."""
    return rng.integers(-2, 3, shape).astype(np.float32)


def truth(rng: np.random.Generator, *shape: int) -> Array:
    return rng.random(shape) < 0.5


def unit(rng: np.random.Generator, *shape: int) -> Array:
    return (rng.random(shape) * 1.8 - 0.9).astype(np.float32)


def fixed(arguments: dict[str, Any], wanted: Any) -> Case:
    return lambda rng: (arguments, wanted)


def over(make: Callable[[np.random.Generator], tuple[dict[str, Any], Any]]) -> Case:
    return make


def reduced(function: Callable[..., torch.Tensor], make: Any = normal) -> list[Case]:
    def some(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
        x, keep = make(rng, *sizes(rng, 4)), bool(rng.random() < 0.5)
        return {"x": x, "axes": ints(1, -1), "keep_dims": np.bool_(keep)}, function(T(x), (1, 3), keep)

    def one(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
        x = make(rng, *sizes(rng, 3))
        return {"x": x, "axes": ints(0), "keep_dims": np.bool_(False)}, function(T(x), (0,), False)

    return [some, one]


def _prod(x: torch.Tensor, axes: tuple[int, ...], keep: bool) -> torch.Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _arg(function: Any) -> Case:
    def case(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
        x = normal(rng, 3, 4, 5)
        return {"x": x, "axis": i32(1), "keep_dims": np.bool_(True)}, function(T(x), 1, keepdim=True)

    return case


def _linear(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
    x, weight, bias = normal(rng, 2, 3, 7), normal(rng, 5, 7), normal(rng, 5)
    return {"x": x, "weight": weight, "bias": bias}, F.linear(T(x), T(weight), T(bias))


def _matmul(flip_x: bool, flip_y: bool) -> Case:
    def case(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
        x, y = normal(rng, 2, 3, 4, 5), normal(rng, 3, 5, 6)
        wanted = T(x) @ T(y)
        x, y = x.swapaxes(-1, -2).copy() if flip_x else x, y.swapaxes(-1, -2).copy() if flip_y else y
        return {
            "x": x,
            "y": y,
            "transpose_x": np.bool_(flip_x),
            "transpose_y": np.bool_(flip_y),
        }, wanted

    return case


def _conv(axes: int, groups: int, **more: Any) -> Case:
    def case(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
        x = normal(rng, 2, 4, *(int(size) for size in rng.integers(6, 9, axes)))
        kernel = [int(size) for size in rng.integers(1, 4, axes)]
        weight, bias = normal(rng, 8, 4 // groups, *kernel), normal(rng, 8)
        strides, gaps = rng.integers(1, 3, axes).astype(np.int32), rng.integers(1, 3, axes).astype(np.int32)
        pads = rng.integers(0, 3, 2 * axes).astype(np.int32)
        room = [int(size) for axis in reversed(range(axes)) for size in pads[2 * axis : 2 * axis + 2]]
        run = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[axes]
        wanted = run(F.pad(T(x), room), T(weight), T(bias), strides.tolist(), 0, gaps.tolist(), groups)
        return {
            "x": x,
            "weight": weight,
            "bias": bias,
            "strides": strides,
            "pad_type": "custom",
            "pad": pads,
            "dilations": gaps,
            "groups": i32(groups),
        }, wanted

    return case


def _conv_same(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
    x, weight = normal(rng, 1, 3, 7, 6), normal(rng, 2, 3, 3, 2)
    return {"x": x, "weight": weight, "pad_type": "same"}, F.conv2d(T(x), T(weight), padding="same")


def _pool(which: str, exclude: bool = False) -> Case:
    def case(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
        x = normal(rng, 2, 3, 8, 7)
        given: dict[str, Any] = {
            "x": x,
            "kernel_sizes": ints(3, 2),
            "strides": ints(2, 1),
            "pad_type": "custom",
            "pad": ints(1, 1, 1, 1),
        }
        if which == "max":
            return given, F.max_pool2d(T(x), (3, 2), (2, 1), 1)
        given["exclude_padding_from_average"] = np.bool_(exclude)
        return given, F.avg_pool2d(T(x), (3, 2), (2, 1), 1, count_include_pad=not exclude)

    return case


def _attention(masked: str) -> Case:
    def case(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
        query, key, value = normal(rng, 1, 3, 4, 8), normal(rng, 1, 3, 6, 8), normal(rng, 1, 3, 6, 5)
        given: dict[str, Any] = {"query": query, "key": key, "value": value}
        mask = None
        if masked:
            mask = normal(rng, 1, 1, 4, 6) if masked == "float" else rng.random((1, 1, 4, 6)) < 0.7
            mask[..., 0] = 0 if masked == "float" else True
            given["attn_mask"] = mask
        return given, F.scaled_dot_product_attention(
            T(query), T(key), T(value), None if mask is None else T(mask)
        )

    return case


def _layer_norm(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
    x, gamma, beta = normal(rng, 3, 4, 5), normal(rng, 4, 5), normal(rng, 4, 5)
    given = {"x": x, "axes": ints(-2, -1), "gamma": gamma, "beta": beta, "epsilon": f32(1e-3)}
    return given, F.layer_norm(T(x), (4, 5), T(gamma), T(beta), 1e-3)


def _batch_norm(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
    x, gamma, beta, mean = normal(rng, 2, 3, 4, 5), normal(rng, 3), normal(rng, 3), normal(rng, 3)
    variance = positive(rng, 3)
    given = {"x": x, "mean": mean, "variance": variance, "gamma": gamma, "beta": beta}
    return given, F.batch_norm(T(x), T(mean), T(variance), T(gamma), T(beta))


def _instance_norm(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
    x, gamma, beta = normal(rng, 2, 3, 4, 5), normal(rng, 3), normal(rng, 3)
    wanted = F.instance_norm(T(x), weight=T(gamma), bias=T(beta))
    return {"x": x, "gamma": gamma, "beta": beta}, wanted


def _l2_norm(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
    x = normal(rng, 2, 3, 4, 5)
    return {"x": x, "epsilon": f32(1e-4)}, T(x) / (T(x).square().sum((1, 2, 3), keepdim=True) + 1e-4).sqrt()


def _slice(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
    x = normal(rng, 4, 6, 5, 7)
    given = {
        "x": x,
        "begin": ints(2, 1, -3, 5),
        "end": ints(0, 6, -1, 0),
        "stride": ints(1, 2, 1, 1),
        "begin_mask": np.array([False, False, False, True]),
        "end_mask": np.array([False, True, False, True]),
        "squeeze_mask": np.array([True, False, False, False]),
    }
    return given, T(x)[2, 1::2, -3:-1, :]


def _slice_update(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
    x, update, start = normal(rng, 2, 3, 9, 4), normal(rng, 1, 3, 2, 4), int(rng.integers(0, 8))
    wanted = T(x).clone()
    wanted[1:2, :, start : start + 2] = T(update)
    return {
        "x": x,
        "update": update,
        "begin": ints(1, 0, start, 0),
        "end": ints(2, 0, start + 2, 0),
        "begin_mask": np.array([False, True, False, True]),
        "end_mask": np.array([False, True, False, True]),
    }, wanted


def _gather(axis: int, batch: int = 0) -> Case:
    def case(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
        x = normal(rng, 3, 6, 5)
        given: dict[str, Any] = {"x": x, "axis": i32(axis)}
        if not batch:
            given["indices"] = rng.integers(0, x.shape[axis], (2, 3)).astype(np.int32)
            return given, T(x).index_select(axis, T(given["indices"]).flatten().long()).unflatten(
                axis, (2, 3)
            )
        given |= {"indices": rng.integers(0, 6, (3, 4)).astype(np.int32), "batch_dims": i32(1)}
        wanted = torch.stack([T(x)[n, T(given["indices"][n]).long()] for n in range(3)])
        return given, wanted

    return case


def _gather_along(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
    x, indices = normal(rng, 3, 4, 5), rng.integers(0, 4, (3, 2, 5)).astype(np.int32)
    return {"x": x, "indices": indices, "axis": i32(1)}, T(x).gather(1, T(indices).long())


def _gather_nd(batch: int) -> Case:
    def case(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
        x = normal(rng, 3, 4, 5)
        if not batch:
            indices = np.stack([rng.integers(0, 3, 6), rng.integers(0, 4, 6)], -1).astype(np.int32)
            return {"x": x, "indices": indices}, T(x)[T(indices[:, 0]).long(), T(indices[:, 1]).long()]
        indices = np.stack([rng.integers(0, 4, (3, 2)), rng.integers(0, 5, (3, 2))], -1).astype(np.int32)
        wanted = torch.stack([T(x)[n][tuple(T(indices[n]).long().T)] for n in range(3)])
        return {"x": x, "indices": indices, "batch_dims": i32(1)}, wanted

    return case


def _scatter(mode: str) -> Case:
    def case(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
        data, updates = normal(rng, 4, 6, 3), normal(rng, 4, 3, 3)
        indices = rng.permutation(6)[:3].astype(np.int32)
        wanted = T(data).clone()
        if mode == "add":
            wanted.index_add_(1, T(indices).long(), T(updates))
        else:
            wanted[:, T(indices).long()] = T(updates)
        return {"data": data, "indices": indices, "updates": updates, "axis": i32(1), "mode": mode}, wanted

    return case


def _scatter_along(mode: str) -> Case:
    torch_mode = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}[mode]

    def case(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
        data, updates = normal(rng, 3, 5), normal(rng, 3, 5)
        indices = rng.integers(0, 5, (3, 5)).astype(np.int32)
        wanted = T(data).scatter_reduce(1, T(indices).long(), T(updates), torch_mode)
        given = {"data": data, "indices": indices, "updates": updates, "axis": i32(1), "mode": mode}
        return given, wanted

    return case


def _scatter_nd(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
    data, updates = normal(rng, 4, 5, 2), normal(rng, 3, 2)
    indices = np.stack([rng.permutation(4)[:3], rng.permutation(5)[:3]], -1).astype(np.int32)
    wanted = T(data).clone()
    wanted[T(indices[:, 0]).long(), T(indices[:, 1]).long()] = T(updates)
    return {"data": data, "indices": indices, "updates": updates, "mode": "update"}, wanted


def _topk(ascending: bool) -> Case:
    def case(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
        x = normal(rng, 3, 7, 2)
        found = T(x).topk(4, 1, largest=not ascending)
        return {"x": x, "k": i32(4), "axis": i32(1), "ascending": np.bool_(ascending)}, tuple(found)

    return case


def _split(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
    x = normal(rng, 2, 7)
    return {"x": x, "axis": i32(-1), "split_sizes": ints(3, 4)}, T(x).split([3, 4], -1)


def _interleaved(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
    values = [normal(rng, 2, 3, 4) for _ in range(2)]
    wanted = torch.stack([T(each) for each in values], 2).reshape(2, 6, 4)
    return {"values": values, "axis": i32(1), "interleave": np.bool_(True)}, wanted


def _values(function: Any, axis: int) -> Case:
    def case(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
        values = [normal(rng, 2, 3, 4) for _ in range(3)]
        return {"values": values, "axis": i32(axis)}, function([T(each) for each in values], axis)

    return case


def _einsum(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
    x, y = normal(rng, 2, 3, 4, 5), normal(rng, 2, 5, 4, 6)
    equation = "abcd,adce->abce"
    return {"values": [x, y], "equation": equation}, torch.einsum(equation, T(x), T(y))


def _pad(mode: str) -> Case:
    def case(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
        x = normal(rng, 2, 3, 6, 5)
        given = {"x": x, "pad": ints(1, 2, 3, 0), "mode": mode, "constant_val": f32(1.5)}
        if mode == "constant":
            return given, F.pad(T(x), (3, 0, 1, 2), value=1.5)
        return given, F.pad(T(x), (3, 0, 1, 2), mode=mode)

    return case


def _cumsum(exclusive: bool, reverse: bool) -> Case:
    def case(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
        x = normal(rng, 3, 6)
        value = T(x).flip(1) if reverse else T(x)
        summed = value.cumsum(1) - (value if exclusive else 0)
        given = {"x": x, "axis": i32(1), "exclusive": np.bool_(exclusive), "reverse": np.bool_(reverse)}
        return given, summed.flip(1) if reverse else summed

    return case


def _one_hot(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
    indices = rng.integers(0, 5, (2, 3)).astype(np.int32)
    return {"indices": indices, "one_hot_vector_size": i32(5)}, F.one_hot(T(indices).long(), 5)


def _quantize(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
    x, scale, zero = normal(rng, 4, 6), positive(rng, 4) / 10, rng.integers(-9, 9, 4).astype(np.int8)
    wanted = ((T(x) / T(scale)[:, None]).round() + T(zero)[:, None]).clamp(-128, 127).to(torch.int8)
    given = {"input": x, "scale": scale, "zero_point": zero, "axis": i32(0), "output_dtype": "int8"}
    return given, wanted


def _dequantize(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
    x, scale = rng.integers(-128, 128, (4, 6)).astype(np.int8), positive(rng, 6)
    zero = rng.integers(-9, 9, 6).astype(np.int8)
    wanted = (T(x).float() - T(zero).float()) * T(scale)
    return {"input": x, "scale": scale, "zero_point": zero, "axis": i32(1)}, wanted


def _depth(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
    x = normal(rng, 2, 12, 3, 4)
    by_block_first = T(x).unflatten(1, (4, 3)).transpose(1, 2).flatten(1, 2)
    return {"x": x, "block_size": i32(2)}, F.pixel_shuffle(by_block_first, 2)


def _space(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
    x = normal(rng, 2, 3, 4, 6)
    wanted = F.pixel_unshuffle(T(x), 2).unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2)
    return {"x": x, "block_size": i32(2)}, wanted


def _alphas(function: Any, *names: str) -> Case:
    """Channel-wise parameters (3,) against x (2, 3, 4, 5)."""

    def case(rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
        x, given = normal(rng, 2, 3, 4, 5), {name: positive(rng, 3) for name in names}
        return {"x": x, **given}, function(T(x), *(T(each)[:, None, None] for each in given.values()))

    return case


def _compare(function: Any) -> list[Case]:
    return [binary(function, small)]


CASES: dict[str, list[Case]] = {
    "abs": [unary(torch.abs)],
    "acos": [unary(torch.acos, unit)],
    "add": [binary(torch.add)],
    "argsort": [
        over(lambda rng: ({"x": (x := normal(rng, 3, 6)), "axis": i32(1)}, T(x).argsort(1, descending=True))),
        over(
            lambda rng: (
                {"x": (x := normal(rng, 3, 6)), "axis": i32(0), "ascending": np.bool_(True)},
                T(x).argsort(0),
            )
        ),
    ],
    "asin": [unary(torch.asin, unit)],
    "atan": [unary(torch.atan)],
    "atanh": [unary(torch.atanh, unit)],
    "avg_pool": [_pool("avg"), _pool("avg", exclude=True)],
    "band_part": [
        over(
            lambda rng: (
                {"x": (x := normal(rng, 2, 5, 6)), "lower": i32(1), "upper": i32(2)},
                T(x).tril(2).triu(-1),
            )
        ),
        over(lambda rng: ({"x": (x := normal(rng, 5, 6)), "lower": i32(-1), "upper": i32(0)}, T(x).tril())),
    ],
    "batch_norm": [_batch_norm],
    "cast": [
        unary(lambda x: x.int(), lambda rng, *shape: 3 * normal(rng, *shape), dtype="int32"),
        over(lambda rng: ({"x": (x := small(rng, 3, 4)), "dtype": "bool"}, T(x).bool())),
    ],
    "ceil": [unary(torch.ceil)],
    "clamped_relu": [
        unary(lambda x: F.leaky_relu(x, 0.5).clamp(max=0.7), alpha=f32(0.5), beta=f32(0.7)),
    ],
    "clip": [unary(lambda x: x.clamp(-0.5, 0.7), alpha=f32(-0.5), beta=f32(0.7))],
    "concat": [_values(torch.cat, 1), _values(torch.cat, -1), _interleaved],
    "conv": [
        *(_conv(axes, groups) for axes in (1, 2, 3) for groups in (1, 2, 4)),
        _conv_same,
    ],
    "cos": [unary(torch.cos)],
    "cosh": [unary(torch.cosh)],
    "cumsum": [_cumsum(False, False), _cumsum(True, False), _cumsum(True, True)],
    "depth_to_space": [_depth],
    "dequantize": [_dequantize],
    "einsum": [_einsum],
    "elu": [unary(lambda x: F.elu(x, 0.7), alpha=f32(0.7))],
    "equal": _compare(torch.eq),
    "erf": [unary(torch.erf)],
    "exp": [unary(torch.exp)],
    "exp2": [unary(torch.exp2)],
    "expand_dims": [
        over(lambda rng: ({"x": (x := normal(rng, 2, 3)), "axes": ints(0, 2)}, T(x)[None, :, None])),
        over(lambda rng: ({"x": (x := normal(rng, 2, 3)), "axes": ints(-1)}, T(x)[..., None])),
    ],
    "fill": [fixed({"shape": ints(2, 3), "value": f32(1.5)}, torch.full((2, 3), 1.5))],
    "fill_like": [
        over(
            lambda rng: ({"ref_tensor": normal(rng, 2, 3), "value": f32(2.5)}, torch.full((2, 3), 2.5)),
        )
    ],
    "flatten2d": [
        over(lambda rng: ({"x": (x := normal(rng, 2, 3, 4, 5)), "axis": i32(2)}, T(x).reshape(6, 20)))
    ],
    "floor": [unary(torch.floor)],
    "floor_div": [binary(torch.floor_divide)],
    "gather": [_gather(0), _gather(1), _gather(2), _gather(1, batch=1)],
    "gather_along_axis": [_gather_along],
    "gather_nd": [_gather_nd(0), _gather_nd(1)],
    "gelu": [
        unary(F.gelu),
        unary(lambda x: F.gelu(x, approximate="tanh"), mode="TANH_APPROXIMATION"),
        unary(lambda x: x * torch.sigmoid(1.702 * x), mode="SIGMOID_APPROXIMATION"),
    ],
    "greater": _compare(torch.gt),
    "greater_equal": _compare(torch.ge),
    "identity": [unary(lambda x: x)],
    "instance_norm": [_instance_norm],
    "inverse": [unary(lambda x: 1 / (x + 0.01), positive, epsilon=f32(0.01))],
    "l2_norm": [_l2_norm],
    "layer_norm": [_layer_norm],
    "leaky_relu": [unary(lambda x: F.leaky_relu(x, 0.3), alpha=f32(0.3))],
    "less": _compare(torch.lt),
    "less_equal": _compare(torch.le),
    "linear": [_linear],
    "linear_activation": [unary(lambda x: 2 * x + 0.5, alpha=f32(2), beta=f32(0.5))],
    "log": [unary(lambda x: torch.log(x + 0.1), positive, epsilon=f32(0.1))],
    "logical_and": [binary(torch.logical_and, truth)],
    "logical_not": [unary(torch.logical_not, truth)],
    "logical_or": [binary(torch.logical_or, truth)],
    "logical_xor": [binary(torch.logical_xor, truth)],
    "matmul": [_matmul(flip_x, flip_y) for flip_x in (False, True) for flip_y in (False, True)],
    "max_pool": [_pool("max")],
    "maximum": [binary(torch.maximum)],
    "minimum": [binary(torch.minimum)],
    "mod": [binary(torch.remainder)],
    "mul": [binary(torch.mul)],
    "non_zero": [over(lambda rng: ({"x": (x := small(rng, 3, 4))}, T(x).nonzero()))],
    "not_equal": _compare(torch.ne),
    "one_hot": [_one_hot],
    "pad": [_pad("constant"), _pad("reflect"), _pad("replicate")],
    "pixel_shuffle": [
        over(
            lambda rng: (
                {"x": (x := normal(rng, 2, 12, 3, 4)), "upscale_factor": i32(2)},
                F.pixel_shuffle(T(x), 2),
            )
        )
    ],
    "pixel_unshuffle": [
        over(
            lambda rng: (
                {"x": (x := normal(rng, 2, 3, 4, 6)), "downscale_factor": np.uint32(2)},
                F.pixel_unshuffle(T(x), 2),
            )
        )
    ],
    "pow": [
        binary(torch.pow, positive),
        over(lambda rng: ({"x": (x := normal(rng, 3, 4)), "y": f32(2)}, T(x).square())),
    ],
    "prelu": [_alphas(lambda x, a: torch.where(x >= 0, x, a * x), "alpha")],
    "quantize": [_quantize],
    "range_1d": [fixed({"end": i32(9), "start": i32(2), "step": i32(3)}, torch.arange(2, 9, 3))],
    "real_div": [binary(torch.div, positive)],
    "reduce_argmax": [_arg(torch.argmax)],
    "reduce_argmin": [_arg(torch.argmin)],
    "reduce_l1_norm": reduced(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    "reduce_l2_norm": reduced(lambda x, axes, keep: x.square().sum(axes, keepdim=keep).sqrt()),
    "reduce_log_sum": reduced(lambda x, axes, keep: x.sum(axes, keepdim=keep).log(), positive),
    "reduce_log_sum_exp": reduced(lambda x, axes, keep: x.logsumexp(axes, keepdim=keep)),
    "reduce_max": reduced(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    "reduce_mean": reduced(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    "reduce_min": reduced(lambda x, axes, keep: x.amin(axes, keepdim=keep)),
    "reduce_prod": reduced(_prod),
    "reduce_sum": reduced(lambda x, axes, keep: x.sum(axes, keepdim=keep)),
    "reduce_sum_square": reduced(lambda x, axes, keep: x.square().sum(axes, keepdim=keep)),
    "relu": [unary(F.relu)],
    "relu6": [unary(F.relu6, lambda rng, *shape: 9 * normal(rng, *shape))],
    "reshape": [
        over(lambda rng: ({"x": (x := normal(rng, 2, 6, 5)), "shape": ints(4, -1)}, T(x).reshape(4, 15))),
        over(
            lambda rng: ({"x": (x := normal(rng, 2, 6, 5)), "shape": ints(0, 3, -1)}, T(x).reshape(2, 3, 10))
        ),
    ],
    "reverse": [over(lambda rng: ({"x": (x := normal(rng, 2, 3, 4)), "axes": ints(0, -1)}, T(x).flip(0, 2)))],
    "round": [unary(torch.round, lambda rng, *shape: small(rng, *shape) / 2)],
    "rsqrt": [unary(lambda x: torch.rsqrt(x + 1e-3), positive, epsilon=f32(1e-3))],
    "scaled_dot_product_attention": [_attention(""), _attention("float"), _attention("bool")],
    "scaled_tanh": [unary(lambda x: 1.5 * torch.tanh(0.3 * x), alpha=f32(1.5), beta=f32(0.3))],
    "scatter": [_scatter("add"), _scatter("update")],
    "scatter_along_axis": [_scatter_along(mode) for mode in ("add", "mul", "max", "min")],
    "scatter_nd": [_scatter_nd],
    "select": [
        over(
            lambda rng: (
                {
                    "cond": (c := truth(rng, 3, 4)),
                    "a": (a := normal(rng, 3, 4)),
                    "b": (b := normal(rng, 3, 4)),
                },
                torch.where(T(c), T(a), T(b)),
            )
        )
    ],
    "shape": [over(lambda rng: ({"x": normal(rng, 2, 5, 3)}, torch.tensor([2, 5, 3])))],
    "sigmoid": [unary(torch.sigmoid)],
    "sigmoid_hard": [unary(lambda x: (0.4 * x + 0.3).clamp(0, 1), alpha=f32(0.4), beta=f32(0.3))],
    "sign": [unary(torch.sign, small)],
    "silu": [unary(F.silu)],
    "sin": [unary(torch.sin)],
    "sinh": [unary(torch.sinh)],
    "slice_by_index": [_slice],
    "slice_by_size": [
        over(
            lambda rng: (
                {"x": (x := normal(rng, 4, 6, 3)), "begin": ints(1, 2, 0), "size": ints(2, -1, 3)},
                T(x)[1:3, 2:],
            )
        )
    ],
    "slice_update": [_slice_update],
    "softmax": [unary(lambda x: x.softmax(-1), axis=i32(-1)), unary(lambda x: x.softmax(0), axis=i32(0))],
    "softplus": [unary(F.softplus, lambda rng, *shape: 9 * normal(rng, *shape))],
    "softplus_parametric": [_alphas(lambda x, a, b: a * F.softplus(b * x), "alpha", "beta")],
    "softsign": [unary(F.softsign)],
    "space_to_depth": [_space],
    "split": [
        _split,
        over(
            lambda rng: (
                {"x": (x := normal(rng, 6, 2)), "axis": i32(0), "num_splits": i32(3)},
                T(x).chunk(3, 0),
            )
        ),
    ],
    "sqrt": [unary(torch.sqrt, positive)],
    "square": [unary(torch.square)],
    "squeeze": [
        over(lambda rng: ({"x": (x := normal(rng, 1, 3, 1, 1)), "axes": ints(0, -1)}, T(x)[0, :, :, 0])),
        over(lambda rng: ({"x": (x := normal(rng, 1, 3, 1))}, T(x).squeeze())),
    ],
    "stack": [_values(torch.stack, 1)],
    "sub": [binary(torch.sub)],
    "tan": [unary(torch.tan, unit)],
    "tanh": [unary(torch.tanh)],
    "threshold": [unary(lambda x: x.clamp(min=0.2), alpha=f32(0.2))],
    "thresholded_relu": [unary(lambda x: torch.where(x >= 0.2, x, 0.0), alpha=f32(0.2))],
    "tile": [
        over(lambda rng: ({"x": (x := normal(rng, 2, 1, 3)), "reps": ints(1, 4, 2)}, T(x).tile(1, 4, 2)))
    ],
    "topk": [_topk(False), _topk(True)],
    "transpose": [
        over(lambda rng: ({"x": (x := normal(rng, 2, 3, 4)), "perm": ints(2, 0, 1)}, T(x).permute(2, 0, 1)))
    ],
    "upsample_nearest_neighbor": [
        over(
            lambda rng: (
                {
                    "x": (x := normal(rng, 1, 2, 3, 4)),
                    "scale_factor_height": f32(2),
                    "scale_factor_width": f32(3),
                },
                F.interpolate(T(x), scale_factor=(2, 3), mode="nearest"),
            )
        )
    ],
}
