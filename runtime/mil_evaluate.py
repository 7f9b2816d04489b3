"""Evaluates one function of an ML program with numpy, operation by operation.

In: a `Function`, weights, inputs, states. Out: its outputs. Not here: packages (`runtime/mil.py`), the
operations themselves (`runtime/mil_ops.py`).

Floats are computed in float32. With `rounded`, what an operation declares as float16 is rounded to it, as on
a device that keeps float16 between operations; how a device adds up inside of one is not known here. Without
it only the weights are as the program stores them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np

from runtime import mil_ops
from runtime.errors import BundleError
from runtime.mil_ops_shape import put, slices
from runtime.mil_program import Argument, Array, Blob, Constant, Function, Operation, Ref, TensorType
from runtime.mil_weights import Store, WeightFiles
from runtime.mil_wire import WireError

States = dict[str, Array]

_FAULTS = (ArithmeticError, LookupError, MemoryError, RecursionError, TypeError, ValueError)
"""What numpy and a damaged program raise."""


class Stored:
    """A constant of the program, expanded when it is needed."""

    def __init__(self, weights: WeightFiles, store: Store) -> None:
        self._weights, self._store = weights, store
        self._made: dict[str, tuple[Operation, int]] = {}  # name to the operation that gives it
        self._inline: dict[str, Array | str] = {}  # values that stand in the program itself, as they are used
        self._keys: dict[str, Hashable] = {}

    def add(self, operation: Operation) -> None:
        """Take note of an operation that gives constants."""
        for place, (name, _) in enumerate(operation.outputs):
            self._made[name] = (operation, place)
            value = operation.attributes.get("val")
            if operation.type == "const" and value is not None and not isinstance(value, Blob):
                half = not isinstance(value, str) and value.dtype == np.float16
                self._inline[name] = np.asarray(value, np.float32) if half else value

    def __contains__(self, name: object) -> bool:
        return name in self._made

    def _origin(self, name: str) -> tuple[Operation, int]:
        if name not in self._made:
            raise ValueError(f"nothing gives {name!r}")
        return self._made[name]

    def packed(self, name: str) -> Array | str:
        """As it is stored; float16 of the weight file stays float16, what is compressed is made dense."""
        if name in self._inline:
            return self._inline[name]
        operation, place = self._origin(name)
        if operation.type == "const":
            return self._constant(operation.attributes["val"])
        dtype = operation.outputs[place][1].dtype
        return self._store.get(("packed", self._key(name)), lambda: self._expand(operation, place, dtype))

    def dense(self, name: str) -> Array | str:
        """Floats as float32."""
        if name in self._inline:
            return self._inline[name]
        operation, place = self._origin(name)
        if operation.outputs[place][1].dtype != "float16":
            return self.packed(name)
        return self._store.get(("dense", self._key(name)), lambda: self._widened(operation, place, name))

    def _widened(self, operation: Operation, place: int, name: str) -> Array:
        if operation.type == "const":
            return np.asarray(self.packed(name)).astype(np.float32)
        return self._expand(operation, place, "float16").astype(np.float32)

    def _expand(self, operation: Operation, place: int, dtype: str) -> Array:
        """What a constexpr gives, in the declared type."""
        given: dict[str, Any] = {name: self._constant(value) for name, value in operation.attributes.items()}
        for parameter, (argument, *_) in operation.inputs.items():
            given[parameter] = (
                self._inner(argument.name) if isinstance(argument, Ref) else self._constant(argument)
            )
        found = mil_ops.CONSTEXPRS[operation.type](**given)
        each = found[place] if isinstance(found, tuple) else found
        return each.astype(np.dtype("uint8" if dtype == "uint1" else dtype), copy=False)

    def _inner(self, name: str) -> Array | str:
        """What feeds another constexpr alone is not kept."""
        operation, place = self._origin(name)
        if operation.type == "const":
            return self.packed(name)
        return self._expand(operation, place, operation.outputs[place][1].dtype)

    def _constant(self, value: Constant) -> Array | str:
        return self._weights.read(value) if isinstance(value, Blob) else value

    def _key(self, name: str) -> Hashable:
        """Equal for constants of the same bytes, so that functions that share weights share this."""
        if name not in self._keys:
            self._keys[name] = self._new_key(*self._origin(name))
        return self._keys[name]

    def _new_key(self, operation: Operation, place: int) -> Hashable:
        arguments: dict[str, tuple[Argument, ...]] = {
            **{key: (value,) for key, value in operation.attributes.items()},
            **operation.inputs,
        }
        parts = [(key, self._key_of(value)) for key in sorted(arguments) for value in arguments[key]]
        return (operation.type, place, *parts)

    def _key_of(self, value: Argument) -> Hashable:
        if isinstance(value, Ref):
            return self._key(value.name)
        if isinstance(value, Blob):
            return self._weights.key(value)
        return value if isinstance(value, str) else (value.dtype.str, value.shape, value.tobytes())


class Evaluator:
    """One function, ready to run. Raises BundleError for an operation that is not known."""

    def __init__(
        self, where: str, function: Function, weights: WeightFiles, store: Store, *, rounded: bool
    ) -> None:
        self._where, self.function, self._rounded = f"{where}: function {function.name}", function, rounded
        self._stored = Stored(weights, store)
        self._steps: list[Operation] = []
        for operation in function.operations:
            self._check_known(operation)
            if operation.type == "const" or operation.type in mil_ops.CONSTEXPRS:
                self._stored.add(operation)
            else:
                self._steps.append(operation)
        self._last_use = _last_uses(self._steps, function.outputs)
        self._back_to_state = _written_back(self._steps)
        types = {name: kind for operation in function.operations for name, kind in operation.outputs}
        types.update(function.inputs)
        if missing := [name for name in function.outputs if name not in types]:
            raise BundleError(f"{self._where}: nothing gives the output {missing[0]}; re-export")
        self.outputs = {name: types[name] for name in function.outputs}
        self.inputs = {name: kind for name, kind in function.inputs.items() if not kind.is_state}
        self.states = {name: kind for name, kind in function.inputs.items() if kind.is_state}

    def run(self, inputs: Mapping[str, Array], states: States) -> dict[str, Array]:
        """Outputs of one run, float16 ones as float32; `states` are changed."""
        values = self._given(inputs, states)
        with np.errstate(all="ignore"):  # float16 overflows to infinity, as it does on a device
            for number, operation in enumerate(self._steps):
                self._step(number, operation, values, states)
                for name in _used(operation):
                    if self._last_use.get(name) == number:
                        values.pop(name, None)
        try:
            return {name: np.array(self._value(Ref(name), values, False)) for name in self.outputs}
        except _FAULTS as error:
            raise BundleError(f"{self._where}, outputs: {error}; re-export") from error

    def _step(self, number: int, operation: Operation, values: dict[str, Array], states: States) -> None:
        try:
            results = self._results(number, operation, values, states)
            if len(results) < len(operation.outputs):
                raise ValueError(f"gave {len(results)} results, {len(operation.outputs)} are declared")
            for (name, kind), result in zip(operation.outputs, results, strict=False):
                values[name] = self._settled(result, kind, operation.type)
        except BundleError:
            raise
        except _FAULTS as error:
            where = f"{self._where}, {operation.type} {operation.name!r}"
            raise BundleError(f"{where}: {error}; re-export") from error

    def _results(
        self, number: int, operation: Operation, values: dict[str, Array], states: States
    ) -> tuple[Array, ...]:
        if operation.type == "read_state":
            return (states[_only_ref(operation, "input")],)
        if operation.type == "write_state":
            name, data = _only_ref(operation, "input"), self._argument(operation, "data", values)
            if data is not states[name]:
                # what was read before stays as it was: a new buffer, not new values in the old one
                states[name] = np.array(data, states[name].dtype).reshape(states[name].shape)
            return ()
        given = {name: self._argument(operation, name, values) for name in operation.inputs}
        if operation.type == "slice_update" and self._in_place(number, operation, given, values, states):
            return (given["x"],)
        found = mil_ops.OPS[operation.type](**given)
        return found if isinstance(found, tuple) else (found,)

    def _argument(self, operation: Operation, parameter: str, values: dict[str, Array]) -> Any:
        arguments = operation.inputs[parameter]
        packed = (operation.type, parameter) in mil_ops.MAY_STAY_PACKED
        if parameter in mil_ops.LISTS:
            return [self._value(argument, values, packed) for argument in arguments]
        (argument,) = arguments
        return self._value(argument, values, packed)

    def _value(self, argument: Argument, values: dict[str, Array], packed: bool) -> Any:
        if isinstance(argument, Ref):
            if argument.name in values:
                return values[argument.name]
            return self._stored.packed(argument.name) if packed else self._stored.dense(argument.name)
        if isinstance(argument, Blob):
            raise WireError("a weight stands where a name should")
        return argument

    def _in_place(
        self,
        number: int,
        operation: Operation,
        given: dict[str, Any],
        values: dict[str, Array],
        states: States,
    ) -> bool:
        """Update a state's own buffer where nobody could tell: it is written back and no one else looks.

        Whoever is used later (x itself among them) must not lie in the part that changes.
        """
        state = self._back_to_state.get(number)
        if state is None or given["x"] is not states.get(state):
            return False
        x, update = given.pop("x"), given.pop("update")
        index = slices(x, **given)
        target = x[index]
        later = (held for name, held in values.items() if self._last_use.get(name, -1) > number)
        free = not any(np.may_share_memory(held, target) for held in later)
        if free:
            put(x, update, index)
        given["x"], given["update"] = x, update
        return free

    def _settled(self, result: Any, kind: TensorType, operation: str) -> Array:
        """A result in the declared type and shape."""
        array = np.asarray(result)
        if kind.dtype == "float16":
            array = array.astype(np.float32, copy=False)
            if self._rounded and operation not in mil_ops.MOVES:
                array = array.astype(np.float16).astype(np.float32)
        else:
            array = array.astype(kind.numpy, copy=False)
        _check_shape(array, kind)
        return array

    def _given(self, inputs: Mapping[str, Array], states: States) -> dict[str, Array]:
        """Inputs in their types; what is missing, too much or of another shape is refused."""
        if set(inputs) != set(self.inputs):
            wanted = ", ".join(sorted(self.inputs))
            raise BundleError(f"{self._where}: takes {wanted}; got {', '.join(sorted(inputs)) or 'nothing'}")
        if missing := [name for name in self.states if name not in states]:
            raise BundleError(f"{self._where}: has the state {missing[0]}; give one from new_state()")
        found = {}
        for name, kind in self.inputs.items():
            array = np.asarray(inputs[name])
            if (array.dtype.kind == "f") != kind.dtype.startswith("float"):
                raise BundleError(f"{self._where}: input {name} is {kind.dtype}, got {array.dtype}")
            try:
                _check_shape(array, kind)
                array = array.astype(kind.numpy) if self._rounded or kind.dtype != "float16" else array
            except ValueError as error:
                raise BundleError(f"{self._where}: input {name} {error}") from None
            found[name] = array.astype(np.float32) if kind.dtype == "float16" else array
        return found

    def _check_known(self, operation: Operation) -> None:
        if mil_ops.unknown(operation.type) or operation.blocks:
            raise BundleError(
                f"{self._where}: operation {operation.type} ({operation.name!r}) is not known to this "
                "runtime; update pocketvlm"
            )


def _check_shape(array: Array, kind: TensorType) -> None:
    sizes = kind.shape
    if array.ndim != len(sizes) or any(
        want not in (None, got) for want, got in zip(sizes, array.shape, strict=True)
    ):
        raise ValueError(f"has the shape {list(array.shape)}, declared is {kind}")


def _used(operation: Operation) -> list[str]:
    """Names that an operation takes or gives."""
    taken = [each.name for values in operation.inputs.values() for each in values if isinstance(each, Ref)]
    return taken + [name for name, _ in operation.outputs]


def _last_uses(steps: list[Operation], outputs: tuple[str, ...]) -> dict[str, int]:
    """The number of the last step that uses a name; outputs are used after all of them."""
    found = {name: number for number, operation in enumerate(steps) for name in _used(operation)}
    found.update({name: len(steps) for name in outputs})
    return found


def _written_back(steps: list[Operation]) -> dict[int, str]:
    """Of each slice_update whose result becomes a state, before anyone reads that state: the state."""
    found: dict[int, str] = {}
    pending: dict[str, int] = {}  # result of a slice_update to its step
    since: dict[str, int] = {}  # state to the step that touched it last
    for number, operation in enumerate(steps):
        if operation.type == "slice_update":
            pending.update({name: number for name, _ in operation.outputs})
        elif operation.type == "read_state":
            since[_only_ref(operation, "input")] = number
        elif operation.type == "write_state":
            state = _only_ref(operation, "input")
            data = next(iter(operation.inputs.get("data", ())), None)
            update = pending.get(data.name) if isinstance(data, Ref) else None
            if update is not None and since.get(state, -1) < update:
                found[update] = state
            since[state] = number
    return found


def _only_ref(operation: Operation, parameter: str) -> str:
    match operation.inputs.get(parameter):
        case (Ref(name),):
            return name
    raise WireError(f"{operation.type} {operation.name!r}: {parameter} must be one name")
