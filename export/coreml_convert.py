"""A torch module to a saved `.mlpackage`: conversion by coremltools, functions merged into one package.

In: modules, their inputs and outputs by name, states. Out: packages on disk. Not here: the modules
(`coreml_parts.py`), compression (`coreml_compress.py`), reading a package back (`coreml_package.py`).

Everything is converted from a torch trace, which turns what depends on constants alone into constants. No
example input may be two inputs at once: a trace would take them for one.
"""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from export.coreml_package import MODEL
from runtime import files
from runtime.errors import CheckpointError, MissingExtra

Precision = Literal["float16", "float32"]
ENTRY = "main"
"""What coremltools calls the function of a package with one."""

_DATE = "com.github.apple.coremltools.conversion_date"
TARGET = "iOS18"
"""The first system with states, functions that share weights, and weights of 4 bits by block."""


@dataclass(frozen=True)
class Function:
    """One function of a package before its conversion.

    `example`: inputs by name; their shapes are fixed. `states`: shapes by the names of the module's buffers.
    `scope`: what must hold while the module is traced.
    """

    module: nn.Module
    example: Mapping[str, torch.Tensor]
    outputs: Sequence[str]
    states: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext


def tools() -> Any:
    """The coremltools package, without what it prints. Raises MissingExtra."""
    with quiet():
        try:
            import coremltools
        except ImportError as error:
            raise MissingExtra(error.name or "coremltools", "coreml") from error
    return coremltools


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and warnings of coremltools; errors pass."""
    before = logging.root.manager.disable
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


@contextlib.contextmanager
def unguarded() -> Iterator[None]:
    """Without the steps that coremltools puts before every gather, in case an index counts from the end.

    None does here: ids, positions and places are counted from 0. Each compression would add them once more.
    """
    tools()
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

    guard = type(PASS_REGISTRY["common::guard_negative_gather_indices"])
    before = guard.apply
    guard.apply = lambda *_: None
    try:
        yield
    finally:
        guard.apply = before


def convert(function: Function, where: str, precision: Precision = "float16") -> Any:
    """The function as a coremltools model that is not on disk yet.

    Raises CheckpointError naming `where` and the operation that has no counterpart.
    """
    ct = tools()
    if len({id(tensor) for tensor in function.example.values()}) != len(function.example):
        raise ValueError(f"{where}: one tensor stands for two inputs; the trace would join them")
    floats = np.dtype(precision).type
    half = precision == "float16"
    before = {name: buffer._version for name, buffer in function.module.named_buffers()}
    with quiet(), unguarded(), torch.no_grad(), function.scope():
        try:
            traced = torch.jit.trace(function.module, tuple(function.example.values()), check_trace=False)
            _check_written(function, before, where)
            model = ct.convert(
                traced,
                convert_to="mlprogram",
                minimum_deployment_target=getattr(ct.target, TARGET),
                compute_precision=ct.precision.FLOAT16 if half else ct.precision.FLOAT32,
                inputs=[
                    ct.TensorType(name, shape=tuple(tensor.shape), dtype=_numpy(tensor, floats))
                    for name, tensor in function.example.items()
                ],
                outputs=[ct.TensorType(name, dtype=floats) for name in function.outputs],
                states=[_state(ct, name, shape) for name, shape in function.states.items()] or None,
                skip_model_load=True,
            )
        except (RuntimeError, ValueError, NotImplementedError, TypeError, KeyError) as error:
            first = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise CheckpointError(
                f"{where}: coremltools {ct.__version__} cannot convert it: {first}; use --to onnx or gguf"
            ) from error
    _check(model, function, where)
    return model


def _check_written(function: Function, before: Mapping[str, int], where: str) -> None:
    """A buffer that the module writes to and nobody called a state would become a constant without a word."""
    now = {name: buffer._version for name, buffer in function.module.named_buffers()}
    written = {name for name, version in before.items() if now.get(name) != version}
    if odd := written ^ set(function.states):
        raise CheckpointError(f"{where}: states and what is written differ in {', '.join(sorted(odd))}")


def _check(model: Any, function: Function, where: str) -> None:
    """An input that nothing reads goes without a word."""
    described = model.get_spec().description
    found = described.functions[0] if described.functions else described
    got = {kind: {each.name for each in getattr(found, kind)} for kind in ("input", "output", "state")}
    wanted = {
        "input": set(function.example),
        "output": set(function.outputs),
        "state": set(function.states),
    }
    for kind, names in wanted.items():
        if odd := names ^ got[kind]:
            raise CheckpointError(f"{where}: the program differs in {kind} {', '.join(sorted(odd))}")


def _numpy(tensor: torch.Tensor, floats: Any) -> Any:
    return floats if tensor.is_floating_point() else np.int32


def _state(ct: Any, name: str, shape: tuple[int, ...]) -> Any:
    return ct.StateType(wrapped_type=ct.TensorType(shape=shape, dtype=np.float16), name=name)


def save(model: Any, path: Path) -> Path:
    """Write a model as a package; what was there goes."""
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with quiet():
        model.save(str(path))
    return path


def opened(path: Path) -> Any:
    """A package of one function as a coremltools model that nothing is predicted with."""
    ct = tools()
    with quiet():
        return ct.models.MLModel(str(path), skip_model_load=True)


def merge(functions: Mapping[str, Path], path: Path) -> Path:
    """Packages of one function each as one package; weights that are equal are stored once.

    The first function is the default one. A single function is copied, under the name that it has.
    """
    ct = tools()
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    if list(functions) == [ENTRY]:
        return steady(Path(shutil.copytree(functions[ENTRY], path)))
    descriptor = ct.utils.MultiFunctionDescriptor()
    for name, source in functions.items():
        descriptor.add_function(str(source), src_function_name=ENTRY, target_function_name=name)
    descriptor.default_function_name = next(iter(functions))
    with quiet():
        ct.utils.save_multifunction(descriptor, str(path))
    return steady(path)


def steady(package: Path) -> Path:
    """Without what differs from one export to the next: the date, random identifiers, the order of maps."""
    ct = tools()
    model = package / MODEL
    spec = ct.utils.load_spec(str(model))
    spec.description.metadata.userDefined.pop(_DATE, None)
    model.write_bytes(spec.SerializeToString(deterministic=True))
    path = package / "Manifest.json"
    content = files.read_json(path)
    items = {
        old: (str(uuid.uuid5(uuid.NAMESPACE_URL, item["path"])).upper(), item)
        for old, item in content["itemInfoEntries"].items()
    }
    files.write_json(
        path,
        {
            **content,
            "itemInfoEntries": dict(sorted(items.values(), key=lambda entry: entry[1]["path"])),
            "rootModelIdentifier": items[content["rootModelIdentifier"]][0],
        },
    )
    return package
