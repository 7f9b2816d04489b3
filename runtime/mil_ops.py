"""Every operation of ML programs that this runtime evaluates, by its name in the program.

In: nothing. Out: tables of functions whose parameters are called as coremltools calls them.
Not here: constants, states (`runtime/mil_evaluate.py`), which are no functions of values.
"""

from __future__ import annotations

from runtime import mil_ops_constexpr, mil_ops_math, mil_ops_nn, mil_ops_shape
from runtime.mil_ops_math import Op

OPS: dict[str, Op] = {**mil_ops_math.OPS, **mil_ops_nn.OPS, **mil_ops_shape.OPS}
"""Functions of values; floats come as float32."""

CONSTEXPRS: dict[str, Op] = mil_ops_constexpr.OPS
"""Functions of stored constants, as they are stored."""

STATEFUL = ("const", "read_state", "write_state")
"""What the evaluator does itself."""

MOVES = frozenset(
    {
        *("band_part", "concat", "depth_to_space", "expand_dims", "flatten2d", "gather", "gather_along_axis"),
        *("gather_nd", "identity", "pad", "pixel_shuffle", "pixel_unshuffle", "read_state", "reshape"),
        *("reverse", "select", "slice_by_index", "slice_by_size", "slice_update", "space_to_depth", "split"),
        *("squeeze", "stack", "tile", "transpose", "upsample_nearest_neighbor"),
    }
)
"""Operations whose results are values of their inputs: nothing to round."""

LISTS = frozenset({"values"})
"""Parameters that take a list, also of one."""

MAY_STAY_PACKED = frozenset({("gather", "x")})
"""Parameters whose constants are used as they are stored, because a few of their values are taken."""


def unknown(kind: str) -> bool:
    """Whether an operation of a program is none of these."""
    return kind not in OPS and kind not in CONSTEXPRS and kind not in STATEFUL
