"""The Swift package beside a Core ML bundle: what is copied, what it claims, and that it parses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from export import swift_package
from runtime import bundle
from runtime.errors import BundleError
from runtime.manifest import known_operations

ROOT = Path(__file__).parent
SWIFT = sorted([*swift_package.SOURCE.rglob("*.swift"), *(ROOT / "swift").rglob("*.swift")])


def test_the_package_is_copied_over_an_earlier_one(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = bundle.read(tiny_bundle)
    out = swift_package.write(tmp_path, manifest)
    assert out == tmp_path / "swift"
    (out / "Package.swift").write_text("old")
    swift_package.write(tmp_path, manifest)
    copied = sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file())
    assert copied == list(swift_package.sources())
    assert all((out / path).read_bytes() == (swift_package.SOURCE / path).read_bytes() for path in copied)
    assert {"Package.swift", "README.md"} <= {str(path) for path in copied}


def test_an_operation_that_the_reader_lacks_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = bundle.read(tiny_bundle).model_copy(update={"requires": ("attention.image_bidirectional@1",)})
    with pytest.raises(
        BundleError, match=r"attention\.image_bidirectional@1, which the Swift reader cannot do"
    ):
        swift_package.write(tmp_path, manifest)
    assert not (tmp_path / "swift").exists()


def test_an_installation_without_the_package_says_so(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swift_package, "SOURCE", tmp_path / "nowhere")
    with pytest.raises(BundleError, match="lacks the Swift package"):
        swift_package.write(tmp_path, bundle.read(tiny_bundle))


def test_the_known_operations_are_those_of_the_source() -> None:
    found = set()
    for path in swift_package.SOURCE.rglob("*.swift"):
        if block := re.search(r"static let known: Set<String> = (.*?)\]", path.read_text(), re.DOTALL):
            found |= set(re.findall(r'"([a-z0-9_.]+@\d+)"', block[1]))
    assert found == swift_package.KNOWN
    assert known_operations() >= swift_package.KNOWN


def test_no_source_names_a_model_family() -> None:
    families = re.compile(r"smolvlm|idefics|qwen|internvl|lfm2|gemma", re.IGNORECASE)
    assert [path.name for path in SWIFT if families.search(path.read_text())] == []


@pytest.mark.parametrize("path", SWIFT, ids=lambda path: "/".join(path.parts[-2:]))
def test_a_source_file_parses(path: Path) -> None:
    """By the grammar of tree-sitter: parts that are for Apple's systems alone are compiled nowhere here."""
    tree_sitter = pytest.importorskip("tree_sitter")
    grammar = pytest.importorskip("tree_sitter_swift")
    parser = tree_sitter.Parser(tree_sitter.Language(grammar.language()))
    text = path.read_bytes()
    assert _faults(parser.parse(text).root_node) == []


def _faults(node: object) -> list[int]:
    """Lines of what the grammar did not understand."""
    children = [line for child in node.children for line in _faults(child)]  # type: ignore[attr-defined]
    bad = node.type == "ERROR" or node.is_missing  # type: ignore[attr-defined]
    return [*([node.start_point[0] + 1] if bad else []), *children]  # type: ignore[attr-defined]
