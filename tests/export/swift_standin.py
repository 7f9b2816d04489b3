"""The other end of the stand-in for Core ML (tests/export/swift/CoreML): evaluates packages for Swift.

In: requests from one pipe, a line of JSON and raw little-endian values. Out: answers into another.
Not here: Swift, Core ML. The evaluator is the project's (`runtime/mil.py`).
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from runtime.errors import PocketError
from runtime.mil import Program


class StandIn:
    """A thread that answers until the Swift process closes the pipe; POCKETVLM_STANDIN is `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("to-python", "to-swift"):
            os.mkfifo(directory / name)
        self.calls: list[tuple[str, str | None]] = []
        """(package, function) of each run, in order."""
        self._programs: dict[str, Program] = {}
        self._states: list[dict[str, Any]] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> StandIn:
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        # a Swift process that never came leaves the thread waiting for it: come and go in its place
        if self._thread.is_alive():
            with open(os.open(self.directory / "to-python", os.O_WRONLY | os.O_NONBLOCK), "wb"):  # noqa: PTH123
                pass
        self._thread.join(1)

    def _serve(self) -> None:
        with (
            (self.directory / "to-python").open("rb") as given,
            (self.directory / "to-swift").open("wb") as out,
        ):
            while line := given.readline():
                head = json.loads(line)
                values = {value["name"]: _read(given, value) for value in head["values"]}
                try:
                    answer, arrays = self._answer(head, values)
                except PocketError as error:
                    answer, arrays = {"error": str(error)}, {}
                listed = [
                    {"name": name, "dtype": str(array.dtype), "shape": array.shape, "bytes": array.nbytes}
                    for name, array in arrays.items()
                ]
                out.write(json.dumps({**answer, "values": listed}).encode() + b"\n")
                out.write(b"".join(array.tobytes() for array in arrays.values()))
                out.flush()

    def _answer(self, head: dict[str, Any], values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        function = head.get("function")
        if (path := head["path"]) not in self._programs:
            self._programs[path] = Program.open(path)
        program = self._programs[path]
        if head["what"] == "describe":
            kinds = program.inputs(function)
            return {}, {name: np.zeros(0, kind.numpy) for name, kind in kinds.items()}
        if head["what"] == "state":
            self._states.append(program.new_state())
            return {"state": len(self._states) - 1}, {}
        self.calls.append((Path(path).stem, function))
        state = self._states[head["state"]] if "state" in head else None
        made = program.run(values, function=function, state=state)
        kinds = program.outputs(function)
        return {}, {name: np.ascontiguousarray(array, kinds[name].numpy) for name, array in made.items()}


def _read(given: BinaryIO, value: dict[str, Any]) -> np.ndarray:
    data = given.read(value["bytes"])
    return np.frombuffer(data, value["dtype"]).reshape(value["shape"])
