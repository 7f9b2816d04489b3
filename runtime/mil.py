"""Opens a Core ML package (`.mlpackage`) anywhere and evaluates its ML program with numpy.

In: a package on disk, inputs. Out: outputs; states that runs change. Not here: Core ML itself, device speed,
how much a device rounds inside of an operation. What Core ML accepts is not checked either: only what is read
here is. Neither coremltools nor the code that writes packages takes part.

    program = Program.open("decoder.mlpackage")
    state = program.new_state()
    logits = program.run({"inputs_embeds": embeds, ...}, function="decode", state=state)["logits"]
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from runtime.errors import BundleError
from runtime.mil_evaluate import Evaluator, States
from runtime.mil_program import Array, Model, TensorType, parse
from runtime.mil_weights import Store, WeightFiles
from runtime.mil_wire import WireError

NUMERICS_ONLY = "evaluated with numpy: numerics only, not device speed"
"""What every figure that comes from here must say."""

_MODEL_BYTES = 1 << 30  # a program without its weights is a few megabytes


class Program:
    """The functions of one package, over one set of weights."""

    def __init__(self, where: str, model: Model, weights: WeightFiles, store: Store, rounded: bool) -> None:
        self.default = model.default
        self.specification = model.specification
        self._where = where
        self._evaluators = {
            name: Evaluator(where, function, weights, store, rounded=rounded)
            for name, function in model.functions.items()
        }

    @classmethod
    def open(cls, path: Path | str, *, rounded: bool = True, store: Store | None = None) -> Program:
        """Read a package and check that every operation in it is known.

        `rounded`: round what is declared as float16 to it after each operation; else compute in float32.
        `store`: where expanded weights are kept, 2 GiB of them by default; programs may share one.
        Raises BundleError when it is damaged, no ML program, or has an operation that is not known.
        """
        package = Path(path)
        model, weights = _read(package)
        try:
            return cls(package.name, model, weights, store or Store(), rounded)
        except ValueError as error:
            raise BundleError(f"{package.name}: {error}; re-export") from error

    @property
    def functions(self) -> tuple[str, ...]:
        return tuple(self._evaluators)

    def inputs(self, function: str | None = None) -> dict[str, TensorType]:
        """What a function takes beside its states."""
        return self._evaluator(function).inputs

    def outputs(self, function: str | None = None) -> dict[str, TensorType]:
        return self._evaluator(function).outputs

    def states(self) -> dict[str, TensorType]:
        """The states of all functions, which share them by name."""
        found: dict[str, TensorType] = {}
        for evaluator in self._evaluators.values():
            for name, kind in evaluator.states.items():
                if found.setdefault(name, kind) != kind:
                    raise BundleError(f"{self._where}: state {name} is {kind} and {found[name]}; re-export")
        return found

    def new_state(self) -> States:
        """Zeros for every state; a run changes them. float16 ones are held as float32 arrays."""
        return {name: zeros(kind) for name, kind in self.states().items()}

    def run(
        self, inputs: Mapping[str, Array], *, function: str | None = None, state: States | None = None
    ) -> dict[str, Array]:
        """Outputs by name, float16 ones as float32, for all inputs of a function (the default one).

        Raises BundleError when inputs are not what the function declares, or when an operation fails, whose
        type and name the message has.
        """
        return self._evaluator(function).run(inputs, {} if state is None else state)

    def _evaluator(self, function: str | None) -> Evaluator:
        name = self.default if function is None else function
        if name not in self._evaluators:
            raise BundleError(f"{self._where}: has no function {name}, only {', '.join(self.functions)}")
        return self._evaluators[name]


def signatures(path: Path | str) -> dict[str, dict[str, TensorType]]:
    """The inputs of each function of a package, states left out, whether or not it can be evaluated here."""
    model, _ = _read(Path(path))
    return {
        name: {key: kind for key, kind in function.inputs.items() if not kind.is_state}
        for name, function in model.functions.items()
    }


def zeros(kind: TensorType) -> Array:
    """An array for values of a type, as the evaluator holds them."""
    sizes = [size for size in kind.shape if size is not None]
    if len(sizes) != len(kind.shape):
        raise BundleError(f"a state has the moving shape {kind}; re-export")
    try:
        return np.zeros(sizes, np.float32 if kind.dtype == "float16" else kind.numpy)
    except (MemoryError, ValueError) as error:
        raise BundleError(f"a state of {kind} does not fit into memory; re-export") from error


def _read(package: Path) -> tuple[Model, WeightFiles]:
    path = _model_path(package)
    try:
        if path.stat().st_size > _MODEL_BYTES:
            raise WireError("is far larger than a program without its weights")
        return parse(path.read_bytes()), WeightFiles(path)
    except (OSError, ValueError) as error:
        raise BundleError(f"{package.name}: {path.name}: {error}; re-export") from error


def _model_path(package: Path) -> Path:
    """The model file that a package's Manifest.json names."""
    path = package / "Manifest.json"
    try:
        manifest: Any = json.loads(path.read_text(encoding="utf-8"))
        item = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
        pure = PurePosixPath(item)
    except (OSError, ValueError, LookupError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise BundleError(f"{package.name}: Manifest.json names no model ({problem}); re-export") from error
    if pure.is_absolute() or ".." in pure.parts:
        raise BundleError(f"{package.name}: {item} leads out of the package; re-export")
    found = package / "Data" / pure
    if not found.is_file():
        raise BundleError(f"{package.name}: Data/{item} is missing; re-export")
    return found
