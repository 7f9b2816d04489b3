"""A bundle that is not what its manifest says is refused in one line that names the place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime import bundle, manifest
from runtime.errors import BundleError

ROOT = Path(manifest.__file__).parent.parent


def edit(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = directory / bundle.MANIFEST_NAME
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def refusal(directory: Path, *, verify: bool = True) -> str:
    with pytest.raises(BundleError) as caught:
        bundle.read(directory, verify=verify)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_round_trip(bundle_copy: Path) -> None:
    read = bundle.read(bundle_copy)
    text = (bundle_copy / bundle.MANIFEST_NAME).read_text()
    bundle.write(read, bundle_copy)
    assert (bundle_copy / bundle.MANIFEST_NAME).read_text() == text
    assert bundle.read(bundle_copy) == read


def test_the_published_schema_is_the_models() -> None:
    published = (ROOT / "docs" / "bundle.schema.json").read_text()
    assert published == manifest.json_schema(), "run: python -m runtime.manifest > docs/bundle.schema.json"


def test_every_operation_is_documented() -> None:
    text = (ROOT / "docs" / "bundle.md").read_text()
    assert [name for name in sorted(manifest.known_operations()) if f"`{name}`" not in text] == []


@pytest.mark.parametrize("role", ["vision_encoder", "embed_tokens", "decoder"])
def test_a_changed_byte(bundle_copy: Path, role: str) -> None:
    part = bundle.read(bundle_copy).part(role)
    path = bundle_copy / part.path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    found = bundle.digest(path)[0]
    assert refusal(bundle_copy) == (
        f"tiny/{part.path}: sha256 {found[:8]}.., manifest says {part.sha256[:8]}..; re-export"
    )
    bundle.read(bundle_copy, verify=False)


@pytest.mark.parametrize("name", ["tokenizer.json", "conformance/cases.json"])
def test_other_files_are_hashed_too(bundle_copy: Path, name: str) -> None:
    with (bundle_copy / name).open("a") as stream:
        stream.write(" ")
    assert f"tiny/{name}: sha256" in refusal(bundle_copy)


def test_a_missing_part(bundle_copy: Path) -> None:
    (bundle_copy / "onnx" / "embed_tokens.onnx").unlink()
    assert refusal(bundle_copy, verify=False) == (
        "tiny/onnx/embed_tokens.onnx: missing, but the manifest names it; re-export"
    )


@pytest.mark.parametrize(
    "path", ["../other.onnx", "/etc/passwd", "a/../../b", "a\\b", "C:/a", "", "./a", "a//b"]
)
def test_paths_stay_inside(bundle_copy: Path, path: str) -> None:
    edit(bundle_copy, lambda raw: raw["parts"][0].update(path=path))
    assert "must be relative" in refusal(bundle_copy, verify=False)


def test_a_symlink_out_is_refused(bundle_copy: Path, tmp_path: Path) -> None:
    part = bundle_copy / "onnx" / "embed_tokens.onnx"
    outside = tmp_path / "outside.onnx"
    part.rename(outside)
    part.symlink_to(outside)
    assert "leads out of the bundle" in refusal(bundle_copy)


def test_an_unknown_operation_is_named(bundle_copy: Path) -> None:
    edit(bundle_copy, lambda raw: raw["requires"].append("tile.idefics3@1"))
    assert "requires tile.idefics3@1, which this runtime does not know" in refusal(bundle_copy)


def test_requires_must_name_what_is_used(bundle_copy: Path) -> None:
    edit(bundle_copy, lambda raw: raw["requires"].remove("to_rgb@1"))
    assert "requires must name exactly the operations used" in refusal(bundle_copy)


def test_an_unknown_key_is_named_with_the_nearest(bundle_copy: Path) -> None:
    edit(bundle_copy, lambda raw: raw["limits"].update(contxt=1))
    assert "limits.contxt: unknown key 'contxt', did you mean 'context'?" in refusal(bundle_copy)


def break_dtype(raw: dict[str, Any]) -> None:
    raw["state"][0]["dtype"] = "complex"


def drop_decoder(raw: dict[str, Any]) -> None:
    raw["parts"] = [part for part in raw["parts"] if part["role"] != "decoder"]


def other_version(raw: dict[str, Any]) -> None:
    raw["manifest_version"] = 2


def no_question(raw: dict[str, Any]) -> None:
    raw["prompt"]["user"] = [part for part in raw["prompt"]["user"] if part["kind"] != "question"]


def other_token(raw: dict[str, Any]) -> None:
    raw["merge"]["token"] += 1


def normalise_first(raw: dict[str, Any]) -> None:
    raw["image"]["operations"].insert(0, raw["image"]["operations"].pop())


def resize_before_rgb(raw: dict[str, Any]) -> None:
    raw["image"]["operations"].insert(1, raw["image"]["operations"].pop(2))


def axis_outside(raw: dict[str, Any]) -> None:
    raw["state"][0]["sequence_axis"] = 4


def too_many_tokens(raw: dict[str, Any]) -> None:
    raw["limits"]["image_tokens"] = 1


def no_layout(raw: dict[str, Any]) -> None:
    raw["image"]["operations"].pop()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (break_dtype, "state.0.dtype"),
        (drop_decoder, "one vision_encoder, one embed_tokens, one decoder"),
        (other_version, "manifest_version"),
        (no_question, "one question slot"),
        (other_token, "differs from prompt.image.token"),
        (normalise_first, "operations must be"),
        (resize_before_rgb, "operations must be"),
        (axis_outside, "sequence_axis 4 is outside"),
        (too_many_tokens, "exceeds limits.image_tokens"),
        (no_layout, "one layout"),
    ],
)
def test_other_faults(bundle_copy: Path, change: Callable[[dict[str, Any]], None], words: str) -> None:
    edit(bundle_copy, change)
    assert words in refusal(bundle_copy)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "\ufffe"])
def test_no_manifest_in_the_file(bundle_copy: Path, text: str) -> None:
    (bundle_copy / bundle.MANIFEST_NAME).write_text(text)
    assert bundle.MANIFEST_NAME in refusal(bundle_copy)


def test_no_bundle(tmp_path: Path) -> None:
    assert "no manifest.json" in refusal(tmp_path / "absent")
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(tmp_path / "file")


def test_a_directory_part_has_the_hash_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "part" / "sub").mkdir(parents=True)
    (tmp_path / "part" / "b").write_bytes(b"two")
    (tmp_path / "part" / "sub" / "a").write_bytes(b"one")
    before = bundle.digest(tmp_path / "part")
    assert before[1] == 6
    (tmp_path / "part" / "sub" / "a").rename(tmp_path / "part" / "a")
    assert bundle.digest(tmp_path / "part")[0] != before[0]
