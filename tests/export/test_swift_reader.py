"""The Swift package compiled and run on Linux: equal to the Python reader, Core ML replaced by the evaluator.

Slow, and only where there is a Swift toolchain (`swift` on the path, or its path in POCKETVLM_SWIFT).
Debian 13 has one in its package swiftlang.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from evals.bench import bench_results
from export import export_checkpoint, swift_package
from export.targets import plan_for
from runtime.generation import GenerationOptions
from runtime.session import Session, open_bundle
from tests.checkpoints import FAMILIES, VARIANTS
from tests.export.swift_standin import StandIn

pytestmark = pytest.mark.slow

SWIFT = os.environ.get("POCKETVLM_SWIFT") or shutil.which("swift")
CHECK = Path(__file__).parent / "swift"
TILES = ("smolvlm_tiles", "idefics3_tiles", "internvl_qwen3")
QUESTION = "What is it? It's a 3"
WHITE = "".join(chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace())
BARE = "\ufeffwhat is\u3000 it?\u200b"
"""Ends with what looks white and is not."""
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Probe:
    """The Swift program that says what its reader makes of pictures and texts."""

    def __init__(self, package: Path, env: dict[str, str] | None = None) -> None:
        command = [str(SWIFT), "run", "--skip-build", "--package-path", str(package), "Probe"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **(env or {})},
        )

    def ask(self, what: str, **request: Any) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps({"what": what, **request}) + "\n")
        self._process.stdin.flush()
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(30)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with a stand-in for Core ML, built."""
    if SWIFT is None:
        pytest.skip("no Swift toolchain")
    out: Path = shutil.copytree(CHECK, tmp_path_factory.mktemp("swift") / "check")
    for name in ("Sources", "Tests"):
        shutil.copytree(swift_package.SOURCE / name, out / name)
    command = [SWIFT, "build", "--build-tests", "-j", "1", "--package-path", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    return out


@pytest.fixture(scope="module")
def probe(package: Path) -> Iterator[Probe]:
    found = Probe(package)
    yield found
    found.close()


@pytest.fixture(scope="module")
def session(tiny_bundle: Path) -> Iterator[Session]:
    with open_bundle(tiny_bundle, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def coreml(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("coremltools")
    home = tmp_path_factory.mktemp(request.param)
    checkpoint = FAMILIES[request.param](home / "checkpoint")
    plan = plan_for(None, to="coreml", split_images=request.param != "lfm2_vl")
    return export_checkpoint(checkpoint, home / "bundle", to="coreml", precision="fp16", plan=plan)


# --- text -------------------------------------------------------------


def texts() -> list[str]:
    fixed = [
        "",
        "   ",
        QUESTION,
        "a  b\n\n c\r\n",
        "1234 x\u0663\u0664 \u216b \u00bd",
        "<|im_start|>hi<|im_end|><|im|>",
        "\u00e9 e\u0301 A\u030a \u212b",
        "\u65e5\u672c\u8a9e \U0001f642\U0001f469\u200d\U0001f469\u200d\U0001f467",
        "I'LL we've \u017f'\u017f \u0130",
        "\x0b\x85\xa0\u2003\u3000a\u200bb",
    ]
    drawn = random.Random(0)
    ranges = [(32, 127), (0xA0, 0x250), (0x300, 0x370), (0x600, 0x700), (0x4E00, 0x4F00), (0x1F600, 0x1F650)]
    for _ in range(60):
        low, high = drawn.choice(ranges)
        fixed.append("".join(chr(drawn.randrange(low, high)) for _ in range(drawn.randrange(1, 40))))
    return fixed


def plain(kind: str) -> Tokenizer:
    """A small tokenizer of one of the kinds that checkpoints have."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "split"))
    if kind == "digits":
        cuts = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    else:
        from tokenizers import Regex

        cuts = [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|im_start|>", "<|im_end|>", "<|im"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([QUESTION, "what is it, it is a circle 12 12 the the then"] * 5, trainer)
    return tokenizer


@pytest.mark.parametrize("kind", ["digits", "split"])
def test_ids_and_texts_are_those_of_the_tokenizers_library(probe: Probe, tmp_path: Path, kind: str) -> None:
    tokenizer = plain(kind)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    asked = texts()
    found = probe.ask("encode", tokenizer=str(tmp_path / "tokenizer.json"), texts=asked)
    wanted = [tokenizer.encode(text, add_special_tokens=False).ids for text in asked]
    assert found["ids"] == wanted
    assert found["texts"] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in wanted]
    assert found["streamed"] == found["texts"]


def test_a_tokenizer_of_another_kind_is_refused(probe: Probe, tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert (
        "tokenizer.json"
        in probe.ask("encode", tokenizer=str(tmp_path / "tokenizer.json"), texts=["a"])["error"]
    )
    other = plain("digits")
    other.pre_tokenizer = pre_tokenizers.Metaspace()
    other.save(str(tmp_path / "tokenizer.json"))
    found = probe.ask("encode", tokenizer=str(tmp_path / "tokenizer.json"), texts=["a"])
    assert "Metaspace is unknown to this reader" in found["error"]


# --- pictures ---------------------------------------------------------


def trimming(bundle: Path, out: Path) -> Path:
    """A copy whose question slots trim."""
    copy = Path(shutil.copytree(bundle, out))
    manifest = (copy / "manifest.json").read_text()
    assert '"trim": false' in manifest
    (copy / "manifest.json").write_text(manifest.replace('"trim": false', '"trim": true'))
    return copy


def same_as_python(probe: Probe, session: Session, directory: Path, tmp_path: Path) -> None:
    drawn = np.random.default_rng(0)
    for height, width, channels in ((64, 64, 3), (37, 91, 3), (150, 64, 4), (203, 130, 3)):
        samples = drawn.integers(0, 256, (height, width, channels), dtype=np.uint8)
        (tmp_path / "samples").write_bytes(samples.tobytes())
        found = probe.ask(
            "prepare",
            bundle=str(directory),
            width=width,
            height=height,
            channels=channels,
            samples=str(tmp_path / "samples"),
            orientation=1,
            file=False,
            question=QUESTION,
            out=str(tmp_path / "pixels"),
        )
        assert "error" not in found, found
        prepared = session.prepare(Image.fromarray(samples))
        ids = session.prompt_ids(QUESTION, [prepared])
        assert found["shapes"] == [list(view.shape) for view in prepared.pixels]
        assert found["ids"] == ids.tolist()
        assert found["positions"] == session.positions(ids, [prepared]).tolist()
        pixels = np.fromfile(tmp_path / "pixels", "<f4")
        np.testing.assert_array_equal(pixels, np.concatenate([view.ravel() for view in prepared.pixels]))


@pytest.mark.parametrize("family", [*TILES, "qwen2_5_vl", "lfm2_vl"])
def test_pictures_and_prompts_of_moving_shapes(probe: Probe, tmp_path: Path, family: str) -> None:
    pytest.importorskip("onnxruntime")
    checkpoint = {**FAMILIES, **VARIANTS}[family](tmp_path / "checkpoint")
    bundle = export_checkpoint(checkpoint, tmp_path / "bundle")
    with open_bundle(bundle, threads=1) as session:
        same_as_python(probe, session, bundle, tmp_path)


def test_white_space_at_the_ends_is_trimmed_as_python_does(
    probe: Probe, tiny_bundle: Path, session: Session, tmp_path: Path
) -> None:
    bundle = trimming(tiny_bundle, tmp_path / "bundle")
    (tmp_path / "samples").write_bytes(bytes(3 * 8 * 8))
    found = probe.ask(
        "prepare", bundle=str(bundle), width=8, height=8, channels=3, orientation=1, file=False,
        samples=str(tmp_path / "samples"), question=WHITE + BARE + WHITE, out=str(tmp_path / "pixels"),
    )  # fmt: skip
    black = session.prepare(Image.new("RGB", (8, 8)))
    assert found.get("ids") == session.prompt_ids(BARE, [black]).tolist(), found


def test_a_file_is_turned_upright(probe: Probe, tiny_bundle: Path, session: Session, tmp_path: Path) -> None:
    samples = np.random.default_rng(1).integers(0, 256, (20, 33, 3), dtype=np.uint8)
    (tmp_path / "samples").write_bytes(samples.tobytes())
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(samples).save(tmp_path / "turned.png", exif=exif)
        found = probe.ask(
            "prepare", bundle=str(tiny_bundle), width=33, height=20, channels=3, orientation=orientation,
            file=True, samples=str(tmp_path / "samples"), question=QUESTION, out=str(tmp_path / "pixels"),
        )  # fmt: skip
        assert "error" not in found, found
        (wanted,) = session.prepare(tmp_path / "turned.png").pixels
        np.testing.assert_array_equal(np.fromfile(tmp_path / "pixels", "<f4"), wanted.ravel())


# --- bundles ----------------------------------------------------------


def test_a_damaged_bundle_is_named(probe: Probe, tiny_bundle: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_bundle, tmp_path / "copy"))
    assert probe.ask("open", bundle=str(copy)) == {"name": "tiny"}
    manifest = (copy / "manifest.json").read_text()
    for old, new, wanted in (
        ('"tokens.grid@1"', '"tokens.grid@7"', "tokens.grid@7"),
        ('"manifest_version"', '"surprise": 1, "manifest_version"', "unknown key surprise"),
        ('"tokenizer.json"', '"../tokenizer.json"', "must be relative"),
    ):
        (copy / "manifest.json").write_text(manifest.replace(old, new))
        assert wanted in probe.ask("open", bundle=str(copy))["error"]
    (copy / "manifest.json").write_text(manifest)
    part = next((copy / "onnx").glob("decoder*.onnx"))
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    assert "decoder" in probe.ask("open", bundle=str(copy))["error"]


# --- answers through the stand-in -------------------------------------


def test_answers_are_those_of_the_python_session(package: Path, coreml: Path, tmp_path: Path) -> None:
    samples = np.random.default_rng(2).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    (tmp_path / "samples").write_bytes(samples.tobytes())
    long = " ".join([QUESTION] * 6)  # more than one chunk
    with StandIn(tmp_path) as standin, open_bundle(coreml, providers=("evaluator",)) as session:
        probe = Probe(package, {"POCKETVLM_STANDIN": str(tmp_path)})
        found = probe.ask(
            "ask", bundle=str(coreml), width=80, height=50, samples=str(tmp_path / "samples"),
            question=long, further="And its shape?", tokens=6,
        )  # fmt: skip
        probe.close()
        assert "error" not in found, found
        chat = session.chat(Image.fromarray(samples))
        options = GenerationOptions(max_new_tokens=6)
        first = chat.ask(long, options)
        assert found["tokens"] == first.token_ids
        assert found["text"] == first.text == "".join(found["pieces"])
        assert found["finish"] == first.finish_reason
        assert found["further"] == chat.ask("And its shape?", options).token_ids
    runs = [function for package_name, function in standin.calls if package_name == "decoder"]
    assert {"prefill", "decode"} == set(runs)


def test_the_packages_own_tests_and_its_benchmark(package: Path, coreml: Path, tmp_path: Path) -> None:
    """Conformance vectors, logits included; `bench.json` is valid and says that no device was measured."""
    bundle = Path(shutil.copytree(coreml, tmp_path / "bundle"))
    for picture in (bundle / "conformance").glob("*.png"):
        write_pam(picture)
    why = "Core ML replaced by an evaluator on Linux"
    env = {
        "POCKETVLM_BUNDLE": str(bundle),
        "POCKETVLM_STANDIN": str(tmp_path),
        "POCKETVLM_RESULTS": str(tmp_path / "bench.json"),
        "POCKETVLM_REPEATS": "2",
        "POCKETVLM_DECODE_TOKENS": "3",
        "POCKETVLM_EMULATED_WHY": why,
    }
    with StandIn(tmp_path):
        command = [str(SWIFT), "test", "--skip-build", "--package-path", str(package)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})
    assert done.returncode == 0, done.stdout[-3000:]
    assert "Executed 4 tests, with 0 failures" in done.stdout
    results = bench_results.read(tmp_path / "bench.json")
    assert (results.source, results.emulated_why) == ("swift", why)
    (measured,) = results.bundles
    assert [part.unit for part in measured.parts] == ["cpu"] * 3
    (point,) = measured.points
    assert point.decode_tokens == 3
    assert [len(row) for row in point.runs[0].times.decode_ms] == [2, 2]
    assert point.runs[0].load.compile_ms is not None


def write_pam(picture: Path) -> None:
    """A PNG as netpbm's P7, where there is no decoder; the orientation as a comment."""
    with Image.open(picture) as image:
        orientation = image.getexif().get(0x0112, 1)
        pixels = np.asarray(image)
    height, width, depth = pixels.shape
    facts = {"# orientation": orientation, "WIDTH": width, "HEIGHT": height, "DEPTH": depth, "MAXVAL": 255}
    head = "\n".join(["P7", *(f"{name} {value}" for name, value in facts.items()), "ENDHDR\n"])
    picture.with_name(picture.name + ".pam").write_bytes(head.encode() + pixels.tobytes())
