"""What README and docs name exists: files and headings behind links, options of verbs, modules and names.

Snippets are parsed and their imports resolved; what they compute is for the tests of the modules.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import pocketvlm

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
OURS = ("runtime", "evals", "export", "distill")
VERBS = {
    name: {flag for parameter in verb.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    for name, verb in typer.main.get_command(pocketvlm.app).commands.items()  # type: ignore[attr-defined]
}


def by_page(page: Path) -> str:
    return str(page.relative_to(ROOT))


pages = pytest.mark.parametrize("page", PAGES, ids=by_page)


@pages
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith(("http", "mailto"))]
    missing = []
    for link in links:
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in headings(target)):
            missing.append(link)
    assert not missing


@pages
def test_verbs_have_the_options_that_are_shown(page: Path) -> None:
    wrong = []
    for verb, rest in re.findall(r"pocketvlm ([a-z-]+)((?:[^\n`#\\]|\\\n)*)", page.read_text()):
        flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", rest)) - {"--help"}
        wrong += [f"{verb} {flag}" for flag in sorted(flags) if verb in VERBS and flag not in VERBS[verb]]
    assert not wrong


@pages
def test_files_that_are_named_exist(page: Path) -> None:
    tops = "|".join((*OURS, "tests", "docs", "benchmarks", "examples"))
    named = re.findall(
        rf"`(?:python )?((?:{tops})/[\w./-]+\.(?:py|md|yaml|jsonl?|sh|cpp))\b", page.read_text()
    )
    assert not [name for name in named if not (ROOT / name).exists()]


@pages
def test_names_of_modules_can_be_imported(page: Path) -> None:
    text = page.read_text()
    named = set(re.findall(rf"`((?:{'|'.join(OURS)})(?:\.\w+)+)(?=[`(])", text))
    named = {name for name in named if not name.endswith(".py")}
    named |= set(re.findall(rf"python -m ((?:{'|'.join(OURS)})(?:\.\w+)+)", text))
    named |= set(imported(text))
    assert not [name for name in sorted(named) if not resolves(name)]


def headings(page: Path) -> set[str]:
    """Anchors as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    plain = [line.replace("`", "").strip().lower() for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    return {re.sub(r"[^\w\- ]", "", line).replace(" ", "-") for line in plain}


def imported(text: str) -> Iterator[str]:
    """Dotted names that the Python snippets of a page import from this project."""
    for snippet in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names if alias.name.split(".")[0] in OURS)


def resolves(name: str) -> bool:
    """Whether a dotted name is a module or something in one; a backend that is not installed is no fault."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name and module.startswith(error.name):
                continue
            return True
        for part in parts[end:]:
            fields = {**getattr(found, "model_fields", {}), **getattr(found, "__annotations__", {})}
            if part in fields:
                return True
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_what_is_looked_for_is_found() -> None:
    """The tests above see a wrong name."""
    assert resolves("runtime.session.open_bundle")
    assert not resolves("runtime.session.open_bundel")
    assert not resolves("runtime.nowhere.open_bundle")
    assert list(imported("```python\nfrom evals.stats import wilson\n```")) == ["evals.stats.wilson"]
    assert "--rounds" in VERBS["bench"]
