"""Pixels are those of the checkpoint's own AutoProcessor, bit for bit, for any shape, mode and orientation.

No tolerance is needed: both sides do the same integer resampling, then the same two float32 operations.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from runtime import image
from runtime.errors import InputError
from runtime.image_spec import ToRgb
from tests.runtime.specs import image_spec

LIMIT = 30_000_000
SHAPES = [(64, 64), (1024, 768), (333, 777), (1, 1), (5000, 40), (40, 5000), (65, 64), (1, 500), (3, 2)]


@pytest.fixture(scope="module")
def processor(tiny_checkpoint: Path) -> Any:
    return AutoProcessor.from_pretrained(tiny_checkpoint).image_processor


def picture(width: int, height: int, channels: int = 3) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    planes = [127 + 120 * np.sin(x / (7 + 3 * k) + y / (11 + k) + k) for k in range(channels)]
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8).squeeze())


def pixels(source: Any, longest_edge: int = 64, side: int = 64) -> np.ndarray:
    return image.prepare(source, image_spec(longest_edge, side), LIMIT).pixels[0]


def assert_as_transformers(processor: Any, source: Any, ours: Any = None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = processor(source, return_tensors="np")["pixel_values"][0]
    got = pixels(source if ours is None else ours)
    assert got.dtype == np.float32
    assert np.array_equal(got, expected), f"differs by {np.abs(got - expected).max()}"


@pytest.mark.parametrize(("width", "height"), SHAPES)
def test_shapes(processor: Any, width: int, height: int) -> None:
    assert_as_transformers(processor, picture(width, height))


@pytest.mark.parametrize(("longest_edge", "side"), [(512, 512), (1536, 384), (5000, 64)])
def test_longest_edge_before_the_square(processor: Any, longest_edge: int, side: int) -> None:
    source = picture(333, 777)
    expected = processor(
        source,
        size={"longest_edge": longest_edge},
        max_image_size={"longest_edge": side},
        return_tensors="np",
    )["pixel_values"][0]
    assert np.array_equal(pixels(source, longest_edge, side), expected)


def variants() -> dict[str, tuple[Image.Image, dict[str, Any]]]:
    """Name of a PNG file -> picture and save options: every mode that a PNG can have in 8 bits."""
    rgb = picture(90, 70)
    palette = rgb.quantize(64)
    return {
        "rgb": (rgb, {}),
        "rgba": (picture(90, 70, 4), {}),
        "gray": (picture(90, 70, 1), {}),
        "gray-alpha": (picture(90, 70, 2), {}),
        "black-white": (picture(90, 70, 1).convert("1"), {}),
        "palette": (palette, {}),
        "palette-one-transparent": (palette, {"transparency": 3}),
        "palette-alpha": (palette, {"transparency": bytes(range(0, 256, 4))}),
        "gray-one-transparent": (picture(90, 70, 1), {"transparency": 100}),
    }


@pytest.mark.parametrize("name", variants())
def test_modes_as_file_and_as_pixels(processor: Any, tmp_path: Path, name: str) -> None:
    source, options = variants()[name]
    path = tmp_path / f"{name}.png"
    source.save(path, **options)
    assert_as_transformers(processor, str(path))
    assert_as_transformers(processor, str(path), ours=path.read_bytes())
    assert_as_transformers(processor, Image.open(path))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "I;16", "F"])
def test_other_modes_as_pixels(processor: Any, mode: str) -> None:
    source = picture(90, 70, 1 if mode in ("I;16", "F") else 3).convert(mode)
    assert_as_transformers(processor, source)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif(processor: Any, tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    path = tmp_path / f"turned.{suffix}"
    picture(90, 70).save(path, exif=exif)
    assert_as_transformers(processor, str(path))
    assert_as_transformers(processor, Image.open(path))  # a PIL image is taken as it is
    turned = not np.array_equal(pixels(path), pixels(Image.open(path)))
    assert turned == (orientation != 1)


@pytest.mark.parametrize(
    "options", [{"quality": 70, "subsampling": 2}, {"progressive": True}, {"mode": "CMYK"}]
)
def test_jpeg_kinds(processor: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "photo.jpg"
    picture(89, 67).convert(options.pop("mode", "RGB")).save(path, **options)
    assert_as_transformers(processor, str(path))


def test_sixteen_bit_gray_file_uses_the_high_byte(tmp_path: Path) -> None:
    """Not as transformers: it leaves 16-bit values unscaled, far outside what the model was trained on."""
    gray = np.asarray(picture(64, 64, 1))
    path = tmp_path / "deep.png"
    Image.fromarray(gray.astype(np.uint16) * 256 + 77).save(path)
    assert np.array_equal(pixels(path), pixels(Image.fromarray(gray)))


def test_an_animation_shows_its_first_frame(tmp_path: Path) -> None:
    frames = [picture(64, 64), picture(64, 64).transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    path = tmp_path / "moving.webp"
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)
    assert np.array_equal(pixels(path), pixels(frames[0]))


def test_alpha_over_white_is_the_documented_integer_formula() -> None:
    colour, alpha = (plane.astype(np.uint8) for plane in np.mgrid[0:256, 0:256])
    got = image._to_rgb(
        Image.fromarray(np.stack([colour, alpha], -1)), ToRgb(file_alpha="drop", pixels_alpha="white"), False
    )
    c, a = colour.astype(int), alpha.astype(int)
    t = (c * a + 255 * (255 - a)) * 128 + 16384
    assert np.array_equal(got[..., 0], (((t >> 8) + t) >> 8) >> 7)


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (b"", "not an image"),
        (b"no image at all", "not an image"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "not an image"),
        (Path("absent.png"), "absent.png: cannot be read (No such file or directory)"),
        (Path(), "cannot be read (Is a directory)"),
        ("nul\0.png", "cannot be read"),
        ("https://example.org/a.png", "are not fetched"),
        (42, "got int, expected a path"),
    ],
)
def test_no_image(source: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        pixels(source)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif"])
def test_truncated(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cut.{suffix}"
    picture(300, 200).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"cut\..*(truncated|not an image)"):
        pixels(path)


@pytest.mark.parametrize("side", [6_000, 20_000])
def test_oversized_is_refused_before_decoding(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("was decoded")

    data = png(side, side)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(InputError, match=str(LIMIT)):
        pixels(data)


def test_oversized_pixels_are_refused() -> None:
    with pytest.raises(InputError, match="6000 x 6000 is 36000000 pixels, the limit is 30000000"):
        pixels(Image.new("1", (6000, 6000)))
