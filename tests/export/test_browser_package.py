"""The page beside a bundle for browsers: what is copied, what it claims, what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from export import browser_package, export_checkpoint
from export.targets import plan_for
from runtime import bundle
from runtime.errors import BundleError
from runtime.manifest import known_operations

SOURCES = [browser_package.SOURCE / path for path in browser_package.sources()]


def test_an_export_for_the_browser_has_the_page(tiny_checkpoint: Path, tmp_path: Path) -> None:
    plan = plan_for("browser")
    out = export_checkpoint(tiny_checkpoint, tmp_path / "bundle", precision="fp32", plan=plan)
    copied = sorted(
        path.relative_to(out / "browser") for path in (out / "browser").rglob("*") if path.is_file()
    )
    assert copied == list(browser_package.sources())
    assert {"index.html", "page.js", "reader/index.js"} <= {str(path) for path in copied}
    assert bundle.read(out).target == "browser"


def test_an_export_for_another_target_has_none(tiny_bundle: Path) -> None:
    assert not (tiny_bundle / "browser").exists()


def test_the_page_is_copied_over_an_earlier_one(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = bundle.read(tiny_bundle)
    out = browser_package.write(tmp_path, manifest)
    (out / "page.js").write_text("old")
    browser_package.write(tmp_path, manifest)
    for path in browser_package.sources():
        assert (out / path).read_bytes() == (browser_package.SOURCE / path).read_bytes()


def test_what_the_page_cannot_run_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = bundle.read(tiny_bundle)
    strange = manifest.model_copy(update={"requires": ("cache.stateful@1",)})
    with pytest.raises(BundleError, match=r"cache\.stateful@1, which the JavaScript reader cannot do"):
        browser_package.write(tmp_path, strange)
    with pytest.raises(BundleError, match="is gguf; a browser runs onnx bundles"):
        browser_package.write(tmp_path, manifest.model_copy(update={"format": "gguf"}))
    assert not (tmp_path / "browser").exists()


def test_an_installation_without_the_page_says_so(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browser_package, "SOURCE", tmp_path / "nowhere")
    with pytest.raises(BundleError, match="lacks the page"):
        browser_package.write(tmp_path, bundle.read(tiny_bundle))


def test_operations_of_onnx_bundles_are_known() -> None:
    missing = known_operations() - browser_package.KNOWN
    assert missing == {"cache.stateful@1", "to_bytes@1"}  # of Core ML and of GGUF


def test_no_source_names_a_model_family() -> None:
    families = re.compile(r"smolvlm|idefics|qwen|internvl|lfm2|gemma", re.IGNORECASE)
    assert [path.name for path in SOURCES if families.search(path.read_text(encoding="utf-8"))] == []


def test_the_page_asks_no_other_server() -> None:
    """No address but that of the vector format's name space is in any source."""
    addresses = {
        found
        for path in SOURCES
        for found in re.findall(r"https?://[^\s'\"`]+", path.read_text(encoding="utf-8"))
    }
    assert addresses == set()


def test_every_import_is_there() -> None:
    for path in SOURCES:
        if path.suffix not in (".js", ".mjs"):
            continue
        for found in re.findall(r"from '(\.[^']+)'", path.read_text(encoding="utf-8")):
            assert (path.parent / found).is_file(), f"{path.name} imports {found}"
