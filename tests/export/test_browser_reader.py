"""The JavaScript reader in Node: equal to the Python reader, to the tokenizers library and to Pillow.

Needs Node 20 or newer (`node` on the path). What runs a model also needs onnxruntime-web, in the node_modules
directory that POCKETVLM_NODE_MODULES names: `npm install --ignore-scripts onnxruntime-web`.
"""

from __future__ import annotations

import io
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from export import browser_package, export_checkpoint
from export.targets import plan_for
from runtime.generation import GenerationOptions
from runtime.session import Session, open_bundle
from tests.checkpoints import FAMILIES, VARIANTS
from tests.export.browser_probe import NODE, Probe, modules
from tests.export.test_swift_reader import BARE, WHITE, plain, texts, trimming

pytestmark = pytest.mark.skipif(NODE is None, reason="no Node")
needs_ort = pytest.mark.skipif(modules() is None, reason="no onnxruntime-web in POCKETVLM_NODE_MODULES")

QUESTION = "What is it? It's a 3"
MAKERS = {**FAMILIES, **VARIANTS}


@pytest.fixture(scope="module")
def probe() -> Iterator[Probe]:
    with Probe() as found:
        yield found


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Iterator[Session]:
    pytest.importorskip("onnxruntime")
    with open_bundle(tiny_bundle, threads=1) as opened:
        yield opened


# --- text -------------------------------------------------------------


@pytest.mark.parametrize("kind", ["digits", "split"])
def test_ids_and_texts_are_those_of_the_tokenizers_library(probe: Probe, tmp_path: Path, kind: str) -> None:
    tokenizer = plain(kind)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    asked = texts()
    found = probe.right("encode", tokenizer=tmp_path / "tokenizer.json", texts=asked)
    wanted = [tokenizer.encode(text, add_special_tokens=False).ids for text in asked]
    assert found["ids"] == wanted
    assert found["texts"] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in wanted]
    assert found["streamed"] == found["texts"]


def test_what_the_tokenizer_cannot_do_is_refused(probe: Probe, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    other = Tokenizer(models.WordLevel({"a": 0}))
    other.save(str(path))
    assert "model WordLevel" in probe.wrong("encode", tokenizer=path, texts=["a"])
    other = plain("digits")
    other.pre_tokenizer = pre_tokenizers.Metaspace()
    other.save(str(path))
    assert "Metaspace is unknown" in probe.wrong("encode", tokenizer=path, texts=["a"])
    plain("digits").save(str(path))
    assert "Unicode" in probe.wrong("encode", tokenizer=path, texts=["\ud800"])
    path.write_text("{")
    assert "is no JSON" in probe.wrong("encode", tokenizer=path, texts=["a"])


# --- numbers ----------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 55, 56, 63, 64, 65, 1000])
def test_the_plain_hash_is_sha256(probe: Probe, tmp_path: Path, size: int) -> None:
    (tmp_path / "bytes").write_bytes(bytes(n * 7 % 256 for n in range(size)))
    found = probe.right("digest", file=tmp_path / "bytes")
    assert found["plain"] == found["platform"]


def test_halves_are_those_of_numpy(probe: Probe, tmp_path: Path) -> None:
    drawn = np.random.default_rng(0)
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = every[np.isfinite(every)]
    between = (finite[:-1].astype(np.float64) + finite[1:]).astype(np.float32) / 2
    values = np.concatenate([finite, between, drawn.normal(size=5000) * 1e3, drawn.normal(size=5000) * 1e-6])
    values = np.concatenate([values, [65519.9, 65520, 1e30, -1e30, np.inf, -np.inf, 1e-9]]).astype(np.float32)
    (tmp_path / "in").write_bytes(values.tobytes())
    found = probe.right("half", file=tmp_path / "in", out=tmp_path / "out")
    with np.errstate(over="ignore"):
        wanted = values.astype(np.float16)
    np.testing.assert_array_equal(np.fromfile(tmp_path / "out", np.uint16), wanted.view(np.uint16))
    assert [float(text) for text in found["back"][: len(finite)]] == finite.tolist()


# --- pictures ---------------------------------------------------------


def pngs() -> dict[str, bytes]:
    """Files of every kind of pixel that Pillow writes, and interlaced ones, which it only reads."""
    drawn = np.random.default_rng(0)
    rgba = drawn.integers(0, 256, (21, 34, 4), dtype=np.uint8)
    colours = Image.fromarray(rgba[..., :3])
    found = {
        "rgb": colours,
        "rgba": Image.fromarray(rgba),
        "gray": colours.convert("L"),
        "gray-alpha": Image.fromarray(rgba).convert("LA"),
        "one-bit": colours.convert("1"),
        "palette": colours.quantize(200),
        "palette-2-bit": colours.quantize(4),
        "palette-4-bit": colours.quantize(13),
        "deep-gray": Image.fromarray(drawn.integers(0, 65536, (21, 34), dtype=np.uint16)),
    }
    files = {name: encoded(picture) for name, picture in found.items()}
    files["clear-palette"] = encoded(found["palette"], transparency=bytes(range(100)))
    files["clear-gray"] = encoded(found["gray"], transparency=int(np.asarray(found["gray"])[3, 4]))
    files["clear-rgb"] = encoded(colours, transparency=tuple(int(value) for value in rgba[2, 5, :3]))
    for size in ((34, 21), (1, 1), (5, 3), (9, 1)):
        files[f"interlaced-{size[0]}x{size[1]}"] = interlaced(colours.resize(size))
    return files


def encoded(picture: Image.Image, **options: Any) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG", **options)
    return out.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def interlaced(picture: Image.Image) -> bytes:
    """An RGB picture by Adam7 (PNG specification, 8.1), its rows filtered by what is above them."""
    pixels = np.asarray(picture)
    passes = [
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ]
    data = b""
    for left, top, right, down in [*passes, (0, 1, 1, 2)]:
        part = pixels[top::down, left::right]
        above = np.zeros_like(part[:1].ravel())
        for row in part if part.size else ():
            data += b"\x02" + (row.ravel() - above).tobytes()
            above = row.ravel()
    head = struct.pack(">IIBBBBB", picture.width, picture.height, 8, 2, 0, 0, 1)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("name", sorted(pngs()))
def test_a_png_is_decoded_as_pillow_does(probe: Probe, tmp_path: Path, name: str) -> None:
    data = pngs()[name]
    (tmp_path / "in.png").write_bytes(data)
    found = probe.right("decode", file=tmp_path / "in.png", most=10**6, out=tmp_path / "out")
    picture: Image.Image = Image.open(io.BytesIO(data))
    if name == "deep-gray":
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    mode = "RGBA" if found["channels"] == 4 else "RGB"
    wanted = np.asarray(picture.convert(mode))
    pixels = np.fromfile(tmp_path / "out", np.uint8).reshape(wanted.shape)
    np.testing.assert_array_equal(pixels, wanted)
    has_alpha = "A" in picture.getbands() or "transparency" in picture.info
    assert mode == ("RGBA" if has_alpha else "RGB")


def test_orientation_is_found(probe: Probe, tmp_path: Path) -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x010F] = "maker"
        exif[0x0112] = orientation
        path = tmp_path / "turned.png"
        Image.new("RGB", (3, 2)).save(path, exif=exif)
        found = probe.right("decode", file=path, most=100, out=tmp_path / "out")
        assert found["orientation"] == orientation


def test_a_damaged_or_large_picture_is_refused(probe: Probe, tmp_path: Path) -> None:
    whole, path = pngs()["rgb"], tmp_path / "in.png"
    spoiled = bytearray(whole)
    spoiled[len(whole) // 2] ^= 1
    bomb = whole[:16] + struct.pack(">II", 30_000, 30_000) + whole[24:]
    for data, wanted in (
        (whole[:-40], "cut off"),
        (bytes(spoiled), "checksum"),
        (b"GIF89", "truncated or damaged"),
        (b"text", "is no PNG"),
        (b"", "is no PNG"),
        (bomb, "900000000 pixels, the limit is 1000000"),
        (whole[:8] + chunk(b"IHDR", whole[16:29]) + chunk(b"IEND", b""), "damaged"),
    ):
        path.write_bytes(data)
        assert wanted in probe.wrong("decode", file=path, most=10**6, out=tmp_path / "out")


def same_as_python(probe: Probe, session: Session, directory: Path, scratch: Path) -> None:
    drawn = np.random.default_rng(0)
    for height, width, channels in ((64, 64, 3), (37, 91, 3), (150, 64, 4), (203, 130, 3)):
        samples = drawn.integers(0, 256, (height, width, channels), dtype=np.uint8)
        (scratch / "samples").write_bytes(samples.tobytes())
        found = probe.right(
            "prepare", bundle=directory, width=width, height=height, channels=channels, orientation=1,
            file=False, samples=scratch / "samples", question=QUESTION, out=scratch / "pixels",
        )  # fmt: skip
        prepared = session.prepare(Image.fromarray(samples))
        ids = session.prompt_ids(QUESTION, [prepared])
        assert found["shapes"] == [list(view.shape) for view in prepared.pixels]
        assert found["ids"] == ids.tolist()
        assert found["positions"] == session.positions(ids, [prepared]).tolist()
        pixels = np.fromfile(scratch / "pixels", "<f4")
        np.testing.assert_array_equal(pixels, np.concatenate([view.ravel() for view in prepared.pixels]))


def test_pictures_and_prompts(probe: Probe, tiny_bundle: Path, session: Session, tmp_path: Path) -> None:
    same_as_python(probe, session, tiny_bundle, tmp_path)


def test_white_space_at_the_ends_is_trimmed_as_python_does(
    probe: Probe, tiny_bundle: Path, session: Session, tmp_path: Path
) -> None:
    bundle = trimming(tiny_bundle, tmp_path / "bundle")
    (tmp_path / "samples").write_bytes(bytes(3 * 8 * 8))
    found = probe.right(
        "prepare", bundle=bundle, width=8, height=8, channels=3, orientation=1, file=False,
        samples=tmp_path / "samples", question=WHITE + BARE + WHITE, out=tmp_path / "pixels",
    )  # fmt: skip
    black = session.prepare(Image.new("RGB", (8, 8)))
    assert found["ids"] == session.prompt_ids(BARE, [black]).tolist()


def test_a_file_is_turned_upright(probe: Probe, tiny_bundle: Path, session: Session, tmp_path: Path) -> None:
    samples = np.random.default_rng(1).integers(0, 256, (20, 33, 3), dtype=np.uint8)
    (tmp_path / "samples").write_bytes(samples.tobytes())
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(samples).save(tmp_path / "turned.png", exif=exif)
        probe.right(
            "prepare", bundle=tiny_bundle, width=33, height=20, channels=3, orientation=orientation,
            file=True, samples=tmp_path / "samples", question=QUESTION, out=tmp_path / "pixels",
        )  # fmt: skip
        (wanted,) = session.prepare(tmp_path / "turned.png").pixels
        np.testing.assert_array_equal(np.fromfile(tmp_path / "pixels", "<f4"), wanted.ravel())


# --- bundles ----------------------------------------------------------


def test_the_known_operations_are_those_of_the_reader(probe: Probe) -> None:
    assert probe.right("known")["known"] == sorted(browser_package.KNOWN)


@needs_ort
def test_a_damaged_bundle_is_named(probe: Probe, tiny_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    assert probe.right("open", bundle=copy) == {"name": "tiny"}
    manifest = (copy / "manifest.json").read_text()
    for old, new, wanted in (
        ('"tokens.grid@1"', '"tokens.grid@7"', "tokens.grid@7"),
        ('"manifest_version"', '"surprise": 1, "manifest_version"', "unknown key surprise"),
        ('"tokenizer.json"', '"../tokenizer.json"', "must be relative"),
        ('"onnx"', '"gguf"', "format gguf"),
    ):
        (copy / "manifest.json").write_text(manifest.replace(old, new))
        assert wanted in probe.wrong("open", bundle=copy)
    (copy / "manifest.json").unlink()
    assert "manifest.json: is not there" in probe.wrong("open", bundle=copy)
    (copy / "manifest.json").write_text(manifest)
    part = next((copy / "onnx").glob("decoder*.onnx"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    assert "decoder_model_merged.onnx: sha256" in probe.wrong("check", bundle=copy)
    part.unlink()
    part.symlink_to(next((tiny_bundle / "onnx").glob("decoder*.onnx")))
    assert "leads out of the bundle" in probe.wrong("check", bundle=copy)


def same_answers(probe: Probe, bundle: Path, scratch: Path, leave: tuple[str, ...] = ()) -> None:
    """Conformance, and the ids and texts of a conversation."""
    found = probe.right("check", bundle=bundle, leave=leave)
    assert found["lines"] == []
    assert found["cases"] > 0
    samples = np.random.default_rng(2).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    picture = scratch / "asked.png"
    Image.fromarray(samples).save(picture)
    long = " ".join([QUESTION] * 8)  # more than one chunk of fixed shape
    with open_bundle(bundle, threads=1, reuse=False) as session:
        options = GenerationOptions(max_new_tokens=6)
        asked: list[dict[str, Any]] = [
            {"question": QUESTION, "withPicture": True, "tokens": 6},
            {"question": long, "withPicture": True, "tokens": 6, "ignoreStop": True},
        ]
        wanted = [
            session.ask(picture, QUESTION, options),
            session.ask(picture, long, GenerationOptions(max_new_tokens=6, ignore_stop=True)),
        ]
        if session.manifest.prompt.later is not None:
            asked.append({"question": "And its shape?", "tokens": 6, "further": True})
            chat = session.chat(picture)
            chat.ask(long, GenerationOptions(max_new_tokens=6, ignore_stop=True))
            wanted.append(chat.ask("And its shape?", options))
        if session.manifest.prompt.user_without_image is not None:
            asked.append({"question": QUESTION, "withPicture": False, "tokens": 6})
            wanted.append(session.ask(None, QUESTION, options))
    answers = probe.right("ask", bundle=bundle, picture=picture, asked=asked, leave=leave)["answers"]
    for answer, right in zip(answers, wanted, strict=True):
        assert answer["ids"] == right.token_ids
        assert answer["text"] == right.text == "".join(answer["pieces"])
        assert answer["finish"] == right.finish_reason


@needs_ort
def test_answers_are_those_of_the_python_session(probe: Probe, tiny_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    same_answers(probe, tiny_bundle, tmp_path)


@needs_ort
@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(MAKERS))
def test_answers_of_every_family(probe: Probe, tmp_path: Path, family: str) -> None:
    pytest.importorskip("onnxruntime")
    checkpoint = MAKERS[family](tmp_path / "checkpoint")
    bundle = export_checkpoint(checkpoint, tmp_path / "bundle")
    same_answers(probe, bundle, tmp_path)
    with open_bundle(bundle, threads=1) as session:
        same_as_python(probe, session, bundle, tmp_path)


@needs_ort
@pytest.mark.slow
def test_answers_of_graphs_of_fixed_shapes(probe: Probe, tiny_checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    plan = plan_for(None, flavour="portable-static", max_context=256)
    bundle = export_checkpoint(tiny_checkpoint, tmp_path / "bundle", plan=plan)
    same_answers(probe, bundle, tmp_path)


@needs_ort
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_rounded_bundles_conform(probe: Probe, tiny_checkpoint: Path, tmp_path: Path, precision: str) -> None:
    """Answers of rounded random weights hang on the last bit of a kernel: the vectors have the tolerance."""
    pytest.importorskip("onnxruntime")
    bundle = export_checkpoint(tiny_checkpoint, tmp_path / "bundle", precision=precision)
    assert probe.right("check", bundle=bundle)["lines"] == []
