"""Images that are given: diffusers' pixels, camera turns, transparency, and files that are none."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from runtime.images import pixels
from runtime.images.pixels import open_image, read_image, read_mask, to_mask, to_pixels


def picture(height: int = 21, width: int = 35) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize("size", [(21, 35), (16, 24)])
def test_pixels_and_masks_are_those_of_diffusers(size: tuple[int, int]) -> None:
    """As they are and resized, from PIL and from arrays."""
    processors = pytest.importorskip("diffusers.image_processor")
    image, mask = picture(), picture()[..., 0]
    given = Image.fromarray(image)
    expected = processors.VaeImageProcessor(vae_scale_factor=1).preprocess(given, *size)[0].numpy()
    for value in (given, image):
        found = to_pixels(read_image(value, "image"), *size)
        assert found.dtype == np.float32 and found.shape == (3, *size)
        np.testing.assert_allclose(found, expected, atol=1e-6)
    floats = to_pixels(read_image(image.astype(np.float64) / 255, "image"), *size)
    assert np.abs(floats - expected).mean() < 0.005  # PIL cuts and rounds bytes between its passes
    settings = {"do_normalize": False, "do_binarize": True, "do_convert_grayscale": True}
    if size == mask.shape:  # diffusers makes a mask black and white after it is resized
        processor = processors.VaeImageProcessor(vae_scale_factor=1, **settings)
        wanted = processor.preprocess(Image.fromarray(mask), *size)[0].numpy()
        assert np.array_equal(to_mask(read_mask(Image.fromarray(mask)), *size), wanted)
        for other in (mask, mask >= 128, mask / 255):
            assert np.array_equal(to_mask(read_mask(other), *size), wanted)


def test_sixteen_bits_of_grey_are_scaled() -> None:
    """As depth comes: half of the range is half grey, not white."""
    stream = io.BytesIO()
    Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(stream, "PNG")
    found = read_image(open_image(stream.getvalue()), "control")
    assert found.shape == (1, 3, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found[0, :, 0], [0, 0.5, 1], atol=1e-5)


def test_a_camera_turn_is_undone_and_transparent_is_white() -> None:
    image = Image.fromarray(picture(4, 6))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown a quarter turn clockwise
    stream = io.BytesIO()
    image.save(stream, "PNG", exif=turned)
    found = read_image(open_image(stream.getvalue()), "image")
    assert np.array_equal(found, np.rot90(np.asarray(image), -1))
    clear = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    clear.putpixel((1, 0), (200, 0, 0, 255))
    assert read_image(clear, "image").tolist() == [[[255, 255, 255], [200, 0, 0]]]
    palette = Image.new("P", (1, 1), 0)
    palette.info["transparency"] = 0
    assert read_image(palette, "image").tolist() == [[[255, 255, 255]]]


def test_files_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lie about the size takes no memory: the header alone is read."""
    whole = png(Image.fromarray(picture()))
    assert read_image(open_image(whole), "image").shape == (21, 35, 3)
    with pytest.raises(ValueError, match="--image is damaged"):
        open_image(whole[:-200], "--image")
    for data in (b"", b"hello", b"GIF89a" + bytes(100)):
        with pytest.raises(ValueError, match="is no image that can be read"):
            open_image(data)
    with pytest.raises(FileNotFoundError, match=r"absent\.png is no file, expected an image"):
        open_image(tmp_path / "absent.png")
    header = whole[:16] + (60_000).to_bytes(4, "big") * 2 + whole[24:]
    header = header[:29] + PngImagePlugin._crc32(header[12:29]).to_bytes(4, "big") + header[33:]
    with pytest.raises(ValueError, match="60000 x 60000 pixels, expected at most|is no image"):
        open_image(header)
    monkeypatch.setattr(pixels, "MAX_GIVEN", 100)
    with pytest.raises(ValueError, match="35 x 21 pixels, expected at most 100"):
        open_image(whole)
    with pytest.raises(ValueError, match="35 x 21 pixels, expected at most 100"):
        read_image(picture(), "image")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("cat.png", "image is str .*open a file with PIL.Image.open"),
        (np.zeros((4, 4), np.uint8), r"shape \[4, 4\], expected a PIL image or an array"),
        (np.zeros((4, 4, 4), np.uint8), r"shape \[4, 4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \[0, 4, 3\]"),
        (np.zeros((4, 4, 3), np.int64), "an array of int64"),
        (np.full((4, 4, 3), 255.0), "outside 0 to 1"),
        (np.full((4, 4, 3), np.nan), "outside 0 to 1"),
        (Image.new("F", (4, 4)), "mode F, expected RGB"),
    ],
)
def test_what_is_no_image_is_refused(value: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_image(value, "image")
