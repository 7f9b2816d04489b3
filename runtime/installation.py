"""What is installed, without importing any of it. Standard library only.

In: nothing. Out: versions, extras with what they lack, threads. Not here: printing (`pocketvlm doctor`).
"""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from runtime.threads import default_threads

CORE = ("numpy", "pillow", "pydantic", "tokenizers", "typer", "rich")
EXTRAS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("onnx", ("onnxruntime",)),
    ("gguf", ("gguf", "llama-cpp-python")),
    ("coreml", ("coremltools", "scikit-learn")),
    ("report", ("jinja2", "matplotlib", "openpyxl", "pyyaml")),
    (
        "distill",
        (
            *("torch", "torchvision", "transformers", "accelerate", "peft", "datasets"),
            *("openai", "scikit-learn", "easy-vqa", "num2words"),
        ),
    ),
    ("export", ("torch", "torchvision", "transformers", "onnx", "onnx-ir", "onnxscript", "optimum")),
)
"""Each extra of the project with the packages that its verbs import."""

ONNXRUNTIMES = (
    *("onnxruntime", "onnxruntime-gpu", "onnxruntime-qnn", "onnxruntime-openvino", "onnxruntime-directml"),
)
"""Packages that all hold the module onnxruntime; one installed over another spoils both."""


def describe() -> dict[str, Any]:
    """JSON-ready facts: python, system, threads, core packages, extras with their pip command."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "threads": default_threads(),
        "core": {package: installed(package) for package in CORE},
        "extras": [_extra(name, packages) for name, packages in EXTRAS],
    }


def installed(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _extra(name: str, packages: tuple[str, ...]) -> dict[str, Any]:
    versions = dict(map(_standing_for, packages))
    return {
        "extra": name,
        "packages": versions,
        "complete": None not in versions.values(),
        "install": f"pip install 'pocketvlm[{name}]'",
    }


def onnxruntime_package() -> str:
    """Which of ONNXRUNTIMES is installed; the first where none is."""
    return next((name for name in ONNXRUNTIMES if installed(name)), ONNXRUNTIMES[0])


def _standing_for(package: str) -> tuple[str, str | None]:
    """The package, or what is installed in its place, with its version."""
    name = onnxruntime_package() if package == ONNXRUNTIMES[0] else package
    return name, installed(name)


def program_version() -> str:
    """Of pocketvlm itself; "source" where it runs without being installed."""
    return installed("pocketvlm") or "source"
