"""Prints docs/modules.md: every module with the first line of its docstring.

    python -m tests.modules > docs/modules.md

In: the packages' source. Out: Markdown. Not here: whether it is up to date (`tests/test_packaging.py`).
"""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("runtime", "evals", "export", "distill")
HEAD = """# Modules

Written by `python -m tests.modules > docs/modules.md` from the first line of every docstring. Imports point
down only; a test holds it:

```
pocketvlm.py -> distill/, export/ (which do not know each other) -> evals/ -> runtime/ (never torch)
```
"""


def page() -> str:
    """The whole page."""
    sections = [HEAD, *(section for package in PACKAGES for section in _sections(ROOT / package))]
    return "\n".join(sections)


def _sections(folder: Path) -> list[str]:
    """A heading and a table for `folder`, then those of the packages in it."""
    files = sorted(file for file in folder.glob("*.py") if file.name != "__init__.py")
    about = _first_line(folder / "__init__.py")
    lines = [f"## {folder.relative_to(ROOT)}/", "", *([about, ""] if about else []), "| | |", "|---|---|"]
    lines += [f"| `{file.name}` | {_first_line(file)} |" for file in files]
    inner = sorted(each.parent for each in folder.glob("*/__init__.py"))
    return ["\n".join(lines) + "\n", *(section for each in inner for section in _sections(each))]


def _first_line(file: Path) -> str:
    """Of the docstring; empty for a module without one."""
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return text.split("\n\n")[0].replace("\n", " ").replace("|", r"\|")


if __name__ == "__main__":
    print(page(), end="")
