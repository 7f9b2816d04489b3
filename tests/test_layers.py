"""Imports point down only: front door -> distill, export -> evals -> runtime, which knows no model family."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "runtime": {"runtime"},
    "evals": {"evals", "runtime"},
    "export": {"export", "evals", "runtime"},
    "distill": {"distill", "evals", "runtime"},
}
OURS = {*ALLOWED, "pocketvlm", "tests", "benchmarks"}
RUNTIME_NEEDS = {"numpy", "PIL", "pydantic", "tokenizers", "onnxruntime", "llama_cpp", "coremltools"}
NO_RUNTIME = ("scorers.py", "judge.py")  # evals modules that import neither runtime nor torch
FAMILIES = ("smolvlm", "idefics", "qwen", "internvl", "lfm2", "gemma", "llama", "siglip")


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(top-level package, whether it is imported at module level) of every import in a file."""
    tree = ast.parse(path.read_text(), str(path))
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
        yield from ((name.split(".")[0], id(node) in top) for name in names)


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_down(package: str) -> None:
    assert sources(package)
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources(package)
        for name, _ in imports(path)
        if name in OURS - ALLOWED[package]
    ]
    assert wrong == []


def test_the_runtime_needs_little() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources("runtime")
        for name, _ in imports(path)
        if name not in {"runtime", "__future__", *RUNTIME_NEEDS} and name not in sys.stdlib_module_names
    ]
    assert wrong == []


@pytest.mark.parametrize("name", NO_RUNTIME)
def test_scorers_and_judge_stand_alone(name: str) -> None:
    path = ROOT / "evals" / name
    if path.exists():
        assert {found for found, _ in imports(path)} & {"runtime", "torch", "transformers"} == set()


def test_the_runtime_contains_no_model_type() -> None:
    """llama.cpp and its binding are a library, no family."""
    library = re.compile(r"llama[-_.]?cpp(?:-python)?|llama_\w+|\.llama_")
    wrong = [
        f"{path.relative_to(ROOT)}: {family}"
        for path in sources("runtime")
        for family in FAMILIES
        if family in library.sub("", path.read_text().lower())
    ]
    assert wrong == []


def loaded_by(statement: str) -> set[str]:
    script = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, text=True).split())


HEAVY = {"torch", "torchvision", "transformers", "onnxruntime", "onnx", "numpy", "PIL", "tokenizers", "yaml"}


def test_import_runtime_loads_nothing_heavy() -> None:
    assert loaded_by("import runtime") & {*HEAVY, "pydantic"} == set()


def test_the_front_door_loads_nothing_heavy() -> None:
    """`--help` is instant: every verb is known, none of what it needs is loaded."""
    assert loaded_by("import pocketvlm") & HEAVY == set()


def test_the_whole_runtime_loads_no_torch() -> None:
    loaded = loaded_by("import runtime.session, runtime.onnx_session, runtime.conformance")
    assert (
        loaded & {"torch", "torchvision", "transformers", "onnxruntime", "onnx", "scipy", "rich", "typer"}
        == set()
    )
    assert {"numpy", "PIL", "pydantic", "tokenizers"} <= loaded


def test_the_runtime_parses_on_the_oldest_python() -> None:
    """JetPack 6 has Python 3.10; newer syntax fails here, newer modules in the environment that runs 3.10."""
    for path in [*sources("runtime"), ROOT / "pocketvlm.py"]:
        ast.parse(path.read_text(), str(path), feature_version=(3, 10))
