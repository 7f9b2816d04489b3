"""The Node program that says what the JavaScript reader makes of pictures, texts and bundles."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

from export import browser_package

NODE = shutil.which("node")
PROGRAM = Path(__file__).parent / "browser" / "probe.mjs"


def modules() -> Path | None:
    """The directory of POCKETVLM_NODE_MODULES, if onnxruntime-web is in it."""
    given = os.environ.get("POCKETVLM_NODE_MODULES")
    if given is None or not (Path(given) / "onnxruntime-web").is_dir():
        return None
    return Path(given).resolve()


class Probe:
    """One process; `ask` sends a request and waits for its answer."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [str(NODE), str(PROGRAM), str(browser_package.SOURCE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def ask(self, what: str, **request: Any) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        values = {key: str(value) if isinstance(value, Path) else value for key, value in request.items()}
        self._process.stdin.write(json.dumps({"what": what, **values}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the probe ended"
        found: dict[str, Any] = json.loads(line)
        return found

    def right(self, what: str, **request: Any) -> dict[str, Any]:
        """An answer that is no error."""
        found = self.ask(what, **request)
        assert "error" not in found, found["error"]
        return found

    def wrong(self, what: str, **request: Any) -> str:
        """The line of an error that the reader means."""
        found = self.ask(what, **request)
        assert found.get("isOurs"), found
        return str(found["error"])

    def __enter__(self) -> Probe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)
