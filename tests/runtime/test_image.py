"""Pixels as diffusers rounds them; files that appear whole, with their settings."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from runtime.image import save, settings_of, to_file, to_image

SETTINGS = {
    "prompt": "ein Kreis \u2014 \u5186 \U0001f534",
    "seed": 3,
    "guidance": 3.5,
    "top_k": [2, 4],
}


def noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((3, 8, 6), np.float32)


def test_rounding_is_that_of_diffusers() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from diffusers.image_processor import VaeImageProcessor

    halves = (np.arange(144, dtype=np.float32).reshape(3, 8, 6) + 0.5) / 255 * 2 - 1
    for pixels in (noise(), halves):
        expected = VaeImageProcessor().postprocess(torch.from_numpy(pixels[None]), "pil")[0]
        np.testing.assert_array_equal(np.asarray(to_image(pixels)), np.asarray(expected))


def test_values_beyond_the_range_are_clipped() -> None:
    pixels = np.array([-9, -1, 0, 1, 9, 0.5], np.float32).reshape(1, 1, 6).repeat(3, axis=0)
    assert np.asarray(to_image(pixels))[0, :, 0].tolist() == [0, 0, 128, 255, 255, 191]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_every_kind_of_file_knows_how_it_was_made(kind: str, tmp_path: Path) -> None:
    image = to_image(noise(), SETTINGS)
    path = tmp_path / "image"
    path.write_bytes(to_file(image, kind, 90))
    assert settings_of(path) == SETTINGS
    with Image.open(path) as opened:
        assert opened.format == kind.upper() and opened.size == (6, 8)
    path.write_bytes(to_file(to_image(noise()), kind, 0))
    assert settings_of(path) == {}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_image_that_overflowed_is_refused(value: float) -> None:
    pixels = noise()
    pixels[1, 2, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        to_image(pixels)


def test_settings_travel_in_the_file(tmp_path: Path) -> None:
    image = to_image(noise(), SETTINGS)
    assert settings_of(image) == SETTINGS
    path = save(image, tmp_path / "sub" / "a.PNG")
    assert settings_of(path) == SETTINGS
    with Image.open(path) as opened:
        assert opened.mode == "RGB" and opened.size == (6, 8)
        np.testing.assert_array_equal(np.asarray(opened), np.asarray(image))
    assert settings_of(Image.new("RGB", (2, 2))) == {}


def test_the_same_image_is_the_same_bytes(tmp_path: Path) -> None:
    first = save(to_image(noise(), SETTINGS), tmp_path / "a.png").read_bytes()
    second = save(to_image(noise(), dict(reversed(SETTINGS.items()))), tmp_path / "b.png")
    assert first == second.read_bytes()


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(to_image(noise()), tmp_path / "a.png")
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(to_image(noise(1)), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.png"]


@pytest.mark.parametrize("name", ["a.gif", "a", "a.png.txt"])
def test_other_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"expected a name ending in \.png"):
        save(to_image(noise()), tmp_path / name)


def test_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(ValueError, match="is a directory"):
        save(to_image(noise()), tmp_path / "a.png")
