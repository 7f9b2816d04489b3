"""Opens ONNX parts with the execution providers one would like, and says why one was skipped.

In: a bundle directory, its parts, `RunSettings`. Out: onnxruntime sessions and `ProviderReport`s.
Not here: running a part (`runtime/onnx_session.py`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime import bundle
from runtime.errors import BundleError, InputError, MissingExtra
from runtime.manifest import Part
from runtime.threads import default_threads

CPU = "CPUExecutionProvider"
EVALUATOR = "evaluator"
"""What runs the parts of a Core ML bundle where Core ML is not; its times and memory are no device's."""
DEVICES = {
    "CUDAExecutionProvider": "cuda",
    "TensorrtExecutionProvider": "cuda",
    "NvTensorRTRTXExecutionProvider": "cuda",
    "ROCMExecutionProvider": "cuda",
}
"""Where a provider wants the state to lie; elsewhere it is the CPU's memory."""

ORT_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


@dataclass(frozen=True)
class RunSettings:
    """How a bundle is run. `threads` inside a node (default: physical cores), `inter_threads` over nodes.

    `spin`: waiting threads spin (None: as is best for the backend). `providers`: the preferred one first; the
    CPU is always the last resort.
    """

    threads: int | None = None
    inter_threads: int = 1
    spin: bool | None = None
    providers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("threads", "inter_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}: got {value}, expected 1 or more")


@dataclass(frozen=True)
class ProviderReport:
    """A provider that was asked for: the roles of the parts it got, and why it got none or not all."""

    name: str
    roles: tuple[str, ...]
    reason: str = ""

    @property
    def used(self) -> bool:
        return bool(self.roles)

    def line(self) -> str:
        """For people."""
        got = f"runs {', '.join(self.roles)}" if self.used else "skipped"
        return f"{self.name}: {got}" + (f" ({self.reason})" if self.reason else "")


class PartOpener:
    """Opens one part after the other, and remembers what became of each provider."""

    def __init__(self, settings: RunSettings) -> None:
        self.ort = import_onnxruntime()
        self._options = _session_options(self.ort, settings)
        available = set(self.ort.get_available_providers())
        asked = [name for name in dict.fromkeys(settings.providers) if name != CPU]
        self._wanted = [name for name in asked if name in available]
        self._order = [*asked, CPU]
        self._roles: dict[str, list[str]] = {name: [] for name in self._order}
        self._reasons: dict[str, list[str]] = {
            name: [_absent(self.ort, name)] for name in asked if name not in available
        }

    def open(self, directory: Path, part: Part) -> Any:
        """An InferenceSession of a part whose inputs and outputs are those of the manifest."""
        path, where = bundle.locate(directory, part.path), f"{directory.name}/{part.path}"
        session, wanted = None, list(self._wanted)
        needed = part.onnx.min_onnxruntime if part.onnx else None
        old = needed is not None and release(self.ort.__version__) < release(needed)
        while session is None:
            if old and not wanted:  # what the CPU needs; some open and fail at the first step
                raise BundleError(
                    f"{where}: wanted onnxruntime {needed} or newer, here is {self.ort.__version__}; "
                    "update it, or take a bundle of another precision (docs/quantization.md)"
                )
            try:
                session = self.ort.InferenceSession(
                    str(path), self._options, providers=[*wanted, CPU], enable_fallback=0
                )
            except Exception as error:  # onnxruntime has a class for each status
                first_line = (str(error).splitlines() or [type(error).__name__])[0]
                if not wanted:
                    raise BundleError(
                        f"{where}: onnxruntime {self.ort.__version__} cannot open it ({first_line}); "
                        "re-export"
                    ) from error
                culprit = next((name for name in wanted if name in str(error)), wanted[0])
                wanted.remove(culprit)
                self._skip(culprit, part.role, first_line)
        self._note(session.get_providers(), wanted, part.role)
        _check_borders(session, part, where)
        return session

    def reports(self) -> tuple[ProviderReport, ...]:
        """One for every provider that was asked for, and the CPU."""
        return tuple(
            ProviderReport(name, tuple(self._roles[name]), "; ".join(self._reasons.get(name, ())))
            for name in self._order
        )

    def device(self, session: Any) -> str:
        """Where the state of an opened part should lie."""
        return next((DEVICES[name] for name in session.get_providers() if name in DEVICES), "cpu")

    def _note(self, active: Sequence[str], wanted: Sequence[str], role: str) -> None:
        for name in wanted:
            if name in active:
                self._roles[name].append(role)
            else:
                self._skip(name, role, "could not be initialised, onnxruntime does not say why")
        if not any(name in active for name in wanted):
            self._roles[CPU].append(role)

    def _skip(self, name: str, role: str, reason: str) -> None:
        self._reasons.setdefault(name, []).append(f"{role}: {reason}")


def release(version: str) -> tuple[int, int]:
    """(1, 23) of `1.23.2`, `1.23`, `1.23.0+cu126`."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _absent(ort: Any, name: str) -> str:
    """Why a provider that is not there is not: left out of this build, or no name that onnxruntime knows."""
    known = ort.get_all_providers()
    if name in known:
        return f"not in this build of onnxruntime {ort.__version__}"
    near = [each for each in known if each.lower().startswith(name.lower())]
    near = near or difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"onnxruntime {ort.__version__} knows no provider of this name{hint}"


def import_onnxruntime() -> Any:
    """The package, or MissingExtra with the command that installs it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra("onnxruntime", "onnx") from error
    return onnxruntime


def _session_options(ort: Any, settings: RunSettings) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.threads or default_threads()
    options.inter_op_num_threads = settings.inter_threads
    if settings.inter_threads > 1:
        options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    options.log_severity_level = 3  # errors only; they are raised as well
    spin = "0" if settings.spin is False else "1"
    for scope in ("intra", "inter"):
        options.add_session_config_entry(f"session.{scope}_op.allow_spinning", spin)
    return options


def _check_borders(session: Any, part: Part, where: str) -> None:
    for kind, wanted, found in (
        ("input", part.inputs, session.get_inputs()),
        ("output", part.outputs, session.get_outputs()),
    ):
        manifest_types = {spec.name: spec.dtype for spec in wanted}
        graph_types = {spec.name: ORT_TYPES.get(spec.type, spec.type) for spec in found}
        if manifest_types != graph_types:
            raise BundleError(
                f"{where}: {kind}s are {graph_types}, the manifest says {manifest_types}; re-export"
            )
