"""What a clone promises: versions, extras, pins, a whole wheel, a README that matches, no private path."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import tomllib
import typer
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import pocketvlm
from distill import settings
from distill.recipe import Recipe
from runtime import installation
from tests import modules as module_list

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
PACKAGES = ("distill", "evals", "export", "runtime")
DECIDED = {
    "torch": "2.14.1",
    "torchvision": "0.29.1",
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
    "optimum": "2.3.0",
    "onnx": "1.23.2",
    "onnxruntime": "1.31.1",
    "onnxscript": "0.7.2",
    "onnx-ir": "1.1.0",
    "coremltools": "9.0",
    "llama-cpp-python": "0.3.36",
    "gguf": "0.19.0",
}
"""Versions that were checked together; a change here is a decision, not an update."""
PINNED_TOO = ("numpy", "scikit-learn", "peft", "datasets", "pydantic", "typer", "rich", "setuptools")
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".html", ".cfg", ".sh", ""}
PRIVATE = re.compile(
    "|".join(
        [
            r"(?<![\w.])/(?:work|opt|root|Users)/",
            r"(?<![\w.$])/home/(?!pocketvlm)",  # the user that the Dockerfile makes
            r"(?:pypi|npmjs|crates|debian)\.(?:org|io)\b",
            r"pythonhosted\.",
            r"download\.pytorch\.",
            r"--(?:extra-)?index-url",
            r"--trusted-host",
        ]
    )
)


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    rows = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(row) == 2 for row in rows), [row for row in rows if len(row) != 2]
    return {canonicalize_name(name): version for name, version in rows}


def files() -> list[Path]:
    """What is in the repository, or would be: neither ignored nor deleted."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(command, cwd=ROOT, text=True).splitlines()
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def modules() -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }


# --- versions and extras ----------------------------------------------


def test_the_changelog_knows_this_version() -> None:
    versions = re.findall(r"^## \[(\d[^]]*)]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == PROJECT["version"]
    assert len(versions) == len(set(versions))


def test_the_extras_exist() -> None:
    assert {"onnx", "gguf", "coreml", "distill", "export", "report", "all", "dev"} == set(EXTRAS)
    (whole,) = EXTRAS["all"]
    assert Requirement(whole).extras == set(EXTRAS) - {"all", "dev"}


def test_the_bare_install_is_the_device_runtime() -> None:
    bare = {Requirement(each).name for each in PROJECT["dependencies"]}
    assert bare == set(installation.CORE)
    assert {Requirement(each).name for each in EXTRAS["onnx"]} == {"onnxruntime"}


def test_the_oldest_device_is_served() -> None:
    """JetPack 6: Python 3.10, whose last aarch64 onnxruntime is 1.23.2."""
    assert "3.10.12" in SpecifierSet(PROJECT["requires-python"])
    assert all("1.23.2" in Requirement(each).specifier for each in EXTRAS["onnx"])


# --- pins -------------------------------------------------------------


def test_every_requirement_is_pinned_within_its_bounds() -> None:
    pinned = pins()
    wanted = [Requirement(each) for each in PROJECT["dependencies"]]
    wanted += [Requirement(each) for extra, rows in EXTRAS.items() if extra != "all" for each in rows]
    wrong = [
        f"{each}: {pinned.get(canonicalize_name(each.name))}"
        for each in wanted
        if pinned.get(canonicalize_name(each.name)) not in each.specifier
    ]
    assert wrong == []


def test_the_decided_versions_are_pinned() -> None:
    pinned = pins()
    assert {name: pinned.get(name) for name in DECIDED} == DECIDED
    assert set(PINNED_TOO) <= set(pinned)
    assert pinned["numpy"] in SpecifierSet("<2.4")  # coremltools' conversion breaks on 2.4
    assert pinned["pydantic"].startswith("2.")


def test_nothing_is_pinned_to_one_machine() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"@|file:|\+cpu|\+cu|^-e|^pocketvlm", text, re.MULTILINE)


# --- what is in the repository ----------------------------------------


def test_no_file_names_a_machine_or_a_registry() -> None:
    checked = [path for path in files() if path.suffix in TEXT and path != Path(__file__)]
    assert {ROOT / "README.md", ROOT / "Makefile", ROOT / ".ci" / "run"} <= set(checked)
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in checked
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if PRIVATE.search(line)
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "line",
    ["see /work/x", "pip install --index-url X", "https://pypi.org/simple", '"/root/a"', "cd /home/me/x"],
)
def test_the_check_for_private_paths_sees_them(line: str) -> None:
    assert PRIVATE.search(line)


def test_the_list_of_modules_is_up_to_date() -> None:
    """And every module says in its first line what it is."""
    assert (ROOT / "docs" / "modules.md").read_text() == module_list.page()
    assert re.findall(r"^\| `(\w+\.py)` \|  \|$", module_list.page(), re.MULTILINE) == []


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    dead = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert dead == []


def test_the_dockerfile_copies_what_is_there() -> None:
    """And no more than `.dockerignore` lets through."""
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    copies = [line.split()[1:-1] for line in lines if line.startswith("COPY ") and "--from" not in line]
    copied = {name for names in copies for name in names}
    assert {name for name in copied if not (ROOT / name).exists()} == set()
    assert copied >= {*PACKAGES, "pocketvlm.py"}
    assert {f"!{name}" for name in copied} <= set((ROOT / ".dockerignore").read_text().splitlines())
    stages = re.findall(r"^FROM \S+ AS (\w+)$", "\n".join(lines), re.MULTILINE)
    assert {"server", "device"} <= set(stages)


def test_the_compose_file_builds_a_stage_and_its_recipe_lines_are_read() -> None:
    """What its comment tells a recipe to say is what the recipe's own models accept."""
    text = (ROOT / "compose.yaml").read_text()
    services = yaml.safe_load(text)["services"]
    stages = re.findall(r"^FROM \S+ AS (\w+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert services["distil"]["build"]["target"] in stages
    assert services["distil"]["command"][0] in typer.main.get_group(pocketvlm.app).commands
    lines = yaml.safe_load("\n".join(re.findall(r"^#   (\w+: .*)$", text, re.MULTILINE)))
    assert set(lines) == {"teachers", "pool", "judge"}
    data = {"train": [{"format": "easy-vqa", "split": "train"}]}
    found = Recipe.model_validate({"name": "it", "student": {"checkpoint": "student"}, "data": data, **lines})
    assert isinstance(found.pool.engine, settings.OpenAI) and isinstance(found.judge, settings.ModelJudge)
    assert found.pool.engine.url == found.judge.url == f"http://teacher:{_port(services['teacher'])}/v1"
    assert found.pool.engine.model == "teacher"


def _port(service: dict[str, Any]) -> str:
    """Where the teacher listens, and where its health is asked for."""
    port = service["command"][service["command"].index("--port") + 1]
    assert f":{port}/" in service["healthcheck"]["test"][-1]
    return str(port)


def test_the_licence_is_the_one_declared() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text


# --- what is installed ------------------------------------------------


def test_help_lists_the_verbs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pocketvlm", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    for verb in ("demo", "run", "export", "bench", "report", "doctor"):
        assert re.search(rf"^\W*{verb} ", done.stdout, re.MULTILINE), verb
    documented = set(re.findall(r"pocketvlm ([a-z]+) ", (ROOT / "README.md").read_text()))
    verbs = set(typer.main.get_group(pocketvlm.app).commands)
    assert documented <= verbs and {"run", "bench", "export"} <= documented


def test_make_says_what_it_offers() -> None:
    found = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("demo", "test", "test-all", "check", "lock", "clean"):
        assert f"make {target} " in found


def test_make_without_a_python_says_so_in_one_line(tmp_path: Path) -> None:
    """No interpreter, and one that is too old: nothing is installed, both are named."""
    old = tmp_path / "python2.6"
    old.write_text("#!/bin/sh\necho 2.6\n")
    old.chmod(0o755)
    venv = tmp_path / "venv"
    command = ["make", "test", f"PYTHON={old} no-such-python", f"VENV={venv}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    line = done.stderr.splitlines()[0]
    assert "wanted Python 3.11, 3.12 or 3.13" in line and "python2.6 is 2.6" in line and "PYTHON=" in line
    assert list(tmp_path.iterdir()) == [old]


def test_the_wheel_is_whole(tmp_path: Path) -> None:
    """Built from a copy of the repository: code, templates, recipes, the type marker, the licence."""
    for path in files():
        target = tmp_path / "source" / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--wheel-dir", str(tmp_path), str(tmp_path / "source")]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    (wheel,) = tmp_path.glob("pocketvlm-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {f"{package}/__init__.py" for package in PACKAGES} | modules()
    for package in PACKAGES:
        for pattern in ("*.html", "*.yaml", "py.typed"):
            expected |= {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob(pattern)}
    assert {"evals/report.html", "distill/recipes/demo.yaml", "runtime/py.typed"} <= expected
    assert expected | {"pocketvlm.py"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)
