"""What runs the parts of a Core ML bundle: Core ML itself on macOS, the evaluator anywhere.

In: a bundle directory and its manifest. Out: an `Engine`. Not here: chunks, positions, features
(`runtime/coreml_session.py`).

`Device` needs macOS 15 and coremltools. It has never been run where this project is tested (Linux): only the
evaluator has.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from runtime import bundle, mil
from runtime.errors import BundleError, MissingExtra
from runtime.manifest import Manifest
from runtime.mil_program import Array, TensorType
from runtime.mil_weights import Store
from runtime.providers import EVALUATOR, ProviderReport, RunSettings

UNITS = ("ALL", "CPU_AND_NE", "CPU_AND_GPU", "CPU_ONLY")
"""Core ML's compute units by their names in coremltools; they are asked for as providers are."""

Signature = dict[str, TensorType]


class Engine(Protocol):
    """The functions of three parts, and the state of the decoder's sequence."""

    providers: tuple[ProviderReport, ...]

    def inputs(self, role: str, function: str) -> Signature:
        """What a function of a part takes beside its states."""

    def run(self, role: str, function: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name; the decoder's functions change the states."""

    def clear(self) -> None:
        """Zeros in every state."""

    def read(self, state: str) -> Array:
        """A copy of a state."""

    def write(self, state: str, value: Array) -> None:
        """Put back what `read` gave."""

    def close(self) -> None:
        """Free the models."""


def open_engine(directory: Path, manifest: Manifest, settings: RunSettings) -> Engine:
    """Core ML with the first compute units that were asked for (default: all) where it is there.

    Elsewhere, and where the first provider asked for is `evaluator`, the evaluator; the reports say why.
    """
    asked = tuple(dict.fromkeys(settings.providers))
    reasons = {name: f"is no compute unit; there are {', '.join(UNITS)}" for name in asked}
    known = [name for name in asked if name in UNITS]
    lacking = unavailable()
    if not lacking and asked[:1] != (EVALUATOR,):
        unit = known[0] if known else UNITS[0]
        reasons |= dict.fromkeys(known, f"{unit} comes first")
        return Device(directory, manifest, unit, _skipped(reasons, asked, unit))
    reasons |= dict.fromkeys(known, lacking or "the evaluator comes first")
    return Evaluated(directory, manifest, _skipped(reasons, asked, EVALUATOR))


def _skipped(reasons: Mapping[str, str], asked: tuple[str, ...], used: str) -> tuple[ProviderReport, ...]:
    return tuple(ProviderReport(name, (), reasons[name]) for name in asked if name != used)


def unavailable() -> str:
    """Why Core ML cannot be used here; empty where it can."""
    if platform.system() != "Darwin":
        return "Core ML is part of macOS and iOS alone"
    try:
        import coremltools  # noqa: F401
    except ImportError:
        return str(MissingExtra("coremltools", "coreml"))
    return ""


class Evaluated:
    """The parts in the evaluator, which share what they expand of their weights."""

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        skipped: tuple[ProviderReport, ...] = (),
        *,
        rounded: bool = True,
    ) -> None:
        store = Store()
        self._programs: dict[str, mil.Program] = {
            part.role: mil.Program.open(bundle.locate(directory, part.path), rounded=rounded, store=store)
            for part in manifest.parts
        }
        self._state = self._programs["decoder"].new_state()
        roles = tuple(part.role for part in manifest.parts)
        self.providers = (*skipped, ProviderReport(EVALUATOR, roles, mil.NUMERICS_ONLY))

    def inputs(self, role: str, function: str) -> Signature:
        return self._programs[role].inputs(function)

    def run(self, role: str, function: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        return self._programs[role].run(inputs, function=function, state=self._state)

    def clear(self) -> None:
        for array in self._state.values():
            array.fill(0)

    def read(self, state: str) -> Array:
        return self._state[state].copy()

    def write(self, state: str, value: Array) -> None:
        self._state[state][...] = value

    def close(self) -> None:
        self._programs.clear()
        self._state.clear()


class Device:
    """The parts in Core ML, on the compute units asked for."""

    def __init__(
        self, directory: Path, manifest: Manifest, unit: str, skipped: tuple[ProviderReport, ...] = ()
    ) -> None:
        import coremltools

        assert manifest.coreml is not None
        self._models: dict[tuple[str, str], Any] = {}
        self._signatures: dict[tuple[str, str], Signature] = {}
        for part in manifest.parts:
            path = bundle.locate(directory, part.path)
            signatures = mil.signatures(path)
            for function in manifest.coreml.functions[part.role]:
                key = (part.role, function)
                self._signatures[key] = signatures.get(function, {})
                try:
                    self._models[key] = coremltools.models.MLModel(
                        str(path),
                        compute_units=coremltools.ComputeUnit[unit],
                        function_name=function if len(signatures) > 1 else None,
                    )
                except Exception as error:  # Core ML's own errors come as RuntimeError or Exception
                    raise BundleError(f"{part.path}: Core ML cannot open {function}: {error}") from error
        self._state: Any = None
        self.clear()
        roles = tuple(part.role for part in manifest.parts)
        self.providers = (*skipped, ProviderReport(unit, roles))

    def inputs(self, role: str, function: str) -> Signature:
        return self._signatures[role, function]

    def run(self, role: str, function: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        state = self._state if role == "decoder" else None
        try:
            found = self._models[role, function].predict(dict(inputs), state)
        except Exception as error:  # as above
            raise BundleError(f"{role}: Core ML cannot run {function}: {error}") from error
        return {name: np.asarray(value) for name, value in found.items()}

    def clear(self) -> None:
        self._state = self._models["decoder", "decode"].make_state()

    def read(self, state: str) -> Array:
        return np.array(self._state.read_state(state))

    def write(self, state: str, value: Array) -> None:
        self._state.write_state(state, value)

    def close(self) -> None:
        self._models.clear()
        self._state = None
