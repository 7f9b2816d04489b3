"""The way to Core ML's own API, with the evaluator standing in for the API.

It proves the plumbing alone: which packages, functions and compute units are asked for, what is fed, and how
the state is kept. Core ML has never run here.
"""

from __future__ import annotations

import enum
import platform
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import bundle, coreml_engine
from runtime.coreml_session import CoremlBackend
from runtime.errors import BundleError
from runtime.mil import Program
from runtime.providers import RunSettings
from tests.runtime import coreml_bundle as by_hand
from tests.runtime.test_coreml_session import conv_wanted, places, text, wanted

OPENED: list[tuple[str, str, str | None]] = []


class State:
    """coremltools' MLState, as far as it is used."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def read_state(self, name: str) -> Any:
        return self.values[name].astype(np.float16)

    def write_state(self, name: str, value: Any) -> None:
        assert value.dtype == np.float16
        self.values[name][...] = value


class Model:
    """coremltools' MLModel: a package, compute units, one function."""

    def __init__(self, model: str, *, compute_units: Any, function_name: str | None = None) -> None:
        assert isinstance(model, str)
        OPENED.append((Path(model).name, compute_units.name, function_name))
        if compute_units.name == "CPU_AND_GPU":
            raise RuntimeError("Error compiling model: out of luck")
        self._program, self._function = Program.open(model), function_name

    def make_state(self) -> State:
        return State(self._program.new_state())

    def predict(self, data: Mapping[str, Any], state: State | None = None) -> dict[str, Any]:
        for name, kind in self._program.inputs(self._function).items():
            assert data[name].dtype == kind.numpy, name
        held = None if state is None else state.values
        return self._program.run(data, function=self._function, state=held)


@pytest.fixture
def macos(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    units = enum.Enum("ComputeUnit", coreml_engine.UNITS)
    standin: Any = types.ModuleType("coremltools")
    standin.ComputeUnit, standin.models = units, types.SimpleNamespace(MLModel=Model)
    monkeypatch.setitem(sys.modules, "coremltools", standin)
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    OPENED.clear()
    yield


def made(tiny_bundle: Path, path: Path, *, conv: bool = False) -> Path:
    return by_hand.write_bundle(tiny_bundle, path / "by-hand", conv=conv)


def opened(path: Path, *providers: str) -> CoremlBackend:
    return CoremlBackend(path, bundle.read(path), RunSettings(providers=providers))


@pytest.mark.usefixtures("macos")
def test_core_ml_is_asked_for_each_function(tiny_bundle: Path, tmp_path: Path) -> None:
    backend = opened(made(tiny_bundle, tmp_path), "CoreMLExecutionProvider", "CPU_AND_NE", "ALL")
    assert OPENED == [
        ("vision_encoder.mlpackage", "CPU_AND_NE", None),
        ("embed_tokens.mlpackage", "CPU_AND_NE", "prefill"),
        ("embed_tokens.mlpackage", "CPU_AND_NE", "decode"),
        ("decoder.mlpackage", "CPU_AND_NE", "prefill"),
        ("decoder.mlpackage", "CPU_AND_NE", "decode"),
    ]
    reports = {report.name: report for report in backend.providers}
    assert reports["CPU_AND_NE"].roles == ("vision_encoder", "embed_tokens", "decoder")
    assert reports["ALL"].reason == "CPU_AND_NE comes first"
    assert "is no compute unit" in reports["CoreMLExecutionProvider"].reason
    assert "evaluator" not in reports
    ids = text(11)
    np.testing.assert_array_equal(backend.extend(ids, places(0, 11), ()), wanted(ids))
    backend.rewind(5)
    np.testing.assert_array_equal(backend.extend(ids[5:9], places(5, 4), ()), wanted(ids[:9]))


@pytest.mark.usefixtures("macos")
def test_its_states_are_kept_and_put_back(tiny_bundle: Path, tmp_path: Path) -> None:
    backend = opened(made(tiny_bundle, tmp_path, conv=True))
    assert {unit for _, unit, _ in OPENED} == {"ALL"}
    ids = text(9)
    backend.extend(ids[:5], places(0, 5), ())
    backend.mark()
    backend.extend(ids[5:], places(5, 4), ())
    assert backend.rewind(7) == 5
    np.testing.assert_array_equal(backend.extend(ids[5:8], places(5, 3), ()), conv_wanted(ids[:8]))
    assert backend.rewind(0) == 0
    np.testing.assert_array_equal(backend.extend(ids, places(0, 9), ()), conv_wanted(ids))


@pytest.mark.usefixtures("macos")
def test_the_evaluator_may_be_asked_for(tiny_bundle: Path, tmp_path: Path) -> None:
    backend = opened(made(tiny_bundle, tmp_path), "evaluator", "ALL")
    assert OPENED == []
    reasons = {report.name: report.reason for report in backend.providers}
    assert reasons["ALL"] == "the evaluator comes first"


@pytest.mark.usefixtures("macos")
def test_what_core_ml_says_is_one_line(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="Core ML cannot open main: Error compiling model: out of luck"):
        opened(made(tiny_bundle, tmp_path), "CPU_AND_GPU")


@pytest.mark.usefixtures("macos")
def test_without_coremltools_the_evaluator_says_what_to_install(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "coremltools", None)
    backend = opened(made(tiny_bundle, tmp_path), "ALL")
    assert "pip install 'pocketvlm[coreml]'" in backend.providers[0].reason
    assert backend.providers[1].name == "evaluator"
