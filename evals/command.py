"""What the verbs of the command line share: what must be installed, progress, lists.

In: names of modules, steps. Out: errors that say what to install, lines on stderr. Not here: the verbs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.errors import MissingExtra

MANIFEST_NAME = "manifest.json"
"""As in runtime/bundle.py, which is not imported for it: `--help` is instant."""

PACKAGES = {"llama_cpp": "llama-cpp-python", "yaml": "PyYAML"}
"""What pip calls a module, where that is another name."""


def require(extra: str, modules: Sequence[str]) -> None:
    """Raise MissingExtra for the first module that is not installed; nothing is imported."""
    from importlib.util import find_spec

    for module in modules:
        if find_spec(module) is None:
            raise MissingExtra(PACKAGES.get(module, module.replace("_", "-")), extra)


def listed(given: str | None) -> list[str] | None:
    """The parts of a list with commas."""
    return None if given is None else [part.strip() for part in given.split(",")]


def without_searches(given: Sequence[Path]) -> list[Path]:
    """The paths without what `export --quant auto` keeps beside a bundle, which a shell's `*` names, too.

    NAME.auto is left out where NAME is a bundle and it is none; stderr says so.
    """
    found = []
    for path in given:
        name = path.name.removesuffix(".auto")
        is_other = name == path.name or (path / MANIFEST_NAME).exists()
        if not is_other and (path.parent / name / MANIFEST_NAME).is_file():
            print(f"{path}: is what the search for {name} keeps, no bundle; left out", file=sys.stderr)
        else:
            found.append(path)
    return found


def is_main() -> bool:
    """Whether this is the process that prints: the first of those that `accelerate launch` started."""
    return os.environ.get("RANK", "0") == "0"


class Progress:
    """A rich spinner on stderr whose text is the step; call it with each step's name.

    Without `spin` each step is a line: a spinner takes time from what is measured meanwhile.
    """

    def __init__(self, verb: str, *, spin: bool = True) -> None:
        from rich.console import Console

        self._verb = verb
        self._console = Console(stderr=True)
        self._spin = spin and self._console.is_terminal
        self._status = self._console.status(verb)

    def __call__(self, step: str) -> None:
        if self._spin:
            self._status.update(f"{self._verb}: {step}")
        else:
            self._console.print(f"{self._verb}: {step}", highlight=False, markup=False, soft_wrap=True)

    def __enter__(self) -> Progress:
        if self._spin:
            self._status.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._status.stop()
