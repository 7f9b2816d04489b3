"""Holds a compressed package against the one it was made from: the same program, its weights rounded.

In: two packages. Out: the largest rounding, or a ParityError that names the weight or operation. Not here:
running a chain (`coreml_gate.py`).

What small weights cost in answers is for the evaluation to judge, so a gate on logits would have to be loose.
This one is narrow: step by step the operations are the same and take the same values, except for weights,
whose rounding is that of their scheme. A matrix in another order is off by more than its own size.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from export import coreml_package
from runtime import mil_ops
from runtime.errors import ParityError
from runtime.mil_evaluate import Stored
from runtime.mil_program import Argument, Array, Blob, Function, Operation, Ref
from runtime.mil_weights import Store, WeightFiles

WEIGHT_RMS = {"fp32": 0.0, "fp16": 0.0, "int8": 0.06, "int4": 0.25, "pal8": 0.06, "pal6": 0.12, "pal4": 0.25}
"""Root mean square of a weight's rounding over its own. Normal weights: int8 0.007, int4 by blocks of 32
0.09, of 128 0.12, palettes of 4 bits 0.1; outliers make it more, another weight gives 1.4."""


def same_but_rounded(plain: Path, rounded: Path) -> float:
    """The largest rounding of a weight, rms over rms, over all functions. Raises ParityError."""
    left, right = (coreml_package.functions(path) for path in (plain, rounded))
    if set(left) != set(right):
        raise ParityError(f"gate: {rounded.name} has functions {sorted(right)}, not {sorted(left)}")
    checks = [
        _Comparison(f"{rounded.name}: {name}", _Side(plain, left[name]), _Side(rounded, right[name]))
        for name in left
    ]
    return max(check.run() for check in checks)


class _Side:
    """A function's steps, its constants apart."""

    def __init__(self, package: Path, function: Function) -> None:
        self.function = function
        self.stored = Stored(WeightFiles(package / coreml_package.MODEL), Store(0))
        self.steps: list[Operation] = []
        for operation in function.operations:
            if operation.type == "const" or operation.type in mil_ops.CONSTEXPRS:
                self.stored.add(operation)
            else:
                self.steps.append(operation)
        self.schemes = {
            operation.outputs[0][0]: weight.scheme
            for operation in function.operations
            if (weight := coreml_package.weight_of(operation)) is not None
        }

    def constant(self, argument: Argument) -> Array | str | None:
        """The value of what is no result of a step."""
        if not isinstance(argument, Ref):
            return None if isinstance(argument, Blob) else argument
        return self.stored.packed(argument.name) if argument.name in self.stored else None


class _Comparison:
    def __init__(self, where: str, plain: _Side, rounded: _Side) -> None:
        self.where, self.plain, self.rounded = where, plain, rounded
        self.names = {name: name for name in plain.function.inputs}  # of a result: what the other calls it
        self.seen: dict[tuple[str, str], float] = {}

    def run(self) -> float:
        """Walk both programs side by side."""
        if self.plain.function.inputs != self.rounded.function.inputs:
            raise ParityError(f"gate: {self.where}: other inputs or states than before compression")
        if len(self.plain.steps) != len(self.rounded.steps):
            raise ParityError(
                f"gate: {self.where}: {len(self.rounded.steps)} steps, {len(self.plain.steps)} before"
            )
        worst = 0.0
        for before, after in zip(self.plain.steps, self.rounded.steps, strict=True):
            for error in self._step(before, after):
                worst = max(worst, error)
        wanted = [self.names.get(name) for name in self.plain.function.outputs]
        if wanted != list(self.rounded.function.outputs):
            raise ParityError(f"gate: {self.where}: other outputs than before compression")
        return worst

    def _step(self, before: Operation, after: Operation) -> Iterator[float]:
        kinds = [[kind for _, kind in operation.outputs] for operation in (before, after)]
        if before.type != after.type or set(before.inputs) != set(after.inputs) or kinds[0] != kinds[1]:
            raise ParityError(f"gate: {self.where}: {after.type} {after.name!r} stands for {before.type}")
        for parameter, values in before.inputs.items():
            others = after.inputs[parameter]
            if len(values) != len(others):
                raise ParityError(f"gate: {self.where}: {after.name!r} takes other {parameter}")
            for value, other in zip(values, others, strict=True):
                yield self._argument(value, other, f"{after.name!r} {parameter}")
        for (name, _), (other_name, _) in zip(before.outputs, after.outputs, strict=True):
            self.names[name] = other_name

    def _argument(self, value: Argument, other: Argument, place: str) -> float:
        """The rounding of an argument; 0 for what is no weight."""
        names = tuple(each.name if isinstance(each, Ref) else "" for each in (value, other))
        if all(names) and names[0] in self.names:
            if self.names[names[0]] != names[1]:
                raise ParityError(f"gate: {self.where}: {place} is {names[1]}, another result than before")
            return 0.0
        key = (names[0], names[1])
        if all(names) and key in self.seen:
            return self.seen[key]
        error = self._rounding(self.plain.constant(value), self.rounded.constant(other), names[1], place)
        self.seen[key] = error
        return error

    def _rounding(
        self, before: Array | str | None, after: Array | str | None, name: str, place: str
    ) -> float:
        if isinstance(before, str) or isinstance(after, str) or before is None or after is None:
            if before is None or not isinstance(after, type(before)) or before != after:
                raise ParityError(f"gate: {self.where}: {place} is another value than before compression")
            return 0.0
        if before.shape != after.shape:
            raise ParityError(f"gate: {self.where}: {place} has the shape {list(after.shape)}")
        scheme = self.rounded.schemes.get(name, "")
        if np.array_equal(before, after):
            return 0.0
        error = rms_error(before, after)
        if not error <= WEIGHT_RMS.get(scheme, 0.0):
            raise ParityError(
                f"gate: {self.where}: weight {name or place} is {error:.3g} off the checkpoint's, rms over "
                f"rms, at most {WEIGHT_RMS.get(scheme, 0.0):.3g} allowed for {scheme or 'no weight'}; "
                "no bundle was written"
            )
        return error


def rms_error(before: Array, after: Array) -> float:
    """rms of the difference over rms of `before`, in float64; infinite with a NaN."""
    left, right = before.astype(np.float64), after.astype(np.float64)
    size = float(np.sqrt(np.mean(left**2)))
    found = float(np.sqrt(np.mean((left - right) ** 2))) / max(size, 1e-30)
    return float("inf") if np.isnan(found) else found
